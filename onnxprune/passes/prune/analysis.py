"""Channel classes: what must be removed together, and everything that goes with it.

A class is one channel as the whole model sees it: the filters that produce it, the parameters that scale it, the
input slices that read it, at every place it reaches. Classes with the same places (the 64 channels of one residual
stream) form a group: they are ranked against each other. All of this is arrays over class numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.graph.metadata import module_path
from onnxprune.ops.channels import ChannelPolicy, LabelArray, Labelling, Role, label_channels

__all__ = [
    "ChannelClasses",
    "ChannelGroup",
    "LayerWidth",
    "WeightSlices",
    "analyze_channels",
]

_NO_WEIGHT = "no weight belongs to it"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightSlices:
    """Where the classes of one group lie on one axis of one initializer.

    `positions` is (classes, positions per class): row i holds the indices that class i of the group owns.
    """

    weight: ir.Value
    axis: int
    role: Role
    positions: LabelArray

    @property
    def key(self) -> str:
        """Name of the weight and axis, as plans spell it."""
        return f"{self.weight.name}[{self.axis}]"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelGroup:
    """Classes that lie in the same places; they are ranked against each other.

    Attributes:
        id: The anchor's key ("conv1.weight[0]"), with "#2" ... where several groups lie on it.
        classes: Class numbers, ascending; row i of every slice's positions belongs to classes[i].
        slices: All places; the first is the anchor.
        layers: Names of the nodes that produce these channels.
        modules: Module paths of these nodes ("" where unknown), in the same order.
        frozen_reason: Why none of them may be removed, or None.
        approximate: Statistics that are taken over these channels: removing some changes what the others get there.
    """

    id: str
    classes: LabelArray
    slices: tuple[WeightSlices, ...]
    layers: tuple[str, ...]
    modules: tuple[str, ...]
    frozen_reason: str | None
    approximate: tuple[str, ...] = ()

    @property
    def anchor(self) -> WeightSlices | None:
        """The place that plans name; None for a group without weights, which is always frozen."""
        return self.slices[0] if self.slices else None

    @property
    def num_channels(self) -> int:
        """Filters or units on the anchor, of which a class may own several; 0 where only constants are counted."""
        anchor = self.anchor
        return int(anchor.positions.size) if anchor is not None and anchor.role is Role.FILTER else 0

    def __len__(self) -> int:
        return len(self.classes)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerWidth:
    """What one layer produces: `classes` holds the class at each position of the filter axis of its weight.

    `counts_units`: the positions are units that work as a whole, such as attention heads.
    """

    layer: str
    module: str
    op_type: str
    key: str
    classes: LabelArray
    counts_units: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelClasses:
    """All classes of one model. The model must not change while this is used.

    Attributes:
        num_classes: Classes are numbered from 0.
        class_of_label: The class of each label of `labelling`.
        groups: Every class is in exactly one group.
        widths: What each layer produces.
        inner_axes: Class arrays of all other labelled axes (parts of a Split): none of them may become empty.
    """

    labelling: Labelling
    num_classes: int
    class_of_label: LabelArray
    groups: tuple[ChannelGroup, ...]
    widths: tuple[LayerWidth, ...]
    inner_axes: tuple[LabelArray, ...]

    def classes_at(self, labels: LabelArray) -> LabelArray:
        """The class at each position of a label array."""
        return self.class_of_label[labels]


def analyze_channels(model: ir.Model, policy: ChannelPolicy | None = None) -> ChannelClasses:
    """Find the channel classes of `model`, which stays as it is.

    Args:
        model: Canonical; its shapes are fresh.
        policy: What the user decides beforehand; None: the defaults.
    """
    labelling = label_channels(model, policy)
    class_of_label = labelling.space.class_of()
    num_classes = int(class_of_label.max()) + 1 if len(class_of_label) else 0
    places = _places(labelling, class_of_label)
    reasons = labelling.space.frozen_reasons(class_of_label, num_classes)
    widths = _widths(labelling, class_of_label)
    return ChannelClasses(
        labelling=labelling,
        num_classes=num_classes,
        class_of_label=class_of_label,
        groups=_groups(places, num_classes, reasons, _statistics(labelling, class_of_label)),
        widths=widths,
        inner_axes=_inner_axes(labelling, class_of_label, widths),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Place:
    """One labelled axis of one initializer: `classes` holds the class of each position."""

    weight: ir.Value
    axis: int
    role: Role
    producers: tuple[ir.Node, ...]
    classes: LabelArray


def _places(labelling: Labelling, class_of_label: LabelArray) -> list[_Place]:
    places = []
    for weight, axes in labelling.weights.items():
        for axis, labels in axes.items():
            if not len(labels):
                continue  # an empty tensor has no channels
            uses = [use for use in labelling.weight_uses[weight] if use.axis == axis]
            roles = [use.role for use in uses]
            role = next((role for role in (Role.FILTER, Role.INPUT) if role in roles), Role.PARAMETER)
            producers = tuple(dict.fromkeys(use.node for use in uses if use.role is Role.FILTER))
            places.append(
                _Place(weight=weight, axis=axis, role=role, producers=producers, classes=class_of_label[labels])
            )
    # The anchor of a group is its first place: filters before what reads or scales them.
    order = {Role.FILTER: 0, Role.PARAMETER: 1, Role.INPUT: 2}
    return sorted(places, key=lambda place: order[place.role])


def _statistics(labelling: Labelling, class_of_label: LabelArray) -> list[tuple[LabelArray, str]]:
    """The classes that each statistic is taken over; a class alone on its axis is no statistic."""
    found = [(np.unique(class_of_label[m.labels]), m.what) for m in labelling.measurements]
    return [(classes, what) for classes, what in found if len(classes) > 1]


def _groups(
    places: Sequence[_Place],
    num_classes: int,
    reasons: Sequence[str | None],
    statistics: Sequence[tuple[LabelArray, str]],
) -> tuple[ChannelGroup, ...]:
    signature = _signatures(places, num_classes, reasons)
    group_of_class = np.unique(signature, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
    num_groups = int(group_of_class.max()) + 1 if num_classes else 0
    sizes = np.bincount(group_of_class, minlength=num_groups)
    slices: list[list[tuple[WeightSlices, LabelArray]]] = [[] for _ in range(num_groups)]
    producers: list[dict[ir.Node, None]] = [{} for _ in range(num_groups)]
    for place in places:
        # Positions sorted by group, then class, then position: each group's part is a (classes, per class) table.
        order = np.lexsort((place.classes, group_of_class[place.classes]))
        sorted_groups = group_of_class[place.classes[order]]
        starts = np.flatnonzero(np.diff(sorted_groups, prepend=-1))
        for part in np.split(order, starts[1:]):
            group = int(group_of_class[place.classes[part[0]]])
            table = part.reshape(int(sizes[group]), -1)
            found = WeightSlices(weight=place.weight, axis=place.axis, role=place.role, positions=table)
            slices[group].append((found, place.classes[table[:, 0]]))
            producers[group].update(dict.fromkeys(place.producers))
    measured: list[dict[str, None]] = [{} for _ in range(num_groups)]
    for classes, what in statistics:
        for group in np.unique(group_of_class[classes]).tolist():
            measured[group][what] = None
    without_places = np.split(np.argsort(group_of_class, kind="stable"), np.cumsum(sizes)[:-1]) if num_groups else []
    groups = []
    used_ids: dict[str, int] = {}
    for index in sorted(range(num_groups), key=lambda g: int(without_places[g][0])):
        classes = slices[index][0][1] if slices[index] else without_places[index]
        own_slices = tuple(found for found, _ in slices[index])
        reason = reasons[int(classes[0])] if own_slices else reasons[int(classes[0])] or _NO_WEIGHT
        name = own_slices[0].key if own_slices else "(none)"
        used_ids[name] = used_ids.get(name, 0) + 1
        nodes = tuple(producers[index])
        groups.append(
            ChannelGroup(
                id=name if used_ids[name] == 1 else f"{name}#{used_ids[name]}",
                classes=classes,
                slices=own_slices,
                layers=tuple(node.name or "" for node in nodes),
                modules=tuple(module_path(node) for node in nodes),
                frozen_reason=reason,
                approximate=tuple(measured[index]),
            )
        )
    return tuple(groups)


def _signatures(places: Sequence[_Place], num_classes: int, reasons: Sequence[str | None]) -> npt.NDArray[np.uint64]:
    """Two 64-bit numbers per class; equal exactly when classes lie in the same places, as often, equally frozen.

    Equal sums of pseudo-random numbers: two different sets of places meet with probability 2**-128.
    """
    signature = np.zeros((num_classes, 2), dtype=np.uint64)
    numbers = np.random.Generator(np.random.PCG64(0))
    for place in places:
        for column, number in enumerate(numbers.integers(1, 2**63, size=2, dtype=np.uint64)):
            np.add.at(signature[:, column], place.classes, number)
    reason_ids: dict[str | None, int] = {}
    frozen = np.array([reason_ids.setdefault(reason, len(reason_ids)) for reason in reasons], dtype=np.int64)
    reason_numbers = numbers.integers(1, 2**63, size=(max(len(reason_ids), 1), 2), dtype=np.uint64)
    if num_classes:
        signature += reason_numbers[frozen]
    return signature


def _widths(labelling: Labelling, class_of_label: LabelArray) -> tuple[LayerWidth, ...]:
    widths = []
    for weight, axes in labelling.weights.items():
        for axis, labels in axes.items():
            for use in labelling.weight_uses[weight]:
                if use.axis != axis or use.role is not Role.FILTER or not len(labels):
                    continue
                width = LayerWidth(
                    layer=use.node.name or "",
                    module=module_path(use.node),
                    op_type=use.node.op_type,
                    key=f"{weight.name}[{axis}]",
                    classes=class_of_label[labels],
                    counts_units=bool(labelling.space.is_unit(labels).any()),
                )
                widths.append(width)
    return tuple(widths)


def _inner_axes(
    labelling: Labelling, class_of_label: LabelArray, widths: Sequence[LayerWidth]
) -> tuple[LabelArray, ...]:
    seen_arrays: set[int] = set()
    seen = {width.classes.tobytes() for width in widths}
    found = []
    for axes in labelling.values.values():
        for labels in axes:
            if labels is None or not len(labels) or id(labels) in seen_arrays:
                continue
            seen_arrays.add(id(labels))
            # What counts is which classes are there, not how often each of them is.
            classes = np.unique(class_of_label[labels])
            content = classes.tobytes()
            if content not in seen:
                seen.add(content)
                found.append(classes)
    return tuple(found)
