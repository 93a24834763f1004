"""Which nodes a quantization plan lets compute in integers, whatever the runtime."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxprune.contracts import QuantizationPlan
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

__all__ = ["PlannedNode", "planned_node", "planned_nodes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedNode:
    """A node that has all scales it needs. `absorbed` is the Relu or Clip that disappears into it.

    `inputs` and `outputs` are the activations that are integers on its way in and out; `weight` is its constant
    weight, where it has one.
    """

    node: ir.Node
    row: QuantRow
    absorbed: ir.Node | None
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    weight: ir.Value | None

    @property
    def names(self) -> tuple[str, ...]:
        """The node's name, and that of what it absorbs."""
        nodes = (self.node,) if self.absorbed is None else (self.node, self.absorbed)
        return tuple(node.name or "" for node in nodes)


def planned_nodes(model: ir.Model, plan: QuantizationPlan) -> tuple[PlannedNode, ...]:
    """Every node of the main graph that `plan` has all scales for, in graph order; absorbed ones in their producer."""
    found: list[PlannedNode] = []
    absorbed: set[ir.Node] = set()
    for node in model.graph:
        if node in absorbed:
            continue
        planned = planned_node(node, plan)
        if isinstance(planned, PlannedNode):
            found.append(planned)
            if planned.absorbed is not None:
                absorbed.add(planned.absorbed)
    return tuple(found)


def planned_node(node: ir.Node, plan: QuantizationPlan) -> PlannedNode | str:
    """`node` with what the plan has for it, or the reason why it stays float."""
    reason = plan.float_reason(node.name or "")
    if reason is not None:
        return reason
    row = QUANT.get(node)
    if row is None:
        domain = f"{node.domain}::" if node.domain else ""
        return f"operator {domain}{node.op_type} has no row in the quantization table"
    refusal = row.refuses(node)
    if refusal is not None:
        return refusal
    activation = absorbed_activation(node, kept_apart={*plan.excluded_nodes, *plan.returned_nodes})
    inputs = activation_inputs(node, row)
    outputs = activation_outputs(node, row) if activation is None else tuple(activation.outputs)
    for value in (*inputs, *outputs):
        name = value.name or ""
        if name not in plan.activations:
            return f"tensor '{name}' has no scale: {plan.skipped.get(name, 'the plan does not know it')}"
    weight = weight_input(node, row)
    if weight is not None and weight.const_value is None:
        weight = None
    if row.is_compute and (weight is None or weight.name not in plan.weights):
        return "the plan has no scales for its weight"
    clipped_by = activation or (node if clip_bounds(node) is not None else None)
    # With 16 bits the zero point is 0 and saturation clips nothing: the activation itself stays.
    is_wide = any(plan.activations[value.name or ""].num_bits > 8 for value in outputs)
    if not is_wide and clipped_by is not None and not _saturates_within(clipped_by, outputs[0], plan):
        return f"the range of '{outputs[0].name}' reaches beyond what '{clipped_by.name}' clips to"
    return PlannedNode(node=node, row=row, absorbed=activation, inputs=inputs, outputs=outputs, weight=weight)


def _saturates_within(clip: ir.Node, output: ir.Value, plan: QuantizationPlan) -> bool:
    """True when the integers of `output` saturate where `clip` clips, up to half a step."""
    bounds = clip_bounds(clip)
    quantization = plan.activations[output.name or ""]
    low, high = representable_range(quantization.scale, quantization.zero_point, quantization.num_bits)
    grace = quantization.scale / 2
    return bounds is not None and bounds[0] - grace <= low and high <= bounds[1] + grace
