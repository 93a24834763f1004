"""Poolings: MAX_POOL_2D and AVERAGE_POOL_2D with channels last, and reductions where all of space is one window.

Maxima and sums over a box are those over its axes, one behind the other: so a 3-D pooling is a 2-D one over each plane
and another over what came of the planes, and a dilated one takes its elements from slices, axis by axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Tensor
from onnxprune.targets.tflite.ops.convolution import with_row, without_row
from onnxprune.targets.tflite.ops.positive import is_never_negative
from onnxprune.targets.tflite.ops.sizes import product_of, reshaped_to, size_of
from onnxprune.targets.tflite.ops.table import TFLITE, Emitted, NodeView
from onnxprune.targets.tflite.ops.unpooling import maxima_with_places
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


@TFLITE.register("MaxPool")
def max_pool(node: NodeView, build: Builder) -> Emitted:
    """MAX_POOL_2D; padding that is not SAME's is -inf, or 0 where the input is never negative.

    XNNPACK takes PAD with 0 and not PADV2. The places of the maxima, where they are read, are found by comparing.
    """
    x = node.input(0)
    given, x = x.type, build.cast(x, "FLOAT32")
    windows = _windows(node, x)
    if node.is_read(1):
        y, places = maxima_with_places(build, x, windows, is_column_major=bool(node.integer("storage_order")))
        return build.cast(y, given), places
    fill = 0.0 if is_never_negative(build, x) else -math.inf
    return build.cast(_pooled(build, "MAX_POOL_2D", "MAXIMUM", x, windows, fill), given)


@TFLITE.register("AveragePool")
def average_pool(node: NodeView, build: Builder) -> Tensor:
    """AVERAGE_POOL_2D, whose SAME leaves the padding out of the average; else over padding of zeros.

    Windows that count fewer elements than the kernel has are corrected by a factor for each place.
    """
    x = node.input(0)
    windows = _windows(node, x)
    counts_padding = bool(node.integer("count_include_pad"))
    if not counts_padding and all(window.is_same and window.dilation == 1 for window in windows):
        return _pooled(build, "AVERAGE_POOL_2D", "ADD", x, windows, 0.0)
    y = _sums(build, x, windows, is_average=True)
    if all(window.size >= 0 for window in windows):
        counts = [_counts(window, counts_padding=counts_padding) for window in windows]
        if any((count != window.kernel).any() for count, window in zip(counts, windows, strict=True)):
            y = build.binary("MUL", y, build.constant(_corrections(counts, windows)))
        return y
    if all(window.reach == 0 and window.begin == 0 for window in windows):
        return y
    if counts_padding:
        if any(window.is_ceil and window.stride > 1 for window in windows):
            raise UnsupportedError("how many elements its last windows count depends on a size that only the run knows")
        return y
    ones = build.op("FILL", [build.shape_of(x), build.constant(1.0)], shape=x.shape, type_=x.type)
    return build.binary("DIV", y, _sums(build, ones, windows, is_average=True))


@TFLITE.register("LpPool")
def lp_pool(node: NodeView, build: Builder) -> Tensor:
    """The p-th root of the sum of powers: an average over padding of zeros, times the elements of the kernel."""
    x, order = node.input(0), node.integer("p", 2)
    windows = _windows(node, x)
    return root(build, _sums(build, power(build, x, order), windows, is_average=False), order)


@TFLITE.register("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(node: NodeView, build: Builder) -> Tensor:
    """MEAN, REDUCE_MAX or SUM over all axes behind the channels."""
    x = node.input(0)
    kind = {"GlobalAveragePool": "MEAN", "GlobalMaxPool": "REDUCE_MAX", "GlobalLpPool": "SUM"}[node.op_type]
    order = node.integer("p", 2)
    if kind == "SUM":
        x = power(build, x, order)
    axes = build.constant(list(range(2, x.rank)))
    y = build.op(kind, [x, axes], shape=(*x.shape[:2], *(1,) * (x.rank - 2)), type_=x.type, keepDims=True)
    return root(build, y, order) if kind == "SUM" else y


def _windows(node: NodeView, x: Tensor) -> tuple[Window, ...]:
    windows = windows_of(node, x.shape[2:], node.ints("kernel_shape"))
    is_doubtful = any(window.dilation > 1 or window.kernel < window.stride for window in windows)
    if is_doubtful and node.text("auto_pad").startswith("SAME"):
        raise UnsupportedError(
            "runtimes disagree on its auto_pad where a kernel is dilated or shorter than its stride; "
            "write the padding as 'pads'"
        )
    return windows


def power(build: Builder, x: Tensor, order: int) -> Tensor:
    """|x| ** order."""
    if order == 2:
        return build.op("SQUARE", [x])
    x = build.op("ABS", [x])
    return x if order == 1 else build.binary("POW", x, build.constant(np.full((1,) * x.rank, order, np.float32)))


def root(build: Builder, x: Tensor, order: int) -> Tensor:
    """The root of numbers that are not negative."""
    if order == 1:
        return x
    if order == 2:
        return build.op("SQRT", [x])
    return build.binary("POW", x, build.constant(np.full((1,) * x.rank, 1 / order, np.float32)))


def _sums(build: Builder, x: Tensor, windows: Sequence[Window], *, is_average: bool) -> Tensor:
    """The sum of each window, with zeros for padding; divided by the elements of the kernel for `is_average`."""
    elements = math.prod(window.kernel for window in windows)
    is_divided = all(window.dilation == 1 for window in windows)
    x = padded(build, x, _padding(windows))
    bare = [_bare(window) for window in windows]
    y = _pooled(build, "AVERAGE_POOL_2D", "ADD", x, bare, 0.0)
    if is_divided == is_average or elements == 1:
        return y
    factor = 1 / elements if is_average else elements
    return build.binary("MUL", y, build.constant(np.full((1,) * y.rank, factor, np.float32)))


def _padding(windows: Sequence[Window]) -> dict[int, tuple[int, int]]:
    """(before, behind) by axis of (N, C, space): just what the windows reach."""
    if any(window.is_late for window in windows):
        raise UnsupportedError("its padding depends on a size that only the run knows")
    return {axis: (window.begin, window.reach) for axis, window in enumerate(windows, start=2)}


def _bare(window: Window) -> Window:
    """The same window over the padded input."""
    size = window.size if window.size < 0 else window.begin + window.size + window.reach
    return Window(size=size, kernel=window.kernel, stride=window.stride, dilation=window.dilation)


def _pooled(build: Builder, kind: str, binary: str, x: Tensor, windows: Sequence[Window], fill: float) -> Tensor:
    """Windows of x (N, C, space), padded with `fill`. `binary` is what `kind` does to two elements."""
    if any(window.dilation > 1 for window in windows):
        x = padded(build, x, _padding(windows), fill)
        return _by_slices(build, binary, x, [_bare(window) for window in windows])
    padding = "SAME" if all(window.is_same for window in windows) else "VALID"
    if padding == "VALID":
        x, windows = padded(build, x, _padding(windows), fill), [_bare(window) for window in windows]
    last = build.transposed(x, channels_last(x.rank))
    if len(windows) == 1:
        row = _images(build, kind, with_row(build, last, 1), (POINT, *windows), padding)
        last = without_row(build, row, 1)
    elif len(windows) == 2:
        last = _images(build, kind, last, windows, padding)
    elif len(windows) == 3:
        last = _volumes(build, kind, last, windows, padding)
    else:
        raise UnsupportedError(f"TFLite pools over 1 to 3 axes, and it has {len(windows)}")
    return build.transposed(last, channels_first(last.rank))


def _images(build: Builder, kind: str, last: Tensor, windows: Sequence[Window], padding: str) -> Tensor:
    if all(window.kernel == window.stride == 1 for window in windows):
        return last
    height, width = windows
    return build.op(
        kind,
        [last],
        shape=(last.shape[0], height.output, width.output, last.shape[3]),
        type_=last.type,
        padding=padding,
        strideH=height.stride,
        strideW=width.stride,
        filterHeight=height.kernel,
        filterWidth=width.kernel,
    )


def _volumes(build: Builder, kind: str, last: Tensor, windows: Sequence[Window], padding: str) -> Tensor:
    """(N, D, H, W, C) -> (N * D, H, W, C) -> (N, D, H' * W', C) -> (N, D', H', W', C)."""
    batch, depth, *_, channels = (size_of(last, axis) for axis in range(5))
    planes = reshaped_to(build, last, [product_of([batch, depth]), *(size_of(last, axis) for axis in (2, 3)), channels])
    planes = _images(build, kind, planes, windows[1:], padding)
    height, width = size_of(planes, 1), size_of(planes, 2)
    area = product_of([height, width])
    flat = Window(size=area if isinstance(area, int) else -1, kernel=1)
    columns = _images(
        build, kind, reshaped_to(build, planes, [batch, depth, area, channels]), (windows[0], flat), padding
    )
    return reshaped_to(build, columns, [batch, size_of(columns, 1), height, width, channels])


def _by_slices(build: Builder, binary: str, x: Tensor, windows: Sequence[Window]) -> Tensor:
    """Axis by axis, from one strided slice for each element of the kernel."""
    for axis, window in enumerate(windows, start=2):
        begins = [step * window.dilation for step in range(window.kernel)]
        cuts = [Cut(begin=begin, behind=window.extent - 1 - begin, stride=window.stride) for begin in begins]
        # One slice after the other, each let go of as soon as it is counted.
        x = build.chained(binary, _slices(build, x, axis, cuts))
    return x


def _slices(build: Builder, x: Tensor, axis: int, cuts: Sequence[Cut]) -> Iterator[Tensor]:
    return (cut(build, x, {axis: one}) for one in cuts)


def _counts(window: Window, *, counts_padding: bool) -> np.ndarray:
    """How many elements each window counts along its axis. What ceil_mode adds behind the padding never counts."""
    first, behind = (-window.begin, window.size + window.end) if counts_padding else (0, window.size)
    starts = np.arange(window.output) * window.stride - window.begin
    places = starts[:, None] + np.arange(window.kernel) * window.dilation
    counts: np.ndarray = ((places >= first) & (places < behind)).sum(axis=1)
    return counts


def _corrections(counts: Sequence[np.ndarray], windows: Sequence[Window]) -> np.ndarray:
    """By what to multiply at each place, where the kernel counts fewer elements than it has: (1, 1, space)."""
    factors = np.ones((1, 1, *(1,) * len(counts)))
    for axis, (count, window) in enumerate(zip(counts, windows, strict=True), start=2):
        factors = factors * (window.kernel / np.maximum(count, 1)).reshape(-1, *(1,) * (len(counts) + 1 - axis))
    return factors.astype(np.float32)
