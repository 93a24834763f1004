"""Numbers of the canonical form, and ONNX's own check of every node."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from onnxprune.errors import ModelError
from onnxprune.graph.names import printable
from onnxprune.graph.protos import fill_graph

__all__ = ["MAX_IR_VERSION", "MAX_OPSET", "MIN_OPSET", "check_nodes", "node_faults"]

MIN_OPSET = 18
MAX_OPSET = 24
MAX_IR_VERSION = 13
"""ONNX Runtime 1.31 reads no newer one."""


def check_nodes(model: ir.Model) -> None:
    """Refuse a source model with nodes that ONNX's checker refuses (unknown operator, missing attribute or input).

    Raises:
        ModelError: Names the first such node.
    """
    fault = node_faults(model)
    if fault:
        raise ModelError(f"The model is not valid ONNX: {fault}.", "Export it again; ONNX Runtime would refuse it too.")


def node_faults(model: ir.Model) -> str:
    """What ONNX's checker says about the first faulty node, or "". Weights are not looked at."""
    proto = onnx.ModelProto(ir_version=model.ir_version)
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    fill_graph(proto.graph, model.graph, _CheckedStyle())
    _declare_initializers(proto.graph, model.graph)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        return printable(" ".join(line.strip() for line in str(error).splitlines() if line.strip()).rstrip(". "))
    return ""


def _declare_initializers(proto: onnx.GraphProto, graph: ir.Graph) -> None:
    """Declare initializers as inputs: the checker wants every name defined, and would want to see all data."""
    for value in graph.initializers.values():
        if not value.is_graph_input():
            proto.input.append(_with_shape(ir.serde.serialize_value(value)))
    for node, node_proto in zip(graph, proto.node, strict=True):
        for attribute in node_proto.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _declare_initializers(attribute.g, node.attributes[attribute.name].as_graph())
            elif attribute.type == onnx.AttributeProto.GRAPHS:
                for body, body_proto in zip(
                    node.attributes[attribute.name].as_graphs(), attribute.graphs, strict=True
                ):
                    _declare_initializers(body_proto, body)


def _with_shape(value_info: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """The checker refuses an unknown rank, which ONNX and ONNX Runtime allow."""
    tensor = value_info.type.tensor_type
    if value_info.type.HasField("tensor_type") and not tensor.HasField("shape"):
        tensor.shape.SetInParent()
    return value_info


class _CheckedStyle:
    """Nodes and interface, and nothing else."""

    def begin_graph(self) -> None:
        """Nothing to do: no tensor is written."""

    def initializer(self, value: ir.Value) -> onnx.TensorProto | str | None:  # noqa: ARG002 - declared afterwards
        return None

    def value_info(self, value: ir.Value) -> onnx.ValueInfoProto | None:  # noqa: ARG002 - shapes are not checked
        return None

    def interface(self, value: ir.Value, *, outermost: bool) -> onnx.ValueInfoProto:  # noqa: ARG002 - all alike
        return _with_shape(ir.serde.serialize_value(value))

    def node_metadata(self, node: ir.Node) -> Mapping[str, str]:  # noqa: ARG002 - means nothing to the checker
        return {}
