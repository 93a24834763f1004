"""Where operators keep their weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from onnxprune.ops.layout import WeightAxes, weight_axes, weight_of
from tests.builders import canonical, proto_of


def node_of(op_type: str, inputs: dict[str, Any], weights: dict[str, tuple[int, ...]], order: str, **attributes: Any):
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in weights.items()}
    node = helper.make_node(op_type, order.split(), ["y"], name="n", **attributes)
    model = canonical(proto_of([node], inputs=inputs, outputs={"y": None}, weights=arrays))
    return model.graph[0]


@pytest.mark.parametrize(
    ("op_type", "data", "weight", "order", "attributes", "expected"),
    [
        ("Conv", [1, 3, 4, 4], (8, 3, 1, 1), "x w", {}, (1, 0, 1)),
        ("ConvTranspose", [1, 3, 4, 4], (3, 8, 1, 1), "x w", {}, (1, 1, 0)),
        ("Gemm", [2, 3], (3, 8), "x w", {}, (1, 1, 0)),
        ("Gemm", [2, 3], (8, 3), "x w", {"transB": 1}, (1, 0, 1)),
        ("MatMul", [5, 2, 3], (3, 8), "x w", {}, (1, 1, 0)),
        ("MatMul", [5, 2, 3], (5, 3, 8), "x w", {}, (1, 2, 1)),
        ("MatMul", [5, 3, 2], (8, 3), "w x", {}, (0, 0, 1)),
        ("MatMul", [5, 3], (3,), "x w", {}, (1, None, 0)),
    ],
)
def test_weight_axes_follow_the_attributes_and_the_side_of_the_constant(
    op_type: str,
    data: list[int],
    weight: tuple[int, ...],
    order: str,
    attributes: dict[str, int],
    expected: tuple[int, int | None, int],
) -> None:
    node = node_of(op_type, {"x": data}, {"w": weight}, order, **attributes)
    position, out_axis, in_axis = expected
    assert weight_axes(node) == WeightAxes(weight_input=position, out_axis=out_axis, in_axis=in_axis)
    assert weight_of(node) is node.inputs[position]


def test_a_product_of_activations_has_no_weight() -> None:
    node = node_of("MatMul", {"a": [2, 3], "b": [3, 4]}, {}, "a b")
    assert weight_of(node) is None


def test_an_operator_without_weights_has_no_axes() -> None:
    assert weight_axes(node_of("Relu", {"x": [2, 3]}, {}, "x")) is None
