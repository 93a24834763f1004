"""Scores for all classes that may be removed, read from the weights as they are after what is removed already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.ops.channels.labelling import WeightUse
from onnxprune.ops.layout import LAYOUT
from onnxprune.passes.prune.activations import ActivationStatistics
from onnxprune.passes.prune.analysis import ChannelClasses, ChannelGroup, WeightSlices
from onnxprune.passes.prune.channel_slices import ChannelPlace, ChannelSlices, SlicedArray
from onnxprune.passes.prune.criteria import CRITERIA, CriterionRow, with_mean_one
from onnxprune.passes.prune.gradients import Gradients
from onnxprune.passes.prune.weight_values import real_values, scales_others

__all__ = ["Scorer", "score_groups"]

Keeps = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scorer:
    """How the channels of one model are scored: the criterion, and the data that it looks at."""

    criterion: CriterionRow
    rng: np.random.Generator
    activations: ActivationStatistics | None = None
    gradients: Gradients | None = None

    def unsuited(self, classes: ChannelClasses, groups: Sequence[ChannelGroup]) -> Mapping[str, tuple[str, ...]]:
        """Groups that the criterion can't score, so that L2 does: what they lack, and their names."""
        found: dict[str, list[str]] = {}
        for group in groups:
            slices = self.slices(classes, group, np.ones(classes.num_classes, dtype=np.bool_))
            reason = self._lacking(slices)
            if reason is not None:
                found.setdefault(reason, []).append(group.id)
        return {reason: tuple(names) for reason, names in found.items()}

    def row_for(self, slices: ChannelSlices) -> CriterionRow:
        """The criterion, or `l2` where the group lacks what it looks at."""
        return self.criterion if self._lacking(slices) is None else CRITERIA["l2"]

    def _lacking(self, slices: ChannelSlices) -> str | None:
        return None if self.criterion.lacks is None else self.criterion.lacks(slices)

    def slices(self, classes: ChannelClasses, group: ChannelGroup, keeps: Keeps) -> ChannelSlices:
        """What the criterion sees of the channels of `group` that `keeps` (one flag per class) still has."""
        alive = keeps[group.classes]
        places: list[ChannelPlace] = []
        weighing: set[ir.Node] = set()
        for slices in group.slices:
            if scales_others(slices.weight):
                continue
            uses = [use for use in classes.labelling.weight_uses[slices.weight] if use.axis == slices.axis]
            place = self._place(classes, slices, uses, alive, keeps)
            places.append(place)
            if place.input_rms is not None:
                weighing.update(use.node for use in uses)
        return ChannelSlices(
            group=group.id,
            layers=group.layers,
            num_channels=int(alive.sum()),
            places=tuple(places),
            activations=() if self.activations is None else self.activations.of_group(group, alive, weighing),
        )

    def _place(
        self, classes: ChannelClasses, slices: WeightSlices, uses: Sequence[WeightUse], alive: Keeps, keeps: Keeps
    ) -> ChannelPlace:
        weight = slices.weight
        positions = slices.positions[alive]
        removed = _removed_elsewhere(classes, slices, keeps)
        return ChannelPlace(
            weight=weight.name or "",
            axis=slices.axis,
            role=slices.role.value,
            op_types=tuple(dict.fromkeys(use.node.op_type for use in uses)),
            is_normalization_scale=any(_is_normalization_scale(use) for use in uses),
            shape=_shape(weight),
            num_channels=len(positions),
            positions_per_channel=positions.shape[1],
            input_rms=self.activations.input_rms(classes, slices, uses, alive)
            if self.activations is not None
            else None,
            open_weight=partial(_open_weight, weight, slices.axis, positions, removed),
            open_gradients=None
            if self.gradients is None or weight.name not in self.gradients
            else partial(_open_gradients, self.gradients, weight, slices.axis, positions, removed),
        )


def score_groups(
    classes: ChannelClasses, groups: Sequence[ChannelGroup], keeps: Keeps, scorer: Scorer
) -> npt.NDArray[np.float64]:
    """One score per class; NaN for classes of no group in `groups`.

    Classes that `keeps` (one flag per class) says are gone score minus infinity, and what they own of the other
    classes' slices doesn't count any more. One weight is read at a time.

    Raises:
        ModelError: A weight holds NaN or infinity, so that nothing can be ranked.
        PluginError: A user's criterion fails, or gives no scores.
    """
    scores = np.full(classes.num_classes, np.nan)
    absolute: list[npt.NDArray[np.int64]] = []
    for group in groups:
        alive = keeps[group.classes]
        scores[group.classes[~alive]] = -np.inf
        if not alive.any():
            continue
        slices = scorer.slices(classes, group, keeps)
        row = scorer.row_for(slices)
        scores[group.classes[alive]] = row.score(slices, scorer.rng)
        if row.is_absolute:
            absolute.append(group.classes[alive])
    if absolute:
        # One factor for all, so that they compare with groups that L2 scores (1 on average).
        together = np.concatenate(absolute)
        scores[together] = with_mean_one(scores[together])
    return scores


def _is_normalization_scale(use: WeightUse) -> bool:
    layout = LAYOUT.get(use.node)
    return layout is not None and use.position in layout.per_channel_inputs[:1]


def _shape(weight: ir.Value) -> tuple[int, ...]:
    return () if weight.const_value is None else tuple(int(size) for size in weight.const_value.shape.numpy())


def _removed_elsewhere(classes: ChannelClasses, slices: WeightSlices, keeps: Keeps) -> tuple[tuple[int, Keeps], ...]:
    """Other axes of the weight that have lost indices, with a flag for each index that is left."""
    axes = classes.labelling.weights[slices.weight].items()
    flags = [(axis, keeps[classes.classes_at(labels)]) for axis, labels in axes if axis != slices.axis]
    return tuple((axis, kept) for axis, kept in flags if not kept.all())


def _open_weight(
    weight: ir.Value, axis: int, positions: npt.NDArray[np.int64], removed: Sequence[tuple[int, Keeps]]
) -> SlicedArray:
    return SlicedArray(array=_without(real_values(weight), removed), axis=axis, positions=positions)


def _open_gradients(
    gradients: Gradients,
    weight: ir.Value,
    axis: int,
    positions: npt.NDArray[np.int64],
    removed: Sequence[tuple[int, Keeps]],
) -> tuple[SlicedArray, ...]:
    return tuple(
        SlicedArray(array=_without(array, removed), axis=axis, positions=positions) for array in gradients.of(weight)
    )


def _without(array: npt.NDArray[Any], removed: Sequence[tuple[int, Keeps]]) -> npt.NDArray[Any]:
    for axis, kept in removed:
        array = np.compress(kept, array, axis=axis)
    return array
