"""Grids: labels that stand on a rectangle, which can only lose whole rows or whole columns.

A Reshape of (N, 768) to (N, 12 heads, 64) puts 768 labels on a rectangle of 12 x 64. Whatever is removed must leave
a rectangle: whole heads, or the same places of every head. Which of both can be known only when the whole model has
been seen (are the heads counted elsewhere? do the places reach an output?), so rules only record the grid:

    flat    labels of the rectangle's elements, row-major over `shape`
    sides   one label for each index of each side; None for a side that has nothing to say (size 1)

and after the sweep `settle_grids` decides for each grid which side carries the removal: an element goes with its
index on that side, and the indices of all other sides are frozen. Grids share labels, so that one decision can leave
another grid a single side: these are settled first. Where there is a choice:

1. A side that counts units (attention heads) carries removals when at least `MIN_UNITS` of them can go one by one.
2. Else one of three orders is followed in all grids that hang together: the side with the most classes, the first
   side, or the last. Each is tried on a copy of the labels, and the one is taken that leaves the most positions of
   weights free, of equals the one with the most classes. (Grouped convolutions with channel shuffles between share
   grids of several shapes: what looks best for one alone can leave the next nothing.)
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxprune.ops.channels.labels import LabelArray, LabelSpace

__all__ = ["MIN_UNITS", "ChannelPolicy", "Grid", "UnitChoice", "distinct_slices", "settle_grids", "spread_along"]

# With fewer heads than this, half of them is too coarse a step: the width of the heads is cut instead.
MIN_UNITS = 4


class UnitChoice(enum.Enum):
    """What goes from attention where both would be possible."""

    AUTO = "auto"
    """Whole heads where there are at least `MIN_UNITS`, else their width."""
    HEADS = "heads"
    WIDTH = "width"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelPolicy:
    """What the user decides about channels before any of them is ranked.

    Attributes:
        units: What goes from attention.
        is_exact: Freeze channels over which statistics are taken (LayerNorm, a mean over channels), so that a pruned
            model always equals the masked original. Otherwise they may go, and the statistics are those of the rest.
    """

    units: UnitChoice = UnitChoice.AUTO
    is_exact: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """`flat` has prod(shape) labels; sides[a] has shape[a] labels, or is None where shape[a] is 1."""

    flat: LabelArray
    shape: tuple[int, ...]
    sides: tuple[LabelArray | None, ...]
    where: str


class _Order(enum.Enum):
    """Which side of a grid is taken where no other rule decides."""

    MOST = enum.auto()
    FIRST = enum.auto()
    LAST = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """What removing along one side would mean: classes that can go one by one, of how many."""

    axis: int
    free: int
    counts_units: bool


def distinct_slices(table: LabelArray, axis: int) -> tuple[LabelArray, LabelArray]:
    """Indices of the first of each set of equal slices of `table` along `axis`, and the set of every index.

    Slices are compared by sums of pseudo-random multiples: two different ones meet with probability 2**-64.
    """
    rows = np.moveaxis(table, axis, 0).reshape(table.shape[axis], -1).astype(np.uint64)
    factors = np.random.Generator(np.random.PCG64(0)).integers(1, 2**63, size=rows.shape[1], dtype=np.uint64)
    # Numbers wrap around at 2**64, which is meant.
    hashes = rows @ factors
    _, first, index = np.unique(hashes, return_index=True, return_inverse=True)
    # Sets in the order in which they first occur.
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order].astype(np.int64), rank[index.reshape(-1)].astype(np.int64)


def spread_along(labels: LabelArray, shape: Sequence[int], axis: int) -> LabelArray:
    """The elements, row-major, of a table that has `labels` along `axis` and does not change along the others."""
    along = [1] * len(shape)
    along[axis] = len(labels)
    wide: npt.NDArray[np.int64] = np.broadcast_to(labels.reshape(along), shape)
    return np.ascontiguousarray(wide).reshape(-1)


def settle_grids(space: LabelSpace, grids: Sequence[Grid], units: UnitChoice, axes: Sequence[LabelArray] = ()) -> None:
    """Decide which side of each grid carries the removal; all grids are true of the labels afterwards.

    Args:
        space: What the labels of the grids are in.
        grids: In the order of the graph.
        units: What goes from attention.
        axes: Labels of the axes of weights: what should be free to go afterwards.
    """
    undecided = _settle_forced(space, grids)
    if not undecided:
        return
    connected = _connected(space, undecided)
    best: dict[int, tuple[tuple[int, int], _Order]] = {}
    for order in _Order:
        trial = space.copy()
        for grid in undecided:
            _settle_by(trial, grid, units, order)
        for group, free in _freedom(space, trial, undecided, connected, axes).items():
            if group not in best or free > best[group][0]:
                best[group] = (free, order)
    for grid, group in zip(undecided, connected.tolist(), strict=True):
        _settle_by(space, grid, units, best[group][1])


def _settle_forced(space: LabelSpace, grids: Sequence[Grid]) -> list[Grid]:
    """Settle grids with at most one side that can go; returns the others, in their order."""
    undecided = list(grids)
    # A forced decision can force others, before and behind it: look in both directions.
    for turn in range(8):
        remaining = []
        for grid in undecided if turn % 2 == 0 else reversed(undecided):
            sides = _removable_sides(space, grid)
            if len(sides) <= 1:
                _settle(space, grid, sides[0].axis if sides else None)
            else:
                remaining.append(grid)
        is_settled = len(remaining) == len(undecided)
        undecided = remaining if turn % 2 == 0 else remaining[::-1]
        if is_settled:
            break
    return undecided


def _connected(space: LabelSpace, grids: Sequence[Grid]) -> LabelArray:
    """For each grid the number of the set of grids that it shares labels with, directly or through others."""
    links = LabelSpace()
    links.fresh(len(grids))
    roots = [space.find(_labels_of(grid)) for grid in grids]
    owners = np.repeat(np.arange(len(grids)), [len(found) for found in roots])
    everything = np.concatenate(roots)
    order = np.argsort(everything, kind="stable")
    is_same = everything[order][1:] == everything[order][:-1]
    links.join(owners[order][1:][is_same], owners[order][:-1][is_same])
    return links.find(np.arange(len(grids), dtype=np.int64))


def _labels_of(grid: Grid) -> LabelArray:
    return np.concatenate([grid.flat, *(side for side in grid.sides if side is not None)])


def _freedom(
    before: LabelSpace,
    settled: LabelSpace,
    grids: Sequence[Grid],
    connected: LabelArray,
    axes: Sequence[LabelArray],
) -> dict[int, tuple[int, int]]:
    """Per set of grids: the positions of weights that can go, and the classes they are in, once all is settled."""
    group_of_label = np.full(len(before), -1, dtype=np.int64)
    for grid, group in zip(grids, connected.tolist(), strict=True):
        group_of_label[before.find(_labels_of(grid))] = group
    positions = dict.fromkeys(connected.tolist(), 0)
    classes: dict[int, list[LabelArray]] = {group: [] for group in positions}
    for labels in axes:
        if not len(labels):
            continue
        groups = group_of_label[before.find(labels)]
        if (groups < 0).all():
            continue
        roots = settled.find(labels)
        is_free = ~settled.is_frozen(labels)
        if (roots == roots[0]).all():
            continue  # the only class of an axis can't go
        for group in np.unique(groups[(groups >= 0) & is_free]).tolist():
            chosen = is_free & (groups == group)
            positions[group] += int(chosen.sum())
            classes[group].append(np.unique(roots[chosen]))
    return {
        group: (count, len(np.unique(np.concatenate(classes[group]))) if classes[group] else 0)
        for group, count in positions.items()
    }


def _settle_by(space: LabelSpace, grid: Grid, units: UnitChoice, order: _Order) -> None:
    sides = _removable_sides(space, grid)
    _settle(space, grid, _preferred(sides, units, order).axis if sides else None)


def _preferred(sides: Sequence[_Side], units: UnitChoice, order: _Order) -> _Side:
    counting = [side for side in sides if side.counts_units]
    others = [side for side in sides if not side.counts_units]
    if not counting:
        return _in_order(others, order)
    takes_units = units is UnitChoice.HEADS or (units is UnitChoice.AUTO and counting[0].free >= MIN_UNITS)
    return counting[0] if takes_units or not others else _in_order(others, order)


def _in_order(sides: Sequence[_Side], order: _Order) -> _Side:
    match order:
        case _Order.FIRST:
            return sides[0]
        case _Order.LAST:
            return sides[-1]
        case _Order.MOST:
            return max(sides, key=lambda side: side.free)


def _removable_sides(space: LabelSpace, grid: Grid) -> list[_Side]:
    found = []
    for axis, side in enumerate(grid.sides):
        if side is None:
            continue
        free = _free_classes(space, grid, axis, side)
        if free:
            found.append(_Side(axis=axis, free=free, counts_units=bool(space.is_unit(side).any())))
    return found


def _free_classes(space: LabelSpace, grid: Grid, axis: int, side: LabelArray) -> int:
    """How many classes could be removed one by one if the elements went with their index on `axis`.

    Indices that share a label (of an element, or of their own) are one class; a class is out when one of its labels is
    frozen, and so is the only class of a side.
    """
    elements = np.moveaxis(grid.flat.reshape(grid.shape), axis, 0).reshape(grid.shape[axis], -1)
    labels = np.concatenate([side[:, None], elements], axis=1)
    _, ids = np.unique(space.find(labels.reshape(-1)), return_inverse=True)
    ids = ids.reshape(labels.shape)
    class_of_index = np.arange(len(side), dtype=np.int64)
    while True:
        class_of_id = np.full(int(ids.max()) + 1, len(side), dtype=np.int64)
        np.minimum.at(class_of_id, ids.reshape(-1), np.repeat(class_of_index, elements.shape[1] + 1))
        smaller = class_of_id[ids].min(axis=1)
        if np.array_equal(smaller, class_of_index):
            break
        class_of_index = smaller
    classes = np.unique(class_of_index)
    if len(classes) < 2:
        return 0
    is_frozen = space.is_frozen(labels.reshape(-1)).reshape(labels.shape).any(axis=1)
    return int(len(classes) - len(np.unique(class_of_index[is_frozen])))


def _settle(space: LabelSpace, grid: Grid, carrier: int | None) -> None:
    size = " x ".join(str(size) for size in grid.shape)
    if carrier is None:
        everything = [grid.flat, *(side for side in grid.sides if side is not None)]
        reasons = (space.frozen_reason(labels) for labels in everything)
        # What froze a side is why the elements stay: users ask for the cause, not for the grid.
        why = next(filter(None, reasons), f"stands on a grid of {size} in {grid.where} that can't lose a side")
        for labels in everything:
            space.freeze(labels, why)
        return
    chosen = grid.sides[carrier]
    if chosen is None:
        raise ValueError("A side of size 1 can't carry a removal.")
    space.join(grid.flat, spread_along(chosen, grid.shape, carrier))
    for axis, side in enumerate(grid.sides):
        if axis != carrier and side is not None:
            space.freeze(side, f"keeps its length: the grid of {size} in {grid.where} is cut along its other side")
