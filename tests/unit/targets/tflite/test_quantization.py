"""QuantizeLinear and its family in forms that the official cases lack; they feed scales, which models keep constant."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import TargetError
from tests.tflite_runs import assert_same_as_ort, emitted, kinds, litert_outputs, one_node

pytest.importorskip("ai_edge_litert")

Array = npt.NDArray[Any]
RNG = np.random.default_rng(0)
X = RNG.uniform(-4, 4, (2, 6, 5)).astype(np.float32)
TYPES = {np.int8: 7, np.uint8: 130, np.int16: 0, np.uint16: 32000}
PROTO = {
    np.int8: TensorProto.INT8, np.uint8: TensorProto.UINT8, np.int16: TensorProto.INT16, np.uint16: TensorProto.UINT16,
}  # fmt: skip
INT4 = helper.make_tensor("w", TensorProto.INT4, (4, 6), [number % 16 - 8 for number in range(24)])


def quantized(dtype: Any, scale: Array, zero_point: Array, **attributes: Any) -> onnx.ModelProto:
    return one_node(
        "QuantizeLinear",
        {"x": X},
        constants={"scale": scale, "zero_point": zero_point},
        output_type=PROTO[dtype],
        opset=21,
        **attributes,
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_one_constant_scale_is_one_operator_where_litert_has_the_type(dtype: Any) -> None:
    model = assert_same_as_ort(
        quantized(dtype, np.float32(0.03125), dtype(TYPES[dtype])), {"x": X}, relative=0, absolute=0
    )

    assert kinds(model) == ["QUANTIZE"] if dtype != np.uint16 else "QUANTIZE" not in kinds(model)


@pytest.mark.parametrize("shape", [(), (3,)], ids=["scalar", "vector"])
@pytest.mark.parametrize("axis", [None, 3])
def test_one_scale_for_all_has_no_axis(shape: tuple[int, ...], axis: int | None) -> None:
    attributes = {} if axis is None else {"axis": axis}
    parameters = {"scale": np.float32(0.25), "zero_point": np.int8(3)}
    x = RNG.uniform(-4, 4, shape).astype(np.float32)
    integers = RNG.integers(-9, 9, shape).astype(np.int8)
    there = one_node(
        "QuantizeLinear", {"x": x}, constants=parameters, output_type=TensorProto.INT8, opset=21, **attributes
    )
    back = one_node("DequantizeLinear", {"x": integers}, constants=parameters, opset=21, **attributes)

    assert_same_as_ort(there, {"x": x}, relative=0, absolute=0)
    assert_same_as_ort(back, {"x": integers}, relative=0, absolute=0)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_scale_for_each_index_of_an_axis_is_arithmetic(dtype: Any) -> None:
    scales = np.float32([0.5, 0.25, 0.0625, 0.03125, 0.015625, 1.0])
    zero_points = np.array([0, 1, 2, 3, 4, 5], dtype)

    assert_same_as_ort(quantized(dtype, scales, zero_points, axis=1), {"x": X}, relative=0, absolute=0)
    assert_same_as_ort(quantized(dtype, scales, zero_points, axis=-2), {"x": X}, relative=0, absolute=0)


def test_scales_of_blocks_are_arithmetic() -> None:
    scales = np.exp2(RNG.integers(-5, 1, (2, 3, 5))).astype(np.float32)
    zero_points = RNG.integers(-9, 9, (2, 3, 5)).astype(np.int8)

    assert_same_as_ort(quantized(np.int8, scales, zero_points, axis=1, block_size=2), {"x": X}, relative=0, absolute=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_integers_become_real_again(dtype: Any) -> None:
    limits = np.iinfo(dtype)
    integers = RNG.integers(limits.min, limits.max, (3, 4), endpoint=True).astype(dtype)
    model = one_node(
        "DequantizeLinear",
        {"x": integers},
        constants={"scale": np.float32(0.1), "zero_point": dtype(TYPES[dtype])},
        opset=21,
    )

    made = assert_same_as_ort(model, {"x": integers}, relative=1e-6, absolute=1e-6)

    assert kinds(made) == ["DEQUANTIZE"] if dtype != np.uint16 else "DEQUANTIZE" not in kinds(made)


def test_two_readings_of_the_same_integers_keep_their_own_scales() -> None:
    integers = np.arange(-6, 6, dtype=np.int8)
    constants = {"s": np.float32(0.5), "t": np.float32(0.25), "z": np.int8(3)}
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["x", "s", "z"], ["a"], name="a"),
            helper.make_node("DequantizeLinear", ["x", "t", "z"], ["b"], name="b"),
        ],
        "two",
        [helper.make_tensor_value_info("x", TensorProto.INT8, (12,))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, (12,)) for name in "ab"],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    assert_same_as_ort(model, {"x": integers}, relative=0, absolute=0)


def test_constant_of_four_bits_is_computed_here() -> None:
    x = RNG.standard_normal((3, 4)).astype(np.float32)
    scales = np.float32([0.1, 0.2, 0.3, 0.4])
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "s"], ["real"], axis=0, name="weight"),
            helper.make_node("MatMul", ["x", "real"], ["y"], name="product"),
        ],
        "four bits",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (3, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (3, 6))],
        [INT4, numpy_helper.from_array(scales, "s")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    made = assert_same_as_ort(model, {"x": x}, relative=1e-5, absolute=1e-5)

    assert kinds(made) == ["FULLY_CONNECTED"]


def test_constants_that_are_rounded_in_the_graph_are_rounded_here() -> None:
    weight = RNG.standard_normal((5, 3)).astype(np.float32)
    x = RNG.standard_normal((2, 5)).astype(np.float32)
    constants = {"w": weight, "s": np.float32([0.01, 0.02, 0.03]), "z": np.zeros(3, np.int8)}
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["w", "s", "z"], ["integers"], axis=1, name="rounded"),
            helper.make_node("DequantizeLinear", ["integers", "s", "z"], ["real"], axis=1, name="real"),
            helper.make_node("MatMul", ["x", "real"], ["y"], name="product"),
        ],
        "rounded",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 5))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 3))],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    made = emitted(model)

    assert kinds(made) == ["FULLY_CONNECTED"]
    # Not ONNX Runtime's optimized result, which is 0.7% off what it computes without optimization.
    expected = x @ (np.clip(np.rint(weight / constants["s"]), -128, 127) * constants["s"])
    np.testing.assert_allclose(litert_outputs(made, {"x": x})["y"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("terms", [100, 1000])
def test_sums_of_integer_products_are_exact(terms: int) -> None:
    left = RNG.integers(0, 256, (3, terms)).astype(np.uint8)
    right = RNG.integers(-128, 128, (terms, 4)).astype(np.int8)
    feeds = {"left": left, "right": right}
    model = one_node(
        "MatMulInteger",
        feeds,
        constants={"left_zero": np.uint8(3), "right_zero": np.int8(-2)},
        output_type=TensorProto.INT32,
        opset=21,
    )

    result = litert_outputs(emitted(model), feeds)["y"]

    np.testing.assert_array_equal(result, (left.astype(np.int64) - 3) @ (right.astype(np.int64) + 2))


def test_sums_beyond_exact_numbers_are_refused() -> None:
    feeds = {"left": np.zeros((1, 5000), np.uint8), "right": np.zeros((5000, 1), np.int8)}
    model = one_node("MatMulInteger", feeds, output_type=TensorProto.INT32, opset=21)

    with pytest.raises(TargetError, match="its sums of 5000 products can leave the whole numbers of FLOAT32"):
        emitted(model)


def test_range_of_zeros_alone_has_the_scale_one() -> None:
    x = np.zeros((2, 3), np.float32)
    graph = helper.make_graph(
        [helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero_point"], name="range")],
        "zeros",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 3))],
        [
            helper.make_tensor_value_info("y", TensorProto.UINT8, (2, 3)),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, ()),
            helper.make_tensor_value_info("zero_point", TensorProto.UINT8, ()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    assert_same_as_ort(model, {"x": x}, relative=0, absolute=0)
