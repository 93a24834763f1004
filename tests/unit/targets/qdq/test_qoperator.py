"""The QOperator form computes the same integers as the QDQ form, with and without ONNX Runtime's optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.contracts import CanonicalModel, ModelState, TargetContext
from onnxprune.convert.onnx_file import load_onnx
from onnxprune.errors import TargetError
from onnxprune.runtime.sessions import ort_runner_from_path
from onnxprune.targets.onnx import OnnxTarget, OnnxTargetConfig
from onnxprune.targets.qdq import SpellingName, place, spell
from onnxprune.targets.qdq.qoperator import MOVING_OPERATORS, as_qoperators
from tests.builders import canonical, conv_net, proto_of
from tests.quantization import everything_integer, normal_batches, plan_for, run
from tests.unit.targets.qdq.test_operators import (
    CASES,
    FLAT_CASES,
    INPUT_SHAPE,
    FlatCase,
    OperatorCase,
    normal,
    sandwich,
)

MakeContext = Callable[..., TargetContext]


def spelled_case(case: OperatorCase, spelling: SpellingName) -> ir.Model:
    model = sandwich(case)
    plan = plan_for(model, normal_batches(INPUT_SHAPE))
    return spell(model, plan, everything_integer(model, plan), spelling)


def flat_model(case: FlatCase) -> CanonicalModel:
    outputs = {"y": [None] * (3 if len(case.shape) == 3 else len(case.shape))}
    return canonical(proto_of(case.nodes, inputs={"x": case.shape}, outputs=outputs, weights=case.weights))


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_integer_operator_has_a_form_that_gives_the_same_integers(case: OperatorCase) -> None:
    spelled = spelled_case(case, "x86-vnni")
    feeds = normal_batches(INPUT_SHAPE).batches[0]

    written = as_qoperators(spelled)

    found = operators(written)
    # One conversion on the way in and one for each output: nothing in between is float.
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 2), found
    onnx.checker.check_model(ir.to_proto(written))
    for fused, optimized, plain in zip(
        run(spelled, feeds), run(written, feeds), run(written, feeds, optimized=False), strict=True
    ):
        np.testing.assert_array_equal(optimized, fused)
        np.testing.assert_array_equal(plain, fused)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_form_with_int8_activations_gives_the_same_integers(case: OperatorCase) -> None:
    spelled = spelled_case(case, "arm64")
    feeds = normal_batches(INPUT_SHAPE).batches[0]

    written = as_qoperators(spelled)

    assert operators(written)["QuantizeLinear"] == 1
    for fused, plain in zip(run(spelled, feeds), run(written, feeds, optimized=False), strict=True):
        np.testing.assert_array_equal(plain, fused)


@pytest.mark.parametrize("case", FLAT_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("spelling", ["x86-vnni", "arm64"])
def test_layer_alone_becomes_one_integer_operator(case: FlatCase, spelling: SpellingName) -> None:
    model = flat_model(case)
    source = normal_batches(case.shape)
    plan = plan_for(model, source)
    spelled = spell(model, plan, everything_integer(model, plan), spelling)

    written = as_qoperators(spelled)

    assert operators(written) == Counter(["QuantizeLinear", case.kernel, "DequantizeLinear"])
    feeds = source.batches[0]
    np.testing.assert_array_equal(run(written, feeds, optimized=False)[0], run(spelled, feeds)[0])


def test_softmax_is_normalized_along_its_axis() -> None:
    nodes = [
        helper.make_node("Softmax", ["a"], ["s"], name="softmax", axis=1),
        helper.make_node("Mul", ["a", "s"], ["b"], name="mul"),
    ]
    spelled = spelled_case(OperatorCase(id="", nodes=nodes, kernel=""), "x86-vnni")
    feeds = normal_batches(INPUT_SHAPE).batches[0]

    written = as_qoperators(spelled)

    assert operators(written)["QLinearSoftmax"] == 1
    meant, actual = run(spelled, feeds, optimized=False)[1], run(written, feeds, optimized=False)[1]
    # The product of two roundings: a step of the softmax is worth at most one of the product here.
    assert np.abs(meant - actual).max() <= np.abs(meant).max() * 0.02


def test_concat_of_equal_scales_moves_integers_and_one_of_different_scales_rescales() -> None:
    def written(factor: float) -> Counter[str]:
        nodes = [
            helper.make_node("Mul", ["a", "k"], ["m"], name="mul"),
            helper.make_node("Concat", ["a", "m"], ["b"], name="concat", axis=1),
        ]
        case = OperatorCase(
            id="", nodes=nodes, kernel="", channels_out=16, weights={"k": np.full((8, 1, 1), factor, dtype=np.float32)}
        )
        return operators(as_qoperators(spelled_case(case, "x86-vnni")))

    assert (written(0.9)["Concat"], written(0.9)["QLinearConcat"]) == (1, 0)
    assert (written(0.1)["Concat"], written(0.1)["QLinearConcat"]) == (0, 1)


def test_operator_without_a_form_keeps_its_conversions() -> None:
    nodes = [helper.make_node("Tanh", ["a"], ["t"], name="tanh"), helper.make_node("Relu", ["t"], ["b"], name="relu")]
    model = sandwich(OperatorCase(id="", nodes=nodes, kernel=""))
    plan = plan_for(model, normal_batches(INPUT_SHAPE))
    spelled = spell(model, plan, everything_integer(model, plan), "x86-vnni")

    written = as_qoperators(spelled)

    (tanh,) = (node for node in written.graph if node.name == "tanh")
    assert tanh.inputs[0] is not None
    assert tanh.inputs[0].producer().op_type == "DequantizeLinear"
    feeds = normal_batches(INPUT_SHAPE).batches[0]
    np.testing.assert_array_equal(run(written, feeds)[0], run(spelled, feeds)[0])


def test_names_of_inputs_outputs_and_nodes_stay_and_the_given_graph_is_untouched() -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, normal_batches((1, 3, 8, 8)))
    spelled = spell(model, plan, place(model, plan, "x86-vnni"), "x86-vnni")
    before = ir.to_proto(spelled).SerializeToString(deterministic=True)

    written = as_qoperators(spelled)

    assert ir.to_proto(spelled).SerializeToString(deterministic=True) == before
    assert [value.name for value in written.graph.inputs] == ["x"]
    assert [value.name for value in written.graph.outputs] == ["y"]
    assert {"stem/conv", "block/conv", "block/add", "head/pool", "head/gemm"} <= {node.name for node in written.graph}
    assert operators(as_qoperators(written)) == operators(written)


def test_bias_in_another_scale_than_input_times_weight_stays_between_conversions() -> None:
    proto = proto_of(
        [helper.make_node("Conv", ["x", "w", "c"], ["y"], name="conv")],
        inputs={"x": INPUT_SHAPE},
        outputs={"y": [None] * 4},
        weights={"w": normal(8, 4, 1, 1), "c": normal(8)},
    )
    model = canonical(proto)
    plan = plan_for(model, normal_batches(INPUT_SHAPE))
    spelled = spell(model, plan, everything_integer(model, plan), "x86-vnni")
    (scale,) = (value for name, value in spelled.graph.initializers.items() if name == "c_quantized_scale")
    assert scale.const_value is not None
    scale.const_value = ir.tensor(scale.const_value.numpy() * np.float32(1.01), name=scale.name)

    assert operators(as_qoperators(spelled))["QLinearConv"] == 0


def test_tensor_that_the_model_returns_as_float_keeps_its_float_operator() -> None:
    # Made elsewhere: the tensor before QuantizeLinear is an output itself.
    scale, point = np.float32(0.05), np.uint8(128)
    proto = proto_of(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="d"),
            helper.make_node("Sigmoid", ["d"], ["raw"], name="sigmoid"),
            helper.make_node("QuantizeLinear", ["raw", "s", "z"], ["r"], name="r"),
            helper.make_node("DequantizeLinear", ["r", "s", "z"], ["y"], name="y_node"),
        ],
        inputs={"x": [1, 4]},
        outputs={"raw": [1, 4], "y": [1, 4]},
        weights={"s": scale, "z": point},
    )
    model = ir.from_proto(proto)

    assert operators(as_qoperators(model))["Sigmoid"] == 1


def test_moving_operators_run_on_both_integer_types_without_any_optimization() -> None:
    ones = np.ones((1, 2, 4, 4), dtype=np.int8)
    extra = {
        "DepthToSpace": ({"blocksize": 1}, []),
        "Expand": ({}, [np.array([1, 2, 4, 4])]),
        "Flatten": ({}, []),
        "Gather": ({}, [np.array(0)]),
        "GatherElements": ({}, [np.zeros((1, 2, 4, 4), dtype=np.int64)]),
        "MaxPool": ({"kernel_shape": [2, 2]}, []),
        "ReduceMax": ({}, [np.array([2, 3])]),
        "Reshape": ({}, [np.array([1, -1])]),
        "Resize": ({"mode": "nearest"}, [None, np.array([1, 1, 2, 2], dtype=np.float32)]),
        "Slice": ({}, [np.array([0]), np.array([1]), np.array([1])]),
        "SpaceToDepth": ({"blocksize": 2}, []),
        "Split": ({"num_outputs": 1, "axis": 1}, []),
        "Squeeze": ({}, [np.array([0])]),
        "Tile": ({}, [np.array([1, 1, 2, 1])]),
        "Transpose": ({}, []),
        "Unsqueeze": ({}, [np.array([0])]),
    }
    assert set(extra) == MOVING_OPERATORS
    for op_type, (attributes, others) in extra.items():
        for dtype, element in ((np.int8, onnx.TensorProto.INT8), (np.uint8, onnx.TensorProto.UINT8)):
            names = [f"i{index}" if other is not None else "" for index, other in enumerate(others)]
            weights = {name: other for name, other in zip(names, others, strict=True) if other is not None}
            proto = proto_of(
                [helper.make_node(op_type, ["x", *names], ["y"], name="node", **attributes)],
                inputs={"x": [1, 2, 4, 4]},
                outputs={},
                weights=weights,
            )
            proto.graph.input[0].type.tensor_type.elem_type = element
            proto.graph.output.append(onnx.ValueInfoProto(name="y"))
            (result,) = run(ir.from_proto(proto), {"x": ones.astype(dtype)}, optimized=False)
            assert result.dtype == dtype, op_type


def test_target_writes_integer_operators_and_proves_them(int8_state: ModelState, context: MakeContext) -> None:
    target = OnnxTarget(OnnxTargetConfig(spelling="x86", int8_format="qoperator"))

    artifact = target.build(int8_state, context())

    found = Counter(node.op_type for node in onnx.load(artifact.model_path).graph.node)
    assert (found["QLinearConv"], found["QLinearAdd"], found["QGemm"], found["Conv"]) == (2, 1, 1, 0)
    images = {"x": np.random.default_rng(5).standard_normal((2, 3, 8, 8), dtype=np.float32)}
    plain = OnnxTarget(OnnxTargetConfig(spelling="x86")).build(int8_state, context())
    np.testing.assert_array_equal(
        ort_runner_from_path(artifact.model_path).run(images)["y"],
        ort_runner_from_path(plain.model_path).run(images)["y"],
    )


def test_target_says_that_int8_operators_are_slow_on_x86(int8_state: ModelState, context: MakeContext) -> None:
    target = OnnxTarget(OnnxTargetConfig(spelling="arm64", int8_format="qoperator"))

    artifact = target.build(int8_state, context())

    assert any("one number at a time" in finding.text for finding in artifact.findings)


def test_integer_operators_of_a_float_model_are_refused(float_state: ModelState) -> None:
    target = OnnxTarget(OnnxTargetConfig(int8_format="qoperator"))

    with pytest.raises(TargetError, match="nothing in the model is quantized"):
        target.check(float_state, will_quantize=False)
    target.check(float_state, will_quantize=True)


def test_target_says_which_layers_could_saturate(int8_state: ModelState, context: MakeContext) -> None:
    def topics(spelling: SpellingName) -> list[str]:
        artifact = OnnxTarget(OnnxTargetConfig(spelling=spelling)).build(int8_state, context())
        return [finding.text for finding in artifact.findings if finding.topic == "16-bit saturation"]

    (full,), (widened,) = topics("x86-vnni"), topics("x86")

    assert full.startswith("On x86 without VNNI, 3 of 3 layers of this artifact can saturate")
    assert "have wider weight scales than the plan" in widened
    assert topics("arm64") == []


def test_qdq_model_from_elsewhere_becomes_integer_operators(context: MakeContext, tmp_path: Path) -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, normal_batches((1, 3, 8, 8)))
    ir.save(spell(model, plan, place(model, plan, "x86"), "x86"), tmp_path / "qdq.onnx")
    state = ModelState(model=load_onnx(tmp_path / "qdq.onnx"))
    target = OnnxTarget(OnnxTargetConfig(int8_format="qoperator"))

    target.check(state, will_quantize=False)
    artifact = target.build(state, context())

    found = Counter(node.op_type for node in onnx.load(artifact.model_path).graph.node)
    assert (found["QuantizeLinear"], found["QLinearConv"], found["QGemm"]) == (1, 2, 1)


def qdq_layer(
    *, data: type[np.integer], weight: type[np.integer] = np.int8, result: type[np.integer] | None = None
) -> ir.Model:
    """One Conv between conversions, as another tool may write it."""
    constants = {
        "s": np.float32(0.05),
        "z": np.array(0, dtype=data),
        "zr": np.array(0, dtype=result or data),
        "w": (normal(8, 4, 1, 1) * 100).astype(weight),
        "ws": np.float32(0.01),
        "wz": np.array(0, dtype=weight),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="d"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], name="wd"),
        helper.make_node("Conv", ["d", "wd"], ["c"], name="conv"),
        helper.make_node("QuantizeLinear", ["c", "s", "zr"], ["cq"], name="cq"),
        helper.make_node("DequantizeLinear", ["cq", "s", "zr"], ["y"], name="y"),
    ]
    shapes = {"inputs": {"x": (1, 4, 8, 8)}, "outputs": {"y": (1, 8, 8, 8)}}
    return canonical(proto_of(nodes, weights=constants, opset=21, **shapes))


@pytest.mark.parametrize(
    ("types", "kernel"),
    [
        ({"data": np.uint8}, "QLinearConv"),
        ({"data": np.uint8, "weight": np.uint8}, "QLinearConv"),
        ({"data": np.int8}, "QLinearConv"),
        ({"data": np.uint16}, "Conv"),
        ({"data": np.int16}, "Conv"),
        ({"data": np.uint8, "result": np.int8}, "Conv"),
        ({"data": np.int8, "weight": np.uint8}, "Conv"),
        ({"data": np.uint8, "weight": np.int16}, "Conv"),
    ],
)
def test_only_element_types_that_have_an_operator_become_one(types: dict[str, type[np.integer]], kernel: str) -> None:
    model = qdq_layer(**types)
    feeds = normal_batches((1, 4, 8, 8)).batches[0]

    written = as_qoperators(model)

    assert operators(written)[kernel] == 1
    expected, found = run(model, feeds, optimized=False)[0], run(written, feeds, optimized=False)[0]
    # A sum on the edge between two integers may fall on either side.
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=0.0501)


@pytest.mark.parametrize("op_type", ["MaxPool", "Sigmoid", "Add", "Concat", "AveragePool"])
def test_sixteen_bits_stay_between_conversions_whatever_the_operator(op_type: str) -> None:
    attributes = {"Concat": {"axis": 1}}.get(op_type, {"kernel_shape": [2, 2]} if op_type.endswith("Pool") else {})
    inputs = ["d", "d"] if op_type in ("Add", "Concat") else ["d"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="d"),
        helper.make_node(op_type, inputs, ["c"], name="node", **attributes),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["cq"], name="cq"),
        helper.make_node("DequantizeLinear", ["cq", "s", "z"], ["y"], name="y"),
    ]
    constants = {"s": np.float32(0.05), "z": np.array(0, dtype=np.uint16)}
    model = canonical(
        proto_of(nodes, inputs={"x": (1, 4, 8, 8)}, outputs={"y": [None] * 4}, weights=constants, opset=21)
    )

    written = as_qoperators(model)

    assert operators(written) == operators(model)


def test_dilated_average_pool_stays_between_conversions_and_one_that_says_so_of_ones_does_not() -> None:
    for dilations, kernel in (([2, 2], "AveragePool"), ([1, 1], "QLinearAveragePool")):
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="d"),
            helper.make_node("AveragePool", ["d"], ["c"], name="pool", kernel_shape=[2, 2], dilations=dilations),
            helper.make_node("QuantizeLinear", ["c", "s", "z"], ["cq"], name="cq"),
            helper.make_node("DequantizeLinear", ["cq", "s", "z"], ["y"], name="y"),
        ]
        constants = {"s": np.float32(0.05), "z": np.array(128, dtype=np.uint8)}
        model = canonical(
            proto_of(nodes, inputs={"x": (1, 4, 8, 8)}, outputs={"y": [None] * 4}, weights=constants, opset=21)
        )
        feeds = normal_batches((1, 4, 8, 8)).batches[0]

        written = as_qoperators(model)

        assert operators(written)[kernel] == 1
        expected, found = run(model, feeds, optimized=False)[0], run(written, feeds, optimized=False)[0]
        # An average on the edge between two integers may fall on either side.
        np.testing.assert_allclose(found, expected, rtol=0.0, atol=0.0501)
