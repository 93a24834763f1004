"""Giving activations 16 bits instead of 8, together with all tensors that are tied to them.

The range stays; the zero point becomes 0, and the step 128 to 257 times finer. Weights keep their bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import onnx_ir as ir

from onnxprune.contracts import ActivationQuantization, QuantizationPlan
from onnxprune.ops.affine import activation_parameters
from onnxprune.ops.planned import PlannedNode, planned_nodes
from onnxprune.ops.quant import FixedQuantization, ScaleRule, fixed_quantization, scale_rule_of

__all__ = ["WIDE_BITS", "with_wide_activations"]

WIDE_BITS = 16


def with_wide_activations(model: ir.Model, plan: QuantizationPlan, nodes: Collection[str]) -> QuantizationPlan:
    """`plan` in which all activations of `nodes` have 16 bits, and so all tensors that share a scale with one of them.

    Operators that only move integers, and a Concat that shares its scale, tie their tensors: these change together.
    """
    planned = planned_nodes(model, plan)
    classes = _tied(planned, plan)
    wanted = {
        value.name or ""
        for item in planned
        if set(nodes).intersection(item.names)
        for value in (*item.inputs, *item.outputs)
    }
    fixed = {
        value.name or "": quantization
        for item in planned
        if (quantization := fixed_quantization(item.row, WIDE_BITS)) is not None
        for value in item.outputs
    }
    activations = dict(plan.activations)
    for members in classes:
        if not wanted.intersection(members):
            continue
        entries = {name: plan.activations[name] for name in members}
        if any(entry.num_bits >= WIDE_BITS for entry in entries.values()):
            continue
        known = next((fixed[name] for name in entries if name in fixed), None)
        scale, zero_point = _wide_parameters(entries, known)
        for name, entry in entries.items():
            activations[name] = replace(entry, scale=scale, zero_point=zero_point, num_bits=WIDE_BITS)
    return replace(plan, activations=activations)


def _wide_parameters(
    entries: Mapping[str, ActivationQuantization], known: FixedQuantization | None
) -> tuple[float, int]:
    if known is not None:
        return known.scale, known.zero_point
    # The hull of what was calibrated is what the common 8-bit scale was made from.
    low = min(entry.range_min for entry in entries.values())
    high = max(entry.range_max for entry in entries.values())
    return activation_parameters(low, high, WIDE_BITS)


def _tied(planned: Iterable[PlannedNode], plan: QuantizationPlan) -> list[set[str]]:
    """Every activation's name in one set with those that share its scale because an operator demands it."""
    class_of: dict[str, set[str]] = {name: {name} for name in plan.activations}
    for item in planned:
        rule = scale_rule_of(item.node, item.row)
        if rule is ScaleRule.FREE or not item.inputs or not item.outputs:
            continue
        output = item.outputs[0].name or ""
        wanted = plan.activations[output]
        for value in (*item.inputs, *item.outputs):
            entry = plan.activations[value.name or ""]
            shares = (entry.scale, entry.zero_point) == (wanted.scale, wanted.zero_point)
            if rule is ScaleRule.SAME or shares:
                _join(class_of, output, value.name or "")
    return list({id(members): members for members in class_of.values()}.values())


def _join(class_of: dict[str, set[str]], one: str, other: str) -> None:
    kept, gone = class_of[one], class_of[other]
    if kept is gone:
        return
    kept |= gone
    for name in gone:
        class_of[name] = kept
