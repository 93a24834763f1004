"""Inputs and outputs with their channels last, where that is asked for.

The tensor at the interface becomes the permuted one, with a TRANSPOSE between it and the graph. The layout stage then
decides what becomes of that TRANSPOSE, like of any other: in a network of convolutions it vanishes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from onnxprune.targets.tflite.graph import Constant, Graph, Operator, Tensor, inverse, permuted_shape

__all__ = ["with_channels_last"]

_RANKS = (3, 4, 5)


def with_channels_last(graph: Graph, *, inputs: bool, outputs: bool) -> Graph:
    """`graph` with float inputs and outputs of rank 3 to 5 stored as (N, spatial axes, C); others stay."""
    for name in graph.inputs if inputs else ():
        if _has_channels(graph.tensors[name]):
            graph = _fed_channels_last(graph, name)
    for name in graph.outputs if outputs else ():
        if name not in graph.inputs and _has_channels(graph.tensors[name]):
            graph = _given_channels_last(graph, name)
    return graph


def _has_channels(tensor: Tensor) -> bool:
    return tensor.rank in _RANKS and tensor.type in ("FLOAT32", "FLOAT16", "BFLOAT16", "FLOAT64")


def _fed_channels_last(graph: Graph, name: str) -> Graph:
    to_last = _to_last(graph.tensors[name].rank)
    operators = tuple(_renamed(operator, name) for operator in graph.operators)
    first, tensors = _transposed(graph, name, _inner(name), inverse(to_last))
    return replace(graph, operators=(first, *operators), tensors=_with_inner(tensors, name, to_last))


def _given_channels_last(graph: Graph, name: str) -> Graph:
    to_last = _to_last(graph.tensors[name].rank)
    operators = tuple(_renamed(operator, name) for operator in graph.operators)
    last, tensors = _transposed(graph, _inner(name), name, to_last)
    return replace(graph, operators=(*operators, last), tensors=_with_inner(tensors, name, to_last))


def _transposed(
    graph: Graph, source: str, output: str, order: tuple[int, ...]
) -> tuple[Operator, Mapping[str, Tensor]]:
    """The operator between the two, and the graph's tensors with its constant."""
    constant = Constant.of(np.array(order, np.int32))
    numbers = Tensor(name=f"{output}/order", type="INT32", shape=constant.shape, constant=constant)
    operator = Operator(kind="TRANSPOSE", inputs=(source, numbers.name), outputs=(output,))
    return operator, {**graph.tensors, numbers.name: numbers}


def _with_inner(tensors: Mapping[str, Tensor], name: str, to_last: tuple[int, ...]) -> Mapping[str, Tensor]:
    """Tensor `name` permuted, and one inside the graph as it was."""
    before = tensors[name]
    outer = replace(before, shape=permuted_shape(before.shape, to_last), layout=to_last)
    return {**tensors, name: outer, _inner(name): replace(before, name=_inner(name))}


def _to_last(rank: int) -> tuple[int, ...]:
    return (0, *range(2, rank), 1)


def _inner(name: str) -> str:
    return f"{name}/channels_first"


def _renamed(operator: Operator, name: str) -> Operator:
    def inner(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_inner(name) if given == name else given for given in names)

    return replace(operator, inputs=inner(operator.inputs), outputs=inner(operator.outputs))
