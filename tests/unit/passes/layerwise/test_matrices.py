"""A layer written as a matrix product gives what ONNX Runtime gives, at the sampled positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from onnxprune.contracts import WeightQuantization
from onnxprune.graph.weights import constant_array
from onnxprune.ops.layout import weight_of
from onnxprune.passes.layerwise.matrices import LayerMatrix, layer_matrix
from tests.builders import canonical, proto_of
from tests.layerwise import normal, outputs

CASES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1x1": ("Conv", (2, 4, 6, 6), (5, 4, 1, 1), {}),
    "strided, padded, dilated": (
        "Conv",
        (2, 4, 9, 8),
        (5, 4, 3, 2),
        {"strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [1, 2]},
    ),
    "same upper": ("Conv", (2, 4, 7, 7), (5, 4, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "same lower": ("Conv", (2, 4, 8, 8), (5, 4, 4, 4), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "grouped": ("Conv", (2, 4, 6, 6), (6, 2, 3, 3), {"group": 2}),
    "depthwise": ("Conv", (2, 4, 6, 6), (8, 1, 3, 3), {"group": 4, "pads": [1] * 4}),
    "one-dimensional": ("Conv", (2, 4, 9), (5, 4, 3), {"pads": [1, 1]}),
    "gemm": ("Gemm", (7, 4), (4, 5), {"alpha": 0.5}),
    "gemm, transposed": ("Gemm", (7, 4), (5, 4), {"transB": 1}),
    "matmul": ("MatMul", (2, 7, 4), (4, 5), {}),
}


def case_of(name: str) -> tuple[Any, np.ndarray]:
    op_type, given, shape, attributes = CASES[name]
    node = helper.make_node(op_type, ["x", "w"], ["y"], name="layer", **attributes)
    model = canonical(proto_of([node], inputs={"x": given}, outputs={"y": None}, weights={"w": normal(*shape)}))
    return model, normal(*given, seed=1, scale=1.0)


@pytest.mark.parametrize("name", CASES)
def test_rows_times_weight_are_the_outputs(name: str) -> None:
    model, data = case_of(name)
    (node,) = model.graph
    matrix = layer_matrix(node)
    assert isinstance(matrix, LayerMatrix)

    x, y = matrix.rows(data, outputs(model, {"x": data}), 10, np.random.default_rng(0))

    weight = matrix.to_matrix(constant_array(weight_of(node)))
    np.testing.assert_allclose(x @ weight.transpose(0, 2, 1), y, rtol=1e-4, atol=1e-5)
    assert x.shape[1] <= 10


@pytest.mark.parametrize("name", CASES)
def test_a_weight_comes_back_from_its_matrix(name: str) -> None:
    model, _ = case_of(name)
    (node,) = model.graph
    matrix, weight = layer_matrix(node), constant_array(weight_of(node))
    assert isinstance(matrix, LayerMatrix)
    assert np.array_equal(matrix.from_matrix(matrix.to_matrix(weight)), weight)


def test_scales_stand_beside_their_outputs() -> None:
    model, _ = case_of("grouped")
    matrix = layer_matrix(next(iter(model.graph)))
    assert isinstance(matrix, LayerMatrix)
    each = WeightQuantization(scales=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), axis=0, num_bits=8)
    assert matrix.scales(each).tolist() == [[1, 2, 3], [4, 5, 6]]
    one = WeightQuantization(scales=(0.5,), axis=None, num_bits=8)
    assert matrix.scales(one).tolist() == [[0.5] * 3] * 2


@pytest.mark.parametrize(
    ("node", "given", "shape", "reason"),
    [
        (
            helper.make_node("ConvTranspose", ["x", "w"], ["y"], name="layer"),
            (1, 4, 6, 6),
            (4, 5, 3, 3),
            "ConvTranspose is not written as a matrix product here",
        ),
        (
            helper.make_node("Gemm", ["x", "w"], ["y"], name="layer", transA=1),
            (4, 7),
            (4, 5),
            "its input is transposed",
        ),
        (
            helper.make_node("MatMul", ["w", "x"], ["y"], name="layer"),
            (4, 5),
            (3, 4),
            "its weight is not a plain matrix on the right",
        ),
    ],
    ids=["ConvTranspose", "transA", "constant on the left"],
)
def test_other_layers_are_refused_with_the_reason(
    node: Any, given: tuple[int, ...], shape: tuple[int, ...], reason: str
) -> None:
    model = canonical(proto_of([node], inputs={"x": given}, outputs={"y": None}, weights={"w": normal(*shape)}))
    assert layer_matrix(next(iter(model.graph))) == reason
