"""The layers that a plan lets be integer, as things to measure and to take out of 8 bits one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxprune.contracts import Batch, CalibrationSource, QuantizationPlan
from onnxprune.ops.planned import PlannedNode, planned_nodes
from onnxprune.ops.quant import ScaleRule, scale_rule_of
from onnxprune.passes.calibration import batch_size

__all__ = ["FirstSamples", "followers", "layers_of"]


def layers_of(model: ir.Model, plan: QuantizationPlan) -> tuple[PlannedNode, ...]:
    """Every planned node that rounds something of its own, in graph order.

    What only moves or selects integers (Reshape, MaxPool) adds no error: see `followers`.
    """
    return tuple(
        item for item in planned_nodes(model, plan) if scale_rule_of(item.node, item.row) is not ScaleRule.SAME
    )


def followers(model: ir.Model, plan: QuantizationPlan, away: Iterable[str]) -> tuple[PlannedNode, ...]:
    """The nodes that only move numbers and stand between nodes that are all away, or not integer anyway.

    One that has a single integer neighbour stays: its tensors are rounded to the same scale there.

    Args:
        model: The float model.
        plan: The plan from which nodes leave 8 bits.
        away: Names of the nodes that leave.
    """
    left = set(away)
    staying = {item.node: item for item in planned_nodes(model, plan) if not left.intersection(item.names)}
    provider = {output: node for node, item in staying.items() for output in item.outputs}
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node, item in staying.items():
        for value in item.inputs:
            readers.setdefault(value, []).append(node)
    movers = [item for item in staying.values() if scale_rule_of(item.node, item.row) is ScaleRule.SAME]
    # A chain of movers stays or leaves as a whole: it is kept by a layer at either end.
    kept = [item.node for item in staying.values() if item not in movers]
    seen = set(kept)
    while kept:
        item = staying[kept.pop()]
        neighbours = [provider.get(value) for value in item.inputs]
        neighbours += [reader for value in item.outputs for reader in readers.get(value, [])]
        for neighbour in neighbours:
            if neighbour is not None and neighbour not in seen:
                seen.add(neighbour)
                kept.append(neighbour)
    return tuple(item for item in movers if item.node not in seen)


@dataclass(frozen=True, slots=True)
class FirstSamples:
    """The first batches of a source, until there are `count` samples; can be iterated again and again."""

    source: CalibrationSource
    count: int

    def __iter__(self) -> Iterator[Batch]:
        seen = 0
        for batch in self.source:
            yield batch
            seen += batch_size(batch)
            if seen >= self.count:
                return
