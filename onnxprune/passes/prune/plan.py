"""The plan of `prune`: which channels go, named so that it fits the same model again after saving and loading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxprune.errors import PassError
from onnxprune.passes.prune.analysis import ChannelClasses, ChannelGroup

__all__ = ["PrunedGroup", "PruningPlan", "flags_from_plan", "pruned_groups"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedGroup:
    """Removed channels of one group.

    `removed` are positions on `axis` of `weight`: the first position of each removed channel. Everything that the
    channel classes of the model join with them goes, too.
    """

    weight: str
    axis: int
    num_channels: int
    removed: tuple[int, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningPlan:
    """All decisions of one `prune`.

    `parameters_after` and `macs_after` are what the plan comes to (MACs None: shapes are dynamic); the batch counts
    as 1 where it is dynamic.
    """

    groups: tuple[PrunedGroup, ...]
    reached: bool
    target: str
    target_ratio: float
    parameters_before: int
    parameters_after: int
    macs_before: int | None
    macs_after: int | None
    skipped: tuple[tuple[str, str], ...] = ()
    latency_ratio_predicted: float | None = None
    """Time of the pruned model over the original's; None where the target is no time."""
    latency_ratio_measured: float | None = None
    notes: tuple[str, ...] = ()
    """What the user should know about how it was decided."""


def pruned_groups(groups: Sequence[ChannelGroup], keeps: npt.NDArray[np.bool_]) -> tuple[PrunedGroup, ...]:
    """What `keeps` (one flag per class) removes, group by group."""
    found = []
    for group in groups:
        gone = ~keeps[group.classes]
        anchor = group.anchor
        if anchor is None or not gone.any():
            continue
        found.append(
            PrunedGroup(
                weight=anchor.weight.name or "",
                axis=anchor.axis,
                num_channels=len(group),
                removed=tuple(int(position) for position in anchor.positions[gone, 0]),
                layers=group.layers,
            )
        )
    return tuple(found)


def flags_from_plan(classes: ChannelClasses, groups: Sequence[PrunedGroup]) -> npt.NDArray[np.bool_]:
    """True for each class that stays.

    Raises:
        PassError: The plan was made for another model: a weight or channel does not exist, or may not be removed.
    """
    weights = {value.name: axes for value, axes in classes.labelling.weights.items()}
    frozen = np.zeros(classes.num_classes, dtype=np.bool_)
    for group in classes.groups:
        frozen[group.classes] = group.frozen_reason is not None
    keeps = np.ones(classes.num_classes, dtype=np.bool_)
    for pruned in groups:
        labels = weights.get(pruned.weight, {}).get(pruned.axis)
        positions = np.array(pruned.removed, dtype=np.int64)
        if labels is None or (positions.size and not 0 <= positions.min() <= positions.max() < len(labels)):
            raise PassError(
                f"The plan does not fit the model: weight '{pruned.weight}' has no channels {pruned.removed[:3]} on "
                f"axis {pruned.axis}.",
                "Make the plan anew, or use the model that it was made for.",
            )
        chosen = classes.classes_at(labels[positions])
        if frozen[chosen].any():
            raise PassError(
                f"The plan does not fit the model: channels of '{pruned.weight}' that it removes are frozen here.",
                "Run `onnxprune inspect --channels` to see why, and make the plan anew.",
            )
        keeps[chosen] = False
    for width in classes.widths:
        if len(width.classes) and not keeps[width.classes].any():
            raise PassError(f"The plan would leave no channel in '{width.layer}' ({width.op_type}).")
    return keeps
