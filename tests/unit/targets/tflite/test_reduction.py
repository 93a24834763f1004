"""Reductions beyond the official cases: constant and computed axes, open batches, integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxprune.errors import TargetError

pytest.importorskip("ai_edge_litert")

from tests.tflite_runs import assert_same_as_ort, emitted, kinds, litert_outputs, one_node
from tests.unit.targets.tflite.test_elementwise import integers, spread

FLOAT_REDUCTIONS = [
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
]  # fmt: skip
# Kernels add in another order.
SUMMED = {"relative": 2e-5, "absolute": 1e-6}


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("op_type", FLOAT_REDUCTIONS)
def test_constant_axes_with_an_open_batch(op_type: str, keepdims: int) -> None:
    feeds = {"x": np.abs(spread(shape=(2, 3, 4, 5))) / 4 + 0.3}
    model = one_node(op_type, feeds, constants={"axes": np.array([-1, 1])}, dynamic={"x": (0,)}, keepdims=keepdims)
    assert_same_as_ort(model, feeds, **SUMMED)


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("op_type", FLOAT_REDUCTIONS)
def test_axes_that_the_run_computes(op_type: str, keepdims: int) -> None:
    feeds = {"x": np.abs(spread(shape=(2, 3, 4))) / 4 + 0.3, "axes": np.array([2, 0])}
    assert_same_as_ort(one_node(op_type, feeds, keepdims=keepdims), feeds, **SUMMED)


def test_an_open_number_of_computed_axes_is_refused() -> None:
    feeds = {"x": spread(), "axes": np.array([1])}
    model = one_node("ReduceSum", feeds, dynamic={"axes": (0,)})
    with pytest.raises(TargetError, match="none may mean all"):
        emitted(model)


@pytest.mark.parametrize(
    ("op_type", "function"), [("ReduceSumSquare", np.square), ("ReduceL1", np.abs), ("ReduceLogSum", np.log)]
)
def test_without_axes_nothing_is_reduced_but_the_function_is_applied(op_type: str, function: Any) -> None:
    x = np.abs(spread()) + 0.1
    made = litert_outputs(emitted(one_node(op_type, {"x": x}, noop_with_empty_axes=1)), {"x": x})["y"]
    # One logarithm of XNNPACK against one of NumPy.
    np.testing.assert_allclose(made, function(x), rtol=1e-6, atol=2e-7)


def test_all_axes_of_a_tensor_with_open_sides_are_reduced() -> None:
    feeds = {"x": spread(shape=(2, 3, 4, 5))}
    model = one_node("ReduceMean", feeds, dynamic={"x": (0, 2, 3)}, keepdims=0)
    assert_same_as_ort(model, feeds, **SUMMED)


def test_spatial_means_with_open_sides_drop_their_axes() -> None:
    feeds = {"x": spread(shape=(2, 3, 4, 5))}
    constants = {"axes": np.array([3])}
    model = one_node("ReduceMax", feeds, constants=constants, dynamic={"x": (0, 2)}, keepdims=0)
    assert_same_as_ort(model, feeds, relative=0, absolute=0)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("op_type", ["ReduceSum", "ReduceMax", "ReduceMin", "ReduceSumSquare"])
def test_integers_keep_their_type_and_wrap_around(op_type: str, dtype: type[np.generic]) -> None:
    x = integers(dtype, 1)
    functions: dict[str, Any] = {
        "ReduceSum": lambda x: x.sum(1, dtype=dtype, keepdims=True),
        "ReduceMax": lambda x: x.max(1, keepdims=True),
        "ReduceMin": lambda x: x.min(1, keepdims=True),
        "ReduceSumSquare": lambda x: (x * x).sum(1, dtype=dtype, keepdims=True),
    }
    type_ = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = one_node(op_type, {"x": x}, constants={"axes": np.array([1])}, output_type=type_)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(litert_outputs(emitted(model), {"x": x})["y"], functions[op_type](x))


def test_products_of_64_bits_wrap_around_with_all_their_digits() -> None:
    x = np.array([[2**40 + 1, 2**20 + 1, 1], [3**20, 3**19, -1], [2**62 + 3, 5, 7]])
    model = one_node("ReduceProd", {"x": x}, constants={"axes": np.array([1])}, output_type=TensorProto.INT64)
    expected = [[np.int64(((a * b * c) + 2**63) % 2**64 - 2**63)] for a, b, c in x.tolist()]
    np.testing.assert_array_equal(litert_outputs(emitted(model), {"x": x})["y"], expected)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
def test_means_of_integers_are_cut_off_and_exact_while_64_bits_hold_the_sum(dtype: type[np.generic]) -> None:
    largest = min(int(np.iinfo(dtype).max), 2**62 - 3)
    rows = [[largest, largest - 1, 5], [3, 4, 4]]
    if dtype is not np.uint32:
        rows += [[-7, 1, 1], [-largest, -largest + 1, 0]]
    x = np.array(rows, dtype)
    type_ = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = one_node("ReduceMean", {"x": x}, constants={"axes": np.array([1])}, output_type=type_)
    expected = [[int(abs(sum(row)) // 3) * (1 if sum(row) >= 0 else -1)] for row in rows]
    np.testing.assert_array_equal(litert_outputs(emitted(model), {"x": x})["y"], np.array(expected, dtype))


def test_logarithms_of_sums_survive_infinities_and_large_numbers() -> None:
    feeds = {"x": np.array([[-np.inf, -np.inf], [np.inf, 1], [1000, 1000], [-1000, -1001]], np.float32)}
    model = one_node("ReduceLogSumExp", feeds, constants={"axes": np.array([1])})
    made = litert_outputs(emitted(model), feeds)["y"].ravel()
    np.testing.assert_allclose(made, [-np.inf, np.inf, 1000 + np.log(2), -1000 + np.log1p(np.exp(-1))], rtol=1e-6)


def test_a_mean_over_space_is_one_operator_and_a_reshape() -> None:
    feeds = {"x": spread(shape=(2, 3, 4, 5))}
    model = one_node("ReduceMean", feeds, constants={"axes": np.array([2, 3])}, dynamic={"x": (0,)}, keepdims=0)
    assert kinds(assert_same_as_ort(model, feeds, **SUMMED)) == ["MEAN", "RESHAPE"]


def test_norms_of_integers_are_refused() -> None:
    model = one_node("ReduceL2", {"x": integers(np.int32, 1)}, output_type=TensorProto.INT32)
    with pytest.raises(TargetError, match="no kernel for INT32"):
        emitted(model)
