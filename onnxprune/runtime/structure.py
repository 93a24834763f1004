"""What the time of a model depends on, as a digest.

That is operators, attributes, shapes and element types, and the constants that say how much work there is: shapes,
axes, factors of a Resize, thresholds. Weights, biases, scales and zero points are left out, since no kernel's time
depends on their values: the same network after another training or calibration has the same digest, as has the second
of two equal blocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import onnx_ir as ir

from onnxprune.contracts import Batch, JsonValue

__all__ = ["structure_digest"]

# Numbers up to so many are taken for shapes, axes, factors and the like, which the work depends on.
_MAX_ELEMENTS = 64
_INTEGERS = frozenset({ir.DataType.INT32, ir.DataType.INT64})
# Their constants, of whatever type, say how much is computed.
_READ_BY_VALUE = frozenset({"Resize", "Upsample", "NonMaxSuppression", "Range", "If", "Loop"})


def structure_digest(model: ir.Model, feeds: Batch, *, with_names: bool = False) -> str:
    """A name for everything in `model` and `feeds` that its time depends on; `with_names` adds the nodes' names."""
    fed = [feeds[name] for name in (value.name or "" for value in model.graph.inputs) if name in feeds]
    description = [
        sorted(model.opset_imports.items()),
        [[list(array.shape), array.dtype.name] for array in fed],
        _describe(model.graph, {}, with_names=with_names),
    ]
    return hashlib.sha256(json.dumps(description, default=str).encode()).hexdigest()


def _describe(graph: ir.Graph, outer: Mapping[ir.Value, int], *, with_names: bool) -> list[JsonValue]:
    """`graph` as plain lists, its values numbered in the order of their appearance."""
    numbers: dict[ir.Value, int] = dict(outer)
    described: list[JsonValue] = []

    def number(value: ir.Value | None) -> JsonValue:
        if value is None:
            return None
        if value in numbers:
            return numbers[value]
        numbers[value] = len(numbers)
        return [numbers[value], *_shape_and_type(value), _counted(_tensor(value))]

    def read(node: ir.Node, value: ir.Value | None) -> JsonValue:
        tensor = _tensor(value)
        if value is None or tensor is None:
            return number(value)
        if _is_quantization(node):
            # No number either: equal scales and zero points are stored once, and which are equal is chance.
            return _shape_and_type(value)
        return [number(value), _numbers_of(tensor)] if node.op_type in _READ_BY_VALUE else number(value)

    described.append([number(value) for value in graph.inputs])
    described.extend(
        [
            node.domain,
            node.op_type,
            node.name if with_names else "",
            [read(node, value) for value in node.inputs],
            [_describe_attribute(node, name, numbers, with_names=with_names) for name in sorted(node.attributes)],
            [number(value) for value in node.outputs],
        ]
        for node in graph
        # A constant is described where it is read, however it is stored.
        if _constant_attribute(node) is None
    )
    described.append([number(value) for value in graph.outputs])
    return described


def _is_quantization(node: ir.Node) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.op_type.startswith("QLinear")


def _constant_attribute(node: ir.Node) -> ir.TensorProtocol | None:
    attribute = node.attributes.get("value") if node.op_type == "Constant" else None
    return attribute.as_tensor() if attribute is not None else None


def _tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The constant that `value` is; None for a result and for an input, whose default may be fed over."""
    if value is None or value.is_graph_input():
        return None
    maker = value.producer()
    return value.const_value if maker is None else _constant_attribute(maker)


def _shape_and_type(value: ir.Value) -> list[JsonValue]:
    tensor = _tensor(value)
    if tensor is not None:
        return [[str(dim) for dim in tensor.shape], str(tensor.dtype)]
    # Names of unknown sizes differ from block to block.
    shape: JsonValue = None if value.shape is None else [dim if isinstance(dim, int) else "?" for dim in value.shape]
    return [shape, str(value.dtype)]


def _counted(tensor: ir.TensorProtocol | None) -> JsonValue:
    """The numbers of a constant that is none of training: True for others, False for what is no constant."""
    return _numbers_of(tensor) if tensor is not None and tensor.dtype in _INTEGERS else tensor is not None


def _numbers_of(tensor: ir.TensorProtocol) -> JsonValue:
    return True if tensor.size > _MAX_ELEMENTS else [str(number) for number in tensor.numpy().reshape(-1).tolist()]


def _describe_attribute(node: ir.Node, name: str, numbers: Mapping[ir.Value, int], *, with_names: bool) -> JsonValue:
    attribute = node.attributes[name]
    if attribute.type is ir.AttributeType.GRAPH:
        return [name, _describe(attribute.as_graph(), numbers, with_names=with_names)]
    if attribute.type is ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return [name, str(tensor.dtype), [str(dim) for dim in tensor.shape], _numbers_of(tensor)]
    return [name, str(attribute.value)]
