"""What is known, before the model runs, of small integer tensors: the vectors that steer shapes.

Exporters compute shapes: Shape -> Gather -> Concat -> Reshape. With an open batch such a chain can't be folded, yet
most of its numbers are known. `evaluate` follows such chains element by element:

    x: (batch, 3, 4)      Shape(x) = [batch, 3, 4]      Concat(Gather(Shape(x), 0), [12]) = [batch, 12]

so that Reshape is told [-1, 12] and the graph stays as static as it can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["MAX_ELEMENTS", "Element", "Elements", "evaluate"]

Element: TypeAlias = int | str | None
"""A number; or the name of an axis length that only the run knows (not negative); or None: any number."""

MAX_ELEMENTS = 64
"""Longer tensors do not steer shapes."""


@dataclass(frozen=True, slots=True)
class Elements:
    """The elements of one INT32, INT64 or BOOL tensor, as an object array of `Element`."""

    array: npt.NDArray[Any]

    @classmethod
    def of(cls, elements: Iterable[Element], shape: tuple[int, ...] | None = None) -> Elements:
        """From a flat list; None: a vector."""
        listed = list(elements)
        array = np.empty(len(listed), object)
        array[:] = listed
        return cls(array if shape is None else array.reshape(shape))

    @property
    def flat(self) -> tuple[Element, ...]:
        """All elements in order."""
        return tuple(self.array.reshape(-1))

    @property
    def is_complete(self) -> bool:
        """True when all are numbers."""
        return all(isinstance(element, int) for element in self.flat)

    def numbers(self, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The numbers, when complete."""
        return self.array.astype(dtype)


@dataclass(frozen=True, slots=True)
class _Given:
    node: ir.Node
    inputs: tuple[Elements | None, ...]
    lengths_of: Callable[[ir.Value], tuple[Element, ...] | None]

    def lengths(self, position: int) -> tuple[Element, ...] | None:
        """Of the axes of an input."""
        value = self.node.inputs[position]
        return None if value is None else self.lengths_of(value)


_Rule: TypeAlias = Callable[[_Given], Elements | None]


def evaluate(
    node: ir.Node, inputs: Sequence[Elements | None], lengths: Callable[[ir.Value], tuple[Element, ...] | None]
) -> Elements | None:
    """The elements of the node's only output; None where nothing is known, or the node is of no such kind.

    Args:
        node: Any node.
        inputs: What is known of its inputs.
        lengths: Gives the lengths of a value's axes; None where their number is not known.
    """
    rule = _RULES.get(node.op_type)
    if rule is None or node.domain not in ("", "ai.onnx") or len(node.outputs) != 1:
        return None
    found = rule(_Given(node, tuple(inputs), lengths))
    if found is None or found.array.size > MAX_ELEMENTS:
        return None
    # Sums that leave the element type wrap around in ONNX.
    bounds = np.iinfo(np.int32 if node.outputs[0].dtype is ir.DataType.INT32 else np.int64)
    kept = (
        None if isinstance(element, int) and not bounds.min <= element <= bounds.max else element
        for element in found.flat
    )
    return Elements.of(kept, found.array.shape)


def _shape(given: _Given) -> Elements | None:
    lengths = given.lengths(0)
    if lengths is None:
        return None
    attributes = given.node.attributes
    return Elements.of(lengths[attributes.get_int("start", 0) : attributes.get_int("end", len(lengths))])


def _size(given: _Given) -> Elements | None:
    lengths = given.lengths(0)
    return None if lengths is None else Elements.of([_product(lengths)], ())


def _product(elements: Iterable[Element]) -> Element:
    product: Element = 1
    for element in elements:
        product = _multiplied(product, element)
    return product


def _gather(given: _Given) -> Elements | None:
    data, indices = given.inputs
    if data is None or data.array.ndim != 1 or indices is None or not indices.is_complete:
        return None
    picks = indices.numbers(np.int64)
    if picks.size and not -len(data.array) <= picks.min() <= picks.max() < len(data.array):
        return None
    return Elements(np.asarray(data.array[picks], object))


def _slice(given: _Given) -> Elements | None:
    data, *bounds = (
        elements for elements, value in zip(given.inputs, given.node.inputs, strict=True) if value is not None
    )
    if data is None or data.array.ndim != 1 or any(one is None or not one.is_complete for one in bounds):
        return None
    flat = [one.flat[0] for one in bounds if one is not None and len(one.flat) == 1]
    has_axes = len(given.node.inputs) > _STEPS - 1 and given.node.inputs[_STEPS - 1] is not None
    if len(flat) < len(bounds):
        return None
    start, end = flat[0], flat[1]
    step = flat[-1] if len(flat) > (3 if has_axes else 2) else 1
    # An end before the first element, for a slice that runs backwards, is None for Python.
    if isinstance(step, int) and isinstance(end, int) and step < 0 and end < -len(data.array):
        end = None
    return Elements(data.array[slice(start, end, step)])


_STEPS = 4
"""Position of Slice's steps."""


def _concat(given: _Given) -> Elements | None:
    parts: list[npt.NDArray[Any]] = []
    for position, elements in enumerate(given.inputs):
        if elements is not None:
            parts.append(elements.array)
            continue
        lengths = given.lengths(position)
        if lengths is None or len(lengths) != 1 or not isinstance(lengths[0], int) or lengths[0] > MAX_ELEMENTS:
            return None
        parts.append(Elements.of([None] * lengths[0]).array)
    return Elements(np.concatenate(parts)) if all(part.ndim == 1 for part in parts) else None


def _same_in_order(given: _Given) -> Elements | None:
    """Squeeze, Unsqueeze, Reshape, Identity: the same numbers, in the shape that inference found."""
    data, shape = given.inputs[0], given.node.outputs[0].shape
    if data is None or shape is None or not all(isinstance(dim, int) for dim in shape):
        return None
    return Elements(data.array.reshape(shape.numpy()))


def _cast(given: _Given) -> Elements | None:
    is_integer = given.node.attributes.get_int("to", 0) in (int(ir.DataType.INT32), int(ir.DataType.INT64))
    return _same_in_order(given) if is_integer else None


def _elementwise(function: Callable[..., Element]) -> _Rule:
    def rule(given: _Given) -> Elements | None:
        arrays = [elements.array for elements in given.inputs if elements is not None]
        if len(arrays) < len(given.inputs):
            return None
        spread = np.broadcast_arrays(*arrays)
        return Elements.of(
            (function(*together) for together in zip(*(one.reshape(-1) for one in spread), strict=True)),
            spread[0].shape,
        )

    return rule


def _exact(function: Callable[..., int]) -> Callable[..., Element]:
    return lambda *given: function(*given) if all(isinstance(one, int) for one in given) else None


def _multiplied(left: Element, right: Element) -> Element:
    for one, other in ((left, right), (right, left)):
        if one == 1:
            return other
        if one == 0:
            return 0
    if isinstance(left, int) and isinstance(right, int):
        return left * right
    # A product of lengths is never negative either.
    names = [str(one) for one in (left, right) if isinstance(one, str) or (isinstance(one, int) and one > 0)]
    return "*".join(sorted(names)) if len(names) == 2 else None


def _added(left: Element, right: Element) -> Element:
    if right == 0:
        return left
    if left == 0:
        return right
    return left + right if isinstance(left, int) and isinstance(right, int) else None


def _subtracted(left: Element, right: Element) -> Element:
    if right == 0:
        return left
    if left is not None and left == right:
        return 0
    return left - right if isinstance(left, int) and isinstance(right, int) else None


def _divided(left: Element, right: Element) -> Element:
    if right == 1:
        return left
    if not isinstance(left, int) or not isinstance(right, int) or right == 0:
        return None
    # ONNX divides integers towards zero.
    return int(math.copysign(abs(left) // abs(right), left * right)) if left else 0


def _equal(left: Element, right: Element) -> Element:
    if isinstance(left, int) and isinstance(right, int):
        return int(left == right)
    if isinstance(left, str) and isinstance(right, str) and left == right:
        return 1
    is_length_and_negative = any(
        isinstance(one, str) and isinstance(other, int) and other < 0 for one, other in ((left, right), (right, left))
    )
    return 0 if is_length_and_negative else None


def _where(condition: Element, if_true: Element, if_false: Element) -> Element:
    if condition is None or isinstance(condition, str):
        return if_true if if_true == if_false else None
    return if_true if condition else if_false


def _constant_of_shape(given: _Given) -> Elements | None:
    (shape,) = given.inputs
    value = given.node.attributes.get("value")
    if shape is None or not shape.is_complete or value is None:
        return None
    number = value.as_tensor().numpy().reshape(-1)[0]
    dims = tuple(int(dim) for dim in shape.numbers(np.int64))
    if not isinstance(number, (np.int32, np.int64)) or math.prod(dims) > MAX_ELEMENTS:
        return None
    return Elements.of([int(number)] * math.prod(dims), dims)


def _expand(given: _Given) -> Elements | None:
    data, shape = given.inputs
    if data is None or shape is None or not shape.is_complete:
        return None
    dims = np.broadcast_shapes(data.array.shape, tuple(int(dim) for dim in shape.numbers(np.int64)))
    if math.prod(dims) > MAX_ELEMENTS:
        return None
    return Elements(np.broadcast_to(data.array, dims))


_RULES: Mapping[str, _Rule] = {
    "Add": _elementwise(_added),
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Div": _elementwise(_divided),
    "Equal": _elementwise(_equal),
    "Expand": _expand,
    "Gather": _gather,
    "Identity": _same_in_order,
    "Max": _elementwise(_exact(max)),
    "Min": _elementwise(_exact(min)),
    "Mul": _elementwise(_multiplied),
    "Neg": _elementwise(_exact(lambda number: -number)),
    "Reshape": _same_in_order,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Squeeze": _same_in_order,
    "Sub": _elementwise(_subtracted),
    "Unsqueeze": _same_in_order,
    "Where": _elementwise(_where),
}
