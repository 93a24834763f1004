"""Images read at places that are computed: GridSample, RoiAlign, DeformConv; and the places of AffineGrid.

An image is a table of rows (pixels, C). A place (..., axes) has along each axis a few taps: the row number's share of
that axis, and a weight. What is read is the sum over all combinations of taps, one GATHER each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Tensor
from onnxprune.targets.tflite.ops.sizes import product_of, reshaped_to, size_of
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView
from onnxprune.targets.tflite.ops.windows import Cut, channels_first, channels_last, cut

__all__ = ["Border", "Tap", "linear_taps", "read_rows"]

_CUBIC_A = -0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """`rows` (N, places, axes) INT32: shares of the row number. `weights` of the same shape; None: 1."""

    rows: Tensor
    weights: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Border:
    """What lies outside of an image of `sizes`: zeros, the pixels of its border, or its reflection.

    `edge` is how far the image reaches beyond the middle of its outermost pixels: 0 or 0.5.
    """

    sizes: tuple[int, ...]
    mode: str = "zeros"
    edge: float = 0.0

    def vector(self, build: Builder, numbers: Sequence[float]) -> Tensor:
        """One number for each axis: (1, 1, axes)."""
        return build.constant(np.array(numbers, np.float32).reshape(1, 1, -1))

    def clipped(self, build: Builder, at: Tensor) -> Tensor:
        """On the image."""
        return _limited(build, at, self.vector(build, [0] * len(self.sizes)), self._last(build))

    def _last(self, build: Builder) -> Tensor:
        return self.vector(build, [size - 1 for size in self.sizes])

    def reflected(self, build: Builder, at: Tensor) -> Tensor:
        """A triangular wave: first + min(m, 2 r - m), where m = |at - first| mod 2 r and r is the image's length."""
        lengths = [size - 1 + 2 * self.edge for size in self.sizes]
        if not all(lengths):
            raise UnsupportedError("its reflection at an axis of one element has no period")
        first, twice = self.vector(build, [-self.edge] * len(lengths)), self.vector(build, [2 * one for one in lengths])
        distance = build.op("ABS", [build.binary("SUB", at, first)])
        rest = build.binary("FLOOR_MOD", distance, twice)
        return build.binary("ADD", build.binary("MINIMUM", rest, build.binary("SUB", twice, rest)), first)

    def entered(self, build: Builder, at: Tensor) -> Tensor:
        """Coordinates that lie beyond the edge, brought onto the image."""
        if self.mode == "reflection":
            return self.reflected(build, at)
        if self.mode == "border":
            low = self.vector(build, [-self.edge] * len(self.sizes))
            high = self.vector(build, [size - 1 + self.edge for size in self.sizes])
            inside = _limited(build, at, low, high)
            is_inside = build.binary("EQUAL", inside, at, type_="BOOL")
            return build.op("SELECT_V2", [is_inside, at, self.clipped(build, at)], shape=at.shape, type_=at.type)
        return at

    def tap(self, build: Builder, at: Tensor, weights: Tensor | None) -> Tap:
        """At whole coordinates."""
        if self.mode == "reflection":
            at = self.reflected(build, at)
        inside = self.clipped(build, at)
        if self.mode == "zeros":
            is_inside = build.cast(build.binary("EQUAL", inside, at, type_="BOOL"), "FLOAT32")
            weights = is_inside if weights is None else build.binary("MUL", weights, is_inside)
        strides = [math.prod(self.sizes[axis + 1 :]) for axis in range(len(self.sizes))]
        factors = build.constant(np.array(strides, np.int32).reshape(1, 1, -1))
        return Tap(rows=build.binary("MUL", build.cast(inside, "INT32"), factors), weights=weights)


def _limited(build: Builder, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return build.binary("MINIMUM", build.binary("MAXIMUM", x, low), high)


def linear_taps(build: Builder, at: Tensor, border: Border) -> list[Tap]:
    """The elements before and behind each coordinate."""
    before = build.op("FLOOR", [at])
    share = build.binary("SUB", at, before)
    one = border.vector(build, [1] * len(border.sizes))
    rest = build.binary("SUB", one, share)
    return [border.tap(build, before, rest), border.tap(build, build.binary("ADD", before, one), share)]


def _cubic_taps(build: Builder, at: Tensor, border: Border) -> list[Tap]:
    """Two elements before and two behind: the cubic convolution of Keys."""
    count, a = len(border.sizes), _CUBIC_A
    before = build.op("FLOOR", [at])
    share = build.binary("SUB", at, before)
    # Of the distance, highest power first.
    near, far = (a + 2, -(a + 3), 0.0, 1.0), (a, -5 * a, 8 * a, -4 * a)
    taps = []
    for offset, polynomial in ((-1, far), (0, near), (1, near), (2, far)):
        moved = border.vector(build, [offset] * count)
        distance = build.op("ABS", [build.binary("SUB", share, moved)])
        weights = build.binary("MUL", distance, border.vector(build, [polynomial[0]] * count))
        for factor in polynomial[1:-1]:
            weights = build.binary("ADD", weights, border.vector(build, [factor] * count))
            weights = build.binary("MUL", weights, distance)
        weights = build.binary("ADD", weights, border.vector(build, [polynomial[-1]] * count))
        taps.append(border.tap(build, build.binary("ADD", before, moved), weights))
    return taps


def read_rows(build: Builder, table: Tensor, taps: Sequence[Tap]) -> Tensor:
    """The sum over all combinations of taps of `table` (N, pixels, C), as (N, places, C)."""
    axes = taps[0].rows.shape[-1]
    columns = [
        [
            (_column(build, tap.rows, axis), None if tap.weights is None else _column(build, tap.weights, axis))
            for tap in taps
        ]
        for axis in range(axes)
    ]

    def sample(chosen: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        row, weight = chosen[0]
        for share, factor in chosen[1:]:
            row = build.binary("ADD", row, share)
            if factor is not None:
                weight = factor if weight is None else build.binary("MUL", weight, factor)
        flat = reshaped_to(build, row, [size_of(row, 0), size_of(row, 1)])
        shape = (*flat.shape, table.shape[-1])
        value = build.op("GATHER", [table, flat], shape=shape, type_=table.type, axis=1, batchDims=1)
        return value if weight is None else build.binary("MUL", value, weight)

    return build.chained("ADD", (sample(chosen) for chosen in itertools.product(*columns)))


def _column(build: Builder, tensor: Tensor, axis: int) -> Tensor:
    return cut(build, tensor, {2: Cut(begin=axis, length=1)})


def _pixel_table(build: Builder, x: Tensor) -> Tensor:
    """(N, C, space) -> (N, pixels, C)."""
    if -1 in x.shape[2:]:
        raise UnsupportedError("where it reads depends on the size of its input, which only the run knows")
    last = build.transposed(x, channels_last(x.rank))
    return reshaped_to(build, last, [size_of(x, 0), math.prod(x.shape[2:]), size_of(x, 1)])


@TFLITE.register("GridSample")
def grid_sample(node: NodeView, build: Builder) -> Tensor:
    """Reads at a grid whose coordinates go from -1 to 1, the last axis first."""
    x, grid = node.input(0), node.input(1)
    if x.type != "FLOAT32":
        raise UnsupportedError(f"it samples {x.type}, and GATHER's weighted sums are FLOAT32")
    space, mode = x.shape[2:], {"bilinear": "linear", "bicubic": "cubic"}.get(node.text("mode"), node.text("mode"))
    is_aligned = bool(node.integer("align_corners"))
    table = _pixel_table(build, x)
    places = [size_of(grid, axis) for axis in range(1, grid.rank - 1)]
    at = reshaped_to(build, grid, [size_of(grid, 0), product_of(places), len(space)])
    if len(space) > 1:
        at = build.op("REVERSE_V2", [at, build.constant([2])], shape=at.shape, type_=at.type)
    border = Border(sizes=space, mode=node.text("padding_mode", "zeros"), edge=0.0 if is_aligned else 0.5)
    spans = [(size - 1 if is_aligned else size) / 2 for size in space]
    at = build.binary("MUL", at, border.vector(build, spans))
    at = build.binary("ADD", at, border.vector(build, [(size - 1) / 2 for size in space]))
    if mode == "cubic" and border.mode == "border":
        raise UnsupportedError("runtimes disagree on cubic samples near the border with padding_mode 'border'")
    if mode == "nearest":
        taps = [border.tap(build, border.entered(build, build.op("ROUND", [at])), None)]
    elif mode == "cubic":
        taps = _cubic_taps(build, border.entered(build, at), border)
    else:
        taps = linear_taps(build, border.entered(build, at), border)
    read = read_rows(build, table, taps)
    y = reshaped_to(build, read, [size_of(grid, 0), *places, size_of(x, 1)])
    return build.transposed(y, channels_first(y.rank))


@TFLITE.register("AffineGrid")
def affine_grid(node: NodeView, build: Builder) -> Tensor:
    """The constant grid, with ones beside it, times theta transposed."""
    theta = node.input(0)
    space = [int(size) for size in node.required_array(1, "sizes")][2:]
    rank = len(space)
    lines = []
    for size in space:
        step = 2 / (size - 1 if node.integer("align_corners") and size > 1 else size)
        first = -1.0 if node.integer("align_corners") else -1 + step / 2
        lines.append(first + step * np.arange(size))
    mesh = np.meshgrid(*lines, indexing="ij")
    # The last axis comes first.
    grid = np.stack([*mesh[::-1], np.ones(space)], axis=-1).reshape(1, -1, rank + 1).astype(np.float32)
    y = build.op(
        "BATCH_MATMUL",
        [build.constant(grid), theta],
        shape=(theta.shape[0], grid.shape[1], rank),
        type_=theta.type,
        adjY=True,
    )
    return build.reshaped(y, (theta.shape[0], *space, rank))


@TFLITE.register("RoiAlign")
def roi_align(node: NodeView, build: Builder) -> Tensor:
    """Bilinear samples inside each bin of a region, pooled by AVERAGE_POOL_2D or MAX_POOL_2D."""
    x, rois, batch = node.input(0), node.input(1), build.cast(node.input(2), "INT32")
    samples = node.integer("sampling_ratio")
    if samples <= 0:
        raise UnsupportedError("its sampling_ratio 0 takes as many samples as each region needs")
    bins = (node.integer("output_height", 1), node.integer("output_width", 1))
    height, width = x.shape[2:]
    offset = 0.5 if node.text("coordinate_transformation_mode", "half_pixel") == "half_pixel" else 0.0
    scale, count = node.number("spatial_scale", 1.0), rois.shape[0]
    table = _pixel_table(build, x)
    table = reshaped_to(build, table, [product_of([size_of(table, 0), height * width]), size_of(x, 1)])
    corners = build.binary("MUL", rois, build.constant([[scale]]))
    if offset:
        corners = build.binary("SUB", corners, build.constant([[offset]]))
    # By axis: (row share, weight) of the element before and of the one behind, as (R, bins * samples).
    taps = [
        _roi_taps(build, corners, axis, size, bins[1 - axis] * samples, is_forced=not offset)
        for axis, size in ((1, height), (0, width))
    ]
    first = build.binary(
        "MUL", build.reshaped(batch, (count, 1, 1)), build.constant(np.full((1, 1, 1), height * width, np.int32))
    )
    places = (bins[0] * samples, bins[1] * samples)
    is_average = node.text("mode", "avg") == "avg"

    def sample(at_row: tuple[Tensor, Tensor], at_column: tuple[Tensor, Tensor]) -> Tensor:
        (row, row_weight), (column, column_weight) = at_row, at_column
        above = build.binary(
            "MUL", build.reshaped(row, (count, places[0], 1)), build.constant(np.full((1, 1, 1), width, np.int32))
        )
        index = build.binary("ADD", build.binary("ADD", first, above), build.reshaped(column, (count, 1, places[1])))
        shape = (count, *places, x.shape[1])
        value = build.op("GATHER", [table, index], shape=shape, type_=x.type, axis=0)
        weight = build.binary(
            "MUL",
            build.reshaped(row_weight, (count, places[0], 1, 1)),
            build.reshaped(column_weight, (count, 1, places[1], 1)),
        )
        return build.binary("MUL", value, weight)

    met = build.chained("ADD" if is_average else "MAXIMUM", itertools.starmap(sample, itertools.product(*taps)))
    y = build.op(
        "AVERAGE_POOL_2D" if is_average else "MAX_POOL_2D",
        [met],
        shape=(count, *bins, x.shape[1]),
        type_=x.type,
        padding="VALID",
        strideH=samples,
        strideW=samples,
        filterHeight=samples,
        filterWidth=samples,
    )
    return build.transposed(y, channels_first(4))


def _times(build: Builder, x: Tensor, factor: int) -> Tensor:
    return build.binary("MUL", x, build.constant(np.full((1,) * x.rank, factor, np.int32)))


def _roi_taps(
    build: Builder, corners: Tensor, axis: int, size: int, samples: int, *, is_forced: bool
) -> list[tuple[Tensor, Tensor]]:
    """Samples at start + length * (i + 0.5) / samples. `corners` are (R, 4): x and y of the start, then of the end."""
    start = cut(build, corners, {1: Cut(begin=axis, length=1)})
    length = build.binary("SUB", cut(build, corners, {1: Cut(begin=axis + 2, length=1)}), start)
    if is_forced:
        length = build.binary("MAXIMUM", length, build.constant([[1.0]]))
    steps = build.constant(((np.arange(samples, dtype=np.float32) + 0.5) / samples).reshape(1, -1).astype(np.float32))
    at = build.binary("ADD", start, build.binary("MUL", length, steps))
    # A sample further out than one element counts nothing.
    limits = (build.constant([[-1.0]]), build.constant([[float(size)]]))
    is_near = build.binary("EQUAL", _limited(build, at, *limits), at, type_="BOOL")
    near = build.cast(is_near, "FLOAT32")
    last = build.constant([[float(size - 1)]])
    at = _limited(build, at, build.constant([[0.0]]), last)
    before = build.op("FLOOR", [at])
    behind = build.binary("MINIMUM", build.binary("ADD", before, build.constant([[1.0]])), last)
    share = build.binary("SUB", at, before)
    rest = build.binary("SUB", build.constant([[1.0]]), share)
    return [
        (build.cast(before, "INT32"), build.binary("MUL", rest, near)),
        (build.cast(behind, "INT32"), build.binary("MUL", share, near)),
    ]
