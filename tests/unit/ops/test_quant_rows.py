"""What no runtime may make integer: nodes that look like others."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.ops.quant import QUANT, pools_everything
from tests.builders import canonical, proto_of


def node_of(*args: Any, weights: dict[str, np.ndarray], inputs: dict[str, list[int]], **attributes: Any) -> ir.Node:
    op_type, names = args
    proto = proto_of(
        [helper.make_node(op_type, names, ["y"], name="node", **attributes)],
        inputs=inputs,
        outputs={"y": [None] * len(inputs["x"])},
        weights=weights,
    )
    return next(iter(canonical(proto).graph))


def refusal(node: ir.Node) -> str | None:
    row = QUANT.get(node)
    assert row is not None
    return row.refuses(node)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((4,), None),
        ((1, 4), None),
        ((1,), None),
        ((4, 1), "its bias differs from row to row"),
        ((4, 4), "its bias differs from row to row"),
    ],
)
def test_gemm_with_a_bias_for_each_row_stays_float_even_where_rows_are_as_many_as_channels(
    shape: tuple[int, ...], reason: str | None
) -> None:
    weights = {"w": np.ones((8, 4), np.float32), "c": np.ones(shape, np.float32)}
    assert refusal(node_of("Gemm", ["x", "w", "c"], weights=weights, inputs={"x": [4, 8]})) == reason


@pytest.mark.parametrize(("auto_pad", "is_global"), [("NOTSET", True), ("VALID", True), ("SAME_UPPER", False)])
def test_a_window_over_the_whole_input_is_a_global_pooling_only_without_padding(auto_pad: str, is_global: bool) -> None:
    node = node_of("AveragePool", ["x"], weights={}, inputs={"x": [1, 2, 4, 4]}, kernel_shape=[4, 4], auto_pad=auto_pad)
    assert pools_everything(node) is is_global


def test_a_quotient_of_two_activations_stays_float() -> None:
    node = node_of("Div", ["x", "z"], weights={}, inputs={"x": [2, 2], "z": [2, 2]})
    assert refusal(node) == "its divisor is computed at run time"
