"""What a channel rule sees of its node, and what it may say.

A rule is a function of a `Flow`. It reads the labels of the inputs and gives labels to the outputs; on the way it
    own       asks for the labels of an operand's axis; a constant gets fresh ones: its indices are new channels
    bind      says that an operand's axis is indexed by given labels
    join      puts labels together that must live or die together
    freeze    says that channels can't be removed, and why
    contract  says that an axis is summed over here: a channel removed before it is a zero to this node
    shrink    registers what to rewrite in the node once it is known which labels are kept
Rules run forward only, in topological order, once per node.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.graph.weights import constant_array, replace_weight
from onnxprune.ops.channels.elements import Dimension, Element, Elements, Literal, constant_elements
from onnxprune.ops.channels.labels import AxisLabels, LabelArray, LabelSpace
from onnxprune.ops.channels.removal import Removal
from onnxprune.ops.table import OpTable

__all__ = [
    "CHANNELS",
    "ChannelRule",
    "Contraction",
    "Flow",
    "Labelling",
    "Role",
    "ShrinkHook",
    "WeightUse",
]

ShrinkHook: TypeAlias = Callable[[Removal], None]
"""Rewrites what a node holds besides its labelled weights (a group count, a shape constant)."""


class Role(enum.Enum):
    """What an axis of a weight is to its node."""

    FILTER = "filter"
    """Enumerates what the node produces."""
    INPUT = "input"
    """Is summed over against the channels that come in."""
    PARAMETER = "parameter"
    """Holds one number (or block) per channel: bias, BatchNorm, broadcast constants."""


@dataclass(frozen=True, slots=True, eq=False)
class WeightUse:
    """One use of one axis of an initializer by one node."""

    node: ir.Node
    position: int
    axis: int
    role: Role


@dataclass(frozen=True, slots=True, eq=False)
class Contraction:
    """`node` sums over `axis` of its input `position`; `rank` is that input's rank."""

    node: ir.Node
    position: int
    axis: int
    rank: int
    labels: LabelArray


@dataclass(slots=True, eq=False)
class Labelling:
    """Everything the sweep over one model found out."""

    space: LabelSpace = field(default_factory=LabelSpace)
    values: dict[ir.Value, AxisLabels] = field(default_factory=dict)
    elements: dict[ir.Value, Elements] = field(default_factory=dict)
    weights: dict[ir.Value, dict[int, LabelArray]] = field(default_factory=dict)
    weight_uses: dict[ir.Value, list[WeightUse]] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    shrink_hooks: list[tuple[LabelArray, ShrinkHook]] = field(default_factory=list)
    macs_axes: dict[ir.Node, tuple[LabelArray, ...]] = field(default_factory=dict)
    """Labelled axes that the MACs of a node are proportional to, one entry for each factor."""


class Flow:
    """One node's view of the labelling."""

    def __init__(self, labelling: Labelling, node: ir.Node) -> None:
        self._labelling = labelling
        self.node = node
        self._read: set[int] = set()
        self._labels_read: set[int] = set()

    # --- reading ----------------------------------------------------------------------------------------------

    @property
    def where(self) -> str:
        """The node for a message."""
        return f"'{self.node.name}' ({self.node.op_type})"

    @property
    def num_inputs(self) -> int:
        """Number of inputs, left-out ones included."""
        return len(self.node.inputs)

    def value(self, position: int) -> ir.Value | None:
        """The input at `position`, or None where it is left out."""
        return self.node.inputs[position] if position < len(self.node.inputs) else None

    def has(self, position: int) -> bool:
        """True when the input is given."""
        return self.value(position) is not None

    def is_constant(self, position: int) -> bool:
        """True when the input is an initializer."""
        value = self.value(position)
        return value is not None and value.is_initializer() and value.const_value is not None

    def is_trainable(self, position: int) -> bool:
        """True when the input is a floating-point initializer: its indices may become channels of their own."""
        value = self.value(position)
        if value is None or value.dtype is None or not self.is_constant(position):
            return False
        return value.dtype.is_floating_point()

    def array(self, position: int) -> npt.NDArray[np.generic] | None:
        """The content of a constant input, or None."""
        return constant_array(self.value(position)) if self.is_constant(position) else None

    def integers(self, position: int) -> list[int] | None:
        """The content of a constant integer input, or None."""
        array = self.array(position)
        return None if array is None else [int(number) for number in array.reshape(-1)]

    def dims(self, position: int) -> tuple[int | str | None, ...] | None:
        """Dimensions of an input, or None where its rank is unknown."""
        return _dims(self.value(position))

    def out_dims(self, index: int = 0) -> tuple[int | str | None, ...] | None:
        """Dimensions of an output, or None where its rank is unknown."""
        return _dims(self.node.outputs[index])

    def labels(self, position: int) -> AxisLabels:
        """Labels of each axis of an input, () where its rank is unknown."""
        self._labels_read.add(position)
        value = self.value(position)
        if value is None:
            return ()
        known = self._labelling.values.get(value)
        if known is not None:
            return known
        dims = self.dims(position)
        if dims is None:
            return ()
        axes = self._labelling.weights.get(value, {})
        return tuple(axes.get(axis) for axis in range(len(dims)))

    def axis_labels(self, position: int, axis: int) -> LabelArray | None:
        """Labels of one axis of an input; None where it has none or the axis is not known."""
        labels = self.labels(position)
        return labels[axis] if -len(labels) <= axis < len(labels) else None

    def find(self, labels: LabelArray) -> LabelArray:
        """A number for each label that is equal for labels of one class."""
        return self._labelling.space.find(labels)

    def elements(self, position: int) -> Elements | None:
        """Elements of a shape-like input. Whoever asks takes care that the node follows when they change."""
        self._read.add(position)
        return self.peek_elements(position)

    def peek_elements(self, position: int) -> Elements | None:
        """Elements of a shape-like input, without taking care of them."""
        value = self.value(position)
        if value is None:
            return None
        known = self._labelling.elements.get(value)
        return known if known is not None else constant_elements(value)

    def ignored_elements(self) -> list[int]:
        """Inputs that hold shape elements nobody asked for."""
        return [
            position
            for position, value in enumerate(self.node.inputs)
            if value is not None and value in self._labelling.elements and position not in self._read
        ]

    def ignored_inputs(self) -> list[int]:
        """Inputs whose labels nobody asked for."""
        return [position for position in range(self.num_inputs) if position not in self._labels_read]

    # --- saying -----------------------------------------------------------------------------------------------

    def give(self, labels: Sequence[LabelArray | None], index: int = 0) -> None:
        """Label the axes of an output."""
        if any(axis is not None for axis in labels) and index < len(self.node.outputs):
            self._labelling.values[self.node.outputs[index]] = tuple(labels)

    def give_elements(self, elements: Elements, index: int = 0) -> None:
        """Say what a shape-like output holds."""
        self._labelling.elements[self.node.outputs[index]] = elements

    def fresh(self, count: int) -> LabelArray:
        """New labels."""
        return self._labelling.space.fresh(count)

    def own(self, position: int, axis: int, role: Role = Role.FILTER) -> LabelArray | None:
        """Labels of an operand's axis. A constant's axis gets fresh labels; a computed one has its own or None."""
        if not self.is_constant(position):
            return self.axis_labels(position, axis)
        value, axis = self._weight(position, axis)
        axes = self._labelling.weights.setdefault(value, {})
        if axis not in axes:
            axes[axis] = self.fresh(_static_dims(value)[axis])
        self._labelling.weight_uses.setdefault(value, []).append(WeightUse(self.node, position, axis, role))
        return axes[axis]

    def bind(self, position: int, axis: int, labels: LabelArray, role: Role = Role.PARAMETER) -> None:
        """Say that an operand's axis is indexed by `labels`: label a constant, join a computed operand."""
        if self.is_constant(position):
            value, axis = self._weight(position, axis)
            axes = self._labelling.weights.setdefault(value, {})
            self._labelling.weight_uses.setdefault(value, []).append(WeightUse(self.node, position, axis, role))
            known = axes.setdefault(axis, labels)
        else:
            known_or_none = self.axis_labels(position, axis)
            if known_or_none is None:
                self.freeze(labels, self._meets_fixed(position))
                return
            known = known_or_none
        self.join(known, labels)

    def _weight(self, position: int, axis: int) -> tuple[ir.Value, int]:
        self._labels_read.add(position)
        value = self.value(position)
        if value is None:
            raise ValueError(f"Input {position} of {self.where} is left out.")
        return value, axis % len(_static_dims(value))

    def _meets_fixed(self, position: int) -> str:
        value = self.value(position)
        name = value.name if value is not None else ""
        return f"meets '{name}', whose channels are fixed, in {self.where}"

    def join(self, left: LabelArray, right: LabelArray) -> None:
        """Make labels at equal positions one channel; arrays of different length are frozen."""
        if left is right:
            return
        if left.shape != right.shape:
            for labels in (left, right):
                self.freeze(labels, f"meets an axis of another length in {self.where}")
            return
        self._labelling.space.join(left, right)

    def freeze(self, labels: LabelArray | None, reason: str) -> None:
        """Never remove these channels; None is no channel."""
        if labels is not None:
            self._labelling.space.freeze(labels, reason)

    def freeze_input(self, position: int, reason: str, *, axes: Iterable[int] | None = None) -> None:
        """Never remove channels of an input (of some of its axes)."""
        labels = self.labels(position)
        for axis in range(len(labels)) if axes is None else axes:
            if -len(labels) <= axis < len(labels):
                self.freeze(labels[axis], reason)

    def freeze_value(self, value: ir.Value | None, reason: str) -> None:
        """Never remove channels of any value of the model, labelled before this node."""
        if value is None:
            return
        labelled = (*self._labelling.values.get(value, ()), *self._labelling.weights.get(value, {}).values())
        for labels in labelled:
            self.freeze(labels, reason)
        for element in self._labelling.elements.get(value, ()):
            if isinstance(element, Dimension):
                self.freeze(element.labels, reason)

    def freeze_elements(self, position: int, reason: str) -> None:
        """Never remove channels whose number is in a shape-like input."""
        for element in self.peek_elements(position) or ():
            if isinstance(element, Dimension):
                self.freeze(element.labels, reason)

    def contract(self, position: int, axis: int) -> None:
        """Say that the node sums over this axis of a computed input."""
        labels = self.labels(position)
        on_axis = labels[axis] if labels else None
        if on_axis is not None and not self.is_constant(position):
            found = Contraction(self.node, position, axis % len(labels), len(labels), on_axis)
            self._labelling.contractions.append(found)

    def macs_follow(self, *axes: LabelArray | None) -> None:
        """Say which labelled axes the node's MACs are proportional to."""
        self._labelling.macs_axes[self.node] = tuple(axis for axis in axes if axis is not None)

    def shrink(self, labels: LabelArray, hook: ShrinkHook) -> None:
        """Call `hook` when one of `labels` is removed."""
        self._labelling.shrink_hooks.append((labels, hook))

    # --- numbers that count channels --------------------------------------------------------------------------

    def count_in_attribute(self, name: str, labels: LabelArray) -> None:
        """The integer attribute `name` is the number of kept positions of `labels`."""
        node = self.node

        def shrink(removal: Removal) -> None:
            node.attributes[name] = ir.AttrInt64(name, removal.count(labels))

        self.shrink(labels, shrink)

    def follow(self, position: int, element: Element, labels: LabelArray) -> None:
        """The element of shape-like input `position` must become the number of kept positions of `labels`."""
        if element is None:
            self.freeze(labels, f"its number is computed for {self.where}")
        elif isinstance(element, Literal):
            if element.number in (0, -1) or len(labels) == 0:
                return  # "as the input has it" and "whatever fits" follow by themselves
            self.rewrite_literal(position, element, lambda removal: removal.count(labels), labels)
        elif element.labels is None:
            self.freeze(labels, f"its number is taken from another, fixed axis in {self.where}")
        else:
            # The number is read from an axis at run time: it fits when that axis holds the same channels.
            self.join(element.labels, labels)

    def rewrite_literal(
        self, position: int, literal: Literal, number: Callable[[Removal], int], labels: LabelArray
    ) -> None:
        """Write `number` in place of a literal when channels are removed.

        A constant that others use too is copied for this node; where it reaches the node through other nodes that
        is not possible, and `labels` are frozen.
        """
        node, source, index = self.node, literal.source, literal.index
        is_direct = source is self.value(position)
        if not is_direct and len(source.uses()) + int(source.is_graph_output()) > 1:
            self.freeze(labels, f"its number stands in '{source.name}', which not only {self.where} uses")
            return

        def shrink(removal: Removal) -> None:
            target = removal.private_constant(node, position) if is_direct else source
            array = np.array(constant_array(target))
            array.reshape(-1)[index] = number(removal)
            replace_weight(target, array)

        self.shrink(labels, shrink)


def _static_dims(value: ir.Value) -> tuple[int, ...]:
    if value.const_value is None:
        raise ValueError(f"'{value.name}' is not a constant.")
    return tuple(int(dim) for dim in value.const_value.shape.numpy())


def _dims(value: ir.Value | None) -> tuple[int | str | None, ...] | None:
    if value is None or value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


ChannelRule: TypeAlias = Callable[[Flow], None]

CHANNELS: OpTable[ChannelRule] = OpTable("channels")
