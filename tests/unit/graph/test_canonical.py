"""What `canonicalize` makes of models as exporters write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from onnxprune.errors import ModelError, OnnxPruneError
from onnxprune.graph.canonical import CanonicalModel, canonicalize
from onnxprune.graph.io import load_model, model_bytes, model_from_proto
from onnxprune.graph.metadata import SHARED_FROM_KEY, module_path
from onnxprune.graph.verify import verify
from onnxprune.ops.shapes import SHAPES

Arrays = Mapping[str, npt.NDArray[Any]]


def parsed(text: str, *, opset: int = 20, ir_version: int = 10, **weights: npt.NDArray[Any]) -> onnx.ModelProto:
    """A model in ONNX's text syntax, with `weights` as initializers."""
    head = f'<ir_version: {ir_version}, opset_import: ["": {opset}, "local": 1]>'
    proto = onnx.parser.parse_model(head + text)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def canonical(proto: onnx.ModelProto) -> CanonicalModel:
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    model = canonicalize(model_from_proto(copy, Path("model.onnx")), shape_rules=SHAPES)
    verify(model)
    return model


def run(model: onnx.ModelProto | ir.Model, feeds: Arrays) -> list[npt.NDArray[Any]]:
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model_bytes(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def assert_same_outputs(proto: onnx.ModelProto, model: ir.Model, feeds: Arrays) -> None:
    """Equal bits: canonicalization moves and removes, and computes only what both would compute alike."""
    for expected, actual in zip(run(proto, feeds), run(model, feeds), strict=True):
        np.testing.assert_array_equal(actual, expected)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def image(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


# --- versions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", range(18, 25))
def test_opset_within_range_is_left_alone(opset: int) -> None:
    proto = parsed("g (float[N] x) => (float[N] y) { y = Relu(x) }", opset=opset)
    model = canonical(proto)
    assert model.opset_imports[""] == opset
    assert model.ir_version <= 13
    assert_same_outputs(proto, model, {"x": image(5)})


@pytest.mark.parametrize("ir_version", [3, 8, 14])
def test_ir_version_becomes_one_that_onnx_runtime_reads(ir_version: int) -> None:
    proto = parsed("g (float[N] x) => (float[N] y) { y = Relu(x) }", ir_version=ir_version)
    model = canonical(proto)
    assert 10 <= model.ir_version <= 13
    run(model, {"x": image(2)})


def test_opset_above_24_is_refused_and_the_blocking_operators_are_named() -> None:
    proto = parsed("g (float[N,2] x) => (float[N,2] y) { a = Cast<to = 1>(x) y = Sin(a) }", opset=25, ir_version=13)
    with pytest.raises(ModelError, match="These operators are newer and can't be taken back: 'Cast-25'"):
        canonical(proto)


def test_opset_above_24_without_blocking_operators_says_so() -> None:
    proto = parsed("g (float[N] x) => (float[N] y) { y = Sin(x) }", opset=25, ir_version=13)
    with pytest.raises(ModelError, match="None of its operators is newer than that"):
        canonical(proto)


def test_opset_below_18_is_refused_with_the_way_to_upgrade() -> None:
    with pytest.raises(ModelError, match="upgrades it"):
        canonical(parsed("g (float[N] x) => (float[N] y) { y = Relu(x) }", opset=17))


# --- constants --------------------------------------------------------------------------------------------------


def test_constants_of_every_kind_become_initializers() -> None:
    proto = parsed(
        """g (float[2] x) => (float[2] y, int64[2] i, float[2] f, string s, string[2] t, int64 n) {
            a = Constant<value = float[2] {1.0, 2.0}>()
            y = Add(x, a)
            i = Constant<value_ints = [3, 4]>()
            f = Constant<value_floats = [0.5, 1.5]>()
            s = Constant<value_string = "grüße">()
            t = Constant<value_strings = ["a", "b"]>()
            n = Constant<value_int = 7>()
        }"""
    )
    model = canonical(proto)
    assert ops(model) == ["Add"]
    assert [value.is_initializer() for value in model.graph.outputs] == [False, True, True, True, True, True]
    assert [value.name for value in model.graph.outputs] == ["y", "i", "f", "s", "t", "n"]
    assert_same_outputs(proto, model, {"x": image(2)})


def test_sparse_constant_becomes_a_dense_initializer() -> None:
    values = numpy_helper.from_array(np.array([5.0], np.float32), "v")
    indices = numpy_helper.from_array(np.array([2], np.int64), "i")
    node = helper.make_node("Constant", [], ["c"], sparse_value=helper.make_sparse_tensor(values, indices, [4]))
    proto = parsed("g (float[4] x, float[4] c) => (float[4] y) { y = Add(x, c) }")
    del proto.graph.input[1]
    proto.graph.node.insert(0, node)
    model = canonical(proto)
    assert ops(model) == ["Add"]
    np.testing.assert_array_equal(run(model, {"x": np.zeros(4, np.float32)})[0], [0, 0, 5, 0])


def test_initializers_listed_as_inputs_are_no_inputs_any_more() -> None:
    proto = parsed("g (float[N,2] x, float[2,2] w) => (float[N,2] y) { y = MatMul(x, w) }", ir_version=3, w=image(2, 2))
    model = canonical(proto)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert_same_outputs(proto, model, {"x": image(3, 2)})


def test_shared_initializer_gets_a_copy_for_each_use_and_they_know_their_origin() -> None:
    proto = parsed(
        """g (float[N,3] x) => (float[N,3] y, float[N,3] z) {
            a = Add(x, bias)
            b = Mul(a, bias)
            y = Add(bias, b)
            z = Where(flag, x, bias)
        }""",
        bias=image(3),
        flag=np.array([True, False, True]),
    )
    model = canonical(proto)
    copies = [value for value in model.graph.initializers.values() if value.name != "flag"]
    assert [len(value.uses()) for value in copies] == [1, 1, 1, 1]
    assert {value.metadata_props[SHARED_FROM_KEY] for value in copies} == {"bias"}
    assert len({id(value.const_value) for value in copies}) == 1  # memory is not taken four times
    assert SHARED_FROM_KEY not in model.graph.initializers["flag"].metadata_props
    assert_same_outputs(proto, model, {"x": image(2, 3)})


def test_node_that_uses_one_initializer_twice_gets_two() -> None:
    proto = parsed("g (float[3] x) => (float[3] y) { a = Mul(w, w) y = Add(x, a) }", w=image(3))
    proto.graph.node[0].op_type = "QuickGelu2"  # nothing folds an unknown operator
    proto.graph.node[0].domain = "local"
    model = canonical(proto)
    first = model.graph[0]
    assert first.inputs[0] is not first.inputs[1]


def test_initializer_that_is_an_output_and_an_input_of_a_node_is_split() -> None:
    proto = parsed("g (float[3] x) => (float[3] y, float[3] w) { y = Add(x, w) }")
    proto.graph.initializer.append(numpy_helper.from_array(image(3), "w"))
    model = canonical(proto)
    assert model.graph.outputs[1].name == "w"
    assert model.graph.outputs[1].uses() == ()
    assert_same_outputs(proto, model, {"x": image(3)})


# --- nodes that do nothing --------------------------------------------------------------------------------------


def test_identities_and_inference_dropouts_are_removed_and_outputs_keep_their_names() -> None:
    proto = parsed(
        """g (float[N,3] x) => (float[N,3] y, float[N,3] kept) {
            a = Identity(x)
            b = Dropout(a)
            c = Relu(b)
            d = Identity(c)
            y = Identity(d)
            kept = Identity(x)
        }"""
    )
    model = canonical(proto)
    # `kept` is an input: only an Identity can say that.
    assert ops(model) == ["Relu", "Identity"]
    assert [value.name for value in model.graph.outputs] == ["y", "kept"]
    assert model.graph[0].outputs[0].name == "y"
    assert_same_outputs(proto, model, {"x": image(2, 3)})


def test_identity_between_two_outputs_stays() -> None:
    proto = parsed("g (float[N] x) => (float[N] y, float[N] z) { y = Relu(x) z = Identity(y) }")
    model = canonical(proto)
    assert ops(model) == ["Relu", "Identity"]
    assert_same_outputs(proto, model, {"x": image(4)})


def test_mask_of_a_dropout_in_inference_is_all_true() -> None:
    proto = parsed(
        "g (float[N,3] x) => (float[N,3] y, bool[N,3] mask) { y, mask = Dropout(x) }",
    )
    model = canonical(proto)
    assert "Dropout" not in ops(model)
    assert run(model, {"x": image(2, 3)})[1].tolist() == [[True] * 3] * 2


def test_dropout_in_training_mode_stays() -> None:
    proto = parsed(
        "g (float[N] x) => (float[N] y) { y = Dropout(x, ratio, training) }",
        ratio=np.array(0.5, np.float32),
        training=np.array(True),
    )
    assert ops(canonical(proto)) == ["Dropout"]


def test_dead_nodes_and_weights_are_removed_also_in_subgraphs() -> None:
    proto = parsed(
        """g (float[N] x, bool c) => (float[N] y) {
            dead = Add(x, unused)
            y = If(c) <
                then_branch = t () => (float[N] a) { d1 = Neg(x) a = Relu(x) },
                else_branch = e () => (float[N] b) { b = Neg(x) }
            >
        }""",
        unused=image(1),
    )
    model = canonical(proto)
    assert ops(model) == ["If"]
    assert not model.graph.initializers
    assert [node.op_type for graph in model.graph.subgraphs() for node in graph] == ["Relu", "Neg"]


# --- functions --------------------------------------------------------------------------------------------------

_FUNCTION = """
<opset_import: ["": {opset}], domain: "local">
Scale <factor: float = 2.0> (v) => (r) {{
    f = Constant<value_float: float = @factor>()
    h = {call}
    r = Mul(h, f)
}}
"""


def test_functions_are_inlined_with_their_attributes_and_defaults() -> None:
    text = """g (float[N] x) => (float[N] y) {
        a = local.Scale<factor = 3.0>(x)
        y = local.Scale(a)
    }""" + _FUNCTION.format(opset=20, call="Relu(v)")
    proto = parsed(text)
    model = canonical(proto)
    assert ops(model) == ["Relu", "Mul", "Relu", "Mul"]
    assert list(model.opset_imports) == [""]
    assert_same_outputs(proto, model, {"x": image(4)})


def test_function_in_an_older_opset_is_raised_before_it_is_inlined() -> None:
    text = "g (float[2,3] x) => (float[2,1] y) { y = local.Scale(x) }" + _FUNCTION.format(
        opset=11, call="ReduceSum<axes = [1]>(v)"
    )
    proto = parsed(text)
    model = canonical(proto)
    np.testing.assert_array_equal(run(model, {"x": np.ones((2, 3), np.float32)})[0], [[6.0], [6.0]])


def test_function_called_in_a_branch_is_inlined_too() -> None:
    text = """g (float[N] x, bool c) => (float[N] y) {
        y = If(c) <
            then_branch = t () => (float[N] a) { a = local.Scale(x) },
            else_branch = e () => (float[N] b) { b = Neg(x) }
        >
    }""" + _FUNCTION.format(opset=20, call="Relu(v)")
    proto = parsed(text)
    model = canonical(proto)
    assert not model.functions
    for flag in (True, False):
        assert_same_outputs(proto, model, {"x": image(4), "c": np.array(flag)})


# --- names ------------------------------------------------------------------------------------------------------


def test_names_are_unique_and_those_of_the_interface_stay() -> None:
    proto = parsed(
        """g (float[N] x, bool c) => (float[N] y) {
            a = Relu(x)
            b = Neg(a)
            y = If(c) <
                then_branch = t () => (float[N] a2) { a2 = Add(b, b) },
                else_branch = e () => (float[N] a3) { a3 = Neg(b) }
            >
        }"""
    )
    for node in proto.graph.node[:2]:
        node.name = "same"
    branches = [attribute.g for attribute in proto.graph.node[2].attribute]
    for branch in branches:
        # A subgraph may repeat names that another subgraph has.
        branch.node[0].output[0] = branch.output[0].name = "inner"
    model = canonical(proto)
    names = [node.name for node in model.graph.all_nodes()]
    assert names[:2] == ["same", "same_1"]
    assert len(set(names)) == len(names)
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == ["x", "c", "y"]
    np.testing.assert_array_equal(run(model, {"x": -np.ones(3, np.float32), "c": np.array(True)})[0], [0, 0, 0])


def test_generated_names_are_the_same_each_time() -> None:
    proto = parsed("g (float[N] x) => (float[N] y) { a = Relu(x) b = Neg(a) y = Relu(b) }")
    names = [[node.name for node in canonical(proto).graph] for _ in range(2)]
    assert names == [["Relu_0", "Neg_1", "Relu_2"]] * 2


def test_module_paths_come_from_names_and_from_the_torch_exporter() -> None:
    proto = parsed("g (float[N] x) => (float[N] y) { a = Relu(x) y = Neg(a) }")
    proto.graph.node[0].name = "/backbone/layer1/act/Relu"
    scopes = proto.graph.node[1].metadata_props.add()
    scopes.key, scopes.value = "pkg.torch.onnx.name_scopes", "['', 'head', 'head.neg', 'neg_1']"
    assert [module_path(node) for node in canonical(proto).graph] == ["backbone.layer1.act", "head.neg"]


def test_metadata_doc_string_producer_and_dimension_names_stay() -> None:
    proto = parsed("g (float[batch, features] x) => (float[batch, features] y) { y = Relu(x) }")
    proto.doc_string, proto.producer_name, proto.model_version = "about", "somebody", 3
    helper.set_model_props(proto, {"labels": "cat,dog"})
    model = canonical(proto)
    assert (model.doc_string, model.producer_name, model.model_version) == ("about", "somebody", 3)
    assert model.metadata_props == {"labels": "cat,dog"}
    assert [str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)] == ["[batch,features]"] * 2


# --- as a whole -------------------------------------------------------------------------------------------------


def test_nodes_out_of_order_are_sorted() -> None:
    proto = parsed("g (float[N] x) => (float[N] y) { a = Relu(x) y = Neg(a) }")
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    assert ops(canonical(proto)) == ["Relu", "Neg"]


def test_model_with_a_node_that_misses_an_attribute_is_refused() -> None:
    proto = parsed("g (float[N,2] x) => (float[N,4] y) { y = Concat<axis = 1>(x, x) }")
    proto.graph.node[0].ClearField("attribute")
    with pytest.raises(ModelError, match="axis"):
        canonical(proto)


def test_model_that_contradicts_itself_is_refused_and_the_node_named() -> None:
    proto = parsed("g (float[2,3] x, float[4,5] z) => (y) { y = MatMul(x, z) }")
    proto.graph.node[0].name = "product"
    with pytest.raises(ModelError, match="'product'"):
        canonical(proto)


def test_valid_node_that_onnx_fails_to_infer_through_its_function_body_is_accepted() -> None:
    # The body of MeanVarianceNormalization is written for opset 13 and fails in inference from opset 18 on.
    proto = parsed("g (float[1,2,3,3] x) => (float[1,2,3,3] y) { y = MeanVarianceNormalization(x) }")
    assert_same_outputs(proto, canonical(proto), {"x": image(1, 2, 3, 3)})


_LOOP = """g (float[N,3] x, int64 n) => (float[N,3] y) {
    go = Constant<value = bool {1}>()
    start = Identity(x)
    y = Loop(n, go, start) <
        body = b (int64 i, bool c, float[N,3] s) => (bool c_out, float[N,3] s_out) {
            c_out = Identity(c)
            shared = Constant<value_float = 2.0>()
            t = Mul(s, shared)
            s_out = Add(t, bias)
        }
    >
}"""


def test_loop_body_that_captures_a_weight_keeps_its_meaning() -> None:
    proto = parsed(_LOOP, bias=image(3))
    model = canonical(proto)
    assert_same_outputs(proto, model, {"x": image(2, 3), "n": np.array(3)})


@pytest.mark.parametrize(
    "text", [_LOOP, "g (float[N,3] x, int64 n) => (float[N,3] y) { a = Add(x, bias) b = Add(a, bias) y = Identity(b) }"]
)
def test_second_canonicalization_changes_nothing(text: str) -> None:
    model = canonical(parsed(text, bias=image(3)))
    before = model_bytes(model)
    assert model_bytes(canonicalize(model, shape_rules=SHAPES)) == before


def test_file_with_a_flipped_byte_never_ends_in_anything_but_a_clear_error(tmp_path: Path) -> None:
    whole = parsed(_LOOP, bias=image(3)).SerializeToString()
    path = tmp_path / "model.onnx"
    accepted = 0
    for position in range(len(whole)):
        for flipped in (0x01, 0x80):
            damaged = bytearray(whole)
            damaged[position] ^= flipped
            path.write_bytes(damaged)
            try:
                verify(canonicalize(load_model(path), shape_rules=SHAPES))
            except ModelError:
                continue
            except OnnxPruneError as error:
                pytest.fail(f"byte {position}: {type(error).__name__}: {error}")
            accepted += 1
    assert accepted > 0  # names, weights and doc strings may change


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet", "inception_v1", "densenet121"])
def test_real_topologies_keep_their_outputs(name: str) -> None:
    from onnxprune.graph.constants import lift_constants
    from onnxprune.graph.names import give_unique_names
    from onnxprune.graph.opset import raise_opset
    from onnxprune.graph.shapes import infer_source_shapes

    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{name}.onnx"
    proto = onnx.load(path)
    rng = np.random.default_rng(0)
    for tensor in _filled_weights(proto, rng):
        proto.graph.initializer.append(tensor)
    model = load_from_bytes(proto)
    lift_constants(model)
    give_unique_names(model)
    infer_source_shapes(model, SHAPES)
    raise_opset(model, 18)
    model = canonicalize(model, shape_rules=SHAPES)
    verify(model)
    assert not [node for node in model.graph if node.op_type in ("Constant", "ConstantOfShape", "Dropout", "Identity")]
    weights = {tensor.name for tensor in proto.graph.initializer}
    feeds = {
        value.name: rng.random([dim.dim_value for dim in value.type.tensor_type.shape.dim], np.float32)
        for value in proto.graph.input
        if value.name not in weights
    }
    for expected, actual in zip(run(proto, feeds), run(model, feeds), strict=True):
        # Kernels of opset 9 and 18 sum in another order; a Softmax shows the last bit of it.
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=0)


def load_from_bytes(proto: onnx.ModelProto) -> ir.Model:
    return model_from_proto(onnx.ModelProto.FromString(proto.SerializeToString()), Path("model.onnx"))


def _filled_weights(proto: onnx.ModelProto, rng: np.random.Generator) -> Sequence[onnx.TensorProto]:
    """Seeded weights instead of the ConstantOfShape nodes that keep the light models light."""
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    fillers = [node for node in proto.graph.node if node.op_type == "ConstantOfShape"]
    weights = []
    for node in fillers:
        shape = shapes[node.input[0]]
        array = (rng.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))).astype(np.float32)
        weights.append(numpy_helper.from_array(np.abs(array) + 0.01 if array.ndim == 1 else array, node.output[0]))
        proto.graph.node.remove(node)
    return weights


def test_subgraphs_know_the_opsets_that_they_are_written_in() -> None:
    model = canonical(parsed(_LOOP, bias=image(3), opset=19))
    assert [graph.opset_imports for graph in model.graph.subgraphs()] == [{"": 19}]
