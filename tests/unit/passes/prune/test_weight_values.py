"""Weights are ranked by the numbers that they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.errors import ModelError
from onnxprune.passes.prune.weight_values import real_values, scales_others
from onnxprune.runtime.sessions import ort_runner_from_model
from tests.builders import canonical, proto_of

INTEGERS = np.arange(-12, 12, dtype=np.int8).reshape(4, 6)


def quantized(*parameters: npt.NDArray[Any], **attributes: int) -> ir.Model:
    """x [N,6] x DequantizeLinear(w [4,6]) with scale and zero point "p0", "p1"."""
    names = [f"p{index}" for index in range(len(parameters))]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", *names], ["real"], name="dq", **attributes),
        helper.make_node("Gemm", ["x", "real"], ["y"], name="gemm", transB=1),
    ]
    weights = {"w": INTEGERS, **dict(zip(names, parameters, strict=True))}
    return canonical(proto_of(nodes, inputs={"x": ["N", 6]}, outputs={"y": None}, weights=weights, opset=21))


@pytest.mark.parametrize(
    ("parameters", "attributes"),
    [
        ((np.float32(0.5),), {}),
        ((np.float32(0.5), np.int8(3)), {}),
        ((np.array([1, 10, 100, 1000], np.float32),), {"axis": 0}),
        ((np.array([1, 2, 3, 4, 5, 6], np.float32), np.arange(6, dtype=np.int8)), {"axis": 1}),
        ((np.array([[1, 2], [3, 4], [5, 6], [7, 8]], np.float32),), {"axis": 1, "block_size": 3}),
        ((np.array([[1, 2], [3, 4], [5, 6], [7, 8]], np.float32),), {"axis": 1, "block_size": 4}),
    ],
    ids=["one scale", "one zero point", "per row", "per column", "blocks", "a last block that is not full"],
)
def test_quantized_weights_count_as_what_the_runtime_makes_of_them(
    parameters: tuple[Any, ...], attributes: dict[str, int]
) -> None:
    model = quantized(*(np.asarray(array) for array in parameters), **attributes)
    expected = ort_runner_from_model(model, extra_outputs=["real"]).run({"x": np.zeros((1, 6), np.float32)})["real"]
    np.testing.assert_array_equal(real_values(model.graph.initializers["w"]), expected)


def test_scales_and_zero_points_are_not_weights_of_their_own() -> None:
    initializers = quantized(np.ones(4, np.float32), np.zeros(4, np.int8), axis=0).graph.initializers
    assert [name for name, value in initializers.items() if scales_others(value)] == ["p0", "p1"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], name="gemm")]
    weights = {"w": np.array([[1.0], [bad]], np.float32)}
    model = canonical(proto_of(nodes, inputs={"x": ["N", 2]}, outputs={"y": None}, weights=weights))
    with pytest.raises(ModelError, match="channels of 'w': it holds values that are NaN or infinite"):
        real_values(model.graph.initializers["w"])
