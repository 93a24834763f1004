"""The order in which layers leave 8 bits, so that as few as possible do.

A tensor is rounded as long as one integer node reads or writes it: taking one of several layers at it away helps as
little as taking none. So the noise of a tensor counts for all layers at it together, that of a weight for its layer.
What is left to be won is shared out greedily: at each step the layer, or all layers at one tensor, whose leaving takes
away the most noise for each layer that leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxprune.contracts import QuantizationPlan
from onnxprune.ops.planned import PlannedNode, planned_nodes
from onnxprune.ops.quant import ScaleRule, scale_rule_of
from onnxprune.passes.quant.sensitivity import OutputNoise

__all__ = ["ranked_layers"]


@dataclass(frozen=True, slots=True)
class _Rounding:
    """Tensors that are the same numbers moved around, and the layers that keep them rounded."""

    noise: float
    layers: frozenset[str]


def ranked_layers(
    model: ir.Model, plan: QuantizationPlan, layers: Sequence[PlannedNode], noise: OutputNoise
) -> tuple[PlannedNode, ...]:
    """`layers`, first those that take most noise with them when they leave."""
    by_name = {layer.node.name or "": layer for layer in layers}
    roundings = _roundings(model, plan, layers, noise)
    left = set(by_name)
    order: list[str] = []
    while left:
        groups = {frozenset({name}) for name in left} | {found.layers & left for found in roundings}
        # Names decide between equals, so that the order is the same in every run.
        best = max(
            (group for group in groups if group),
            key=lambda group: (_gain(group, left, roundings, noise.weights) / len(group), -len(group), sorted(group)),
        )
        order.extend(sorted(best, key=lambda name: (-noise.weights.get(name, 0.0), name)))
        left -= best
    return tuple(by_name[name] for name in order)


def _gain(group: frozenset[str], left: set[str], roundings: Iterable[_Rounding], weights: Mapping[str, float]) -> float:
    """The noise that goes when `group` leaves what is `left`."""
    tensors = sum(
        found.noise for found in roundings if not group.isdisjoint(found.layers) and found.layers & left <= group
    )
    return tensors + sum(weights.get(name, 0.0) for name in group)


def _roundings(
    model: ir.Model, plan: QuantizationPlan, layers: Sequence[PlannedNode], noise: OutputNoise
) -> list[_Rounding]:
    """One for each group of tensors that operators only move numbers between."""
    group_of: dict[str, set[str]] = {}
    for item in planned_nodes(model, plan):
        names = [value.name or "" for value in (*item.inputs, *item.outputs)]
        for name in names:
            group_of.setdefault(name, {name})
        if scale_rule_of(item.node, item.row) is ScaleRule.SAME:
            joined = set().union(*(group_of[name] for name in names))
            group_of.update(dict.fromkeys(joined, joined))
    layers_at: dict[str, set[str]] = {}
    for layer in layers:
        for value in (*layer.inputs, *layer.outputs):
            layers_at.setdefault(value.name or "", set()).add(layer.node.name or "")
    groups = {id(group): group for group in group_of.values()}.values()
    return [
        _Rounding(
            noise=max((noise.tensors.get(name, 0.0) for name in group), default=0.0),
            layers=frozenset().union(*(layers_at.get(name, set()) for name in group)),
        )
        for group in groups
    ]
