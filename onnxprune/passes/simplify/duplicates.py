"""The same computation done once.

x -> Sigmoid -> a
x -> Sigmoid -> b    =>    x -> Sigmoid -> a, read by all that read a or b
"""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from onnxprune.graph.weights import constant_array
from onnxprune.passes.simplify.edits import bypass_all, is_standard

__all__ = ["merge_duplicates"]

# Not the same twice, or (quantization) read in pairs by runtimes.
_NEVER_MERGED = frozenset(
    {
        *("Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"),
        *("RandomUniformLike", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
    }
)
# Constants up to this size count as the same input when they are equal; larger ones only when they are one tensor.
_MAX_COMPARED_ELEMENTS = 64


def merge_duplicates(model: ir.Model) -> int:
    """No two nodes of a graph are left that compute the same from the same inputs; the first stays.

    Not done: for nodes with subgraphs, random or quantizing nodes, operators of other domains (they may be random),
    and for two nodes that both make outputs.

    Returns:
        How many nodes went.
    """
    merged = 0
    for graph in list(model.graphs()):
        seen: dict[Hashable, ir.Node] = {}
        for node in list(graph):
            identity = _identity(node)
            if identity is None:
                continue
            first = seen.setdefault(identity, node)
            if first is not node and bypass_all(node, first.outputs):
                merged += 1
    return merged


def _identity(node: ir.Node) -> Hashable | None:
    """Equal for nodes that compute the same; None where that can't be said."""
    if not is_standard(node, node.op_type) or node.op_type in _NEVER_MERGED:
        return None
    attributes: list[Hashable] = []
    for name, attribute in sorted(node.attributes.items()):
        match attribute.type:
            case ir.AttributeType.INT | ir.AttributeType.FLOAT | ir.AttributeType.STRING:
                attributes.append((name, attribute.value))
            case ir.AttributeType.INTS | ir.AttributeType.FLOATS | ir.AttributeType.STRINGS:
                attributes.append((name, tuple(attribute.value)))
            case _:
                return None
    inputs = tuple(_input_identity(value) for value in node.inputs)
    return (node.op_type, node.version, inputs, tuple(attributes), len(node.outputs))


def _input_identity(value: ir.Value | None) -> Hashable:
    if value is None or value.const_value is None or value.const_value.size > _MAX_COMPARED_ELEMENTS:
        return id(value)
    array = constant_array(value)
    return id(value) if array is None else (str(value.dtype), array.shape, array.tobytes())
