"""Small edits that every rewrite of `simplify` is made of; none of them leaves the graph broken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.graph.cleanup import hand_over
from onnxprune.graph.names import UniqueNames
from onnxprune.graph.weights import add_initializer, constant_array, replace_weight

__all__ = [
    "attribute_ints",
    "bypass",
    "bypass_all",
    "constant_input",
    "input_at",
    "is_standard",
    "only_consumer",
    "set_constant",
]

_STANDARD_DOMAINS = frozenset({"", "ai.onnx"})


def is_standard(node: ir.Node | None, *op_types: str) -> bool:
    """True when `node` is one of ONNX's own operators `op_types`."""
    return node is not None and node.op_type in op_types and node.domain in _STANDARD_DOMAINS


def input_at(node: ir.Node, position: int) -> ir.Value | None:
    """The input at `position`, or None where it is left out."""
    return node.inputs[position] if position < len(node.inputs) else None


def constant_input(node: ir.Node, position: int) -> npt.NDArray[Any] | None:
    """The array of a constant input, or None where it is left out or computed."""
    return constant_array(input_at(node, position))


def attribute_ints(node: ir.Node, name: str, default: Sequence[int]) -> tuple[int, ...]:
    """A list attribute, or `default` where it is left out."""
    attribute = node.attributes.get(name)
    return tuple(int(number) for number in (attribute.as_ints() if attribute is not None else default))


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The one node of the same graph that reads `value`, once; None where another does, or the caller of the model."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    producer = value.producer()
    # A reader inside a branch may not run at all: it is none that a rewrite may move work into.
    return node if producer is None or node.graph is producer.graph else None


def bypass(node: ir.Node, value: ir.Value) -> bool:
    """Let everything that reads the first output of `node` read `value` instead, and remove the node.

    Returns False, with nothing changed, where another output of the node is read, or where the output is the model's
    own and `value` can't take its name: an input, a constant, a value of an outer graph, or an output already.
    """
    if any(other.uses() or other.is_graph_output() for other in node.outputs[1:]):
        return False
    return bypass_all(node, (value, *(None for _ in node.outputs[1:])))


def bypass_all(node: ir.Node, values: Sequence[ir.Value | None]) -> bool:
    """Like `bypass` for all outputs of `node`; None stands for an output that nothing reads."""
    graph = node.graph
    if graph is None:
        return False
    pairs = [(output, value) for output, value in zip(node.outputs, values, strict=True) if value is not None]
    for output, value in pairs:
        producer = value.producer()
        may_take_name = producer is not None and producer.graph is graph and not value.is_graph_output()
        if output.is_graph_output() and not may_take_name:
            return False
    for output, value in pairs:
        hand_over(output, value)
    graph.remove(node, safe=True)
    return True


def set_constant(node: ir.Node, position: int, array: npt.NDArray[Any], names: UniqueNames, *, like: str) -> None:
    """Make `array` the constant input of `node` at `position`.

    Writes into the present initializer where `node` alone reads it, else makes a new one named after `like`.
    """
    array = np.ascontiguousarray(array)
    present = input_at(node, position)
    if present is not None and present.is_initializer() and not present.is_graph_output() and len(present.uses()) == 1:
        replace_weight(present, array)
        return
    graph = node.graph
    if graph is None:
        raise ValueError(f"Node '{node.name}' is in no graph.")
    value = add_initializer(graph, like, array, names)
    if position >= len(node.inputs):
        node.resize_inputs(position + 1)
    node.replace_input_with(position, value)
