"""Numbers of the canonical form, and ONNX's own check of every node."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from onnxprune.errors import ModelError
from onnxprune.graph.inference import is_defined_by_onnx
from onnxprune.graph.names import printable
from onnxprune.graph.protos import fill_graph

__all__ = ["MAX_IR_VERSION", "MAX_OPSET", "MIN_OPSET", "check_nodes", "node_faults"]

MIN_OPSET = 18
MAX_OPSET = 24
MAX_IR_VERSION = 13
"""ONNX Runtime 1.31 reads no newer one."""

_UNKNOWN_DOMAIN = "onnxprune.unknown"


def check_nodes(model: ir.Model) -> None:
    """Refuse a source model with nodes that ONNX's checker refuses (missing attribute or input, wrong type).

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
    _prepare(proto.graph, model.graph, model.opset_imports)
    proto.opset_import.add(domain=_UNKNOWN_DOMAIN, version=1)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        return printable(" ".join(line.strip() for line in str(error).splitlines() if line.strip()).rstrip(". "))
    return ""


def _prepare(proto: onnx.GraphProto, graph: ir.Graph, opset_imports: Mapping[str, int]) -> None:
    """Make the checker look at what it is asked about only.

    Initializers become inputs: it wants every name defined, and would want to see all data. Operators without a schema
    move to a domain that it does not know: ONNX Runtime has some of its own in ONNX's domain.
    """
    for value in graph.initializers.values():
        if not value.is_graph_input():
            proto.input.append(_with_shape(ir.serde.serialize_value(value)))
    for node, node_proto in zip(graph, proto.node, strict=True):
        if not is_defined_by_onnx(node, opset_imports):
            node_proto.domain = _UNKNOWN_DOMAIN
        for attribute in node_proto.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _prepare(attribute.g, node.attributes[attribute.name].as_graph(), opset_imports)
            elif attribute.type == onnx.AttributeProto.GRAPHS:
                bodies = node.attributes[attribute.name].as_graphs()
                for body, body_proto in zip(bodies, attribute.graphs, strict=True):
                    _prepare(body_proto, body, opset_imports)


def _with_shape(value_info: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """The checker refuses an unknown rank or type, which ONNX and ONNX Runtime allow."""
    if value_info.type.WhichOneof("value") is None:
        value_info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    tensor = value_info.type.tensor_type
    if value_info.type.HasField("tensor_type") and not tensor.HasField("shape"):
        tensor.shape.SetInParent()
    return value_info


class _CheckedStyle:
    """Nodes and interface, and nothing else."""

    def begin_graph(self) -> None:
        """Nothing to do: no tensor is written."""

    def initializer(self, value: ir.Value) -> onnx.TensorProto | str | None:
        return None

    def value_info(self, value: ir.Value) -> onnx.ValueInfoProto | None:
        return None

    def interface(self, value: ir.Value, *, outermost: bool) -> onnx.ValueInfoProto:
        return _with_shape(ir.serde.serialize_value(value))

    def node_metadata(self, node: ir.Node) -> Mapping[str, str]:
        return {}
