"""Weights in fewer bits: float16, int8 with ranges of each run, and what stays float32."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.contracts import QuantizationPlan, WeightQuantization
from onnxprune.targets.tflite.emit import EmitOptions, Emitted, emit
from onnxprune.targets.tflite.graph import Constant, Grid, Quantization
from onnxprune.targets.tflite.precision import Precision
from tests.builders import canonical, proto_of
from tests.tflite_runs import litert_outputs

pytest.importorskip("ai_edge_litert")

Array = npt.NDArray[Any]
RNG = np.random.default_rng(0)
X = RNG.uniform(-2, 2, (1, 16, 9, 9)).astype(np.float32)


def network(node: onnx.NodeProto, weights: dict[str, Array], x: Array = X) -> onnx.ModelProto:
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        [node],
        "network",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(next(iter(weights.values())).dtype), None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def conv(weight: Array, **attributes: Any) -> onnx.ModelProto:
    return network(helper.make_node("Conv", ["x", "w"], ["y"], name="conv", **attributes), {"w": weight})


def emitted(model: onnx.ModelProto, precision: Precision, plan: QuantizationPlan | None = None) -> Emitted:
    return emit(canonical(model), EmitOptions(precision=precision), plan=plan)


def outputs(made: Emitted, x: Array = X) -> Array:
    return litert_outputs(made.model, {"x": x})["y"]


def stored(made: Emitted, kind: str) -> list[ir.Shape | tuple[int, ...]]:
    """Shapes of the constants of an element type."""
    tensors = made.model.main.tensors.values()
    return [tensor.shape for tensor in tensors if tensor.type == kind and tensor.constant is not None]


def kinds(made: Emitted) -> Counter[str]:
    return Counter(operator.kind for operator in made.model.main.operators)


def test_half_precision_stores_each_weight_once_and_computes_in_float32() -> None:
    weight = RNG.standard_normal((32, 16, 3, 3)).astype(np.float32)
    model = conv(weight)
    rounded = conv(weight.astype(np.float16).astype(np.float32))

    made = emitted(model, "fp16")

    assert (len(stored(made, "FLOAT16")), kinds(made)["DEQUANTIZE"]) == (1, 1)
    # The same numbers in the same kernel.
    np.testing.assert_array_equal(outputs(made), outputs(emitted(rounded, "fp32")))


def test_weight_beyond_half_precision_stays_float32_and_is_named() -> None:
    weight = RNG.standard_normal((32, 16, 3, 3)).astype(np.float32)
    weight[3, 2, 1, 0] = 7e4

    made = emitted(conv(weight), "fp16")

    assert stored(made, "FLOAT16") == []
    assert "go up to 70000, and float16 ends at 65504" in made.findings[0].text
    assert made.findings[0].severity == "warning"


def test_small_weights_stay_float32() -> None:
    made = emitted(conv(RNG.standard_normal((8, 16, 1, 1)).astype(np.float32)), "fp16")

    assert stored(made, "FLOAT16") == []


def test_model_in_half_precision_keeps_its_halves_at_float32() -> None:
    weight = RNG.standard_normal((32, 16, 3, 3)).astype(np.float16)
    x = X.astype(np.float16)
    model = network(helper.make_node("Conv", ["x", "w"], ["y"], name="conv"), {"w": weight}, x)

    made = emitted(model, "fp32")

    assert len(stored(made, "FLOAT16")) == 1
    assert outputs(made, x).dtype == np.float16


@pytest.mark.parametrize(
    ("attributes", "shape", "is_hybrid"),
    [
        ({}, (32, 16, 3, 3), True),
        ({"group": 2}, (64, 8, 3, 3), True),
        ({"group": 16}, (96, 1, 5, 5), False),
    ],
    ids=["convolution", "groups", "depthwise"],
)
def test_dynamic_int8_agrees_with_its_own_weights_in_float(
    attributes: dict[str, Any], shape: tuple[int, ...], *, is_hybrid: bool
) -> None:
    weight = RNG.standard_normal(shape).astype(np.float32) * np.geomspace(0.1, 3, shape[0]).reshape(-1, 1, 1, 1)
    model = conv(weight.astype(np.float32), **attributes)
    scales = np.abs(weight).reshape(shape[0], -1).max(axis=1).reshape(-1, 1, 1, 1) / 127
    rounded = conv((np.rint(weight / scales) * scales).astype(np.float32), **attributes)

    made = emitted(model, "dynamic-int8")
    expected, actual = outputs(emitted(rounded, "fp32")), outputs(made)

    assert len(stored(made, "INT8")) == 1
    assert kinds(made)["DEQUANTIZE"] == (0 if is_hybrid else 1)
    # Rounding inputs to 8 bits: half a step of the range of 4, on each of the products, which partly cancel.
    step = 4 / 255
    bound = step / 2 * np.abs(weight).reshape(shape[0], -1).sum(axis=1).max() if is_hybrid else 1e-4
    assert np.abs(actual - expected).max() <= bound


def test_matrix_has_a_scale_for_each_column_and_rows_of_a_table_one_each() -> None:
    table = (RNG.standard_normal((200, 24)) * np.geomspace(0.01, 10, 200).reshape(-1, 1)).astype(np.float32)
    matrix = RNG.standard_normal((24, 48)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "x"], ["rows"], name="rows"),
            helper.make_node("MatMul", ["rows", "matrix"], ["y"], name="product"),
        ],
        "network",
        [helper.make_tensor_value_info("x", TensorProto.INT64, (1, 7))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(matrix, "matrix")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    indices = np.array([[0, 3, 50, 100, 150, 198, 199]])

    made = emitted(model, "dynamic-int8")
    actual = outputs(made, indices)

    assert sorted(stored(made, "INT8")) == [(48, 24), (200, 24)]
    expected = table[indices] @ matrix
    # Relative to each row's own size, which spans three decades: a table with one scale would lose the small ones.
    error = np.abs(actual - expected).max(axis=-1) / np.abs(expected).max(axis=-1)
    assert error[0, -3:].max() < 0.03
    assert error.max() < 0.03


def test_scales_of_a_plan_are_those_of_the_file() -> None:
    weight = RNG.standard_normal((32, 16, 3, 3)).astype(np.float32)
    scales = tuple(float(np.float32(number)) for number in np.linspace(0.01, 0.02, 32))
    plan = QuantizationPlan(
        activations={},
        weights={"w": WeightQuantization(scales=scales, axis=0, num_bits=8)},
        method="minmax",
        calibration_hash="",
        num_samples=0,
        mode="dynamic",
    )

    hybrid = emitted(conv(weight), "dynamic-int8", plan)
    folded = emitted(conv(weight), "dynamic-int8", replace(plan, mode="weight-only"))

    for made in (hybrid, folded):
        tensors = made.model.main.tensors.values()
        (tensor,) = [one for one in tensors if one.type == "INT8" and one.constant is not None]
        assert tensor.quantization is not None
        assert tensor.quantization.scales == scales
    assert (kinds(hybrid)["DEQUANTIZE"], kinds(folded)["DEQUANTIZE"]) == (0, 1)
    spread = np.array(scales, np.float32).reshape(-1, 1, 1, 1)
    integers = np.clip(np.rint(weight / spread), -127, 127)
    expected = outputs(emitted(conv((integers * spread).astype(np.float32)), "fp32"))
    np.testing.assert_array_equal(outputs(folded), expected)


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_factor_behind_integer_weights_moves_into_their_scales(sign: int) -> None:
    weight = RNG.integers(-127, 128, (32, 16, 3, 3)).astype(np.int8)
    factors = (sign * np.linspace(0.5, 2, 32)).astype(np.float32)
    model = proto_of(
        [
            helper.make_node("DequantizeLinear", ["w", "s"], ["wr"]),
            helper.make_node("Conv", ["x", "wr"], ["c"], name="conv"),
            helper.make_node("BatchNormalization", ["c", "f", "zero", "zero", "one"], ["b"], name="bn", epsilon=0.0),
            helper.make_node("GlobalAveragePool", ["b"], ["y"]),
        ],
        inputs={"x": X.shape},
        outputs={"y": (1, 32, 1, 1)},
        weights={
            "w": weight,
            "s": np.float32(0.01),
            "f": factors,
            "zero": np.zeros(32, np.float32),
            "one": np.ones(32, np.float32),
        },
    )

    made = emitted(model, "fp32")

    assert kinds(made)["MUL"] == 0
    # A scale is positive: below zero the weight is stored in float rather than wrong.
    assert len(stored(made, "INT8")) == (1 if sign > 0 else 0)
    real = conv((weight * np.float32(0.01) * factors.reshape(-1, 1, 1, 1)).astype(np.float32))
    expected = outputs(emitted(real, "fp32")).mean(axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(outputs(made), expected, rtol=1e-4, atol=1e-4)


def test_parts_of_a_weight_in_half_precision_stay_halves() -> None:
    weight = RNG.standard_normal((16, 16, 3, 3)).astype(np.float16)
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], name="conv", group=2)

    made = emitted(network(node, {"w": weight}, X.astype(np.float16)), "fp32")

    assert stored(made, "FLOAT16") == [(16, 3, 3, 8)] * 2


def test_part_of_a_constant_keeps_the_scales_of_its_indices() -> None:
    scales = Quantization(scales=(0.5, 1.0, 2.0), zero_points=(1, 2, 3), axis=0)
    whole = replace(Constant.of(np.ones((3, 4), np.float32)), grid=Grid(type="INT8", quantization=scales))

    rows, columns = whole.sliced(0, 1, 2), whole.sliced(1, 0, 2)

    assert rows.grid == Grid(type="INT8", quantization=replace(scales, scales=(1.0, 2.0), zero_points=(2, 3)))
    assert (rows.array().shape, columns.array().shape, columns.grid) == ((2, 4), (3, 2), whole.grid)
