"""Which node computes and reads which tensor, for graphs of any format: all that a comparison by name needs.

Tensors are known by their names. What has no name, or shares its name with another tensor, can't be asked for and is
left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir

from onnxprune.graph.inference import captured_values

__all__ = ["GraphNode", "GraphTensor", "TensorGraph", "tensor_graph"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphTensor:
    """One tensor. `may_be_float` is False where it certainly is none; integers that stand for floats count as floats.

    `num_elements` is None where a size is unknown. `is_constant` is True where no input reaches it.
    """

    name: str
    may_be_float: bool = True
    num_elements: int | None = None
    is_output: bool = False
    is_constant: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphNode:
    """One operator. `reads` holds a name as often as it is an input, and once what inner graphs read.

    `onnx_type` is the ONNX operator that does the same, where there is one; `op_type` is the format's own name.
    """

    name: str
    op_type: str
    onnx_type: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TensorGraph:
    """Nodes in an order in which they can run, and every tensor that has a name of its own."""

    nodes: tuple[GraphNode, ...]
    tensors: Mapping[str, GraphTensor] = field(repr=False)

    @cached_property
    def computed(self) -> Mapping[str, GraphTensor]:
        """What nodes compute, in the order of the nodes."""
        return {name: self.tensors[name] for node in self.nodes for name in node.writes if name in self.tensors}

    @cached_property
    def readers(self) -> Mapping[str, tuple[GraphNode, ...]]:
        """The nodes that read a tensor, each once; a name that nothing reads is missing."""
        found: defaultdict[str, dict[int, GraphNode]] = defaultdict(dict)
        for number, node in enumerate(self.nodes):
            for name in node.reads:
                found[name][number] = node
        return {name: tuple(nodes.values()) for name, nodes in found.items()}


def tensor_graph(graph: ir.Graph) -> TensorGraph:
    """The main graph of an ONNX model; nodes of inner graphs are part of the node that holds them."""
    tensors: dict[str, GraphTensor] = {}
    nodes = []
    for node in graph:
        reads = [value for value in (*node.inputs, *captured_values(node)) if value is not None]
        for value in (*reads, *node.outputs):
            if value.name:
                tensors[value.name] = _tensor(value)
        nodes.append(
            GraphNode(
                name=node.name or "",
                op_type=node.op_type,
                onnx_type=node.op_type,
                reads=tuple(value.name for value in reads if value.name),
                writes=tuple(value.name for value in node.outputs if value.name),
            )
        )
    return TensorGraph(nodes=tuple(nodes), tensors=tensors)


def _tensor(value: ir.Value) -> GraphTensor:
    producer = value.producer()
    is_static = value.shape is not None and value.shape.is_static()
    return GraphTensor(
        name=value.name or "",
        may_be_float=value.dtype is None or value.dtype.is_floating_point(),
        num_elements=math.prod(value.shape.numpy()) if value.shape is not None and is_static else None,
        is_output=value.is_graph_output(),
        is_constant=value.is_initializer() or (producer is not None and producer.op_type == "Constant"),
    )
