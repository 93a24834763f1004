"""Convolutions, with channels last.

    CONV_2D              x (N, H, W, C), filters (out, kH, kW, C / groups)
    DEPTHWISE_CONV_2D    x (N, H, W, C), filters (1, kH, kW, C * multiplier)
    CONV_3D              x (N, D, H, W, C), filters (kD, kH, kW, C, out); in one group

A 1-D convolution is a 2-D one over an image of one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Tensor
from onnxprune.targets.tflite.ops.sizes import product_of, reshaped_to, size_of, slice_of
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView
from onnxprune.targets.tflite.ops.windows import (
    POINT,
    Cut,
    Window,
    channels_first,
    channels_last,
    cut,
    padded,
    windows_of,
)

__all__ = ["convolved", "with_row", "without_row"]

_EXACT_IN_FLOAT = 2**24
_LARGEST_BYTE = 255


@TFLITE.register("Conv")
def conv(node: NodeView, build: Builder) -> Tensor:
    """PAD where there is padding, then a convolution with padding VALID; the fusion stage joins them where equal."""
    x, weight = node.input(0), node.input(1)
    windows = windows_of(node, x.shape[2:], weight.shape[2:])
    return convolved(build, x, weight, node.optional(2), windows, group=node.integer("group", 1))


@TFLITE.register("ConvInteger")
def conv_integer(node: NodeView, build: Builder) -> Tensor:
    """A float convolution of the bytes, which is exact below 2^24.

    A filter whose sum can be larger is split into 16 * high + low, and the two sums are added as INT32.
    """
    x, weight = node.input(0), node.input(1)
    numbers = _less_zero_point(build, x, node.optional(2))
    filters = node.required_array(1, "filters").astype(np.float32)
    zero_point = node.array(3)
    if zero_point is None and node.has(3):
        raise UnsupportedError("the zero point of its filters is computed when the model runs, and must be constant")
    if zero_point is not None:
        filters = filters - zero_point.astype(np.float32).reshape(-1, *(1,) * (filters.ndim - 1))
    windows = windows_of(node, x.shape[2:], weight.shape[2:])
    parts: list[tuple[int, np.ndarray]] = [(1, filters)]
    if _largest_sum(filters) >= _EXACT_IN_FLOAT:
        high = np.round(filters / 16)
        parts = [(16, high), (1, filters - 16 * high)]
    if any(_largest_sum(part) >= _EXACT_IN_FLOAT for _, part in parts):
        raise UnsupportedError(
            "its sums don't fit the 24 bits that FLOAT32 adds exactly, and CONV_2D has no plain bytes"
        )

    def summed(factor: int, part: np.ndarray) -> Tensor:
        y = convolved(build, numbers, build.constant(part), None, windows, group=node.integer("group", 1))
        y = build.cast(y, "INT32")
        return y if factor == 1 else build.binary("MUL", y, build.constant(np.full((1,) * y.rank, factor, np.int32)))

    return build.chained("ADD", (summed(factor, part) for factor, part in parts))


def _less_zero_point(build: Builder, x: Tensor, zero_point: Tensor | None) -> Tensor:
    x = build.cast(x, "FLOAT32")
    if zero_point is None or (zero_point.constant is not None and not zero_point.constant.array().any()):
        return x
    return build.binary("SUB", x, build.cast(zero_point, "FLOAT32"))


def _largest_sum(filters: np.ndarray) -> float:
    """The largest sum of a filter's products with numbers of a byte."""
    return _LARGEST_BYTE * float(np.abs(filters).reshape(len(filters), -1).sum(axis=1).max(initial=0))


def convolved(
    build: Builder, x: Tensor, weight: Tensor, bias: Tensor | None, windows: Sequence[Window], *, group: int = 1
) -> Tensor:
    """The convolution of x (N, C, space) with weight (out, C / group, kernel), as (N, out, space)."""
    if bias is None:
        bias = build.constant(np.zeros(weight.shape[0], np.float32))
    last = build.transposed(x, channels_last(x.rank))
    if len(windows) == 1:
        last, weight, windows = with_row(build, last, 1), with_row(build, weight, 2), (POINT, *windows)
        return build.transposed(without_row(build, _images(build, last, weight, bias, windows, group), 1), (0, 2, 1))
    if len(windows) == 2:
        y = _images(build, last, weight, bias, windows, group)
    elif len(windows) == 3 and group == 1:
        y = _volumes(build, last, weight, bias, windows)
    elif len(windows) == 3:
        y = _volumes_by_planes(build, last, weight, bias, windows, group)
    else:
        raise UnsupportedError(f"TFLite convolves over 1 to 3 axes, and it has {len(windows)}")
    return build.transposed(y, channels_first(y.rank))


def with_row(build: Builder, x: Tensor, axis: int) -> Tensor:
    """With an axis of length 1 before `axis`."""
    return reshaped_to(
        build, x, [*(size_of(x, at) for at in range(axis)), 1, *(size_of(x, at) for at in range(axis, x.rank))]
    )


def without_row(build: Builder, x: Tensor, axis: int) -> Tensor:
    """Without `axis`, which is of length 1."""
    return reshaped_to(build, x, [size_of(x, at) for at in range(x.rank) if at != axis])


def _padded(build: Builder, last: Tensor, windows: Sequence[Window]) -> tuple[Tensor, str]:
    """The input with its padding, and the name of the padding that is left to the operator."""
    if any(window.is_late for window in windows):
        if not all(window.is_same for window in windows):
            raise UnsupportedError("its padding depends on a size that only the run knows")
        return last, "SAME"
    pads = {axis: (window.begin, window.end) for axis, window in enumerate(windows, start=1)}
    return padded(build, last, pads), "VALID"


def _images(
    build: Builder, last: Tensor, weight: Tensor, bias: Tensor, windows: Sequence[Window], group: int
) -> Tensor:
    out, channels = weight.shape[0], weight.shape[1] * group
    is_depthwise = group > 1 and weight.shape[1] == 1
    last, padding = _padded(build, last, windows)
    # (out, in, kH, kW) -> (in, kH, kW, out) or (out, kH, kW, in)
    filters = build.transposed(weight, (1, 2, 3, 0) if is_depthwise else (0, 2, 3, 1))
    height, width = windows
    options: dict[str, int] = {"depthMultiplier": out // channels} if is_depthwise else {}
    return build.op(
        "DEPTHWISE_CONV_2D" if is_depthwise else "CONV_2D",
        [last, filters, bias],
        shape=(last.shape[0], height.output, width.output, out),
        type_=last.type,
        padding=padding,
        strideH=height.stride,
        strideW=width.stride,
        dilationHFactor=height.dilation,
        dilationWFactor=width.dilation,
        **options,
    )


def _volumes(build: Builder, last: Tensor, weight: Tensor, bias: Tensor, windows: Sequence[Window]) -> Tensor:
    last, padding = _padded(build, last, windows)
    depth, height, width = windows
    return build.op(
        "CONV_3D",
        # (out, in, kD, kH, kW) -> (kD, kH, kW, in, out)
        [last, build.transposed(weight, (2, 3, 4, 1, 0)), bias],
        shape=(last.shape[0], *(window.output for window in windows), weight.shape[0]),
        type_=last.type,
        padding=padding,
        strideD=depth.stride,
        strideH=height.stride,
        strideW=width.stride,
        dilationDFactor=depth.dilation,
        dilationHFactor=height.dilation,
        dilationWFactor=width.dilation,
    )


def _volumes_by_planes(
    build: Builder, last: Tensor, weight: Tensor, bias: Tensor, windows: Sequence[Window], group: int
) -> Tensor:
    """In groups, which CONV_3D lacks: for each plane of the kernel a 2-D convolution of the planes that it meets.

    (N, D, H, W, C) -> (N * D', H, W, C), and back behind the sum.
    """
    depth, *plane = windows
    if depth.is_late:
        raise UnsupportedError("its padding depends on a size that only the run knows")
    last = padded(build, last, {1: (depth.begin, depth.end)})
    total = None
    for step in range(depth.kernel):
        begin = step * depth.dilation
        met = cut(build, last, {1: Cut(begin=begin, behind=depth.extent - 1 - begin, stride=depth.stride)})
        images = reshaped_to(
            build, met, [product_of([size_of(met, 0), size_of(met, 1)]), *(size_of(met, axis) for axis in (2, 3, 4))]
        )
        filters = without_row(build, slice_of(build, weight, 2, step, 1), 2)
        offset = bias if step == 0 else build.constant(np.zeros(weight.shape[0], np.float32))
        y = _images(build, images, filters, offset, plane, group)
        total = y if total is None else build.binary("ADD", total, y)
    assert total is not None  # noqa: S101 - a kernel has a plane
    sizes = [size_of(last, 0), depth.output, *(size_of(total, axis) for axis in (1, 2, 3))]
    if depth.output < 0:
        sizes[1] = size_of(met, 1)
    return reshaped_to(build, total, sizes)
