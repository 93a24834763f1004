"""QDQ graphs, ours and foreign ones, as integer TFLite graphs: borders, moving operators, inputs and outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.targets import qdq
from onnxprune.targets.qdq.tflite import place_tflite
from onnxprune.targets.tflite.emit import EmitOptions, Emitted, emit
from onnxprune.targets.tflite.precision import Precision
from tests.builders import canonical, conv_net
from tests.quantization import normal_batches, plan_for, run
from tests.tflite_runs import litert_outputs
from tests.unit.targets.qdq.test_operators import CASES, INPUT_SHAPE, OperatorCase, sandwich

pytest.importorskip("ai_edge_litert")

Array = npt.NDArray[Any]
SHAPE = (1, 8, 6, 6)


@dataclass
class Qdq:
    """Builds a QDQ model node by node."""

    dtype: type[np.generic] = np.int8
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)

    def node(self, op_type: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = output or f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=f"{name}/node", **attributes))
        return name

    def constant(self, array: Array) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = array
        return name

    def quantized(self, name: str, scale: float, zero_point: int) -> str:
        """name -> QuantizeLinear."""
        return self.node("QuantizeLinear", name, *self.form(scale, zero_point))

    def real(self, name: str, scale: float, zero_point: int) -> str:
        """name -> DequantizeLinear."""
        return self.node("DequantizeLinear", name, *self.form(scale, zero_point))

    def rounded(self, name: str, scale: float, zero_point: int) -> str:
        """name -> QuantizeLinear -> DequantizeLinear; `zero_point` is signed."""
        return self.real(self.quantized(name, scale, zero_point), scale, zero_point)

    def form(self, scale: float, zero_point: int) -> tuple[str, str]:
        shift = 128 if self.dtype == np.uint8 else 0
        return self.constant(np.float32(scale)), self.constant(self.dtype(zero_point + shift))

    def weight(self, array: Array, scales: Array) -> str:
        zero_points = self.constant(np.zeros(scales.shape, np.int8))
        return self.node("DequantizeLinear", self.constant(array), self.constant(scales), zero_points, axis=0)

    def model(self, output: str, shape: tuple[int | str, ...] = SHAPE) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "qdq",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(array), name) for name, array in self.constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def convolved(build: Qdq, name: str, channels: int = 8) -> str:
    rng = np.random.default_rng(3)
    weight = build.weight(
        rng.integers(-127, 128, (16, channels, 3, 3)).astype(np.int8), np.geomspace(0.001, 0.004, 16).astype(np.float32)
    )
    return build.node("Conv", name, weight, pads=[1, 1, 1, 1])


def emitted(model: onnx.ModelProto, precision: Precision = "int8-float-io") -> Emitted:
    return emit(canonical(model), EmitOptions(precision=precision))


def assert_within_one_step(model: onnx.ModelProto, step: float, *, steps: int = 1, shape: Any = SHAPE) -> Counter[str]:
    """LiteRT and ONNX Runtime are at most `steps` integers apart; gives the kinds of the operators."""
    made = emitted(model)
    feed = np.random.default_rng(0).uniform(-3, 3, shape).astype(np.float32)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": feed})
    actual = litert_outputs(made.model, {"x": feed})[model.graph.output[0].name]
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= (steps + 0.01) * step
    return Counter(operator.kind for operator in made.model.main.operators)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_convolution_relu_and_pooling_of_a_foreign_model_are_integer(dtype: type[np.generic]) -> None:
    build = Qdq(dtype=dtype)
    x = build.rounded("x", 6 / 255, 0)
    y = build.node("Relu", convolved(build, x))
    y = build.rounded(y, 0.03, -128)
    y = build.node("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    y = build.rounded(y, 0.03, -128)

    kinds = assert_within_one_step(build.model(y), 0.03)

    assert (kinds["QUANTIZE"], kinds["DEQUANTIZE"], kinds["RELU"]) == (1, 1, 0)


def test_clip_that_ends_inside_of_the_range_is_kept_as_integers() -> None:
    build = Qdq()
    x = build.rounded("x", 6 / 255, 0)
    bounds = (build.constant(np.float32(-0.5)), build.constant(np.float32(1.5)))
    y = build.rounded(build.node("Clip", convolved(build, x), *bounds), 0.02, 3)

    kinds = assert_within_one_step(build.model(y), 0.02)

    assert (kinds["MINIMUM"], kinds["MAXIMUM"]) == (1, 1)
    assert (kinds["QUANTIZE"], kinds["DEQUANTIZE"]) == (1, 1)


def test_operands_of_a_concatenation_get_the_scale_of_the_result() -> None:
    build = Qdq()
    x = build.rounded("x", 6 / 255, 0)
    one = build.rounded(convolved(build, x), 0.03, 5)
    y = build.rounded(build.node("Concat", one, x, axis=1), 0.04, -3)

    kinds = assert_within_one_step(build.model(y), 0.04, steps=1)

    # x, and both operands from integers to integers.
    assert (kinds["QUANTIZE"], kinds["DEQUANTIZE"], kinds["CONCATENATION"]) == (3, 1, 1)


def test_convolution_whose_result_is_read_as_float_stays_float_and_says_so() -> None:
    build = Qdq()
    x = build.rounded("x", 6 / 255, 0)
    y = convolved(build, x)
    made = emitted(build.model(y))

    assert any(operator.kind == "CONV_2D" for operator in made.model.main.operators)
    assert made.findings[0].text.endswith("Float stay 1 x CONV_2D: its result is read as float.")
    # Its weight has 8 bits in the file nevertheless.
    assert any(tensor.type == "INT8" and tensor.constant is not None for tensor in made.model.main.tensors.values())


def test_division_by_what_may_be_rounded_to_zero_stays_float_and_says_so() -> None:
    build = Qdq()
    x = build.rounded("x", 6 / 255, 20)
    size = build.node("Abs", x)
    above = build.rounded(build.node("Add", size, build.constant(np.float32(0.5))), 3.5 / 255, -128)
    y = build.rounded(build.node("Div", x, above), 0.01, 0)

    kinds = assert_within_one_step(build.model(y), 0.01)

    assert kinds["DIV"] == 1
    assert "1 x DIV: LiteRT divides integers by constants only" in emitted(build.model(y)).findings[0].text


def test_weight_with_a_zero_point_of_its_own_is_moved_where_it_fits() -> None:
    build = Qdq()
    x = build.rounded("x", 6 / 255, 0)
    integers = np.random.default_rng(3).integers(-30, 120, (16, 8, 3, 3)).astype(np.int8)
    parameters = (build.constant(np.float32(0.002)), build.constant(np.int8(-7)))
    weight = build.node("DequantizeLinear", build.constant(integers), *parameters)
    y = build.rounded(build.node("Conv", x, weight), 0.03, 0)

    kinds = assert_within_one_step(build.model(y), 0.03)

    assert (kinds["QUANTIZE"], kinds["DEQUANTIZE"]) == (1, 1)


def test_weight_that_does_not_fit_without_its_zero_point_leaves_the_convolution_float() -> None:
    build = Qdq()
    x = build.rounded("x", 6 / 255, 0)
    integers = np.random.default_rng(3).integers(-128, 128, (16, 8, 3, 3)).astype(np.int8)
    parameters = (build.constant(np.float32(0.002)), build.constant(np.int8(-7)))
    weight = build.node("DequantizeLinear", build.constant(integers), *parameters)
    y = build.rounded(build.node("Conv", x, weight), 0.03, 0)

    assert_within_one_step(build.model(y), 0.03)

    assert "its weight has a zero point" in emitted(build.model(y)).findings[0].text


def test_padding_of_integers_fills_with_the_integer_that_was_asked_for() -> None:
    build = Qdq()
    x = build.quantized("x", 6 / 255, 20)
    pads = build.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    zero = build.node("Pad", x, pads)
    y = build.real(zero, 6 / 255, 20)

    kinds = assert_within_one_step(build.model(y), 6 / 255, steps=0)

    assert kinds["PADV2"] == 1


def test_padding_with_zero_between_conversions_fills_with_the_zero_point() -> None:
    build = Qdq()
    x = build.rounded("x", 6 / 255, 20)
    pads = build.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    y = build.rounded(build.node("Pad", x, pads), 6 / 255, 20)

    kinds = assert_within_one_step(build.model(y), 6 / 255, steps=0)

    assert (kinds["PAD"], kinds["QUANTIZE"], kinds["DEQUANTIZE"]) == (1, 1, 1)


def test_pool_behind_relu_is_padded_with_the_zero_point() -> None:
    build = Qdq()
    x = build.rounded("x", 6 / 255, 0)
    y = build.rounded(build.node("Relu", convolved(build, x)), 0.03, -128)
    y = build.node("MaxPool", y, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    y = build.rounded(y, 0.03, -128)

    kinds = assert_within_one_step(build.model(y), 0.03)

    # PADV2 would be an operator outside of XNNPACK.
    assert (kinds["PAD"], kinds["PADV2"], kinds["MAX_POOL_2D"]) == (1, 0, 1)


def test_reshapes_that_conversions_stood_between_become_one() -> None:
    build = Qdq()
    x = build.rounded("x", 6 / 255, 0)
    pooled = build.rounded(build.node("GlobalAveragePool", x), 0.02, 0)
    vector = build.node("Reshape", pooled, build.constant(np.array([1, 8], np.int64)))
    vector = build.rounded(vector, 0.02, 0)
    gate = build.rounded(build.node("Reshape", vector, build.constant(np.array([1, 8, 1, 1], np.int64))), 0.02, 0)
    y = build.rounded(convolved(build, gate), 0.02, 3)

    kinds = assert_within_one_step(build.model(y), 0.02)

    # The other one brings the channels of the result to the front again.
    assert kinds == {"QUANTIZE": 1, "MEAN": 1, "RESHAPE": 2, "CONV_2D": 1, "DEQUANTIZE": 1}


def test_reshape_that_is_rounded_to_another_scale_is_still_rounded() -> None:
    build = Qdq()
    x = build.rounded("x", 6 / 255, 0)
    # Three times as coarse: no number lies in the middle between two, where runtimes round as they like.
    flat = build.rounded(build.node("Reshape", x, build.constant(np.array([1, 288], np.int64))), 18 / 255, 0)
    y = build.rounded(build.node("Reshape", flat, build.constant(np.array([1, 8, 6, 6], np.int64))), 6 / 255, 0)

    assert_within_one_step(build.model(y), 6 / 255, steps=0)


def test_sixteen_bit_activations_with_eight_bit_weights_are_integer() -> None:
    build = Qdq(dtype=np.int16)
    x = build.rounded("x", 3 / 32767, 0)
    y = build.rounded(convolved(build, x), 6 / 32767, 0)
    model = build.model(y)

    # ONNX Runtime adds in float32: of 16-bit numbers, that is several steps.
    kinds = assert_within_one_step(model, 6 / 32767, steps=4)

    assert (kinds["QUANTIZE"], kinds["DEQUANTIZE"]) == (1, 1)


def test_batch_stays_open_in_integers() -> None:
    build = Qdq()
    x = build.rounded("x", 6 / 255, 0)
    y = build.rounded(convolved(build, x), 0.03, 0)

    assert_within_one_step(build.model(y, ("n", *SHAPE[1:])), 0.03, shape=(3, *SHAPE[1:]))


# --- plans of ours ----------------------------------------------------------------------------------------------


def spelled(**options: Any) -> tuple[Any, Any]:
    model = conv_net(batch=1)
    plan = plan_for(model, normal_batches((1, 3, 8, 8)), **options)
    return qdq.spell(model, plan, place_tflite(model, plan), "tflite"), plan


def form_of(details: Mapping[str, Any]) -> tuple[float, int]:
    return details["quantization"]


def test_network_of_ours_gives_the_very_integers_of_onnx_runtime() -> None:
    model, plan = spelled()
    made = emit(model, EmitOptions(precision="int8-float-io"))

    for feeds in normal_batches((1, 3, 8, 8)):
        actual = litert_outputs(made.model, feeds)
        for value, array in zip(model.graph.outputs, run(model, feeds), strict=True):
            assert np.abs(array - actual[value.name]).max() <= plan.activations[value.name].scale * 1.01
    assert made.findings[0].text.endswith("operators work on integers.")
    kinds = Counter(operator.kind for operator in made.model.main.operators)
    assert (kinds["QUANTIZE"], kinds["DEQUANTIZE"]) == (1, 1)


def test_inputs_and_outputs_become_integers_and_keep_their_names() -> None:
    from ai_edge_litert.interpreter import Interpreter

    from onnxprune.targets.tflite.serialize import serialize

    model, plan = spelled()
    made = emit(model, EmitOptions(precision="int8"))
    with_float = emit(model, EmitOptions(precision="int8-float-io"))
    feeds = next(iter(normal_batches((1, 3, 8, 8))))

    kinds = Counter(operator.kind for operator in made.model.main.operators)
    assert kinds["QUANTIZE"] + kinds["DEQUANTIZE"] == 0
    interpreter = Interpreter(model_content=bytes(serialize(made.model)))
    interpreter.allocate_tensors()
    (entry,), (exit_,) = interpreter.get_input_details(), interpreter.get_output_details()
    ((name, array),) = feeds.items()
    (output,) = litert_outputs(with_float.model, feeds)
    assert (entry["name"], exit_["name"]) == (name, output)
    for details in (entry, exit_):
        planned = plan.activations[details["name"]]
        assert form_of(details) == (pytest.approx(planned.scale), planned.zero_point)
    scale, zero_point = form_of(entry)
    integers = np.clip(np.rint(array / np.float32(scale)) + zero_point, -128, 127).astype(np.int8)
    interpreter.set_tensor(entry["index"], integers)
    interpreter.invoke()
    scale, zero_point = form_of(exit_)
    real = (interpreter.get_tensor(exit_["index"]).astype(np.float32) - zero_point) * np.float32(scale)
    np.testing.assert_array_equal(real, litert_outputs(with_float.model, feeds)[output])


def test_output_that_stays_float_is_named() -> None:
    build = Qdq()
    x = build.rounded("x", 6 / 255, 0)
    y = convolved(build, x)

    texts = [finding.text for finding in emitted(build.model(y), "int8").findings]

    assert texts[-1] == f"'{y}' stay float32: no integer operator stands next to them."


# Steps at the output, behind one more convolution, which adds up what differs by one.
STEPS = {"AveragePool without padding": 3, "squeeze and excitation": 2}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_planned_operator_between_convolutions_is_integer_and_agrees(case: OperatorCase) -> None:
    model = sandwich(case)
    plan = plan_for(model, normal_batches(INPUT_SHAPE))
    placement = place_tflite(model, plan)
    meaning = qdq.spell(model, plan, placement, "tflite")

    made = emit(meaning, EmitOptions(precision="int8-float-io"))

    main = made.model.main
    computing = [one for one in main.operators if one.kind not in ("QUANTIZE", "DEQUANTIZE")]
    float_kinds = [one.kind for one in computing if main.tensors[one.outputs[0]].type == "FLOAT32"]
    assert float_kinds == []
    feeds = next(iter(normal_batches(INPUT_SHAPE)))
    actual = litert_outputs(made.model, feeds)
    for value, array in zip(meaning.graph.outputs, run(meaning, feeds, optimized=False), strict=True):
        steps = np.abs(array - actual[value.name]).max() / plan.activations[value.name].scale
        assert steps <= STEPS.get(case.id, 1) + 0.01


def test_spelling_for_x86_becomes_the_same_integers() -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, normal_batches((1, 3, 8, 8)))
    placement = place_tflite(model, plan)
    ours = emit(qdq.spell(model, plan, placement, "tflite"), EmitOptions(precision="int8"))
    shifted = emit(qdq.spell(model, plan, placement, "x86-vnni"), EmitOptions(precision="int8"))

    # x86 has a fourth channel of zeros in front of its first convolution; it is filled with the zero point.
    kinds = [Counter(operator.kind for operator in made.model.main.operators) for made in (ours, shifted)]
    assert kinds[1] - kinds[0] == {"PADV2": 1}
    feeds = {
        name: np.random.default_rng(0).integers(-128, 128, (1, 3, 8, 8)).astype(np.int8)
        for name in ours.model.main.inputs
    }
    for name, array in litert_outputs(ours.model, feeds).items():
        np.testing.assert_array_equal(array, litert_outputs(shifted.model, feeds)[name])


def test_model_that_is_fed_unsigned_integers_is_fed_them_still() -> None:
    build = Qdq(dtype=np.uint8)
    y = build.rounded(convolved(build, build.real("x", 6 / 255, 0)), 0.03, 0)
    model = build.model(y)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    feed = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)

    made = emitted(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    actual = litert_outputs(made.model, {"x": feed})[y]

    assert np.abs(actual - session.run(None, {"x": feed})[0]).max() <= 0.0301
    computing = [one for one in made.model.main.operators if one.kind not in ("QUANTIZE", "DEQUANTIZE")]
    assert {made.model.main.tensors[one.outputs[0]].type for one in computing} == {"INT8"}
