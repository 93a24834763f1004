"""Deciding which nodes compute in integers, and saying of every other node why it does not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxprune.contracts import Placement, QuantizationPlan
from onnxprune.ops.affine import representable_range
from onnxprune.ops.quant import (
    QUANT,
    QuantRow,
    absorbed_activation,
    activation_inputs,
    activation_outputs,
    clip_bounds,
    weight_input,
)
from onnxprune.targets.qdq.kernels import DEQUANTIZE_NS, KERNELS, QUANTIZE_NS, Kernel
from onnxprune.targets.qdq.mincut import CutGraph
from onnxprune.targets.qdq.spelling import SpellingName, find_spelling
from onnxprune.targets.qdq.writer import IntegerUnit

__all__ = ["integer_units", "place"]

NOT_WORTH_REASON = "it stands beside float operators: converting its tensors would cost more than integers save"
INSIDE_BODY_REASON = "it stands inside the body of an If, Loop or Scan"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Possible:
    """A unit that could be integer on this target."""

    unit: IntegerUnit
    inputs: tuple[ir.Value, ...]
    row: QuantRow
    kernel: Kernel

    @property
    def names(self) -> tuple[str, ...]:
        nodes = (self.unit.node,) if self.unit.absorbed is None else (self.unit.node, self.unit.absorbed)
        return tuple(node.name or "" for node in nodes)


def place(model: ir.Model, plan: QuantizationPlan, spelling: SpellingName) -> Placement:
    """Choose the nodes of `model` that are integer on ONNX Runtime's CPU provider.

    Operators with weights are integer wherever the plan and a kernel allow. The others cost a conversion wherever an
    integer neighbour meets a float one, so they are chosen together: of all choices the one with the least estimated
    time (a minimum cut; `kernels.py` has the costs), and float where it makes no difference.

    Args:
        model: The float model that `plan` was made for. It is not changed.
        plan: Scales; nodes and tensors it leaves out stay float with its reasons.
        spelling: The processor; decides the name of the placement.

    Returns:
        The placement, with a reason for every node that stays float.
    """
    reasons: dict[str, str] = {}
    possible: list[_Possible] = []
    absorbed: set[ir.Node] = set()
    for node in model.graph:
        if node in absorbed:
            continue
        found = _possible(node, plan)
        if isinstance(found, str):
            reasons[node.name or ""] = found
            continue
        possible.append(found)
        if found.unit.absorbed is not None:
            absorbed.add(found.unit.absorbed)
    chosen = _cheapest(model, possible)
    integer_nodes: list[str] = []
    for index, item in enumerate(possible):
        if index in chosen:
            integer_nodes.extend(item.names)
        else:
            reasons.update(dict.fromkeys(item.names, NOT_WORTH_REASON))
    main_nodes = set(model.graph)
    for node in model.graph.all_nodes():
        if node not in main_nodes:
            reasons[node.name or ""] = INSIDE_BODY_REASON
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


def _possible(node: ir.Node, plan: QuantizationPlan) -> _Possible | str:
    """`node` as something that could be integer, or the reason why it can't."""
    excluded = plan.excluded_nodes.get(node.name or "")
    if excluded is not None:
        return excluded
    row = QUANT.get(node)
    domain = f"{node.domain}::" if node.domain else ""
    if row is None:
        return f"operator {domain}{node.op_type} has no row in the quantization table"
    kernel = KERNELS.get(node)
    if kernel is None:
        return f"ONNX Runtime has no integer kernel for {node.op_type}"
    refusal = row.refuses(node) or kernel.refuses(node)
    if refusal is not None:
        return refusal
    unit = _unit(node, row, set(plan.excluded_nodes))
    inputs = activation_inputs(node, row)
    for value in (*inputs, *unit.outputs):
        name = value.name or ""
        if name not in plan.activations:
            return f"tensor '{name}' has no scale: {plan.skipped.get(name, 'the plan does not know it')}"
    if row.is_compute:
        weight = weight_input(node, row)
        if weight is None or weight.name not in plan.weights:
            return "the plan has no scales for its weight"
    clipped_by = unit.absorbed or (node if clip_bounds(node) is not None else None)
    if clipped_by is not None and not _saturates_within(clipped_by, unit.outputs[0], plan):
        return f"the range of '{unit.outputs[0].name}' reaches beyond what '{clipped_by.name}' clips to"
    return _Possible(unit=unit, inputs=inputs, row=row, kernel=kernel)


def _saturates_within(clip: ir.Node, output: ir.Value, plan: QuantizationPlan) -> bool:
    """True when the integers of `output` saturate where `clip` clips, up to half a step."""
    bounds = clip_bounds(clip)
    quantization = plan.activations[output.name or ""]
    low, high = representable_range(quantization.scale, quantization.zero_point, quantization.num_bits)
    grace = quantization.scale / 2
    return bounds is not None and bounds[0] - grace <= low and high <= bounds[1] + grace


def _cheapest(model: ir.Model, possible: Sequence[_Possible]) -> frozenset[int]:
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
        maker_of.update(dict.fromkeys(item.unit.outputs, vertex))
        vertex_of[item.unit.node] = vertex
        if item.unit.absorbed is not None:
            vertex_of[item.unit.absorbed] = vertex
        if item.row.is_compute:
            graph.add_cost(CutGraph.ONE, vertex, math.inf)
            continue
        size = max(_num_elements(value) for value in (*item.inputs, *item.unit.outputs))
        graph.add_cost(CutGraph.ONE, vertex, item.kernel.float_ns * size)
        graph.add_cost(vertex, CutGraph.OTHER, item.kernel.int_ns * size)
    output_values = set(model.graph.outputs)
    tensors = dict.fromkeys(value for item in possible for value in (*item.inputs, *item.unit.outputs))
    for value in tensors:
        if value.const_value is not None:
            continue
        readers = {vertex_of.get(user, CutGraph.OTHER) for user in value.consumers()}
        if value in output_values:
            readers.add(CutGraph.OTHER)
        maker = maker_of.get(value, CutGraph.OTHER)
        size = _num_elements(value)
        if maker != CutGraph.OTHER:
            all_readers = graph.add_vertex()
            graph.add_cost(maker, all_readers, DEQUANTIZE_NS * size)
            for reader in sorted(readers):
                graph.add_cost(all_readers, reader, math.inf)
        any_reader = graph.add_vertex()
        graph.add_cost(any_reader, maker, QUANTIZE_NS * size)
        for reader in sorted(readers - {CutGraph.OTHER}):
            graph.add_cost(reader, any_reader, math.inf)
    integer = graph.one_side()
    return frozenset(index for index, vertex in enumerate(vertices) if vertex in integer)


def _num_elements(value: ir.Value) -> int:
    """Elements of one sample; 1 where the shape is not known."""
    if value.shape is None:
        return 1
    return math.prod(dim for dim in value.shape if isinstance(dim, int)) or 1


def float_reasons(placement: Placement) -> Mapping[str, int]:
    """How many nodes stay float for each reason, most frequent first."""
    counts: dict[str, int] = {}
    for reason in placement.float_nodes.values():
        counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
