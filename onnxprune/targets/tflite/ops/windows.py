"""Windows that slide over space: their geometry, and moving axes, padding and cutting around them.

Per spatial axis, with everything in elements:

    extent = (kernel - 1) * dilation + 1
    output = (begin + size + end - extent) // stride + 1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Shape, Tensor
from onnxprune.targets.tflite.ops.table import NodeView

__all__ = ["POINT", "Cut", "Window", "channels_first", "channels_last", "cut", "padded", "windows_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One spatial axis of a window. `begin` and `end` count the padding."""

    size: int
    """Of the input; -1 where only the run knows it."""
    kernel: int
    stride: int = 1
    dilation: int = 1
    begin: int = 0
    end: int = 0
    is_ceil: bool = False
    """A last window that the input fills in part counts, unless it starts behind the input."""
    is_late: bool = False
    """The padding is that of TFLite's SAME, for a size that only the run knows; `begin` and `end` say nothing."""

    @property
    def extent(self) -> int:
        """From the first element of the window to its last."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def output(self) -> int:
        """Number of windows; -1 where only the run knows it."""
        if self.size < 0:
            return -1
        room = self.begin + self.size + self.end - self.extent
        if not self.is_ceil:
            return room // self.stride + 1
        count = -(-room // self.stride) + 1
        return count - 1 if (count - 1) * self.stride >= self.size + self.begin else count

    @property
    def reach(self) -> int:
        """Elements behind the input that the last window covers; `end` may hold more, and with `is_ceil` less."""
        if self.size < 0:
            if not self.is_ceil or self.stride == 1:
                return self.end
            if self.end:
                raise UnsupportedError("its ceil_mode with padding behind an axis depends on the size of that axis")
            # A window more, where what is left over begins one inside the input.
            return min(self.stride, self.extent) - 1
        return max(0, (self.output - 1) * self.stride + self.extent - self.size - self.begin)

    @property
    def is_same(self) -> bool:
        """True when TFLite's SAME pads just so."""
        if self.size < 0:
            total = self.extent - 1
            is_even = self.stride == 1 and self.begin == total // 2 and self.end == total - total // 2
            return self.is_late or is_even
        wanted = -(-self.size // self.stride)
        total = max(0, (wanted - 1) * self.stride + self.extent - self.size)
        return self.output == wanted and self.begin == total // 2 and self.reach == total - total // 2


POINT = Window(size=1, kernel=1)
"""An axis of length 1 that is there because the operator wants one."""


def windows_of(node: NodeView, sizes: Shape, kernel: Sequence[int]) -> tuple[Window, ...]:
    """The windows of a node with `kernel_shape`, `strides`, `dilations`, `pads` or `auto_pad`, and `ceil_mode`."""
    rank = len(sizes)
    if -1 in kernel or len(kernel) != rank:
        raise UnsupportedError("the size of its kernel is not known")
    ones, auto_pad = (1,) * rank, node.text("auto_pad", "NOTSET")
    pads = node.ints("pads") if auto_pad == "NOTSET" else ()
    pads = pads or (0,) * (2 * rank)
    found = []
    for axis, (stride, dilation) in enumerate(
        zip(node.ints("strides") or ones, node.ints("dilations") or ones, strict=True)
    ):
        window = Window(
            size=sizes[axis],
            kernel=int(kernel[axis]),
            stride=stride,
            dilation=dilation,
            begin=pads[axis],
            end=pads[axis + rank],
            is_ceil=bool(node.integer("ceil_mode")),
        )
        found.append(_same(window, auto_pad) if auto_pad.startswith("SAME") else window)
    return tuple(found)


def _same(window: Window, auto_pad: str) -> Window:
    """As many windows as strides in the input; SAME_LOWER pads an odd element in front."""
    total = window.extent - 1
    if window.size >= 0:
        total = max(0, (-(-window.size // window.stride) - 1) * window.stride + window.extent - window.size)
    less, more = total // 2, total - total // 2
    begin, end = (less, more) if auto_pad == "SAME_UPPER" else (more, less)
    is_late = window.size < 0 and window.stride > 1
    if is_late and auto_pad == "SAME_LOWER":
        raise UnsupportedError("its auto_pad SAME_LOWER depends on a size that only the run knows")
    return Window(
        size=window.size,
        kernel=window.kernel,
        stride=window.stride,
        dilation=window.dilation,
        begin=begin,
        end=end,
        is_late=is_late,
    )


def channels_last(rank: int) -> tuple[int, ...]:
    """The permutation (N, C, space) -> (N, space, C)."""
    return (0, *range(2, rank), 1)


def channels_first(rank: int) -> tuple[int, ...]:
    """The permutation (N, space, C) -> (N, C, space)."""
    return (0, rank - 1, *range(1, rank - 1))


def padded(build: Builder, x: Tensor, pads: Mapping[int, tuple[int, int]], value: float = 0.0) -> Tensor:
    """With (before, behind) elements added to some axes: PAD, or PADV2 where `value` is not 0."""
    table = np.zeros((x.rank, 2), np.int32)
    for axis, pair in pads.items():
        table[axis] = pair
    if not table.any():
        return x
    shape = tuple(dim if dim < 0 else dim + int(pair.sum()) for dim, pair in zip(x.shape, table, strict=True))
    if value == 0:
        return build.op("PAD", [x, build.constant(table)], shape=shape, type_=x.type)
    fill = build.constant(np.array(value), x.type)
    return build.op("PADV2", [x, build.constant(table), fill], shape=shape, type_=x.type)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What to take of an axis: from `begin` on, all but the last `behind`, every `stride`-th; or just `length`."""

    begin: int = 0
    behind: int = 0
    stride: int = 1
    length: int = -1

    def kept(self, size: int) -> int:
        """Elements taken of an axis of `size`; -1 where only the run knows it."""
        if self.length >= 0:
            return self.length
        return -1 if size < 0 else -(-(size - self.begin - self.behind) // self.stride)


def cut(build: Builder, x: Tensor, cuts: Mapping[int, Cut]) -> Tensor:
    """Part of a tensor: SLICE where nothing is passed over and the lengths are known, else STRIDED_SLICE."""
    shape = tuple(cuts[axis].kept(dim) if axis in cuts else dim for axis, dim in enumerate(x.shape))
    if shape == x.shape and all(part in (Cut(), Cut(length=part.length)) for part in cuts.values()):
        return x
    begins = np.array([cuts[axis].begin if axis in cuts else 0 for axis in range(x.rank)], np.int32)
    if all(part.stride == 1 and shape[axis] >= 0 for axis, part in cuts.items()):
        # -1, of an open size: all that is there. XNNPACK takes numbers only.
        sizes = np.array(shape, np.int32)
        return build.op("SLICE", [x, build.constant(begins), build.constant(sizes)], shape=shape, type_=x.type)
    strides = np.array([cuts[axis].stride if axis in cuts else 1 for axis in range(x.rank)], np.int32)
    ends = np.zeros(x.rank, np.int32)
    open_ends = 0
    for axis in range(x.rank):
        part = cuts.get(axis, Cut())
        if part.length >= 0:
            ends[axis] = part.begin + (part.length - 1) * part.stride + 1
        elif part.behind:
            ends[axis] = -part.behind
        else:
            open_ends |= 1 << axis
    return build.op(
        "STRIDED_SLICE",
        [x, build.constant(begins), build.constant(ends), build.constant(strides)],
        shape=shape,
        type_=x.type,
        endMask=open_ends,
    )
