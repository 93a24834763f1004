"""How a convolution is written so that ONNX Runtime takes its fastest integer kernel, with the very same integers.

Read in MLAS (`convsym.cpp`, `qlinearconv.cc`) and measured on x86 with AVX-512 VNNI:

1. A convolution with groups runs one matrix product a group. Each has a fixed price and computes 16 columns however few
   there are, so many narrow groups are slow: 32 groups of 4 channels took 988 us where the float kernel took 322.
   Neighbouring groups are merged, with zeros where a group does not reach (a block-diagonal weight): 8 groups of 16
   take 310 us, 4 of 32 take 261.
2. The direct kernel (no im2col) wants input channels in fours. The 3 channels of a picture get a fourth that is zero:
   374 -> 182 us for 3x3 with stride 2 at 224x224.

Both add products with zero weights only: (q - zero point) * 0 = 0, whatever q is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.graph.weights import constant_array
from onnxprune.targets.qdq.spelling import Spelling

__all__ = ["ConvolutionShape", "WiderConvolution", "merged_groups", "padded_input_channels", "widened"]

# ns for each output position and group, fitted to 40 convolutions of 64 to 1024 channels: a product's fixed price,
# and that of one multiplication. Only their relation matters here.
_GROUP_NS = 38.0
_PRODUCT_NS = 0.0049
_COLUMNS = 16
# Groups of fewer channels than this pay their fixed price twice (gathering windows byte by byte).
_NARROW = 8
# The direct kernel takes input channels in fours, and output channels in eights from 16 on (8 may be padded to 16).
_DIRECT_INPUTS, _DIRECT_OUTPUTS = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvolutionShape:
    """Sizes of a convolution; `window` is the product of its kernel's sides."""

    groups: int
    inputs_per_group: int
    outputs_per_group: int
    window: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WiderConvolution:
    """How many neighbouring groups become one, and how many zero channels the input gets."""

    groups: int
    """Of the convolution as it was."""
    merged: int
    added_inputs: int

    def weight(self, array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The weight [outputs, inputs/group, ...] with zeros where nothing was."""
        if self.merged > 1:
            array = _block_diagonal(array, self.groups, self.merged)
        if self.added_inputs:
            zeros = np.zeros((array.shape[0], self.added_inputs, *array.shape[2:]), dtype=array.dtype)
            array = np.concatenate([array, zeros], axis=1)
        return array


def widened(node: ir.Node, spelling: Spelling) -> WiderConvolution | None:
    """How `node`, a Conv, should be written; None: as it is.

    Nothing is changed for ARM, whose kernels were not measured.
    """
    if not spelling.unsigned_activations:
        return None
    shape = _shape(node)
    if shape is None:
        return None
    found = WiderConvolution(
        groups=shape.groups, merged=merged_groups(shape), added_inputs=padded_input_channels(shape)
    )
    return found if found.merged > 1 or found.added_inputs else None


def merged_groups(shape: ConvolutionShape) -> int:
    """How many neighbouring groups to compute as one, a divisor of their number; 1 for depthwise convolutions."""
    if shape.inputs_per_group == 1 and shape.outputs_per_group == 1:
        return 1  # has a kernel of its own
    divisors = [count for count in range(1, shape.groups + 1) if shape.groups % count == 0]
    return min(divisors, key=lambda count: _cost_ns(shape, count))


def padded_input_channels(shape: ConvolutionShape) -> int:
    """Zero channels that bring the direct kernel within reach of a convolution on a picture; else 0.

    Of more channels the copy into wider rows costs what the kernel saves.
    """
    missing = -shape.inputs_per_group % _DIRECT_INPUTS
    is_direct = shape.outputs_per_group % _DIRECT_OUTPUTS == 0
    if not is_direct or shape.groups > 1 or shape.window == 1:
        return 0
    return missing if shape.inputs_per_group < _DIRECT_INPUTS else 0


def _cost_ns(shape: ConvolutionShape, merged: int) -> float:
    inputs = shape.inputs_per_group * merged
    columns = math.ceil(shape.outputs_per_group * merged / _COLUMNS) * _COLUMNS
    fixed_ns = _GROUP_NS * (2 if inputs < _NARROW else 1)
    return shape.groups / merged * (fixed_ns + _PRODUCT_NS * inputs * shape.window * columns)


def _shape(node: ir.Node) -> ConvolutionShape | None:
    weight = constant_array(node.inputs[1])
    groups = node.attributes.get_int("group", 1)
    if weight is None or weight.ndim != 4 or weight.shape[0] % groups:
        return None
    return ConvolutionShape(
        groups=groups,
        inputs_per_group=weight.shape[1],
        outputs_per_group=weight.shape[0] // groups,
        window=math.prod(weight.shape[2:]),
    )


def _block_diagonal(array: npt.NDArray[np.float32], groups: int, merged: int) -> npt.NDArray[np.float32]:
    """[outputs, inputs/group, ...] -> [outputs, merged * inputs/group, ...]: each group's weight in its own columns."""
    outputs, inputs = array.shape[:2]
    columns = np.zeros((outputs, merged, *array.shape[1:]), dtype=array.dtype)
    group_of = np.arange(outputs) // (outputs // groups)
    columns[np.arange(outputs), group_of % merged] = array
    return columns.reshape(outputs, merged * inputs, *array.shape[2:])
