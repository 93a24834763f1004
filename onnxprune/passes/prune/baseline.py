"""What ratios count from: the model at hand, or, inside a block that is repeated, the model that the block began with.

A group of W channels of which w are left, and of which a ratio r shall be gone by now, loses

    floor(r * W) - (W - w)      channels, or none where that is negative.

So rounding does not add up over the iterations, and the last one ends at the very widths that a single step would.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

import numpy as np

from onnxprune.contracts import Iteration
from onnxprune.passes.prune.analysis import ChannelClasses, ChannelGroup, LayerWidth, WeightSlices
from onnxprune.passes.prune.costs import CostModel, Costs

__all__ = ["Baseline"]

# Where a group lies and how much of it one channel owns, which removing channels does not change.
_GroupKey: TypeAlias = tuple[bool, frozenset[tuple[str, int]]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Baseline:
    """Sizes and costs of the model that ratios count from; `iteration` is None outside a block."""

    costs: Costs
    iteration: Iteration | None
    ratio_before: float
    group_sizes: Mapping[_GroupKey, int]
    axis_lengths: Mapping[str, int]
    widths: Mapping[tuple[str, str], int]

    @classmethod
    def of(
        cls, classes: ChannelClasses, costs: CostModel, iteration: Iteration | None = None, *, ratio: float = 0.0
    ) -> Self:
        """The baseline of a pass.

        Args:
            classes: Of the model that ratios count from.
            costs: Of the same model.
            iteration: Which time around, inside a block.
            ratio: The part of every group's channels that shall be gone in the end, where that is the target.
        """
        sizes: dict[_GroupKey, int] = defaultdict(int)
        lengths: dict[str, int] = {}
        for group in classes.groups:
            sizes[_key(group)] += len(group)
            lengths |= {place.key: _length(place) for place in group.slices}
        return cls(
            costs=costs.costs(np.ones(classes.num_classes, dtype=np.bool_)),
            iteration=iteration,
            ratio_before=0.0 if iteration is None else iteration.ratio_by_now(ratio, part=0.0),
            group_sizes=dict(sizes),
            axis_lengths=lengths,
            widths={(width.layer, width.key): len(width.classes) for width in classes.widths},
        )

    def ratio_at(self, ratio: float, part: float) -> float:
        """The part of the baseline that shall be gone when `part` of this pass is done, of `ratio` in all."""
        return ratio * part if self.iteration is None else self.iteration.ratio_by_now(ratio, part=part)

    def count(self, ratio: float, groups: Sequence[ChannelGroup]) -> int:
        """How many classes of `groups` together have to go so that `ratio` of the baseline's are gone, rounded down."""
        size = sum(len(group) for group in groups)
        size_before = sum(self._size_of(group) for group in groups)
        # 0.3 * 10 is 3, whatever floats say.
        return min(max(int(ratio * size_before + 1e-9) - (size_before - size), 0), size)

    def width_of(self, width: LayerWidth) -> int:
        """What a layer produced in the baseline, in channels."""
        return self.widths.get((width.layer, width.key), len(width.classes))

    def _size_of(self, group: ChannelGroup) -> int:
        """Classes in the baseline.

        A group that is not found there took another form when channels went (too few attention heads are left to go
        as a whole): its weight tells. A weight that is new was made by a pass between: it is taken to have lost what
        the iterations before took from every group.
        """
        size = self.group_sizes.get(_key(group))
        if size is not None or group.anchor is None:
            return max(size or 0, len(group))
        length = self.axis_lengths.get(group.anchor.key)
        if length is not None:
            return max(round(len(group) * length / _length(group.anchor)), len(group))
        return round(len(group) / (1.0 - self.ratio_before))


def _key(group: ChannelGroup) -> _GroupKey:
    return (group.frozen_reason is None, frozenset((place.key, place.positions.shape[1]) for place in group.slices))


def _length(place: WeightSlices) -> int:
    return int(place.weight.const_value.shape.numpy()[place.axis]) if place.weight.const_value is not None else 0
