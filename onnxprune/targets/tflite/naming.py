"""Integers are called as the values of the float model that they stand for: by their names, tensors are compared.

The QDQ spelling has three values for each of them (`onnxprune.targets.qdq.writer`). What an operator gives before it is
rounded is none to go by: where rounding does the work of a Relu, it has the name of what is in front of the Relu.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from onnxprune.targets.tflite.graph import Graph, Operator

__all__ = ["with_source_names"]

_SUFFIX = "_quantized"


def with_source_names(graph: Graph, source: Collection[str]) -> Graph:
    """`graph` with computed integers renamed to the values in `source`, as far as these names are free."""
    taken = set(graph.tensors)
    fixed = {*graph.inputs, *graph.outputs, *source}
    computed = [name for operator in graph.operators for name in operator.outputs]
    names: dict[str, str] = {}
    for name in computed:
        wanted = name.removesuffix(_SUFFIX)
        is_free = wanted in source and wanted not in taken
        if is_free and name not in fixed and graph.tensors[name].quantization is not None:
            names[name] = wanted
            taken.add(wanted)
    if not names:
        return graph

    def renamed(operator: Operator) -> Operator:
        return replace(
            operator,
            inputs=tuple(names.get(name, name) for name in operator.inputs),
            outputs=tuple(names.get(name, name) for name in operator.outputs),
        )

    return replace(
        graph,
        operators=tuple(map(renamed, graph.operators)),
        tensors={
            names.get(name, name): replace(tensor, name=names.get(name, name)) for name, tensor in graph.tensors.items()
        },
    )
