"""From onnx_ir to ONNX protos, part by part, so that the caller decides about weights and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import onnx
import onnx_ir as ir

__all__ = ["ProtoStyle", "fill_graph", "fill_node", "sorted_metadata", "tensor_head"]


class ProtoStyle(Protocol):
    """What goes into the protos besides nodes and attributes."""

    def begin_graph(self) -> None:
        """The initializers of another graph follow."""
        ...

    def initializer(self, value: ir.Value) -> onnx.TensorProto | str | None:
        """The tensor to write, or the name of an equal one of the same graph, or None: nothing is written."""
        ...

    def value_info(self, value: ir.Value) -> onnx.ValueInfoProto | None:
        """What is said about an initializer or an inner value."""
        ...

    def interface(self, value: ir.Value, *, outermost: bool) -> onnx.ValueInfoProto:
        """What is said about an input or output of the model (`outermost`) or of a subgraph."""
        ...

    def node_metadata(self, node: ir.Node) -> Mapping[str, str]:
        """The metadata to write for `node`."""
        ...


def fill_graph(
    proto: onnx.GraphProto,
    graph: ir.Graph,
    style: ProtoStyle,
    *,
    stored_names: Mapping[ir.Value, str] | None = None,
) -> None:
    """Write `graph` into `proto` as `style` says.

    Args:
        proto: Empty.
        graph: Its values must have names that are unique within their scope.
        style: Decides about weights, types and shapes.
        stored_names: Initializers of enclosing graphs that are stored under another initializer's name.
    """
    proto.name = graph.name or "graph"
    if graph.doc_string:
        proto.doc_string = graph.doc_string
    sorted_metadata(proto.metadata_props, graph.metadata_props)
    outermost = stored_names is None
    names = dict(stored_names or {})
    proto.input.extend(style.interface(value, outermost=outermost) for value in graph.inputs)
    proto.output.extend(style.interface(value, outermost=outermost) for value in graph.outputs)
    style.begin_graph()
    for value in graph.initializers.values():
        stored = style.initializer(value)
        if isinstance(stored, str):
            names[value] = stored
            continue
        if stored is not None:
            proto.initializer.append(stored)
        _add_value_info(proto, value, style)
    graph_outputs = set(graph.outputs)
    for node in graph:
        fill_node(proto.node.add(), node, style, names)
        for value in node.outputs:
            if value.name and value not in graph_outputs:
                _add_value_info(proto, value, style)


def _add_value_info(proto: onnx.GraphProto, value: ir.Value, style: ProtoStyle) -> None:
    value_info = style.value_info(value)
    if value_info is not None:
        proto.value_info.append(value_info)


def fill_node(proto: onnx.NodeProto, node: ir.Node, style: ProtoStyle, stored_names: Mapping[ir.Value, str]) -> None:
    """Write `node`, with its subgraphs, into the empty `proto`."""
    proto.op_type = node.op_type
    for field in ("domain", "name", "overload", "doc_string"):
        if text := getattr(node, field):
            setattr(proto, field, text)
    proto.input.extend("" if v is None else stored_names.get(v, v.name or "") for v in node.inputs)
    outputs = [value.name or "" for value in node.outputs]
    while outputs and not outputs[-1]:
        outputs.pop()
    proto.output.extend(outputs)
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            proto.attribute.append(ir.serde.serialize_reference_attribute(attribute))
            continue
        if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            proto.attribute.append(ir.serde.serialize_attribute(attribute))
            continue
        written = proto.attribute.add(name=name, type=int(attribute.type))
        if attribute.type == ir.AttributeType.GRAPH:
            fill_graph(written.g, attribute.as_graph(), style, stored_names=stored_names)
        else:
            for body in attribute.as_graphs():
                fill_graph(written.graphs.add(), body, style, stored_names=stored_names)
    sorted_metadata(proto.metadata_props, style.node_metadata(node))


class _Entries(Protocol):
    def add(self, *, key: str, value: str) -> object: ...


def sorted_metadata(entries: _Entries, metadata: Mapping[str, str]) -> None:
    """Append `metadata` in the order of its keys, so that equal models give equal bytes."""
    for key in sorted(metadata):
        entries.add(key=key, value=metadata[key])


def tensor_head(tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto:
    """The proto of `tensor` under `name`, without its data."""
    proto = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
    if tensor.doc_string:
        proto.doc_string = tensor.doc_string
    sorted_metadata(proto.metadata_props, tensor.metadata_props)
    return proto
