"""Where a model stops computing features: the decode tail, and arithmetic on coordinates.

A detector turns what its last layers give into boxes and scores by a few additions, products and exponentials. Integers
save nothing there, and a step of int8 is pixels wide. Which nodes these are is told by the graph alone:

    feature path   goes through float tensors, and into an operator where it takes data: not into the grid of a
                   GridSample, the boxes of a RoiAlign, or a NonMaxSuppression, and not through indices or conditions
    layer          a convolution or matrix product with more than `MAX_ARITHMETIC_WEIGHTS` constant weights

1. A node from which no feature path leads to a layer is in the tail. So the proposals of a two-stage detector are,
   although more layers come after them, and so are the sampling points of deformable attention.
2. A node that computes coordinates, and from which a path without a layer leads to an output, is in the tail even
   though another path leads to a layer: boxes that are refined several times (DETR's descendants). What it reads and
   writes looks like coordinates when it is small (a 64th of the largest tensor) and has an axis of 2 to 8 numbers; so a
   residual stream that reaches an output stays as it is.

Operators that only move numbers are never in the tail: they follow their producer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxprune.ops.quant import (
    QUANT,
    QuantRow,
    ScaleRule,
    activation_inputs,
    scale_rule_of,
    stored_constant,
    weight_input,
)

__all__ = ["MAX_ARITHMETIC_WEIGHTS", "Tail", "find_tail"]

MAX_ARITHMETIC_WEIGHTS = 16
"""A convolution with no more weights than this is arithmetic in disguise (the expectation over 16 bins that YOLO
detectors write as a 1x1 convolution, for one), not a layer that int8 makes faster."""

# See case 2 at the top of this file.
_LARGEST_SHARE_OF_COORDINATES = 1 / 64
_COORDINATE_AXIS = range(2, 9)

TAIL_REASON = "it comes after the last convolution or matrix product on its way to the outputs (decode arithmetic)"
COORDINATES_REASON = "its results serve as coordinates or indices, which a step of int8 would move (decode arithmetic)"
REFINED_REASON = "no layer comes between its coordinates and an output (decode arithmetic whose result is used again)"

# Inputs through which features flow, where that is not all of them.
_FEATURE_INPUTS: Mapping[str, tuple[int, ...]] = {
    "GridSample": (0,),
    "MaxRoiPool": (0,),
    "NonMaxSuppression": (),
    "RoiAlign": (0,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """`reasons` has the nodes of the tail in graph order, among those that could be integer.

    `nodes` are all of the tail, with those that only move numbers and those that no integer operator exists for. From
    `last_layers` no feature path leads to another layer.
    """

    reasons: Mapping[ir.Node, str]
    nodes: tuple[ir.Node, ...]
    last_layers: frozenset[ir.Node]


def find_tail(model: ir.Model, rows: Mapping[ir.Node, QuantRow], absorbed_by: Mapping[ir.Node, ir.Node]) -> Tail:
    """The decode tail of `model`, as the top of this file says.

    Args:
        model: A canonical model.
        rows: The nodes that could be integer, with their rows.
        absorbed_by: The Relu and Clip that disappear into a producer, with it; they belong to a layer as it does.
    """
    flow = _Flow(model, rows)
    largest = max((_num_elements(value) for node in rows for value in node.outputs), default=0)
    reasons: dict[ir.Node, str] = {}
    for node, row in rows.items():
        producer = absorbed_by.get(node)
        if _is_layer(node, row) or (producer is not None and _is_layer(producer, rows[producer])):
            continue
        if _only_moves(node, row):
            continue
        if node not in flow.leads_to_layer:
            reasons[node] = TAIL_REASON if node in flow.reaches_output else COORDINATES_REASON
        elif node in flow.reaches_output and _computes_coordinates(node, row, largest):
            reasons[node] = REFINED_REASON
    layers = [node for node, row in rows.items() if _is_layer(node, row)]
    return Tail(
        reasons=reasons,
        nodes=tuple(node for node in model.graph if node in reasons or node not in flow.leads_to_layer),
        last_layers=frozenset(layer for layer in layers if not flow.goes_on(layer)),
    )


class _Flow:
    """Which nodes lead where.

    `leads_to_layer` are nodes from which a feature path leads to a layer, and layers themselves; `reaches_output` those
    from which a path of floats leads to an output of the model with no layer behind the node.
    """

    def __init__(self, model: ir.Model, rows: Mapping[ir.Node, QuantRow]) -> None:
        self._graph = model.graph
        self._layers = {node for node, row in rows.items() if _is_layer(node, row)}
        # Layers that are left in float (excluded, or without a kernel) end a path as well.
        self._layers.update(node for node in model.graph if _is_layer(node, QUANT.get(node)))
        main = set(model.graph)
        self._bodies_have_layers = any(
            _is_layer(node, QUANT.get(node)) for node in model.graph.all_nodes() if node not in main
        )
        self.leads_to_layer: set[ir.Node] = set()
        self.reaches_output: set[ir.Node] = set()
        for node in reversed(model.graph):
            if node in self._layers or self.goes_on(node) or (self._bodies_have_layers and _has_body(node)):
                self.leads_to_layer.add(node)
            if any(self._is_delivered(value) for value in node.outputs):
                self.reaches_output.add(node)

    def goes_on(self, node: ir.Node) -> bool:
        """True when a feature path leads from the outputs of `node` to a layer."""
        return any(
            self._takes_features(user, position)
            for value in node.outputs
            if _is_float(value)
            for user, position in value.uses()
        )

    def _takes_features(self, user: ir.Node, position: int) -> bool:
        if user.graph is not self._graph:
            return self._bodies_have_layers
        positions = _FEATURE_INPUTS.get(user.op_type)
        return user in self.leads_to_layer and (positions is None or position in positions)

    def _is_delivered(self, value: ir.Value) -> bool:
        if value.is_graph_output():
            return True
        return _is_float(value) and any(
            user in self.reaches_output and user not in self._layers for user in value.consumers()
        )


def _is_layer(node: ir.Node, row: QuantRow | None) -> bool:
    # A layer counts as one although its weight is turned at run time, and so it stays float.
    stored = stored_constant(weight_input(node, row)) if row is not None else None
    return stored is not None and stored.const_value is not None and stored.const_value.size > MAX_ARITHMETIC_WEIGHTS


def _only_moves(node: ir.Node, row: QuantRow) -> bool:
    return scale_rule_of(node, row) is ScaleRule.SAME and len(activation_inputs(node, row)) == 1


def _has_body(node: ir.Node) -> bool:
    return any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    )


def _computes_coordinates(node: ir.Node, row: QuantRow, largest: int) -> bool:
    values = [value for value in (*activation_inputs(node, row), *node.outputs) if value.const_value is None]
    return all(
        value.shape is not None
        and _num_elements(value) <= largest * _LARGEST_SHARE_OF_COORDINATES
        and any(size in _COORDINATE_AXIS for size in value.shape if isinstance(size, int))
        for value in values
    )


def _is_float(value: ir.Value) -> bool:
    """True where the element type is not known as well."""
    return value.dtype is None or value.dtype.is_floating_point()


def _num_elements(value: ir.Value) -> int:
    """Elements of one sample; 0 where the shape is not known."""
    if value.shape is None:
        return 0
    return math.prod(dim for dim in value.shape if isinstance(dim, int))
