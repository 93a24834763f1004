"""Which operators let a positive factor for each channel through: f(s x) = s f(x), and nothing crosses channels.

Cross-layer equalization (Nagel et al. 2019, arXiv:1906.04721) may divide a tensor's channels before such an operator
and multiply them behind it. An operator without a row does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxprune.graph.weights import constant_array
from onnxprune.ops.quant import pooled_axes_are_spatial
from onnxprune.ops.table import OpTable

__all__ = ["HOMOGENEOUS", "HomogeneousRow", "passes_channel_factors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HomogeneousRow:
    """The data is input 0 with channels on axis 1, and so is output 0. `refuses` says why a very node is none."""

    refuses: Callable[[ir.Node], str | None] = lambda _node: None
    is_activation: bool = False
    """It works on single numbers, so that int8 runtimes compute it with the layer before it."""


HOMOGENEOUS: OpTable[HomogeneousRow] = OpTable("homogeneous")


def passes_channel_factors(node: ir.Node) -> str | None:
    """None when `node` lets a positive factor for each channel through; else the reason why not."""
    row = HOMOGENEOUS.get(node)
    if row is None:
        domain = f"{node.domain}::" if node.domain else ""
        return f"{domain}{node.op_type} does not let a factor for each channel through"
    return row.refuses(node)


def _channels(value: ir.Value | None) -> object:
    return value.shape[1] if value is not None and value.shape is not None and len(value.shape) > 1 else None


def _refuse_second_output(node: ir.Node) -> str | None:
    return "its indices are used" if any(output.uses() for output in node.outputs[1:]) else None


def _refuse_pad(node: ir.Node) -> str | None:
    known = _channels(node.inputs[0])
    if not isinstance(known, int) or known != _channels(node.outputs[0]):
        return "it pads channels, or their number is not known"
    if node.attributes.get_string("mode", "constant") != "constant" or len(node.inputs) < 3 or node.inputs[2] is None:
        return None
    value = constant_array(node.inputs[2])
    return None if value is not None and not np.any(value) else "its padding value is not zero"


def _refuse_resize(node: ir.Node) -> str | None:
    known = _channels(node.inputs[0])
    if not isinstance(known, int) or known != _channels(node.outputs[0]):
        return "it resizes channels, or their number is not known"
    if node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return "it fills what lies outside of the crop with a value of its own"
    return None


def _refuse_reduction(node: ir.Node) -> str | None:
    return None if pooled_axes_are_spatial(node) else "it does not reduce exactly the spatial axes"


def _refuse_reshape(node: ir.Node) -> str | None:
    """[N, C, 1, 1] to [N, C] and back moves no channel."""
    shapes = [
        value.shape for value in (node.inputs[0], node.outputs[0]) if value is not None and value.shape is not None
    ]
    if len(shapes) != 2:
        return "its shapes are not known"
    given, made = (list(shape)[1:] for shape in shapes)
    is_same = bool(given and made) and isinstance(given[0], int) and given[0] == made[0]
    if is_same and all(dim == 1 for dim in (*given[1:], *made[1:])):
        return None
    return "it may move numbers between channels"


def _register_rows() -> None:
    HOMOGENEOUS.add(HomogeneousRow(is_activation=True), "Relu", "LeakyRelu", "PRelu")
    HOMOGENEOUS.add(HomogeneousRow(), "Identity", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
    HOMOGENEOUS.add(HomogeneousRow(refuses=_refuse_second_output), "MaxPool", "Dropout")
    HOMOGENEOUS.add(HomogeneousRow(refuses=_refuse_pad), "Pad")
    HOMOGENEOUS.add(HomogeneousRow(refuses=_refuse_resize), "Resize")
    HOMOGENEOUS.add(HomogeneousRow(refuses=_refuse_reduction), "ReduceMean", "ReduceMax")
    HOMOGENEOUS.add(HomogeneousRow(refuses=_refuse_reshape), "Flatten", "Reshape", "Squeeze")


_register_rows()
