"""How much of a model pruning can reach, and what holds back the rest.

A parameter can go when at least one channel that it belongs to can go: the last layer of a classifier loses no class,
but it loses the inputs that come from removed channels. A parameter all of whose channels are frozen can't; it is put
down to the channel that its filter axis belongs to, or else to the one that it scales, or reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.evaluate.figures import holds_parameters
from onnxprune.ops.channels import LabelArray, Role
from onnxprune.passes.prune.analysis import ChannelClasses

__all__ = ["ChannelReach", "ChannelSummary", "GroupReach", "channel_reach", "summarize_channels"]

_MAIN_ROLES = (Role.FILTER, Role.PARAMETER, Role.INPUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReach:
    """`parameters` belong to the group's channels, on any axis; `unreachable` of them can't go because it is frozen."""

    parameters: int
    unreachable: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelReach:
    """All parameters of a model; `groups` in the order of `ChannelClasses.groups`.

    `unlabelled` parameters belong to weights that no rule says anything about. They and the groups' `unreachable` ones
    are all that pruning can't reach.
    """

    parameters: int
    unlabelled: int
    groups: tuple[GroupReach, ...]

    @property
    def unreachable(self) -> int:
        """Parameters that can't go whatever is asked for."""
        return self.unlabelled + sum(group.unreachable for group in self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelSummary:
    """One group of channels for people and JSON; `GroupReach` says what the figures are.

    `modules` are the paths of `layers` in the source's modules, "" where unknown.
    """

    name: str
    num_channels: int
    parameters: int
    unreachable_parameters: int
    layers: tuple[str, ...]
    modules: tuple[str, ...]
    weights: tuple[str, ...]
    frozen_reason: str | None
    approximate: tuple[str, ...]


def summarize_channels(classes: ChannelClasses, reach: ChannelReach) -> tuple[ChannelSummary, ...]:
    """All channel groups that own weights in plain values, in the order of the graph."""
    return tuple(
        ChannelSummary(
            name=group.id,
            num_channels=group.num_channels,
            parameters=figures.parameters,
            unreachable_parameters=figures.unreachable,
            layers=group.layers,
            modules=group.modules,
            weights=tuple(dict.fromkeys(slices.weight.name or "" for slices in group.slices)),
            frozen_reason=group.frozen_reason,
            approximate=group.approximate,
        )
        for group, figures in zip(classes.groups, reach.groups, strict=True)
        if group.slices
    )


def channel_reach(model: ir.Model, classes: ChannelClasses) -> ChannelReach:
    """Count the parameters of `model` by what may go; `classes` are those of the same model."""
    group_of_class = np.zeros(classes.num_classes, dtype=np.int64)
    is_frozen = np.zeros(len(classes.groups), dtype=np.bool_)
    for number, group in enumerate(classes.groups):
        group_of_class[group.classes] = number
        is_frozen[number] = group.frozen_reason is not None
    total, unlabelled = 0, 0
    belonging = np.zeros(len(classes.groups), dtype=np.int64)
    unreachable = np.zeros(len(classes.groups), dtype=np.int64)
    for graph in model.graphs():
        for weight in graph.initializers.values():
            if weight.const_value is None or not holds_parameters(weight):
                continue
            size = int(weight.const_value.size)
            total += size
            axes = classes.labelling.weights.get(weight, {})
            counts = {
                axis: np.bincount(group_of_class[classes.classes_at(labels)], minlength=len(classes.groups))
                for axis, labels in axes.items()
                if len(labels)
            }
            if not counts:
                unlabelled += size
                continue
            belonging += _belonging(size, counts)
            unreachable += _unreachable(size, counts, _main_axis(weight, classes, counts), is_frozen)
    return ChannelReach(
        parameters=total,
        unlabelled=unlabelled,
        groups=tuple(
            GroupReach(parameters=int(own), unreachable=int(held))
            for own, held in zip(belonging, unreachable, strict=True)
        ),
    )


def _belonging(size: int, counts: Mapping[int, LabelArray]) -> npt.NDArray[np.int64]:
    """Elements of a weight that lie on each group, on one axis or several; `counts` are positions by axis and group."""
    elsewhere = np.prod([1.0 - count / count.sum() for count in counts.values()], axis=0)
    parameters: npt.NDArray[np.int64] = np.rint(size * (1.0 - elsewhere)).astype(np.int64)
    return parameters


def _unreachable(
    size: int, counts: Mapping[int, LabelArray], main_axis: int, is_frozen: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Elements all of whose channels are frozen, by the group on the main axis."""
    each = size
    for count in counts.values():
        each //= int(count.sum())
    for axis, count in counts.items():
        if axis != main_axis:
            each *= int(count[is_frozen].sum())
    return np.where(is_frozen, counts[main_axis] * each, 0).astype(np.int64)


def _main_axis(weight: ir.Value, classes: ChannelClasses, counts: Mapping[int, LabelArray]) -> int:
    roles = {use.axis: use.role for use in classes.labelling.weight_uses[weight] if use.axis in counts}
    return min(counts, key=lambda axis: _MAIN_ROLES.index(roles.get(axis, Role.INPUT)))
