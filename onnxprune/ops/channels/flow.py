"""What a channel rule sees of its node, and what it may say.

A rule is a function of a `Flow`. It reads the labels of the inputs and gives labels to the outputs; on the way it
    own       asks for the labels of an operand's axis; a constant gets fresh ones: its indices are new channels
    bind      says that an operand's axis is indexed by given labels
    join      puts labels together that must live or die together
    freeze    says that channels can't be removed, and why
    contract  says that an axis is summed over here: a channel removed before it is a zero to this node
    measure   says that statistics are taken over an axis: with a channel removed, they are those of the others
    grid      puts labels on a rectangle that can only lose whole rows or columns; merged does the reverse
    shrink    registers what to rewrite in the node once it is known which labels are kept
Rules run forward only, in topological order, once per node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.graph.weights import constant_array, replace_weight
from onnxprune.ops.channels.elements import Dimension, Element, Elements, Literal, constant_elements
from onnxprune.ops.channels.grids import Grid, distinct_slices, spread_along
from onnxprune.ops.channels.labelling import (
    Contraction,
    Labelling,
    LiteralUse,
    MacsTerm,
    Measurement,
    Role,
    ShrinkHook,
    TentativeAxis,
    WeightUse,
)
from onnxprune.ops.channels.labels import AxisLabels, LabelArray
from onnxprune.ops.channels.removal import Removal
from onnxprune.ops.table import OpTable

__all__ = ["CHANNELS", "ChannelRule", "Flow"]


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
        """Label the axes of an output; of one whose rank is unknown they are frozen."""
        if index >= len(self.node.outputs) or all(axis is None for axis in labels):
            return
        if not self.node.outputs[index].name:
            return  # the output is left out
        if self.out_dims(index) is None:
            for axis in labels:
                self.freeze(axis, f"reaches '{self.node.outputs[index].name}', whose rank is unknown")
        else:
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
            labels = self.axis_labels(position, axis)
            self._note_use(position, labels, role)
            if labels is not None and role is Role.FILTER and self.value(position) in self._labelling.derived:
                self._labelling.firm.append(labels)
            return labels
        value, axis = self._weight(position, axis)
        axes = self._labelling.weights.setdefault(value, {})
        if axis in axes:
            self._labelling.firm.append(axes[axis])
        else:
            axes[axis] = self.fresh(_static_dims(value)[axis])
        self._labelling.weight_uses.setdefault(value, []).append(WeightUse(self.node, position, axis, role))
        return axes[axis]

    def own_tentatively(self, position: int, axis: int) -> LabelArray:
        """Labels of a constant's axis that only count when something labelled is joined to them."""
        value, axis = self._weight(position, axis)
        axes = self._labelling.weights.setdefault(value, {})
        use = WeightUse(self.node, position, axis, Role.PARAMETER)
        if axis not in axes:
            axes[axis] = self.fresh(_static_dims(value)[axis])
            self._labelling.tentative.append(TentativeAxis(axes[axis], use))
        self._labelling.weight_uses.setdefault(value, []).append(use)
        return axes[axis]

    def sized_by(self, position: int, element: Element) -> LabelArray | None:
        """Labels of a new axis whose size is this element of shape-like input `position`.

        An axis as long as another one has the other's labels. A literal gives labels of its own, which only count
        when something labelled is joined to them: then the literal is rewritten.
        """
        if isinstance(element, Dimension):
            return element.labels
        if element is None or element.number <= 1:
            return None
        labels = self.fresh(element.number)
        self._labelling.tentative.append(TentativeAxis(labels, None))
        self.follow(position, element, labels)
        return labels

    def is_derived(self, positions: Iterable[int]) -> bool:
        """True when these inputs are constants, or computed from constants only."""
        return all(
            value is None or value in self._labelling.derived or self.is_constant(position)
            for position, value in ((position, self.value(position)) for position in positions)
        )

    def mark_derived(self) -> None:
        """Note that what the node computes comes from constants only."""
        self._labelling.derived.update(self.node.outputs)

    def _note_use(self, position: int, labels: LabelArray | None, role: Role) -> None:
        """A weight that reaches this node through others (Cast, DequantizeLinear) is used here, too."""
        value = self.value(position)
        if labels is None or value is None or value not in self._labelling.derived:
            return
        for source in self._initializers_behind(value):
            for axis, own in self._labelling.weights.get(source, {}).items():
                if np.array_equal(own, labels):
                    self._labelling.weight_uses[source].append(WeightUse(self.node, position, axis, role))

    def bind(self, position: int, axis: int, labels: LabelArray, role: Role = Role.PARAMETER) -> None:
        """Say that an operand's axis is indexed by `labels`: label a constant, join a computed operand."""
        if self.is_constant(position):
            value, axis = self._weight(position, axis)
            if _static_dims(value)[axis] != len(labels):
                self.freeze(labels, f"meets an axis of another length in {self.where}")
                return
            axes = self._labelling.weights.setdefault(value, {})
            self._labelling.weight_uses.setdefault(value, []).append(WeightUse(self.node, position, axis, role))
            known = axes.setdefault(axis, labels)
        else:
            known_or_none = self.axis_labels(position, axis)
            if known_or_none is None:
                self.freeze(labels, self._meets_fixed(position))
                return
            known = known_or_none
            self._note_use(position, known, role)
        self.join(known, labels)

    def _initializers_behind(self, value: ir.Value) -> list[ir.Value]:
        """The initializers that a derived value comes from."""
        found: list[ir.Value] = []
        seen: set[ir.Value] = set()
        waiting = [value]
        while waiting:
            current = waiting.pop()
            producer = current.producer()
            if current in seen:
                continue
            seen.add(current)
            if producer is not None and current in self._labelling.derived:
                waiting.extend(other for other in producer.inputs if other is not None)
            elif current.is_initializer():
                found.append(current)
        return found

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
        """Say that the node sums over this axis of an input."""
        labels = self.labels(position)
        on_axis = labels[axis] if labels else None
        if on_axis is not None:
            found = Contraction(self.node, position, axis % len(labels), len(labels), on_axis)
            self._labelling.contractions.append(found)
            self._labelling.firm.append(on_axis)

    def measure(self, axis_labels: LabelArray | None, what: str) -> bool:
        """Say that the node takes statistics over an axis of its inputs that carries these labels.

        Returns:
            True when the channels may go all the same; False when the policy wants exact results, and they are frozen.
        """
        if axis_labels is None:
            return True
        reason = f"{what} by {self.where}"
        if self._labelling.policy.is_exact:
            self.freeze(axis_labels, reason)
            return False
        self._labelling.measurements.append(Measurement(self.node, axis_labels, reason))
        return True

    def grid(self, labels: LabelArray, shape: Sequence[int]) -> tuple[LabelArray | None, ...]:
        """Put `labels` on a rectangle, row-major; returns labels for each of its sides.

        A side along which nothing changes has None: nothing can be removed along it. Where the labels change along
        one side only, that side has them. Otherwise every side gets labels of its own, and which of them carries
        removals is decided when the whole model is known (see `grids`).

        Args:
            labels: prod(shape) labels.
            shape: Size of each side.
        """
        table = labels.reshape(tuple(shape))
        roots = self.find(labels).reshape(table.shape)
        for axis in range(table.ndim):
            first = _first_along(roots, axis)
            if table.shape[axis] > 1 and (roots == first).all():
                only = np.ascontiguousarray(_first_along(table, axis).reshape(-1))
                self._join_along(table, only, axis)
                return tuple(only if other == axis else None for other in range(table.ndim))
        sides: list[LabelArray | None] = []
        distinct: list[LabelArray | None] = []
        reduced = table
        for axis, size in enumerate(table.shape):
            if size == 1:
                sides.append(None)
                distinct.append(None)
                continue
            first_of, set_of = distinct_slices(roots, axis)
            own = self.fresh(len(first_of))
            sides.append(own[set_of])
            distinct.append(own)
            reduced = np.take(reduced, first_of, axis=axis)
        flat = np.ascontiguousarray(reduced).reshape(-1)
        self._add_grid(flat, reduced.shape, distinct)
        self._labelling.grid_memo.setdefault(_key([side for side in distinct if side is not None]), flat)
        return tuple(sides)

    def merged(self, sides: Sequence[LabelArray]) -> LabelArray:
        """Labels of the elements, row-major, of a rectangle with these sides."""
        # A label that stands on a side several times (a channel and its H*W places) is one row of the grid.
        found = [distinct_slices(self.find(side), 0) for side in sides]
        distinct = [side[first_of] for side, (first_of, _) in zip(sides, found, strict=True)]
        shape = tuple(len(side) for side in distinct)
        if sum(size > 1 for size in shape) > 1:
            known = self._labelling.grid_memo.get(_key(distinct))
            flat = known if known is not None else self.fresh(int(np.prod(shape)))
            if known is None:
                self._add_grid(flat, shape, [side if len(side) > 1 else None for side in distinct])
                self._labelling.grid_memo[_key(distinct)] = flat
        else:
            flat = max(distinct, key=len)
        for side in distinct:
            if len(side) == 1:
                # The one row can't go, and what is on it goes by the other sides.
                self.freeze(side, f"is the only row of a grid in {self.where}")
        return np.ascontiguousarray(flat.reshape(shape)[np.ix_(*(set_of for _, set_of in found))]).reshape(-1)

    def prefer(self, labels: LabelArray) -> None:
        """Say that these labels count units that work as a whole, such as attention heads."""
        self._labelling.space.mark_units(labels)

    def _add_grid(self, flat: LabelArray, shape: tuple[int, ...], sides: Sequence[LabelArray | None]) -> None:
        self._labelling.grids.append(Grid(flat=flat, shape=shape, sides=tuple(sides), where=self.where))

    def _join_along(self, table: LabelArray, labels: LabelArray, axis: int) -> None:
        """Join what has one root already, so that later joins of either reach both."""
        elements, wide = table.reshape(-1), spread_along(labels, table.shape, axis)
        if (elements != wide).any():
            self.join(wide, elements)

    def macs_follow(self, *axes: LabelArray | None) -> None:
        """Say which labelled axes the node's MACs are proportional to."""
        self.macs_sum((1.0, axes))

    def macs_sum(self, *terms: tuple[float, Iterable[LabelArray | None]]) -> None:
        """Say what the node's MACs are a sum of: each term's share, and the labelled axes it is proportional to."""
        self._labelling.macs_terms[self.node] = tuple(
            MacsTerm(share, tuple(axis for axis in axes if axis is not None)) for share, axes in terms
        )

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
            self.rewrite_literal(position, element, lambda removal: removal.count(labels), labels, is_count=True)
        elif element.labels is None:
            self.freeze(labels, f"its number is taken from another, fixed axis in {self.where}")
        else:
            # The number is read from an axis at run time: it fits when that axis holds the same channels.
            self.join(element.labels, labels)

    def rewrite_literal(
        self,
        position: int,
        literal: Literal,
        number: Callable[[Removal], int],
        labels: LabelArray,
        *,
        is_count: bool = False,
    ) -> None:
        """Write `number` in place of a literal when channels are removed.

        A constant that others use too is copied for this node. Where it reaches the node through other nodes that is
        not possible: after the sweep, `labels` are frozen if somebody else reads another number there.
        """
        node, source, index = self.node, literal.source, literal.index
        is_direct = source is self.value(position)
        if not is_direct:
            self._labelling.literals.append(LiteralUse(node, position, literal, labels, is_count))

        def shrink(removal: Removal) -> None:
            target = removal.private_constant(node, position) if is_direct else source
            array = np.array(constant_array(target))
            array.reshape(-1)[index] = number(removal)
            replace_weight(target, array)

        self.shrink(labels, shrink)


def _key(sides: Sequence[LabelArray]) -> tuple[bytes, ...]:
    return tuple(side.tobytes() for side in sides if len(side) > 1)


def _first_along(table: LabelArray, axis: int) -> LabelArray:
    """The first entry on all axes but one, which keep size 1."""
    return table[tuple(slice(None) if other == axis else slice(0, 1) for other in range(table.ndim))]


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
