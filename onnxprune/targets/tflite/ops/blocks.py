"""Blocks of pixels and of channels that change places, and images that are cut or padded around their middle."""

from __future__ import annotations

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Tensor
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView
from onnxprune.targets.tflite.ops.windows import Cut, cut, padded

_TO_LAST, _TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


@TFLITE.register("DepthToSpace")
def depth_to_space(node: NodeView, build: Builder) -> Tensor:
    """DEPTH_TO_SPACE, which takes (row, column, channel) from the depth: ONNX's DCR.

    CRD has (channel, row, column) there, so the channels are put in order first.
    """
    x, size = node.input(0), node.integer("blocksize")
    batch, depth, height, width = x.shape
    if depth < 0:
        raise UnsupportedError("the number of its channels is not known")
    channels = depth // size**2
    last = build.transposed(x, _TO_LAST)
    if node.text("mode", "DCR") == "CRD" and channels > 1:
        order = np.arange(depth, dtype=np.int32).reshape(channels, size**2).transpose().reshape(-1)
        last = build.op("GATHER", [last, build.constant(order)], shape=last.shape, type_=x.type, axis=3)
    shape = (batch, _times(height, size), _times(width, size), channels)
    y = build.op("DEPTH_TO_SPACE", [last], shape=shape, type_=x.type, blockSize=size)
    return build.transposed(y, _TO_FIRST)


@TFLITE.register("SpaceToDepth")
def space_to_depth(node: NodeView, build: Builder) -> Tensor:
    """SPACE_TO_DEPTH."""
    x, size = node.input(0), node.integer("blocksize")
    batch, channels, height, width = x.shape
    last = build.transposed(x, _TO_LAST)
    shape = (batch, *(dim if dim < 0 else dim // size for dim in (height, width)), _times(channels, size**2))
    y = build.op("SPACE_TO_DEPTH", [last], shape=shape, type_=x.type, blockSize=size)
    return build.transposed(y, _TO_FIRST)


def _times(dim: int, factor: int) -> int:
    return dim if dim < 0 else dim * factor


@TFLITE.register("CenterCropPad")
def center_crop_pad(node: NodeView, build: Builder) -> Tensor:
    """SLICE and PAD; of an odd number the larger half is behind."""
    x = node.input(0)
    wanted = [int(size) for size in node.required_array(1, "sizes")]
    axes = [axis % x.rank for axis in node.ints("axes", range(x.rank))]
    cuts, pads = {}, {}
    for axis, size in zip(axes, wanted, strict=True):
        dim = x.shape[axis]
        if dim < 0:
            raise UnsupportedError("how much it cuts or pads depends on a size that only the run knows")
        less = abs(size - dim) // 2
        if size < dim:
            cuts[axis] = Cut(begin=less, length=size)
        elif size > dim:
            pads[axis] = (less, size - dim - less)
    return padded(build, cut(build, x, cuts), pads)
