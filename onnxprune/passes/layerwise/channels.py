"""A layer's weight seen by its channels: [group, output, input, kernel position], whatever the operator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.graph.weights import constant_array
from onnxprune.ops.layout import weight_axes

__all__ = [
    "input_magnitudes",
    "is_depthwise",
    "layer_weight",
    "output_magnitudes",
    "scale_inputs",
    "scale_outputs",
    "summed_kernel",
]

Array = npt.NDArray[Any]


def layer_weight(node: ir.Node) -> ir.Value | None:
    """The constant weight of `node` if it is a layer whose channels this file knows, else None."""
    axes = weight_axes(node)
    if axes is None or axes.in_axis is None or axes.out_axis is None or node.domain not in ("", "ai.onnx"):
        return None
    weight = node.inputs[axes.weight_input]
    array = constant_array(weight)
    if weight is None or array is None or array.dtype != np.float32:
        return None
    if node.op_type in ("Conv", "ConvTranspose"):
        return weight
    is_plain = node.op_type in ("Gemm", "MatMul") and array.ndim == 2 and axes.weight_input == 1
    return weight if is_plain and not node.attributes.get_int("transA", 0) else None


def is_depthwise(node: ir.Node) -> bool:
    """True for a convolution in which every input channel has filters of its own."""
    weight = constant_array(layer_weight(node))
    return node.op_type == "Conv" and weight is not None and weight.shape[1] == 1 and weight.shape[0] > 1


def output_magnitudes(node: ir.Node, weight: Array) -> Array:
    """The largest absolute weight of each output channel."""
    found: Array = np.abs(_view(node, weight)).max(axis=(2, 3)).reshape(-1)
    return found


def input_magnitudes(node: ir.Node, weight: Array) -> Array:
    """The largest absolute weight that each input channel meets."""
    found: Array = np.abs(_view(node, weight)).max(axis=(1, 3)).reshape(-1)
    return found


def scale_outputs(node: ir.Node, weight: Array, factors: Array) -> Array:
    """`weight` with each output channel multiplied."""
    view = _view(node, weight)
    return _from_view(node, view * factors.reshape(view.shape[0], -1, 1, 1), weight.shape)


def scale_inputs(node: ir.Node, weight: Array, factors: Array) -> Array:
    """`weight` with what each input channel meets multiplied."""
    view = _view(node, weight)
    return _from_view(node, view * factors.reshape(view.shape[0], 1, -1, 1), weight.shape)


def summed_kernel(node: ir.Node, weight: Array, inputs: Array) -> Array:
    """What each output channel gives for an input that is `inputs` (one number a channel) everywhere."""
    view = _view(node, weight).astype(np.float64)
    found: Array = np.einsum("goik,gi->go", view, inputs.reshape(view.shape[0], -1)).reshape(-1)
    return found


def _view(node: ir.Node, weight: Array) -> Array:
    if node.op_type == "Conv":
        groups = node.attributes.get_int("group", 1)
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:]))
    if node.op_type == "ConvTranspose":
        groups = node.attributes.get_int("group", 1)
        split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:]))
        return split.transpose(0, 2, 1, 3)
    matrix = weight.T if _inputs_first(node) else weight
    return matrix[np.newaxis, :, :, np.newaxis]


def _from_view(node: ir.Node, view: Array, shape: tuple[int, ...]) -> Array:
    if node.op_type == "Conv":
        return view.reshape(shape)
    if node.op_type == "ConvTranspose":
        return np.ascontiguousarray(view.transpose(0, 2, 1, 3)).reshape(shape)
    matrix = view[0, :, :, 0]
    return np.ascontiguousarray(matrix.T if _inputs_first(node) else matrix)


def _inputs_first(node: ir.Node) -> bool:
    axes = weight_axes(node)
    return axes is not None and axes.in_axis == 0
