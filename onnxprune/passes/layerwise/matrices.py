"""Layers as matrix products: Y = X W^T for each group, whatever the operator.

Shapes, with G groups, O outputs and K inputs of a group, n rows (a row is one position of one sample):

    X [G, n, K]    W [G, O, K]    Y [G, n, O]

For a convolution K counts channels and kernel positions, (in/group, kH, kW) flattened; a depthwise one has as many
groups as channels and K = kH * kW. Positions are sampled: neighbouring ones say nearly the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import WeightQuantization
from onnxprune.graph.weights import constant_array
from onnxprune.ops.layout import weight_axes

__all__ = ["LayerMatrix", "channel_axis_of_output", "layer_matrix", "output_channels"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMatrix:
    """A layer's geometry. `weight_shape` is that of the stored tensor; `is_transposed` says that it is (K, O)."""

    node: ir.Node
    groups: int
    outputs: int
    inputs: int
    weight_shape: tuple[int, ...]
    is_transposed: bool
    input_scale: float = 1.0
    """Gemm's alpha."""

    def to_matrix(self, weight: Array) -> Array:
        """The stored weight as [G, O, K]."""
        if self.is_transposed:
            weight = weight.T
        return weight.reshape(self.groups, self.outputs, self.inputs)

    def from_matrix(self, matrix: Array) -> Array:
        """[G, O, K] as it is stored."""
        if self.is_transposed:
            return np.ascontiguousarray(matrix[0].T)
        return matrix.reshape(self.weight_shape)

    def scales(self, quantization: WeightQuantization) -> Array:
        """The step of each output, [G, O]."""
        scales = np.asarray(quantization.scales, dtype=np.float32)
        if quantization.axis is None:
            return np.broadcast_to(scales.reshape(1, 1), (self.groups, self.outputs)).copy()
        return scales.reshape(self.groups, self.outputs)

    def rows(self, data: Array, output: Array, max_rows: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """X [G, n, K] and Y [G, n, O] at no more than `max_rows` positions, drawn from all samples alike.

        Args:
            data: The layer's input, batch first.
            output: What the layer is to give there.
            max_rows: Positions in all.
            rng: Draws the positions.
        """
        if self.node.op_type == "Conv":
            return self._conv_rows(data, output, max_rows, rng)
        x = data.reshape(-1, self.inputs) * np.float32(self.input_scale)
        y = output.reshape(-1, self.outputs)
        chosen = _chosen(len(x), max_rows, rng)
        return x[np.newaxis, chosen], y[np.newaxis, chosen]

    def _conv_rows(self, data: Array, output: Array, max_rows: int, rng: np.random.Generator) -> tuple[Array, Array]:
        batch, channels = data.shape[:2]
        window = _Window.of(self.node, self.weight_shape[2:], data.shape[2:], output.shape[2:])
        chosen = _chosen(math.prod(output.shape[2:]), max(1, max_rows // batch), rng)
        padded = np.pad(data, [(0, 0), (0, 0), *window.pads])
        flat = padded.reshape(batch, channels, -1)
        # (batch, channels, positions, kernel) -> (batch, positions, channels, kernel)
        patches = flat[:, :, window.indices(chosen, padded.shape[2:])].transpose(0, 2, 1, 3)
        x = patches.reshape(-1, self.groups, self.inputs).transpose(1, 0, 2)
        y = output.reshape(batch, self.groups * self.outputs, -1)[:, :, chosen].transpose(0, 2, 1)
        y = y.reshape(-1, self.groups, self.outputs).transpose(1, 0, 2)
        return np.ascontiguousarray(x), np.ascontiguousarray(y)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """Where the windows of a convolution lie in its padded input."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    output: tuple[int, ...]

    @classmethod
    def of(cls, node: ir.Node, kernel: tuple[int, ...], given: tuple[int, ...], output: tuple[int, ...]) -> _Window:
        rank = len(kernel)
        strides = tuple(node.attributes.get_ints("strides", [1] * rank))
        dilations = tuple(node.attributes.get_ints("dilations", [1] * rank))
        pads = list(node.attributes.get_ints("pads", [0] * 2 * rank))
        mode = node.attributes.get_string("auto_pad", "NOTSET")
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            for axis in range(rank):
                span = (output[axis] - 1) * strides[axis] + (kernel[axis] - 1) * dilations[axis] + 1
                total = max(span - given[axis], 0)
                # The odd one goes to the end, or to the beginning with SAME_LOWER.
                small, large = total // 2, total - total // 2
                pads[axis], pads[rank + axis] = (small, large) if mode == "SAME_UPPER" else (large, small)
        return cls(
            kernel=kernel,
            strides=strides,
            dilations=dilations,
            pads=tuple((pads[axis], pads[rank + axis]) for axis in range(rank)),
            output=output,
        )

    def indices(self, positions: Array, padded: tuple[int, ...]) -> Array:
        """Flat places in the padded input, [positions, kernel], of the windows at flat output `positions`."""
        steps = [math.prod(padded[axis + 1 :]) for axis in range(len(padded))]
        corner = np.unravel_index(positions, self.output)
        offset = np.unravel_index(np.arange(math.prod(self.kernel)), self.kernel)
        starts = sum(corner[axis] * self.strides[axis] * steps[axis] for axis in range(len(steps)))
        shifts = sum(offset[axis] * self.dilations[axis] * steps[axis] for axis in range(len(steps)))
        found: Array = np.asarray(starts)[:, np.newaxis] + np.asarray(shifts)[np.newaxis]
        return found


def layer_matrix(node: ir.Node) -> LayerMatrix | str:
    """The geometry of `node`, or why it can't be written as a matrix product."""
    axes = weight_axes(node)
    weight = node.inputs[axes.weight_input] if axes is not None else None
    array = constant_array(weight)
    if axes is None or array is None:
        return "it has no constant weight"
    shape = tuple(array.shape)
    if node.op_type == "Conv":
        groups = node.attributes.get_int("group", 1)
        return LayerMatrix(
            node=node,
            groups=groups,
            outputs=shape[0] // groups,
            inputs=math.prod(shape[1:]),
            weight_shape=shape,
            is_transposed=False,
        )
    if node.op_type not in ("Gemm", "MatMul"):
        return f"{node.op_type} is not written as a matrix product here"
    if len(shape) != 2 or axes.weight_input != 1:
        return "its weight is not a plain matrix on the right"
    if node.attributes.get_int("transA", 0):
        return "its input is transposed"
    is_transposed = axes.out_axis == 1
    return LayerMatrix(
        node=node,
        groups=1,
        outputs=shape[1] if is_transposed else shape[0],
        inputs=shape[0] if is_transposed else shape[1],
        weight_shape=shape,
        is_transposed=is_transposed,
        input_scale=node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0,
    )


def channel_axis_of_output(node: ir.Node) -> int:
    """The axis of the output that holds output channels."""
    return 1 if node.op_type in ("Conv", "ConvTranspose") else -1


def output_channels(node: ir.Node) -> int | None:
    """Output channels of a layer with a constant weight; None where no axis of the weight enumerates them."""
    axes = weight_axes(node)
    if axes is None or axes.out_axis is None:
        return None
    array = constant_array(node.inputs[axes.weight_input])
    if array is None:
        return None
    groups = node.attributes.get_int("group", 1) if node.op_type == "ConvTranspose" else 1
    return int(array.shape[axes.out_axis]) * groups


def _chosen(count: int, wanted: int, rng: np.random.Generator) -> Array:
    if count <= wanted:
        return np.arange(count)
    return np.sort(rng.choice(count, size=wanted, replace=False))
