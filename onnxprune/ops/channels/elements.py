"""What small integer tensors hold: numbers, and dimensions of other tensors.

Exporters compute shapes in the graph: Shape -> Gather -> Concat -> Reshape. To know whether such a shape follows when
channels are removed, each element of a shape tensor is one of
    Literal     a number that stands in an initializer: must be rewritten when it counts channels
    Dimension   the size of an axis, read at run time: follows by itself
    None        anything else
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxprune.graph.weights import constant_array
from onnxprune.ops.channels.labels import LabelArray

__all__ = ["Dimension", "Element", "Elements", "Literal", "constant_elements", "move_elements"]

# Shapes are short; a long integer vector is data.
_MAX_ELEMENTS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Dimension:
    """The size of an axis of some value: its labels when it has any, and its size in the unpruned model."""

    labels: LabelArray | None
    size: int | str | None


@dataclass(frozen=True, slots=True, eq=False)
class Literal:
    """The number at `index` (row-major) of the initializer `source`."""

    number: int
    source: ir.Value
    index: int


Element: TypeAlias = Dimension | Literal | None
Elements: TypeAlias = tuple[Element, ...]


def constant_elements(value: ir.Value | None) -> Elements | None:
    """The elements of a small integer initializer, or None."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    if value.const_value.size > _MAX_ELEMENTS or len(value.const_value.shape) > 1:
        return None
    array = constant_array(value)
    if array is None or not np.issubdtype(array.dtype, np.integer):
        return None
    return tuple(Literal(int(number), value, index) for index, number in enumerate(array.reshape(-1).tolist()))


def move_elements(node: ir.Node, inputs: list[Elements | None]) -> Elements | None:
    """Elements of the first output of an operator that only moves shape elements about, or None."""
    first = inputs[0] if inputs else None
    if node.op_type == "Concat":
        if any(part is None for part in inputs):
            return None
        return tuple(element for part in inputs for element in part or ())
    if first is None:
        return None
    match node.op_type:
        case "Identity" | "Squeeze" | "Unsqueeze" | "Reshape":
            return first
        case "Cast":
            is_integer = node.attributes.get_int("to", 0) in (ir.DataType.INT64, ir.DataType.INT32)
            return first if is_integer else None
        case "Gather":
            chosen = _integers(node, 1)
            if chosen is None or any(not -len(first) <= index < len(first) for index in chosen):
                return None
            return tuple(first[index] for index in chosen)
        case "Slice":
            starts, ends, steps = _integers(node, 1), _integers(node, 2), _integers(node, 4, default=[1])
            if starts is None or ends is None or steps is None or len(starts) != 1 or steps[0] == 0:
                return None
            return first[slice(starts[0], ends[0], steps[0])] if steps[0] > 0 else None
        case _:
            return None


def _integers(node: ir.Node, position: int, default: list[int] | None = None) -> list[int] | None:
    value = node.inputs[position] if position < len(node.inputs) else None
    if value is None:
        return default
    array = constant_array(value)
    return None if array is None else [int(number) for number in array.reshape(-1)]
