"""Where the maxima of a pooling stood, and putting them back there.

TFLite's poolings don't tell. ONNX counts places through the whole tensor (N, C, space).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Tensor
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView
from onnxprune.targets.tflite.ops.windows import Cut, Window, cut, padded

__all__ = ["maxima_with_places"]


def maxima_with_places(
    build: Builder, x: Tensor, windows: Sequence[Window], *, is_column_major: bool
) -> tuple[Tensor, Tensor]:
    """The maxima of windows and, as INT64, where the first of each stood: one comparison for an element of the kernel.

    `is_column_major` counts the first spatial axis fastest.
    """
    if -1 in x.shape[1:]:
        raise UnsupportedError("the places of its maxima depend on sizes that only the run knows")
    space = x.shape[2:]
    here = np.arange(math.prod(space), dtype=np.int32).reshape(space, order="F" if is_column_major else "C")
    here = np.pad(here, [(window.begin, window.reach) for window in windows])
    x = padded(build, x, {axis: (one.begin, one.reach) for axis, one in enumerate(windows, start=2)}, -math.inf)
    best = place = None
    for steps in itertools.product(*(range(window.kernel) for window in windows)):
        cuts = [
            Cut(begin=step * window.dilation, stride=window.stride, length=window.output)
            for step, window in zip(steps, windows, strict=True)
        ]
        value = cut(build, x, dict(enumerate(cuts, start=2)))
        at = build.constant(here[tuple(_python_slice(part) for part in cuts)][None, None])
        if best is None or place is None:
            best, place = value, at
            continue
        is_better = build.binary("GREATER", value, best, type_="BOOL")
        place = build.op("SELECT_V2", [is_better, at, place], shape=value.shape, type_="INT32")
        best = build.binary("MAXIMUM", best, value)
    assert best is not None and place is not None  # noqa: S101, PT018 - a kernel has an element
    place = build.binary("ADD", place, _starts(build, x, math.prod(space)))
    return best, build.cast(place, "INT64")


def _python_slice(part: Cut) -> slice:
    return slice(part.begin, part.begin + (part.length - 1) * part.stride + 1, part.stride)


def _starts(build: Builder, x: Tensor, area: int) -> Tensor:
    """Where each channel of each item begins: (N, C, 1, ...)."""
    batch, channels = x.shape[:2]
    ones = (1,) * (x.rank - 2)
    by_channel = build.constant((np.arange(channels, dtype=np.int32) * area).reshape(1, channels, *ones))
    if batch >= 0:
        by_item = build.constant((np.arange(batch, dtype=np.int32) * channels * area).reshape(batch, 1, *ones))
    else:
        count = build.op(
            "SLICE", [build.shape_of(x), build.constant([0]), build.constant([1])], shape=(1,), type_="INT32"
        )
        zero, one = build.constant(np.array(0, np.int32)), build.constant(np.array(1, np.int32))
        items = build.op("RANGE", [zero, build.reshaped(count, ()), one], shape=(-1,), type_="INT32")
        by_item = build.binary(
            "MUL",
            build.reshaped(items, (-1, 1, *ones)),
            build.constant(np.full((1, 1, *ones), channels * area, np.int32)),
        )
    return build.binary("ADD", by_item, by_channel)


@TFLITE.register("MaxUnpool")
def max_unpool(node: NodeView, build: Builder) -> Tensor:
    """SCATTER_ND, which adds what meets at one place.

    Only windows that overlap can share a maximum: there the sum is divided by how many have met.
    """
    x, places = node.input(0), node.input(1)
    kernel = node.ints("kernel_shape")
    strides = node.ints("strides", (1,) * len(kernel))
    pads = node.ints("pads", (0,) * (2 * len(kernel)))
    if not x.is_static:
        raise UnsupportedError("SCATTER_ND needs its sizes, and they are known only when the model runs")
    space = [
        (size - 1) * stride - pads[axis] - pads[axis + len(kernel)] + kernel[axis]
        for axis, (size, stride) in enumerate(zip(x.shape[2:], strides, strict=True))
    ]
    shape = (*x.shape[:2], *space)
    indices = build.reshaped(build.cast(places, "INT32"), (x.num_elements, 1))
    y = _scattered(build, indices, build.reshaped(x, (x.num_elements,)), math.prod(shape))
    if any(one > stride for one, stride in zip(kernel, strides, strict=True)):
        ones = build.constant(np.ones(x.num_elements, np.float32))
        met = _scattered(build, indices, ones, math.prod(shape))
        y = build.binary("DIV", y, build.binary("MAXIMUM", met, build.constant(np.ones(1, np.float32))))
    y = build.reshaped(y, shape)
    if not node.has(2):
        return y
    wanted = [int(size) for size in node.required_array(2, "output's sizes")]
    return padded(build, y, {axis: (0, wanted[axis] - shape[axis]) for axis in range(2, len(shape))})


def _scattered(build: Builder, indices: Tensor, updates: Tensor, total: int) -> Tensor:
    return build.op("SCATTER_ND", [indices, updates, build.constant([total])], shape=(total,), type_=updates.type)
