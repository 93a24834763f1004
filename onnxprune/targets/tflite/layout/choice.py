"""Stage 2 of layout assignment: which operators take their alternative form, so that the fewest numbers are moved.

A minimum cut. Every operator with an alternative is a vertex, whose side says which form it takes. Whoever wants a
tensor in another order than its producer gives it costs one transposition, shared by all who want that order.

A cut can only charge for vertices on *different* sides. Where a transposition stands between two operators, being in
*different* forms may be what makes it vanish: one of the two is flipped then, so that its sides bear the forms the
other way round. Flips are chosen along the heaviest edges first; where a cycle of them contradicts itself, the cost of
its lightest edge is taken as paid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from onnxprune.targets.mincut import CutGraph
from onnxprune.targets.tflite.graph import compose, inverse, permuted_shape
from onnxprune.targets.tflite.layout.axes import Form, Permutation, Port, identity
from onnxprune.targets.tflite.layout.cost import transposition_cost
from onnxprune.targets.tflite.layout.flow import Flow

__all__ = ["chosen_forms"]

# Between equally cheap choices the alternative form is taken: what stands beside a convolution can then be fused.
_NOMINAL_COST = 1.0


class _Literal(NamedTuple):
    """True when an operator takes its alternative form (or does not)."""

    operator: int
    is_alternative: bool


@dataclass(slots=True)
class _Wish:
    """Everyone who wants a source in one order."""

    always: bool = False
    literals: list[_Literal] = field(default_factory=list)


def chosen_forms(flow: Flow, forms: Mapping[int, Form]) -> Mapping[int, Form]:
    """The part of `forms` to take."""
    cut = _Cut(flow, forms)
    return {index: form for index, form in forms.items() if cut.takes_alternative(index)}


class _Cut:
    def __init__(self, flow: Flow, forms: Mapping[int, Form]) -> None:
        self.flow = flow
        self.forms = forms
        self.graph = CutGraph()
        self.vertices = {index: self.graph.add_vertex() for index in forms}
        self.flipped = _flips(self._ties(), forms)
        for source in flow.origins:
            if flow.origins[source].source == source:
                self._charge(source)
        for index in forms:
            self._charge_any([_Literal(index, is_alternative=False)], _NOMINAL_COST)
        self._nominal_side = self.graph.one_side()

    def takes_alternative(self, index: int) -> bool:
        """True where the cheapest split has the operator in its alternative form."""
        return (self.vertices[index] not in self._nominal_side) != self.flipped[index]

    # --- who wants what -------------------------------------------------------------------------------------

    def _given(self, source: str) -> tuple[int | None, Permutation | None]:
        """The producer, and the order in which its alternative form gives `source`; None: there is just one."""
        index = self.flow.producers.get(source)
        if index is None or index not in self.forms:
            return None, None
        position = self.flow.graph.operators[index].outputs.index(source)
        given = self.forms[index].permutations.get(Port(is_output=True, position=position))
        if given is None or given == identity(len(given)):
            return None, None
        return index, given

    def _wishes(self, source: str) -> dict[Permutation, _Wish]:
        wishes: dict[Permutation, _Wish] = {}
        for origin in self.flow.leaving.get(source, ()):
            wishes.setdefault(origin.path, _Wish()).always = True
        for reader in self.flow.readers.get(source, ()):
            form = self.forms.get(reader.place)
            moved = None if form is None else form.permutations.get(Port(is_output=False, position=reader.position))
            nominal = wishes.setdefault(reader.path, _Wish())
            if moved is None or moved == identity(len(moved)):
                nominal.always = True
                continue
            nominal.literals.append(_Literal(reader.place, is_alternative=False))
            wishes.setdefault(compose(reader.path, moved), _Wish()).literals.append(
                _Literal(reader.place, is_alternative=True)
            )
        return wishes

    def _ties(self) -> list[tuple[float, int, int, bool]]:
        """(weight, one operator, another, True where they must be in different forms to agree)."""
        ties: list[tuple[float, int, int, bool]] = []
        for source in self.flow.producers:
            producer, given = self._given(source)
            if producer is None or given is None:
                continue
            shape = self.flow.graph.tensors[source].shape
            weight = transposition_cost(shape, given)
            for order, wish in self._wishes(source).items():
                if order in (given, identity(len(given))):
                    ties.extend(
                        (weight, producer, literal.operator, literal.is_alternative != (order == given))
                        for literal in wish.literals
                        if literal.operator != producer
                    )
        return ties

    # --- costs ----------------------------------------------------------------------------------------------

    def _charge(self, source: str) -> None:
        tensor = self.flow.graph.tensors[source]
        if tensor.constant is not None:
            return
        producer, given = self._given(source)
        nominal = identity(tensor.rank)
        for order, wish in self._wishes(source).items():
            if producer is not None and given is not None and order in (nominal, given):
                missing = _Literal(producer, is_alternative=order == nominal)
                cost = transposition_cost(tensor.shape, given)
                self._charge_when(missing, wish, cost)
            elif order != nominal:
                cost = transposition_cost(tensor.shape, order)
                if given is not None:
                    stored = permuted_shape(tensor.shape, given)
                    cost = max(cost, transposition_cost(stored, compose(inverse(given), order)))
                if not wish.always:
                    self._charge_any(wish.literals, cost)

    def _on_other_side(self, literal: _Literal) -> bool:
        """True when the literal holds on the OTHER side of the cut."""
        return literal.is_alternative != self.flipped[literal.operator]

    def _charge_when(self, missing: _Literal, wish: _Wish, cost: float) -> None:
        """`cost` when `missing` holds and any of the wish."""
        producer, other = self.vertices[missing.operator], self._on_other_side(missing)
        if wish.always:
            self._charge_any([missing], cost)
            return
        opposite = [literal for literal in wish.literals if self._on_other_side(literal) != other]
        self._charge_any([literal for literal in wish.literals if self._on_other_side(literal) == other], cost)
        if not opposite:
            return
        wanted = self._any_of(opposite, other=not other)
        if other:
            self.graph.add_cost(wanted, producer, cost)
        else:
            self.graph.add_cost(producer, wanted, cost)

    def _charge_any(self, literals: Iterable[_Literal], cost: float) -> None:
        """`cost` when any of the literals holds, whatever the producer does."""
        given = list(literals)
        for other in (False, True):
            alike = [literal for literal in given if self._on_other_side(literal) == other]
            if not alike:
                continue
            wanted = self._any_of(alike, other=other)
            if other:
                self.graph.add_cost(CutGraph.ONE, wanted, cost)
            else:
                self.graph.add_cost(wanted, CutGraph.OTHER, cost)

    def _any_of(self, literals: list[_Literal], *, other: bool) -> int:
        """A vertex that is on the OTHER (or the ONE) side as soon as one of the literals is."""
        if len(literals) == 1:
            return self.vertices[literals[0].operator]
        vertex = self.graph.add_vertex()
        for literal in literals:
            if other:
                self.graph.add_cost(vertex, self.vertices[literal.operator], math.inf)
            else:
                self.graph.add_cost(self.vertices[literal.operator], vertex, math.inf)
        return vertex


def _flips(ties: list[tuple[float, int, int, bool]], forms: Mapping[int, Form]) -> dict[int, bool]:
    """Which operators are flipped, so that as much weight as possible is on ties that can be charged for."""
    parent = {index: index for index in forms}
    differs = dict.fromkeys(forms, False)

    def root(index: int) -> tuple[int, bool]:
        trail = []
        while parent[index] != index:
            trail.append(index)
            index = parent[index]
        is_flipped = False
        for step in reversed(trail):
            is_flipped ^= differs[step]
            parent[step], differs[step] = index, is_flipped
        return index, is_flipped

    for _, one, other, must_differ in sorted(ties, key=lambda tie: -tie[0]):
        (first, first_flipped), (second, second_flipped) = root(one), root(other)
        if first != second:
            parent[second] = first
            differs[second] = first_flipped ^ second_flipped ^ must_differ
    return {index: root(index)[1] for index in forms}
