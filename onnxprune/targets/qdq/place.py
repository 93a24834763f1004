"""Deciding which nodes compute in integers, and saying of every other node why it does not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxprune.contracts import Placement, QuantizationPlan
from onnxprune.ops.planned import PlannedNode, planned_node
from onnxprune.ops.quant import QUANT, QuantRow, absorbed_activation, activation_outputs
from onnxprune.targets.mincut import CutGraph
from onnxprune.targets.qdq.cost_table import TableCosts
from onnxprune.targets.qdq.costs import PlacementCosts
from onnxprune.targets.qdq.kernels import KERNELS
from onnxprune.targets.qdq.placements import reasons_inside_bodies
from onnxprune.targets.qdq.spelling import SpellingName, find_spelling
from onnxprune.targets.qdq.writer import IntegerUnit

__all__ = ["float_reasons", "integer_choice", "integer_units", "place"]

NOT_WORTH_REASON = "it stands beside float operators: converting its tensors would cost more than integers save"
WIDE_REASON = "its activations have 16 bits, and ONNX Runtime's CPU provider has integer kernels for 8 only"


def place(
    model: ir.Model,
    plan: QuantizationPlan,
    spelling: SpellingName,
    *,
    costs: PlacementCosts | None = None,
    returned: Mapping[str, str] | None = None,
) -> Placement:
    """Choose the nodes of `model` that are integer on ONNX Runtime's CPU provider.

    A conversion is due wherever an integer neighbour meets a float one, so nodes are chosen together: of all choices
    the one with the least time (a minimum cut), and float where it makes no difference. By the table's costs
    (`cost_table.py`), operators with weights are integer wherever the plan and a kernel allow.

    Args:
        model: The float model that `plan` was made for. It is not changed.
        plan: Scales; nodes and tensors it leaves out stay float with its reasons.
        spelling: The processor; decides the name of the placement.
        costs: Where times come from; None: from the table.
        returned: Nodes that stay float whatever they cost, with the reason.

    Returns:
        The placement, with a reason for every node that stays float.
    """
    reasons: dict[str, str] = {}
    returned = returned or {}
    possible: list[PlannedNode] = []
    absorbed: set[ir.Node] = set()
    for node in model.graph:
        if node in absorbed:
            continue
        found = integer_choice(node, plan)
        if isinstance(found, str):
            reasons[node.name or ""] = found
            continue
        if found.absorbed is not None:
            absorbed.add(found.absorbed)
        kept = [returned[name] for name in found.names if name in returned]
        if kept:
            reasons.update(dict.fromkeys(found.names, kept[0]))
        else:
            possible.append(found)
    chosen = _cheapest(model, possible, costs or TableCosts(spelling))
    integer_nodes: list[str] = []
    for index, item in enumerate(possible):
        if index in chosen:
            integer_nodes.extend(item.names)
        else:
            reasons.update(dict.fromkeys(item.names, NOT_WORTH_REASON))
    reasons.update(reasons_inside_bodies(model))
    return Placement(
        target=find_spelling(spelling).placement_target,
        integer_nodes=tuple(integer_nodes),
        float_nodes=reasons,
        decided_by="table",
    )


def integer_units(model: ir.Model, placement: Placement) -> list[IntegerUnit]:
    """The integer nodes of `placement` in graph order, each with the activation that disappears into it."""
    integer = set(placement.integer_nodes)
    kept_apart = {node.name or "" for node in model.graph if node.name not in integer}
    units: list[IntegerUnit] = []
    absorbed: set[ir.Node] = set()
    for node in model.graph:
        row = QUANT.get(node)
        if node.name not in integer or node in absorbed or row is None:
            continue
        unit = _unit(node, row, kept_apart)
        if unit.absorbed is not None:
            absorbed.add(unit.absorbed)
        units.append(unit)
    return units


def _unit(node: ir.Node, row: QuantRow, kept_apart: set[str]) -> IntegerUnit:
    activation = absorbed_activation(node, kept_apart=kept_apart)
    outputs = activation_outputs(node, row) if activation is None else tuple(activation.outputs)
    return IntegerUnit(node=node, absorbed=activation, outputs=outputs)


def integer_choice(node: ir.Node, plan: QuantizationPlan) -> PlannedNode | str:
    """`node` as something that could be integer here, or the reason why it can't."""
    planned = planned_node(node, plan)
    if isinstance(planned, str):
        return planned
    if any(plan.activations[value.name or ""].num_bits > 8 for value in (*planned.inputs, *planned.outputs)):
        return WIDE_REASON
    kernel = KERNELS.get(node)
    if kernel is None:
        return f"ONNX Runtime has no integer kernel for {node.op_type}"
    refusal = kernel.refuses(node)
    return planned if refusal is None else refusal


def _cheapest(model: ir.Model, possible: Sequence[PlannedNode], costs: PlacementCosts) -> frozenset[int]:
    """The positions in `possible` that are integer in the cheapest choice.

    On the one side of the cut are integer units. A tensor costs once, however many read it:
    a DequantizeLinear where an integer unit makes it and something float reads it (vertex `all_readers`, integer only
    if all of them are), a QuantizeLinear where something float makes it and an integer unit reads it (`any_reader`).
    """
    graph = CutGraph()
    vertices = [graph.add_vertex() for _ in possible]
    maker_of: dict[ir.Value, int] = {}
    vertex_of: dict[ir.Node, int] = {}
    for item, vertex in zip(possible, vertices, strict=True):
        maker_of.update(dict.fromkeys(item.outputs, vertex))
        vertex_of[item.node] = vertex
        if item.absorbed is not None:
            vertex_of[item.absorbed] = vertex
        graph.add_cost(CutGraph.ONE, vertex, costs.float_ns(item))
        graph.add_cost(vertex, CutGraph.OTHER, costs.integer_ns(item))
    output_values = set(model.graph.outputs)
    tensors = dict.fromkeys(value for item in possible for value in (*item.inputs, *item.outputs))
    for value in tensors:
        if value.const_value is not None:
            continue
        readers = {vertex_of.get(user, CutGraph.OTHER) for user in value.consumers()}
        if value in output_values:
            readers.add(CutGraph.OTHER)
        maker = maker_of.get(value, CutGraph.OTHER)
        if maker != CutGraph.OTHER:
            all_readers = graph.add_vertex()
            graph.add_cost(maker, all_readers, costs.dequantize_ns(value))
            for reader in sorted(readers):
                graph.add_cost(all_readers, reader, math.inf)
        any_reader = graph.add_vertex()
        graph.add_cost(any_reader, maker, costs.quantize_ns(value))
        for reader in sorted(readers - {CutGraph.OTHER}):
            graph.add_cost(reader, any_reader, math.inf)
    integer = graph.one_side()
    return frozenset(index for index, vertex in enumerate(vertices) if vertex in integer)


def float_reasons(placement: Placement) -> Mapping[str, int]:
    """How many nodes stay float for each reason, most frequent first."""
    counts: dict[str, int] = {}
    for reason in placement.float_nodes.values():
        counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
