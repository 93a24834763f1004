"""What the spelled graph looks like: names, types, sharing, and what is left alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from onnxprune.contracts import CanonicalModel
from onnxprune.errors import TargetError
from onnxprune.graph.weights import constant_array
from onnxprune.targets.qdq import SpellingName, find_spelling, place, place_tflite, spell
from onnxprune.targets.qdq.writer import IntegerWriter
from tests.builders import canonical, conv_net, proto_of
from tests.quantization import kernels, normal_batches, plan_for, run, signal_to_noise_db

SOURCE = normal_batches((1, 3, 8, 8))


def spelled_net(spelling: SpellingName, model: CanonicalModel | None = None) -> ir.Model:
    model = model or conv_net(batch=1)
    plan = plan_for(model, SOURCE)
    placement = place_tflite(model, plan) if spelling == "tflite" else place(model, plan, spelling)
    return spell(model, plan, placement, spelling)


def small_weights(*shape: int) -> np.ndarray:
    return (np.random.default_rng(5).standard_normal(shape) * 0.3).astype(np.float32)


def test_inputs_outputs_and_node_names_stay_and_the_graph_is_valid_onnx() -> None:
    model = conv_net(batch=1)
    before = ir.to_proto(model).SerializeToString()

    spelled = spelled_net("x86-vnni", model)

    onnx.checker.check_model(ir.to_proto(spelled), full_check=True)
    assert [value.name for value in spelled.graph.inputs] == ["x"]
    assert [value.name for value in spelled.graph.outputs] == ["y"]
    assert spelled.graph.outputs[0].dtype == ir.DataType.FLOAT
    names = {node.name for node in spelled.graph}
    assert {"stem/conv", "block/conv", "block/add", "head/pool", "head/gemm"} <= names
    assert not {"stem/relu", "block/relu"} & names
    assert ir.to_proto(model).SerializeToString() == before


def test_whole_network_runs_in_integers_and_stays_close(tmp_path: Path) -> None:
    spelled = spelled_net("x86")

    found = kernels(spelled, tmp_path)

    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 1), found
    assert (found["QLinearConv"], found["QLinearAdd"], found["QGemm"]) == (2, 1, 1)
    feeds = SOURCE.batches[0]
    # Five roundings to 8 bits with 7-bit weights.
    assert signal_to_noise_db(run(conv_net(batch=1), feeds)[0], run(spelled, feeds)[0]) > 25


@pytest.mark.parametrize(
    ("spelling", "activation_type"),
    [("x86-vnni", ir.DataType.UINT8), ("arm64", ir.DataType.INT8), ("tflite", ir.DataType.INT8)],
)
def test_element_types_and_weight_range_of_each_spelling(spelling: SpellingName, activation_type: ir.DataType) -> None:
    graph = spelled_net(spelling).graph

    quantized = {node.outputs[0].dtype for node in graph if node.op_type == "QuantizeLinear"}
    assert quantized == {activation_type}
    weights = constant_array(graph.initializers["stem.weight_quantized"])
    biases = constant_array(graph.initializers["stem.bias_quantized"])
    assert weights is not None
    assert biases is not None
    assert weights.dtype == np.int8
    assert biases.dtype == np.int32
    # Every channel uses the whole range.
    assert np.abs(weights.astype(np.int32)).reshape(16, -1).max(axis=1).tolist() == [127] * 16
    assert "stem.weight" not in graph.initializers


def test_spellings_differ_by_the_shift_of_128_only() -> None:
    unsigned, signed = spelled_net("x86-vnni").graph, spelled_net("arm64").graph

    def constants(graph: ir.Graph, position: int) -> dict[str | None, int | float]:
        found = {}
        for node in graph:
            if node.op_type == "QuantizeLinear":
                array = constant_array(node.inputs[position])
                assert array is not None
                found[node.name] = array.item()
        return found

    assert constants(unsigned, 1) == constants(signed, 1)
    assert constants(unsigned, 2) == {name: point + 128 for name, point in constants(signed, 2).items()}


def test_second_spelling_of_the_same_plan_gives_the_same_bytes() -> None:
    one, other = (ir.to_proto(spelled_net("x86-vnni")).SerializeToString(deterministic=True) for _ in range(2))

    assert one == other


def test_tensor_that_an_integer_node_makes_and_the_model_returns_keeps_its_name() -> None:
    proto = proto_of(
        [
            helper.make_node("Conv", ["x", "w"], ["middle"], name="conv"),
            helper.make_node("Conv", ["middle", "v"], ["y"], name="conv2"),
        ],
        inputs={"x": [1, 3, 8, 8]},
        outputs={"middle": [1, 8, 8, 8], "y": [1, 8, 8, 8]},
        weights={"w": small_weights(8, 3, 1, 1), "v": small_weights(8, 8, 1, 1)},
    )
    model = canonical(proto)

    spelled = spelled_net("x86", model)

    feeds = SOURCE.batches[0]
    assert [value.name for value in spelled.graph.outputs] == ["middle", "y"]
    for exact, actual in zip(run(model, feeds), run(spelled, feeds), strict=True):
        assert signal_to_noise_db(exact, actual) > 25


def test_tensor_read_by_integer_and_float_operators_is_quantized_for_the_integer_ones_only() -> None:
    proto = proto_of(
        [
            helper.make_node("Erf", ["x"], ["e"], name="erf"),
            helper.make_node("Conv", ["e", "w"], ["c"], name="conv"),
            helper.make_node("Erf", ["e"], ["f"], name="erf2"),
            helper.make_node("ReduceSum", ["f"], ["s"], name="sum", keepdims=1),
            helper.make_node("Sinh", ["c"], ["h"], name="sinh"),
            helper.make_node("Max", ["h", "s"], ["y"], name="max"),
        ],
        inputs={"x": [1, 3, 8, 8]},
        outputs={"y": [1, 8, 8, 8]},
        weights={"w": small_weights(8, 3, 1, 1)},
    )

    graph = spelled_net("x86", canonical(proto)).graph

    (erf2,) = (node for node in graph if node.name == "erf2")
    (conv,) = (node for node in graph if node.name == "conv")
    producer = conv.inputs[0].producer() if conv.inputs[0] is not None else None
    assert erf2.inputs[0] is not None
    assert erf2.inputs[0].name == "e"
    assert producer is not None
    assert producer.op_type == "DequantizeLinear"


def test_shared_weight_is_stored_once_and_shared_bias_once_for_each_input_scale() -> None:
    proto = proto_of(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["m"], name="conv", pads=[1] * 4),
            helper.make_node("Relu", ["m"], ["r"], name="relu"),
            helper.make_node("Conv", ["r", "w", "b"], ["y"], name="conv2", pads=[1] * 4),
        ],
        inputs={"x": [1, 3, 8, 8]},
        outputs={"y": [1, 3, 8, 8]},
        weights={"w": small_weights(3, 3, 3, 3), "b": small_weights(3)},
    )
    model = canonical(proto)
    (first, second) = (node for node in model.graph if node.op_type == "Conv")
    # The canonical form un-shares; a weight that is shared all the same is one tensor with one set of scales.
    for position in (1, 2):
        second.replace_input_with(position, first.inputs[position])

    spelled = spelled_net("x86", model)

    types = sorted(
        value.dtype.name
        for value in {node.inputs[0] for node in spelled.graph if node.op_type == "DequantizeLinear"}
        if value is not None and value.dtype is not None and value.const_value is not None
    )
    assert types == ["INT32", "INT32", "INT8"]
    feeds = SOURCE.batches[0]
    assert signal_to_noise_db(run(model, feeds)[0], run(spelled, feeds)[0]) > 25


def test_body_of_an_if_is_untouched_and_reads_the_dequantized_tensor() -> None:
    def branch(name: str, op_type: str) -> onnx.GraphProto:
        return helper.make_graph(
            [helper.make_node(op_type, ["a"], [name], name=f"{name}_node")],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 8, 8])],
        )

    proto = proto_of(
        [
            helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
            helper.make_node("ReduceSum", ["x"], ["s"], name="sum", keepdims=0),
            helper.make_node("Cast", ["s"], ["cond"], name="cast", to=TensorProto.BOOL),
            helper.make_node(
                "If", ["cond"], ["y"], name="if", then_branch=branch("t", "Relu"), else_branch=branch("e", "Neg")
            ),
        ],
        inputs={"x": [1, 3, 8, 8]},
        outputs={"y": [1, 8, 8, 8]},
        weights={"w": small_weights(8, 3, 1, 1)},
    )
    model = canonical(proto)

    spelled = spelled_net("x86", model)

    (if_node,) = (node for node in spelled.graph if node.op_type == "If")
    assert [node.op_type for node in if_node.attributes["then_branch"].as_graph()] == ["Relu"]
    feeds = SOURCE.batches[0]
    assert signal_to_noise_db(run(model, feeds)[0], run(spelled, feeds)[0]) > 25


def test_float_average_between_integers_is_kept_from_the_slow_integer_kernel(tmp_path: Path) -> None:
    proto = proto_of(
        [
            helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
            helper.make_node("AveragePool", ["a"], ["b"], name="pool", kernel_shape=[3, 3], pads=[1] * 4),
            helper.make_node("Conv", ["b", "v"], ["y"], name="conv2"),
        ],
        inputs={"x": [1, 3, 8, 8]},
        outputs={"y": [1, 8, 8, 8]},
        weights={"w": small_weights(8, 3, 1, 1), "v": small_weights(8, 8, 1, 1)},
    )
    model = canonical(proto)

    spelled = spelled_net("x86", model)

    found = kernels(spelled, tmp_path)
    assert found["QLinearAveragePool"] == 0
    assert found["AveragePool"] == 1
    feeds = SOURCE.batches[0]
    assert signal_to_noise_db(run(model, feeds)[0], run(spelled, feeds)[0]) > 25


def test_model_without_integer_nodes_is_copied_as_it_is() -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, SOURCE)
    placement = dataclasses.replace(place(model, plan, "x86"), integer_nodes=())

    spelled = spell(model, plan, placement, "x86")

    assert [node.name for node in spelled.graph] == [node.name for node in model.graph]
    assert set(spelled.graph.initializers) == set(model.graph.initializers)


def test_placement_of_another_model_is_refused() -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, SOURCE)
    placement = dataclasses.replace(place(model, plan, "x86"), integer_nodes=("elsewhere",))

    with pytest.raises(TargetError, match="this one has no node 'elsewhere'"):
        spell(model, plan, placement, "x86")


def test_placement_that_needs_more_than_the_plan_has_is_refused() -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, SOURCE)
    placement = place(model, plan, "x86")
    poorer = dataclasses.replace(plan, weights={})

    with pytest.raises(TargetError, match=r"needs the weight 'stem\.weight' as integers"):
        spell(model, poorer, placement, "x86")


def test_names_that_the_writer_would_choose_may_be_taken_already() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y_quantized"], name="y_QuantizeLinear"),
        helper.make_node("Relu", ["y_quantized"], ["y_raw"], name="first"),
        helper.make_node("Conv", ["y_raw", "v"], ["y_dequantized"], name="first_replaced"),
        helper.make_node("Conv", ["y_dequantized", "v"], ["y"], name="w_dequantized_DequantizeLinear"),
    ]
    proto = proto_of(
        nodes,
        inputs={"x": [1, 3, 8, 8]},
        outputs={"y": [None] * 4},
        weights={"w": small_weights(8, 3, 1, 1), "v": small_weights(8, 8, 1, 1)},
    )

    spelled = spelled_net("x86-vnni", canonical(proto))

    onnx.checker.check_model(ir.to_proto(spelled), full_check=True)
    names = [node.name for node in spelled.graph]
    assert len(names) == len(set(names))


def test_names_of_scales_are_counted_on_and_not_searched_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []

    class Watched(set[str]):
        def __contains__(self, name: object) -> bool:
            looked_up.append(str(name))
            return super().__contains__(name)

    model = conv_net(batch=1)
    plan = plan_for(model, SOURCE)
    writer = IntegerWriter(model.clone(), plan, find_spelling("x86-vnni"))
    monkeypatch.setattr(writer._names, "_taken", Watched(writer._names._taken))

    for _ in range(100):
        writer.initializer(np.zeros(1, dtype=np.float32), "scale")

    # Twice or three times for each; searching from one would take 5000.
    assert len(looked_up) <= 300


@pytest.mark.parametrize("spelling", ["x86-vnni", "tflite"])
def test_tensor_of_sixteen_bits_is_refused(spelling: SpellingName) -> None:
    model = conv_net(batch=1)
    placement = place(model, plan_for(model, SOURCE), "x86-vnni")

    with pytest.raises(TargetError, match="has 16 bits for it"):
        spell(model, plan_for(model, SOURCE, activation_bits=16), placement, spelling)
