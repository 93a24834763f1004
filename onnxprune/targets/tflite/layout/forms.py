"""Stage 1 of layout assignment: what other order each operator could be computed in.

One alternative an operator. It starts where a transposition would vanish (its reader takes the tensor as it comes, or
its producer makes it as it is wanted) and spreads from there to the neighbours. Where several could come, the first
wins: either the nearest, or that of the transposition that moves most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from heapq import heappop, heappush
from typing import Literal, TypeAlias

from onnxprune.targets.tflite.graph import compose, inverse
from onnxprune.targets.tflite.layout.axes import AxisMap, Form, Permutation, Port, identity, spread
from onnxprune.targets.tflite.layout.cost import transposition_cost
from onnxprune.targets.tflite.layout.flow import Flow
from onnxprune.targets.tflite.layout.rules import PERMUTABLE

__all__ = ["Precedence", "alternative_forms"]

Precedence: TypeAlias = Literal["nearest", "heaviest"]


def alternative_forms(flow: Flow, precedence: Precedence) -> Mapping[int, Form]:
    """For operators, by their place in the graph, the form other than the nominal one; none for those that stay."""
    forms: dict[int, Form] = {}
    maps: dict[int, AxisMap | None] = {}
    spread_over: set[_Spread] = set()
    offers: list[tuple[tuple[float, ...], _Offer]] = []
    count = 0

    def add(offer: _Offer, weight: float, distance: int) -> None:
        nonlocal count
        count += 1
        order = (distance, -weight) if precedence == "nearest" else (-weight, distance)
        heappush(offers, ((*order, count), offer))

    for source, offer, path in _anchors(flow):
        add(offer, transposition_cost(flow.graph.tensors[source].shape, path), 0)
    while offers:
        (*order, _), (index, port, permutation) = heappop(offers)
        if index in forms or permutation == identity(len(permutation)):
            continue
        if index not in maps:
            maps[index] = _axis_map(flow, index)
        axes = maps[index]
        form = None if axes is None else spread(axes, port, permutation)
        if form is None:
            continue
        forms[index] = form
        distance, weight = (order[0], -order[1]) if precedence == "nearest" else (order[1], -order[0])
        for offer in _neighbours(flow, index, forms, spread_over):
            add(offer, weight, int(distance) + 1)
    return forms


def _axis_map(flow: Flow, index: int) -> AxisMap | None:
    view = flow.view(index)
    rule = PERMUTABLE.get(view.operator.kind)
    return None if rule is None else rule.axes(view)


_Offer: TypeAlias = tuple[int, Port, Permutation]
_Spread: TypeAlias = tuple[str, Permutation, Permutation]
"""A source, an order in which it is stored, and the same seen by who reads or makes it: offered to all around it."""


def _anchors(flow: Flow) -> Iterator[tuple[str, _Offer, Permutation]]:
    """Both ends of every transposition, with its source and path."""
    for source, readers in flow.readers.items():
        for reader in readers:
            if reader.path != identity(len(reader.path)):
                offer = reader.place, Port(is_output=False, position=reader.position), inverse(reader.path)
                yield source, offer, reader.path
                for offer in _to_producer(flow, source, reader.path):
                    yield source, offer, reader.path
    for source, origins in flow.leaving.items():
        for origin in origins:
            for offer in _to_producer(flow, source, origin.path):
                yield source, offer, origin.path


def _to_producer(flow: Flow, source: str, stored: Permutation) -> Iterator[_Offer]:
    index = flow.producers.get(source)
    if index is not None:
        yield index, Port(is_output=True, position=flow.graph.operators[index].outputs.index(source)), stored


def _neighbours(flow: Flow, index: int, forms: Mapping[int, Form], spread_over: set[_Spread]) -> Iterator[_Offer]:
    """Everyone around an operator that has taken a form, who has none yet.

    What is in `spread_over` has been offered before, by a nearer or heavier operator: a tensor that all layers read
    would be offered to all of them by each of them.
    """
    operator = flow.graph.operators[index]
    for port, permutation in forms[index].permutations.items():
        name = (operator.outputs if port.is_output else operator.inputs)[port.position]
        origin = flow.origins[name]
        stored = compose(origin.path, permutation)
        if (origin.source, stored, permutation) in spread_over:
            continue
        spread_over.add((origin.source, stored, permutation))
        if not port.is_output:
            yield from _to_producer(flow, origin.source, stored)
        for reader in flow.readers.get(origin.source, ()):
            if reader.place not in forms:
                place = Port(is_output=False, position=reader.position)
                yield reader.place, place, compose(inverse(reader.path), stored)
                # A transposition that stays can still be computed on the other order.
                yield reader.place, place, permutation
