"""What no plan may break: layers keep enough channels, and widths that shrink are those that kernels are made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxprune.ops.channels import LabelArray
from onnxprune.passes.prune.analysis import ChannelClasses, LayerWidth

__all__ = ["AxisKey", "WidthLimits", "Widths", "axis_key", "kernel_width", "width_limits"]

AxisKey: TypeAlias = bytes
"""Which class lies at each position of an axis, as bytes: axes with equal keys always have equal widths."""
Keeps: TypeAlias = npt.NDArray[np.bool_]
Scores: TypeAlias = npt.NDArray[np.float64]
Widths: TypeAlias = npt.NDArray[np.int64]

# Blocked convolution kernels take 16 channels at a time with AVX-512 and 8 with AVX2; 4 floats fill a register of SSE
# and NEON.
_KERNEL_BLOCKS = (16, 8, 4)
# How far a width may be rounded away from what was asked for: so much of what stays, and so much of what goes (else a
# small ratio would be rounded to nothing).
_ROUNDING_OF_KEPT = 0.25
_ROUNDING_OF_REMOVED = 0.5


def axis_key(classes: LabelArray) -> AxisKey:
    """The key of an axis with these classes."""
    return np.ascontiguousarray(classes, dtype=np.int64).tobytes()


def kernel_width(asked: int, width: int, *, rounds_down: bool = True) -> int:
    """What `asked` of `width` channels is rounded to: the nearest multiple of 16, else of 8, else of 4; else `asked`.

    The first counts that lies within a quarter of `asked` and within half of what goes; of two equally near ones the
    smaller. With `rounds_down` False it is the next larger multiple.
    """
    for block in _KERNEL_BLOCKS:
        below = asked // block * block
        is_below_nearer = asked - below <= below + block - asked
        nearest = below if asked == below or (rounds_down and is_below_nearer) else below + block
        if abs(nearest - asked) <= _tolerance(asked, width):
            return nearest
    return asked


def _tolerance(asked: int, width: int) -> float:
    return min(_ROUNDING_OF_KEPT * asked, _ROUNDING_OF_REMOVED * (width - asked))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Limit:
    """`classes` are the different classes of an axis, `counts` how many positions each has on it.

    `allowed` are the widths that the axis may have, ascending, its full width last and none below the least.
    """

    classes: LabelArray
    counts: LabelArray
    allowed: Widths
    is_layer: bool

    def width(self, keeps: Keeps) -> int:
        return int(self.counts[keeps[self.classes]].sum())

    def next_allowed(self, width: int) -> int:
        return int(self.allowed[np.searchsorted(self.allowed, width)])


class WidthLimits:
    """Repairs choices that leave a layer too narrow, or at a width that it may not have."""

    def __init__(self, limits: Sequence[_Limit], rounding: _Rounding | None) -> None:
        self._limits = limits
        self._rounding = rounding

    def repaired(self, keeps: Keeps, scores: Scores, *, rounds: bool = True) -> Keeps:
        """`keeps` with as many of the most important removed classes put back as the limits ask for.

        Putting back is all that happens, so it ends; a layer that several limits meet in takes the strictest. Where
        widths are rounded to those of kernels, that comes last, and only where no limit breaks.

        Args:
            keeps: One flag per class.
            scores: One score per class; NaN for those that may not be removed.
            rounds: False leaves widths where the limits have them.
        """
        keeps = keeps.copy()
        changed = True
        while changed:
            changed = False
            for limit in self._limits:
                missing = limit.next_allowed(limit.width(keeps)) - limit.width(keeps)
                if missing > 0:
                    _put_back(limit, missing, keeps, scores)
                    changed = True
        return self._rounding.rounded(keeps, scores) if rounds and self._rounding is not None else keeps


def _put_back(limit: _Limit, missing: int, keeps: Keeps, scores: Scores) -> None:
    own = limit.classes
    gone = np.flatnonzero(~keeps[own])
    # Highest score first; equal scores in the order of the channels.
    order = gone[np.argsort(-scores[own[gone]], kind="stable")]
    enough = int(np.searchsorted(np.cumsum(limit.counts[order]), missing)) + 1
    keeps[own[order[:enough]]] = True


def _take_out(limit: _Limit, surplus: int, keeps: Keeps, scores: Scores) -> None:
    own = limit.classes
    removable = np.flatnonzero(keeps[own] & np.isfinite(scores[own]))
    order = removable[np.argsort(scores[own[removable]], kind="stable")]
    few_enough = int(np.searchsorted(np.cumsum(limit.counts[order]), surplus, side="right"))
    keeps[own[order[:few_enough]]] = False


class _Rounding:
    """Moves widths to those of kernels, one axis at a time.

    A move is a wish and no limit: it stays only where all axes that it touches keep their limits, stay near what was
    asked for (see `kernel_width`), and end up better aligned together than before. (Where every class owns a position
    in each of 16 small groups, no width of a group can be rounded, and none should be put back entirely for that.)
    """

    def __init__(self, limits: Sequence[_Limit], *, rounds_down: bool) -> None:
        self._limits = limits
        self._rounds_down = rounds_down
        counts = [len(limit.classes) for limit in limits]
        joined = np.concatenate([limit.classes for limit in limits]) if limits else np.zeros(0, dtype=np.int64)
        order = np.argsort(joined, kind="stable")
        self._classes = joined[order]
        self._limit_of = np.repeat(np.arange(len(limits)), counts)[order]

    def rounded(self, keeps: Keeps, scores: Scores) -> Keeps:
        asked = [limit.width(keeps) for limit in self._limits]
        for index, limit in enumerate(self._limits):
            width, full = limit.width(keeps), int(limit.allowed[-1])
            if not limit.is_layer or width == full:
                continue
            wanted = kernel_width(asked[index], full, rounds_down=self._rounds_down)
            if wanted == width:
                continue
            moved = keeps.copy()
            if wanted > width:
                _put_back(limit, wanted - width, moved, scores)
            else:
                _take_out(limit, width - wanted, moved, scores)
            if self._is_better(keeps, moved, asked):
                keeps = moved
        return keeps

    def _is_better(self, keeps: Keeps, moved: Keeps, asked: Sequence[int]) -> bool:
        gain = 0
        for index in self._touched(np.flatnonzero(keeps != moved)):
            limit = self._limits[index]
            before, after = limit.width(keeps), limit.width(moved)
            if after < limit.allowed[0]:
                return False
            if limit.is_layer:
                if abs(after - asked[index]) > _tolerance(asked[index], int(limit.allowed[-1])):
                    return False
                gain += _alignment(after) - _alignment(before)
        return gain > 0

    def _touched(self, changed: LabelArray) -> list[int]:
        starts = np.searchsorted(self._classes, changed)
        stops = np.searchsorted(self._classes, changed, side="right")
        found = [self._limit_of[start:stop] for start, stop in zip(starts, stops, strict=True)]
        return [int(index) for index in np.unique(np.concatenate(found))] if found else []


def _alignment(width: int) -> int:
    return next((block for block in _KERNEL_BLOCKS if width % block == 0), 1).bit_length()


def width_limits(
    classes: ChannelClasses,
    *,
    min_channels: int | None,
    channel_multiple: int | Literal["auto"],
    width_before: Callable[[LayerWidth], int] | None = None,
    paying_widths: Mapping[AxisKey, Widths] | None = None,
    rounds_down: bool = True,
) -> WidthLimits:
    """The limits of every layer.

    Args:
        classes: Of the model.
        min_channels: What each layer keeps; None: the larger of 8 and an eighth of its width (of attention heads, an
            eighth and at least one). No layer is ever emptied, and no part of a Split or of another cut either.
        channel_multiple: Widths that shrink are rounded up to multiples of this; "auto" moves them to `kernel_width`
            where that breaks nothing.
        width_before: The width of a layer in the model that ratios count from, which an eighth is taken of; None: that
            of `classes`.
        paying_widths: The widths that an axis may have instead, where it has an entry; rounded up.
        rounds_down: False where "auto" may only put channels back.
    """
    limits: dict[AxisKey, _Limit] = {}
    multiple = 1 if channel_multiple == "auto" else channel_multiple
    for width in classes.widths:
        key, size = axis_key(width.classes), len(width.classes)
        before = size if width_before is None else width_before(width)
        # Heads are few and work one by one; kernels want 8 channels or more.
        smallest = 1 if width.counts_units else 8
        least = min(size, max(smallest, -(-before // 8)) if min_channels is None else min_channels)
        members, counts = np.unique(width.classes, return_counts=True)
        allowed = (paying_widths or {}).get(key)
        if allowed is None:
            allowed = np.arange(multiple, size + 1, multiple)
        limits[key] = _Limit(classes=members, counts=counts, allowed=_between(allowed, least, size), is_layer=True)
    for members in classes.inner_axes:
        ones, everything = np.ones(len(members), dtype=np.int64), np.arange(1, len(members) + 1)
        found = _Limit(classes=members, counts=ones, allowed=everything, is_layer=False)
        limits.setdefault(axis_key(members), found)
    found_limits = list(limits.values())
    rounding = None
    if channel_multiple == "auto" and paying_widths is None:
        rounding = _Rounding(found_limits, rounds_down=rounds_down)
    return WidthLimits(found_limits, rounding)


def _between(allowed: Widths, least: int, size: int) -> Widths:
    """The allowed widths from `least` on, and the full one. `least` itself need not be allowed."""
    fitting = np.unique(allowed[(allowed >= least) & (allowed < size)])
    return np.append(fitting, size).astype(np.int64)
