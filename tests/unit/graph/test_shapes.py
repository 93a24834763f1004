"""Shapes are inferred anew, across operators that ONNX does not know, and never silently out of date."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from onnxprune.errors import UsageError, VerificationError
from onnxprune.graph.canonical import canonicalize
from onnxprune.graph.io import load_model, model_from_proto, save_model
from onnxprune.graph.shapes import fix_input_shapes, refresh_shapes, values_beyond_inference
from onnxprune.graph.weights import replace_weight
from onnxprune.ops.shapes import SHAPES

_HEAD = '<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1, "custom": 1]>'


def canonical(text: str, **weights: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(_HEAD + text)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return canonicalize(model_from_proto(proto, Path("model.onnx")), shape_rules=SHAPES)


def shapes(model: ir.Model) -> dict[str, str]:
    return {value.name or "": str(value.shape) for node in model.graph.all_nodes() for value in node.outputs}


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


_TWO_CONVS = """g (float[N,3,8,8] x) => (float[N,4,8,8] y) {
    a = Conv<pads = [1,1,1,1]>(x, w1)
    b = Relu(a)
    y = Conv<pads = [1,1,1,1]>(b, w2)
}"""


# --- after weights changed --------------------------------------------------------------------------------------


def test_pruned_weight_changes_the_shapes_behind_it() -> None:
    # onnx_ir's own ShapeInferencePass logs a warning here and changes nothing.
    model = canonical(_TWO_CONVS, w1=weight(6, 3, 3, 3), w2=weight(4, 6, 3, 3))
    assert shapes(model)["b"] == "[N,6,8,8]"
    replace_weight(model.graph.initializers["w1"], weight(5, 3, 3, 3))
    replace_weight(model.graph.initializers["w2"], weight(4, 5, 3, 3))
    refresh_shapes(model, SHAPES)
    assert shapes(model) == {"a": "[N,5,8,8]", "b": "[N,5,8,8]", "y": "[N,4,8,8]"}


def test_stale_shapes_of_initializers_are_corrected() -> None:
    model = canonical(_TWO_CONVS, w1=weight(6, 3, 3, 3), w2=weight(4, 6, 3, 3))
    value = model.graph.initializers["w1"]
    value.const_value = ir.tensor(weight(5, 3, 3, 3), name="w1")
    refresh_shapes(model, SHAPES)
    assert value.shape == ir.Shape([5, 3, 3, 3])


def test_contradiction_after_a_pass_is_an_error_that_names_the_node() -> None:
    model = canonical("g (float[N,6] x) => (float[N,6] y) { a = MatMul(x, w) y = Add(a, x) }", w=weight(6, 6))
    model.graph[1].name = "residual"
    replace_weight(model.graph.initializers["w"], weight(6, 5))
    with pytest.raises(VerificationError, match=r"contradictions in the graph: 'residual'"):
        refresh_shapes(model, SHAPES)


def test_element_types_follow_the_weights() -> None:
    model = canonical("g (float[N,6] x) => (float[N,6] y) { a = Cast<to = 1>(w) y = MatMul(x, a) }", w=weight(6, 6))
    assert [node.op_type for node in model.graph] == ["MatMul"]
    for name in list(model.graph.initializers):
        replace_weight(model.graph.initializers[name], weight(6, 6).astype(np.float16))
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    refresh_shapes(model, SHAPES)
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT16


def test_shapes_in_subgraphs_are_inferred_too() -> None:
    text = """g (float[N,6] x, bool c) => (float[N,4] y) {
        a = Relu(x)
        y = If(c) <
            then_branch = t () => (float[N,4] p) { h = MatMul(a, w) p = Relu(h) },
            else_branch = e () => (float[N,4] q) { q = MatMul(a, w) }
        >
    }"""
    model = canonical(text, w=weight(6, 4))
    inside = next(iter(model.graph.subgraphs()))
    replace_weight(inside[0].inputs[1], weight(6, 3))  # type: ignore[arg-type]
    other = list(model.graph.subgraphs())[1]
    replace_weight(other[0].inputs[1], weight(6, 3))  # type: ignore[arg-type]
    refresh_shapes(model, SHAPES)
    assert shapes(model)["h"] == "[N,3]"
    assert shapes(model)["y"] == "[N,3]"


# --- operators that ONNX does not know --------------------------------------------------------------------------


def test_inference_goes_on_behind_contrib_operators() -> None:
    text = """g (float[N,6] x) => (float[N,4] y) {
        a = MatMul(x, w1)
        b = com.microsoft.FastGelu(a)
        c = MatMul(b, w2)
        d = com.microsoft.QuickGelu(c)
        y = Relu(d)
    }"""
    model = canonical(text, w1=weight(6, 5), w2=weight(5, 4))
    assert shapes(model) == {"a": "[N,5]", "b": "[N,5]", "c": "[N,4]", "d": "[N,4]", "y": "[N,4]"}
    replace_weight(model.graph.initializers["w1"], weight(6, 3))
    replace_weight(model.graph.initializers["w2"], weight(3, 4))
    refresh_shapes(model, SHAPES)
    assert shapes(model)["b"] == "[N,3]"


def test_shape_that_is_computed_before_a_contrib_operator_and_used_behind_it_is_found() -> None:
    text = """g (float[N,6,2] x) => (y) {
        s = Shape(x)
        b = com.microsoft.FastGelu(x)
        n = Gather(s, zero)
        n1 = Unsqueeze(n, axes)
        target = Concat<axis = 0>(n1, minus)
        y = Reshape(b, target)
    }"""
    model = canonical(text, zero=np.array(0), axes=np.array([0]), minus=np.array([12], np.int64))
    assert shapes(model)["y"] == "[N,12]"


_CUSTOM = """g (float[N,6] x) => (float[N,4] y) <float[N,5] c> {
    a = MatMul(x, w1)
    c = custom.Mystery(a)
    y = MatMul(c, w2)
}"""


def test_unknown_operator_keeps_the_shape_that_the_model_declares() -> None:
    model = canonical(_CUSTOM, w1=weight(6, 3), w2=weight(5, 4))
    assert shapes(model) == {"a": "[N,3]", "c": "[N,5]", "y": "[N,4]"}
    refresh_shapes(model, SHAPES)
    assert shapes(model)["c"] == "[N,5]"


def test_shape_behind_an_unknown_operator_whose_input_changed_is_an_error() -> None:
    model = canonical(_CUSTOM, w1=weight(6, 3), w2=weight(5, 4))
    replace_weight(model.graph.initializers["w1"], weight(6, 2))
    with pytest.raises(VerificationError, match=r"'c \(output of custom::Mystery\)'.* are out of date"):
        refresh_shapes(model, SHAPES)


def test_caller_can_say_the_shape_that_nothing_else_knows() -> None:
    model = canonical(_CUSTOM, w1=weight(6, 3), w2=weight(5, 4))
    replace_weight(model.graph.initializers["w1"], weight(6, 2))
    replace_weight(model.graph.initializers["w2"], weight(7, 4))
    value = model.graph[1].outputs[0]
    refresh_shapes(model, SHAPES, edited={value: ir.Shape(["N", 7])})
    assert shapes(model) == {"a": "[N,2]", "c": "[N,7]", "y": "[N,4]"}
    refresh_shapes(model, SHAPES)  # and it is remembered for these inputs
    assert shapes(model)["c"] == "[N,7]"


def test_kept_shape_survives_a_clone_and_is_checked_there_too() -> None:
    model = canonical(_CUSTOM, w1=weight(6, 3), w2=weight(5, 4)).clone()
    refresh_shapes(model, SHAPES)
    replace_weight(model.graph.initializers["w1"], weight(6, 2))
    with pytest.raises(VerificationError, match="out of date"):
        refresh_shapes(model, SHAPES)


def test_unknown_operator_without_a_declared_shape_has_unknown_rank() -> None:
    model = canonical(_CUSTOM.replace("<float[N,5] c>", ""), w1=weight(6, 3), w2=weight(5, 4))
    assert shapes(model)["c"] == "None"


def test_shape_that_was_inferred_once_and_can_not_be_any_more_is_an_error() -> None:
    model = canonical("g (float[N,6] x) => (y) { a = Relu(x) y = Neg(a) }")
    model.graph[0].domain = "custom"  # a pass puts an operator there that nothing knows
    model.graph[0].op_type = "Mystery"
    model.opset_imports["custom"] = 1
    with pytest.raises(VerificationError, match="'a "):
        refresh_shapes(model, SHAPES)


# --- dynamic dimensions -----------------------------------------------------------------------------------------


def test_dimension_names_that_onnx_invents_do_not_stay() -> None:
    model = canonical("g (float[N] x) => (int64[1,M] y) { y = NonZero(x) }")
    assert shapes(model)["y"] == "[1,M]"
    model = canonical("g (float[N] x) => (z) { y = NonZero(x) z = Neg(y) }")
    assert shapes(model)["z"] == "[1,None]"


def test_fixed_input_shape_reaches_every_value_and_shape_computations_fold() -> None:
    text = """g (float[batch,3,height,width] x, float[batch] scale) => (float[batch,n] y) {
        s = Shape<end = 1>(x)
        rest = Constant<value_ints = [-1]>()
        target = Concat<axis = 0>(s, rest)
        y = Reshape(x, target)
        z = Neg(scale)
    }"""
    model = canonical(text)
    fix_input_shapes(model, {"x": (2, 3, 8, 10)}, SHAPES)
    assert str(model.graph.inputs[0].shape) == "[2,3,8,10]"
    assert str(model.graph.inputs[1].shape) == "[2]"
    model = canonicalize(model, shape_rules=SHAPES)
    assert [node.op_type for node in model.graph] == ["Reshape"]
    assert shapes(model)["y"] == "[2,240]"


@pytest.mark.parametrize(
    ("shapes_", "said"),
    [
        ({"imagge": (1, 3, 8, 8)}, "Did you mean 'image'"),
        ({"image": (1, 3, 8)}, "declares 4 dimensions"),
        ({"image": (1, 4, 8, 8)}, "declares 3 for axis 1"),
        ({"image": (1, 3, 8, -8)}, "can't be negative"),
        ({"image": (1, 3, 8, 8), "other": (2,)}, "dimension 'batch' is 1 in another place"),
    ],
    ids=["name", "rank", "size", "negative", "conflict"],
)
def test_input_shape_that_does_not_fit_is_refused(shapes_: dict[str, Sequence[int]], said: str) -> None:
    model = canonical("g (float[batch,3,h,w] image, float[batch] other) => (y, z) { y = Relu(image) z = Neg(other) }")
    with pytest.raises(UsageError, match=said):
        fix_input_shapes(model, shapes_, SHAPES)


def test_input_shape_that_the_graph_can_not_take_is_refused() -> None:
    model = canonical("g (float[a,b] x, float[c,d] z) => (y) { y = MatMul(x, z) }")
    with pytest.raises(UsageError, match="can't work with the given input shapes"):
        fix_input_shapes(model, {"x": (2, 3), "z": (4, 5)}, SHAPES)


# --- what a file must say ---------------------------------------------------------------------------------------


def test_only_shapes_that_nobody_can_infer_are_written(tmp_path: Path) -> None:
    model = canonical(_CUSTOM, w1=weight(6, 3), w2=weight(5, 4))
    assert {value.name for value in values_beyond_inference(model)} == {"c"}
    save_model(model, tmp_path / "model.onnx")
    assert [value.name for value in onnx.load(tmp_path / "model.onnx").graph.value_info] == ["c"]
    again = canonicalize(load_model(tmp_path / "model.onnx"), shape_rules=SHAPES)
    assert shapes(again) == shapes(model)


# --- cost -------------------------------------------------------------------------------------------------------
