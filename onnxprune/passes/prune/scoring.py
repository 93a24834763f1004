"""Scores for all classes that may be removed, read from the weights as they are after what is removed already."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from onnxprune.errors import ModelError
from onnxprune.graph.weights import constant_array
from onnxprune.passes.prune.analysis import ChannelClasses, ChannelGroup, WeightSlices
from onnxprune.passes.prune.criteria import Criterion, Rows, channel_scores

__all__ = ["score_groups"]


def score_groups(
    classes: ChannelClasses,
    groups: Sequence[ChannelGroup],
    keeps: npt.NDArray[np.bool_],
    criterion: Criterion,
    rng: np.random.Generator,
) -> npt.NDArray[np.float64]:
    """One score per class; NaN for classes of no group in `groups`.

    Classes that `keeps` (one flag per class) says are gone score minus infinity, and what they own of the other
    classes' slices doesn't count any more.

    Raises:
        ModelError: A weight holds NaN or infinity, so that nothing can be ranked.
    """
    scores = np.full(classes.num_classes, np.nan)
    for group in groups:
        alive = keeps[group.classes]
        scores[group.classes[~alive]] = -np.inf
        if not alive.any():
            continue
        tables = [_rows(classes, slices, alive, keeps) for slices in group.slices]
        scores[group.classes[alive]] = channel_scores(tables, criterion, rng)
    return scores


def _rows(
    classes: ChannelClasses,
    slices: WeightSlices,
    alive: npt.NDArray[np.bool_],
    keeps: npt.NDArray[np.bool_],
) -> Rows:
    """One row for each channel that is alive: all its weights on this axis, without those of removed channels."""
    array = constant_array(slices.weight)
    if array is None:
        raise ModelError(f"Weight '{slices.weight.name}' has no content.")
    for axis, labels in classes.labelling.weights[slices.weight].items():
        kept = keeps[classes.classes_at(labels)]
        if axis != slices.axis and not kept.all():
            array = np.compress(kept, array, axis=axis)
    positions = slices.positions[alive]
    wanted = positions.reshape(-1)
    if not np.array_equal(wanted, np.arange(array.shape[slices.axis])):
        # Along the axis as it lies in memory; picking from a transposed view is several times slower.
        array = np.take(array, wanted, axis=slices.axis)
    moved = np.moveaxis(array, slices.axis, 0)
    rows = moved.reshape(len(positions), -1).astype(np.float32, copy=False)
    if not np.isfinite(rows).all():
        raise ModelError(
            f"Cannot rank the channels of '{slices.weight.name}': it holds values that are NaN or infinite.",
            "Look at how the model was trained or exported; pruning can't repair it.",
        )
    return rows
