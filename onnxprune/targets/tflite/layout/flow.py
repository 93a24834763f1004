"""A graph without its transpositions: who needs which tensor in which order of axes.

TRANSPOSE computes nothing. `Flow` looks through it: every tensor is a *source* (a fed, constant or otherwise computed
one) and the *path* that leads there, so that tensor = transpose(source, path).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onnxprune.targets.tflite.graph import Constant, Graph, Operator, Tensor, compose
from onnxprune.targets.tflite.layout.axes import Permutation, Port, identity

__all__ = ["Flow", "OperatorView", "Origin", "Reader", "permutation_of"]


class Origin(NamedTuple):
    """Where a tensor comes from: transpose(`source`, `path`)."""

    source: str
    path: Permutation


class Reader(NamedTuple):
    """An operator, by its place in the graph, that reads a source through `path` at an input."""

    place: int
    position: int
    path: Permutation


@dataclass(frozen=True, slots=True)
class Flow:
    """`graph` with the origin of every tensor."""

    graph: Graph
    origins: Mapping[str, Origin]
    producers: Mapping[str, int]
    """Source -> place of the operator that computes it; fed and constant ones have none."""
    readers: Mapping[str, Sequence[Reader]]
    """Source -> who reads it, in graph order. TRANSPOSE and the graph's outputs are not among them."""
    leaving: Mapping[str, Sequence[Origin]]
    """Source -> the origins of the graph's outputs that come from it."""

    @classmethod
    def of(cls, graph: Graph) -> Flow:
        """Look through all TRANSPOSE of `graph`."""
        origins: dict[str, Origin] = {}
        producers: dict[str, int] = {}
        readers: dict[str, list[Reader]] = {}

        def origin(name: str) -> Origin:
            known = origins.get(name)
            if known is None:
                known = origins[name] = Origin(name, identity(graph.tensors[name].rank))
            return known

        for index, operator in enumerate(graph.operators):
            path = permutation_of(operator, graph.tensors)
            if path is not None:
                before = origin(operator.inputs[0])
                origins[operator.outputs[0]] = Origin(before.source, compose(before.path, path))
                continue
            for position, name in enumerate(operator.inputs):
                if name:
                    found = origin(name)
                    readers.setdefault(found.source, []).append(Reader(index, position, found.path))
            for name in operator.outputs:
                origin(name)
                producers[name] = index
        leaving: dict[str, list[Origin]] = {}
        for name in graph.outputs:
            leaving.setdefault(origin(name).source, []).append(origin(name))
        return cls(graph, origins, producers, readers, leaving)

    def source(self, name: str) -> Tensor:
        """The source of a tensor."""
        return self.graph.tensors[self.origins[name].source]

    def constant(self, name: str) -> Constant | None:
        """The numbers of a tensor, with its path followed, where its source is constant."""
        stored = self.source(name).constant
        if stored is None:
            return None
        path = self.origins[name].path
        return stored if path == identity(len(path)) else stored.transposed(path)

    def view(self, index: int) -> OperatorView:
        """An operator of the graph with its tensors."""
        return OperatorView(self, index, self.graph.operators[index])


@dataclass(frozen=True, slots=True)
class OperatorView:
    """What the rules see of an operator: its tensors in nominal order, whatever path leads to them."""

    flow: Flow
    index: int
    operator: Operator

    def has(self, position: int) -> bool:
        """True when the input is given."""
        return position < len(self.operator.inputs) and self.operator.inputs[position] != ""

    def input(self, position: int) -> Tensor:
        """A given input."""
        return self.flow.graph.tensors[self.operator.inputs[position]]

    def output(self, position: int = 0) -> Tensor:
        """An output."""
        return self.flow.graph.tensors[self.operator.outputs[position]]

    def constant(self, position: int) -> Constant | None:
        """The numbers of an input, where it is given and constant."""
        return self.flow.constant(self.operator.inputs[position]) if self.has(position) else None

    def integers(self, position: int) -> tuple[int, ...] | None:
        """The numbers of a small constant input (axes, a shape, paddings) one after the other; None: not constant."""
        constant = self.constant(position)
        return None if constant is None else tuple(int(number) for number in constant.array().reshape(-1))

    def outputs(self) -> list[Port]:
        """A port for each output."""
        return [Port(is_output=True, position=position) for position in range(len(self.operator.outputs))]


def permutation_of(operator: Operator, tensors: Mapping[str, Tensor]) -> Permutation | None:
    """The permutation of a TRANSPOSE; None for any other operator, and where it is computed."""
    if operator.kind != "TRANSPOSE":
        return None
    order: npt.NDArray[Any] | None = tensors[operator.inputs[1]].array()
    return None if order is None else tuple(int(axis) for axis in np.asarray(order).reshape(-1))
