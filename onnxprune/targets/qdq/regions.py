"""Integer nodes in groups that can be timed.

A region is a run of integer nodes in graph order that hang together by integer tensors. Large ones are cut where few
tensors cross, so that each takes long enough to be timed and a part can be returned without the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxprune.contracts import Placement
from onnxprune.targets.qdq.place import integer_units
from onnxprune.targets.qdq.writer import IntegerUnit

__all__ = ["Region", "find_regions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Names of integer nodes in graph order, absorbed ones included, and the tensors that cross its border.

    Of `integer_inputs` and `integer_outputs` the other side is integer too. An output that is read by both kinds
    stands in both lists.
    """

    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    integer_inputs: frozenset[str]
    integer_outputs: frozenset[str]


def find_regions(
    model: ir.Model, placement: Placement, *, cost_of: Callable[[IntegerUnit], float], region_cost: float
) -> list[Region]:
    """The integer nodes of `placement` in regions, each in one.

    Args:
        model: The float model.
        placement: Which nodes are integer.
        cost_of: What one of them costs, in any unit.
        region_cost: What a region should cost at least, where what hangs together allows.
    """
    units = integer_units(model, placement)
    graph_outputs = set(model.graph.outputs)
    maker_of = {value: position for position, unit in enumerate(units) for value in unit.outputs}
    return [
        _region([units[position] for position in part], maker_of, units, graph_outputs)
        for group in _connected(units, maker_of)
        for part in _cut(group, units, maker_of, cost_of, region_cost)
    ]


def _read_tensors(unit: IntegerUnit) -> list[ir.Value]:
    """What `unit` reads that is computed."""
    own = set(unit.node.outputs)
    nodes = (unit.node,) if unit.absorbed is None else (unit.node, unit.absorbed)
    return [
        value
        for node in nodes
        for value in node.inputs
        if value is not None and value.const_value is None and value not in own
    ]


def _connected(units: Sequence[IntegerUnit], maker_of: Mapping[ir.Value, int]) -> list[list[int]]:
    """Positions of units that hang together by tensors from one to the other, each group in graph order."""
    leader = list(range(len(units)))

    def find(position: int) -> int:
        while leader[position] != position:
            leader[position] = leader[leader[position]]
            position = leader[position]
        return position

    for position, unit in enumerate(units):
        for value in _read_tensors(unit):
            if value in maker_of:
                leader[find(position)] = find(maker_of[value])
    groups: dict[int, list[int]] = {}
    for position in range(len(units)):
        groups.setdefault(find(position), []).append(position)
    return list(groups.values())


def _cut(
    group: Sequence[int],
    units: Sequence[IntegerUnit],
    maker_of: Mapping[ir.Value, int],
    cost_of: Callable[[IntegerUnit], float],
    region_cost: float,
) -> list[list[int]]:
    """`group` in parts of about `region_cost`.

    A part ends where it costs so much and one tensor crosses, or twice as much and three do, or four times as much.
    """
    last_reader: dict[ir.Value, int] = {}
    for position in group:
        for value in _read_tensors(units[position]):
            if value in maker_of:
                last_reader[value] = position
    parts: list[list[int]] = [[]]
    cost, crossing = 0.0, 0
    ends: dict[int, int] = {}
    left = sum(cost_of(units[position]) for position in group)
    for position in group:
        parts[-1].append(position)
        own_cost = cost_of(units[position])
        cost, left = cost + own_cost, left - own_cost
        for value in units[position].outputs:
            if value in last_reader:
                crossing += 1
                ends[last_reader[value]] = ends.get(last_reader[value], 0) + 1
        crossing -= ends.pop(position, 0)
        is_border = (
            (crossing <= 1 and cost >= region_cost)
            or (crossing <= 3 and cost >= 2 * region_cost)
            or cost >= 4 * region_cost
        )
        # What is left over should still make a region.
        if is_border and left >= region_cost / 2:
            parts.append([])
            cost = 0.0
    return [part for part in parts if part]


def _region(
    inside: Sequence[IntegerUnit],
    maker_of: Mapping[ir.Value, int],
    units: Sequence[IntegerUnit],
    graph_outputs: set[ir.Value],
) -> Region:
    nodes = {node for unit in inside for node in (unit.node, unit.absorbed) if node is not None}
    integer_nodes = {node for unit in units for node in (unit.node, unit.absorbed) if node is not None}
    made = {value for node in nodes for value in node.outputs}
    inputs = list(dict.fromkeys(value for unit in inside for value in _read_tensors(unit) if value not in made))
    outputs: list[ir.Value] = []
    integer_outputs: set[str] = set()
    for value in (value for unit in inside for value in unit.outputs):
        outside = [node for node in value.consumers() if node not in nodes]
        if not outside and value not in graph_outputs:
            continue
        if any(node in integer_nodes for node in outside):
            integer_outputs.add(value.name or "")
        if value in graph_outputs or any(node not in integer_nodes for node in outside):
            outputs.append(value)
    names = [node.name or "" for unit in inside for node in (unit.node, unit.absorbed) if node is not None]
    return Region(
        nodes=tuple(names),
        inputs=tuple(value.name or "" for value in inputs),
        outputs=tuple(value.name or "" for value in outputs),
        integer_inputs=frozenset(value.name or "" for value in inputs if value in maker_of),
        integer_outputs=frozenset(integer_outputs),
    )
