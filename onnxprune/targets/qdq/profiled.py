"""Costs of a model's own nodes on this machine, from ONNX Runtime's profiler.

The float model and the one with everything integer that can be are profiled in turn, so each node is timed in its
place: with the fusions, layouts and caches of the real model. Two spellings give the times of all nodes on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import onnx_ir as ir

from onnxprune.contracts import Batch, QuantizationPlan
from onnxprune.ops.planned import PlannedNode
from onnxprune.runtime.model_timing import ModelTimer, NodeMs
from onnxprune.targets.qdq.cost_table import TableCosts, num_elements
from onnxprune.targets.qdq.costs import IntegerWhereverPossible
from onnxprune.targets.qdq.place import integer_choice, place
from onnxprune.targets.qdq.spell import spell
from onnxprune.targets.qdq.spelling import SpellingName

__all__ = ["NodeCosts", "ProfiledCosts", "profiled_costs"]

# Float must be better by so much before a node leaves the integers on the word of a profile.
_BENEFIT_OF_DOUBT = 0.95
# Convolutions work on channels in blocks (float) or channels last (integer), so a map that goes from one to the other
# is transposed as well. Tried on MobileNetV3: 0.35 ns an element on the way to float, 0.8 on the way back.
_LAYOUT_TO_FLOAT_NS = 0.35
_LAYOUT_TO_INTEGER_NS = 0.8

# What converts or moves data between kernels belongs to no node.
_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "ReorderInput", "ReorderOutput"})


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCosts:
    """Milliseconds of one node, with what it absorbs."""

    float_ms: float
    integer_ms: float


class ProfiledCosts(TableCosts):
    """`PlacementCosts` of one model; the table's where a node was not found in the profiles."""

    def __init__(self, spelling: SpellingName, costs: Mapping[str, NodeCosts]) -> None:
        super().__init__(spelling)
        self.costs = costs

    def float_ns(self, planned: PlannedNode) -> float:
        """As profiled."""
        found = self.costs.get(planned.names[0])
        return super().float_ns(planned) if found is None else found.float_ms * 1e6

    def integer_ns(self, planned: PlannedNode) -> float:
        """As profiled, less the benefit of the doubt."""
        found = self.costs.get(planned.names[0])
        return super().integer_ns(planned) if found is None else found.integer_ms * 1e6 * _BENEFIT_OF_DOUBT

    def quantize_ns(self, value: ir.Value) -> float:
        """By the table, and the change of layout."""
        layout = _LAYOUT_TO_INTEGER_NS if _is_map(value) else 0.0
        return super().quantize_ns(value) + layout * num_elements(value)

    def dequantize_ns(self, value: ir.Value) -> float:
        """By the table, and the change of layout."""
        layout = _LAYOUT_TO_FLOAT_NS if _is_map(value) else 0.0
        return super().dequantize_ns(value) + layout * num_elements(value)


def profiled_costs(
    model: ir.Model, plan: QuantizationPlan, spelling: SpellingName, *, timer: ModelTimer, feeds: Batch, run_s: float
) -> ProfiledCosts:
    """The time of every node that could be integer, in float and in integers; one run of `model` takes about `run_s`.

    Raises:
        OnnxPruneError: The model or its integer spelling does not load or run.
    """
    everything = place(model, plan, spelling, costs=IntegerWhereverPossible(spelling))
    spelled = spell(model, plan, everything, spelling)
    times = timer.node_times({"float": model, "integer": spelled}, feeds, run_s=run_s)
    units = _units(model, plan)
    owner_of = {name: unit.names[0] for unit in units for name in unit.names}
    known = {node.name for node in model.graph.all_nodes() if node.name}
    float_ms = _by_owner(times["float"], owner_of, known)
    integer_ms = _by_owner(times["integer"], owner_of, known)
    integer = set(everything.integer_nodes)
    costs: dict[str, NodeCosts] = {}
    for name in (unit.names[0] for unit in units):
        # Of a node that is in neither profile, optimized away or renamed, nothing is known.
        if name in integer and (name in float_ms or name in integer_ms):
            costs[name] = NodeCosts(float_ms=float_ms.get(name, 0.0), integer_ms=integer_ms.get(name, 0.0))
    return ProfiledCosts(spelling, costs)


def _units(model: ir.Model, plan: QuantizationPlan) -> list[PlannedNode]:
    units: list[PlannedNode] = []
    absorbed: set[ir.Node] = set()
    for node in model.graph:
        found = integer_choice(node, plan) if node not in absorbed else ""
        if isinstance(found, PlannedNode):
            units.append(found)
            if found.absorbed is not None:
                absorbed.add(found.absorbed)
    return units


def _by_owner(nodes: Sequence[NodeMs], owner_of: Mapping[str, str], known: AbstractSet[str]) -> dict[str, float]:
    """Milliseconds by the first name of the unit; `known` are the names of the float model's nodes.

    What a rewrite added carries its node's name in front. A node of the float model counts to nothing but itself,
    also where another's name is the beginning of its own.
    """
    total: dict[str, float] = {}
    for node in nodes:
        if node.op_type in _CONVERSIONS or not node.model_node:
            continue
        name = node.model_node
        while name and name not in known:
            name = name.rpartition("_")[0]
        if name in owner_of:
            total[owner_of[name]] = total.get(owner_of[name], 0.0) + node.time_ms
    return total


def _is_map(value: ir.Value) -> bool:
    """True for a tensor with spatial axes, as convolutions have."""
    if value.shape is None or len(value.shape) < 4:
        return False
    return any(dim != 1 for dim in tuple(value.shape)[2:])
