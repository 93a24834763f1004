"""Nodes that give back what they get.

| node | gone when |
|---|---|
| Reshape, Expand, Tile, Squeeze, Unsqueeze, Flatten | the shape stays the same |
| Transpose | the axes stay in order |
| Cast | the element type stays the same |
| Pad | all pads are zero |
| Slice | it takes everything, forwards |
| Concat, Sum, Max, Min, Mean, Split | one input, or one output |
| Mul, Div by 1; Add, Sub of 0; Pow to 1 | the constant does not make the result larger |
| Reshape of a Reshape | the second alone makes the same shape |

Identity and Dropout are gone from the canonical form already.

    x (1,8,4,4) -> Reshape (1,128) -> Reshape (2,64)   =>   x -> Reshape (2,64)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxprune.passes.simplify.edits import attribute_ints, bypass, constant_input, input_at, is_standard, only_consumer

__all__ = ["remove_noops"]

_SAME_SHAPE = frozenset({"Reshape", "Expand", "Tile", "Squeeze", "Unsqueeze", "Flatten"})
_VARIADIC = frozenset({"Concat", "Sum", "Max", "Min", "Mean"})


def remove_noops(model: ir.Model) -> int:
    """No node is left that gives back what it gets (the table at the top of this file).

    Not done: for a node that makes an output straight from an input or a constant, because the name must stay, and
    where a shape that decides is not known.

    Returns:
        How many nodes went.
    """
    removed = 0
    for node in list(model.graph.all_nodes()):
        if node.graph is None:
            continue
        position = _passed_through(node)
        value = input_at(node, position) if position is not None else None
        if (value is not None and bypass(node, value)) or _skip_inner_reshape(node):
            removed += 1
    return removed


def _passed_through(node: ir.Node) -> int | None:
    """Position of the input that the node gives back unchanged, or None."""
    if not is_standard(node, node.op_type) or not node.inputs or not node.outputs:
        return None
    rule = _RULES.get(node.op_type)
    return rule(node) if rule is not None else None


def _same_shape(node: ir.Node) -> int | None:
    return 0 if _same_shapes(node.inputs[0], node.outputs[0]) else None


def _transpose(node: ir.Node) -> int | None:
    axes = attribute_ints(node, "perm", ())
    return 0 if axes and axes == tuple(range(len(axes))) else None


def _cast(node: ir.Node) -> int | None:
    value = node.inputs[0]
    return 0 if value is not None and value.dtype is not None and value.dtype == node.outputs[0].dtype else None


def _pad(node: ir.Node) -> int | None:
    pads = constant_input(node, 1)
    return 0 if pads is not None and not pads.any() else None


def _slice(node: ir.Node) -> int | None:
    # Forwards and of unchanged size means everything: steps above 1 and bounds inside would make it smaller.
    steps = constant_input(node, 4)
    forwards = input_at(node, 4) is None or (steps is not None and bool((steps > 0).all()))
    return 0 if forwards and _same_shapes(node.inputs[0], node.outputs[0]) else None


def _single_input(node: ir.Node) -> int | None:
    return 0 if len(node.inputs) == 1 else None


def _single_output(node: ir.Node) -> int | None:
    return 0 if len(node.outputs) == 1 and _same_shapes(node.inputs[0], node.outputs[0]) else None


def _neutral(neutral: float, *, commutes: bool) -> Callable[[ir.Node], int | None]:
    """The rule for a binary operator that does nothing with `neutral` on the right, or on either side."""

    def rule(node: ir.Node) -> int | None:
        for position in (0, 1) if commutes else (0,):
            constant = constant_input(node, 1 - position)
            # The constant may still broadcast the data to a larger shape, or (Pow) another type.
            if (
                constant is not None
                and constant.dtype.kind in "fiu"
                and bool(np.all(constant == neutral))
                and _same_shapes(node.inputs[position], node.outputs[0])
            ):
                return position
        return None

    return rule


_RULES: dict[str, Callable[[ir.Node], int | None]] = {
    "Transpose": _transpose,
    "Cast": _cast,
    "Pad": _pad,
    "Slice": _slice,
    "Split": _single_output,
    "Mul": _neutral(1, commutes=True),
    "Div": _neutral(1, commutes=False),
    "Add": _neutral(0, commutes=True),
    "Sub": _neutral(0, commutes=False),
    "Pow": _neutral(1, commutes=False),
    **dict.fromkeys(_SAME_SHAPE, _same_shape),
    **dict.fromkeys(_VARIADIC, _single_input),
}


def _same_shapes(before: ir.Value | None, after: ir.Value) -> bool:
    """True when both shapes are known to be equal; a dimension without number and name is not known."""
    if before is None or before.shape is None or after.shape is None or before.shape.rank() != after.shape.rank():
        return False
    return all(
        old == new and (isinstance(old, int) or old.value is not None)
        for old, new in zip(before.shape, after.shape, strict=True)
    )


def _skip_inner_reshape(node: ir.Node) -> bool:
    """Let a Reshape read what the Reshape before it read, and remove that one when nothing else reads it."""
    if not is_standard(node, "Reshape"):
        return False
    value = node.inputs[0]
    inner = value.producer() if value is not None else None
    target = constant_input(node, 1)
    if value is None or inner is None or target is None or not is_standard(inner, "Reshape", "Flatten"):
        return False
    # A 0 copies a size of the tensor that is read (with allowzero it is a size): neither may change its meaning.
    source = inner.inputs[0]
    if source is None or (target == 0).any() or only_consumer(value) is not node:
        return False
    node.replace_input_with(0, source)
    if inner.graph is not None:
        inner.graph.remove(inner, safe=True)
    return True
