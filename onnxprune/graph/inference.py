"""ONNX's own type and shape inference on a weight-free copy of some nodes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from onnxprune.graph.protos import fill_node, tensor_head

__all__ = ["Contradiction", "Inferred", "ValueType", "captured_values", "infer_types", "is_defined_by_onnx"]

# Tensors that steer shapes (targets of Reshape, bounds of Slice ...) are smaller; weights are not needed.
_STEERING_UP_TO_BYTES = 1024
# The names that ONNX's inference invents for dimensions it can't compute; they change from call to call.
_INVENTED_DIMENSION = re.compile(r"unk__\d+")


@dataclass(frozen=True, slots=True)
class ValueType:
    """Type and shape of a value; None: unknown."""

    type: ir.TypeProtocol | None
    shape: ir.Shape | None


@dataclass(frozen=True, slots=True)
class Contradiction:
    """What ONNX has to say against a node."""

    node: str
    text: str


@dataclass(frozen=True, slots=True)
class Inferred:
    """What ONNX says about values, and the contradictions it found."""

    types: Mapping[ir.Value, ValueType]
    contradictions: tuple[Contradiction, ...]


def is_defined_by_onnx(node: ir.Node, opset_imports: Mapping[str, int]) -> bool:
    """True when the onnx package has a schema, and so an inference rule, for `node`."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    return bool(onnx.defs.has(node.op_type, opset_imports.get(domain, 1), domain))


def captured_values(node: ir.Node) -> Iterator[ir.Value]:
    """Values that the subgraphs of `node` use from outside, once each, in order of use."""
    bodies = [graph for attribute in node.attributes.values() for graph in _graphs(attribute)]
    if not bodies:
        return
    inside: set[ir.Value] = set()
    used: dict[ir.Value, None] = {}
    for body in bodies:
        for graph in (body, *body.subgraphs()):
            inside.update(graph.inputs, graph.initializers.values(), (v for n in graph for v in n.outputs))
            used.update((v, None) for v in graph.outputs)
            used.update((v, None) for n in graph for v in n.inputs if v is not None)
    yield from (value for value in used if value not in inside)


def _graphs(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else ()


def infer_types(
    model: ir.Model, nodes: Iterable[ir.Node], known: Mapping[ir.Value, ValueType], *, collect_errors: bool
) -> Inferred:
    """Infer the outputs of `nodes`, a stretch of the main graph in topological order, and of their subgraphs.

    Args:
        model: Gives opset and dimension names.
        nodes: The stretch; what it takes from before is declared as `known` says, or as the value itself says.
        known: Types of values from before the stretch, and of outputs of nodes that ONNX does not define.
        collect_errors: Also look for contradictions between nodes and types; costs a second inference if there is one.
    """
    proto = onnx.ModelProto(ir_version=max(model.ir_version, 10))
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    proto.graph.name = "stretch"
    style = _WeightFreeStyle(known)
    declared: set[ir.Value] = set()
    written: list[ir.Node] = []
    for node in nodes:
        for value in (*(v for v in node.inputs if v is not None), *captured_values(node)):
            if value not in declared:
                declared.add(value)
                style.declare(proto.graph, value)
        fill_node(proto.graph.node.add(), node, style, {})
        written.append(node)
        declared.update(node.outputs)
        for value in node.outputs:
            if value in known and (value_info := style.value_info(value)):
                proto.graph.value_info.append(value_info)
    result, message = _run(proto, collect_errors=collect_errors)
    # Only of what is declared: a model may be cut into as many stretches as it has nodes.
    user_names = _dimension_names(model, [known[value] for value in declared if value in known])
    types: dict[ir.Value, ValueType] = {}
    _collect(result.graph, {v.name: v for node in written for v in node.outputs if v.name}, types, user_names)
    for node, node_proto in zip(written, result.graph.node, strict=True):
        _collect_subgraphs(node, node_proto, types, user_names)
    return Inferred(types, tuple(_contradictions(message)))


def _run(proto: onnx.ModelProto, *, collect_errors: bool) -> tuple[onnx.ModelProto, str]:
    def infer(*, strict: bool, data_prop: bool) -> onnx.ModelProto:
        return onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=strict, data_prop=data_prop)

    if not collect_errors:
        return infer(strict=False, data_prop=True), ""
    try:
        return infer(strict=True, data_prop=True), ""
    except onnx.shape_inference.InferenceError:
        result = infer(strict=False, data_prop=True)
    try:
        # Propagating values can fail where the shapes themselves are in order; that is no contradiction.
        infer(strict=True, data_prop=False)
    except onnx.shape_inference.InferenceError as error:
        return result, str(error)
    return result, ""


def _contradictions(message: str) -> Iterator[Contradiction]:
    """One for each line "(op_type:Concat, node name: x): what is wrong"; deeper lines are about parts of a node."""
    for line in message.splitlines():
        _, bracket, rest = line.partition("(op_type:")
        name, separator, text = rest.partition(", node name: ")[2].partition("): ")
        if bracket and separator:
            yield Contradiction(name, text.removeprefix("[ShapeInferenceError] "))


class _WeightFreeStyle:
    """Small tensors as they are, weights by type and shape only, and the types that are known."""

    def __init__(self, known: Mapping[ir.Value, ValueType]) -> None:
        self._known = known

    def begin_graph(self) -> None:
        """Nothing to do: no tensor refers to another one."""

    def initializer(self, value: ir.Value) -> onnx.TensorProto | str | None:
        tensor = value.const_value
        if tensor is None or tensor.dtype is ir.DataType.STRING or tensor.nbytes > _STEERING_UP_TO_BYTES:
            return None
        proto = tensor_head(tensor, value.name or "")
        proto.raw_data = tensor.tobytes()
        return proto

    def value_info(self, value: ir.Value) -> onnx.ValueInfoProto | None:
        if value.is_initializer() and value.const_value is not None:
            tensor = value.const_value
            return onnx.helper.make_tensor_value_info(value.name or "", int(tensor.dtype), tensor.shape.numpy())
        if value not in self._known:
            return None
        known = self._known[value]
        return _value_info(value.name or "", known.type, known.shape)

    def interface(self, value: ir.Value, *, outermost: bool) -> onnx.ValueInfoProto:
        # What a subgraph declares about its inputs and outputs may be out of date; the node outside says it anew.
        return _value_info(value.name or "", value.type, None)

    def node_metadata(self, node: ir.Node) -> Mapping[str, str]:
        return {}

    def declare(self, graph: onnx.GraphProto, value: ir.Value) -> None:
        """Say in `graph` what is known about a value from before the stretch."""
        if value.is_initializer() and value.producer() is None:
            tensor = self.initializer(value)
            if isinstance(tensor, onnx.TensorProto):
                graph.initializer.append(tensor)
        value_info = self.value_info(value)
        if value_info is None:
            value_info = _value_info(value.name or "", value.type, value.shape)
        graph.value_info.append(value_info)


def _value_info(name: str, type_: ir.TypeProtocol | None, shape: ir.Shape | None) -> onnx.ValueInfoProto:
    return ir.serde.serialize_value(ir.Value(name=name, type=type_, shape=shape if type_ is not None else None))


def _dimension_names(model: ir.Model, types: Sequence[ValueType]) -> frozenset[str]:
    shapes = [value.shape for value in (*model.graph.inputs, *model.graph.outputs)]
    shapes += [entry.shape for entry in types]
    dims = (dim for shape in shapes if shape is not None for dim in shape)
    return frozenset(dim.value for dim in dims if isinstance(dim, ir.SymbolicDim) and dim.value)


def _collect_subgraphs(
    node: ir.Node, proto: onnx.NodeProto, types: dict[ir.Value, ValueType], user_names: frozenset[str]
) -> None:
    for attribute in proto.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            pairs = [(node.attributes[attribute.name].as_graph(), attribute.g)]
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            pairs = list(zip(node.attributes[attribute.name].as_graphs(), attribute.graphs, strict=True))
        else:
            continue
        for graph, graph_proto in pairs:
            by_name = {v.name: v for inner in graph for v in inner.outputs if v.name}
            _collect(graph_proto, by_name, types, user_names)
            for inner, inner_proto in zip(graph, graph_proto.node, strict=True):
                _collect_subgraphs(inner, inner_proto, types, user_names)


def _collect(
    proto: onnx.GraphProto,
    by_name: Mapping[str, ir.Value],
    types: dict[ir.Value, ValueType],
    user_names: frozenset[str],
) -> None:
    for value_info in (*proto.value_info, *proto.output):
        value = by_name.get(value_info.name)
        if value is not None:
            types[value] = _value_type(value_info.type, user_names)


def _value_type(proto: onnx.TypeProto, user_names: frozenset[str]) -> ValueType:
    kind = proto.WhichOneof("value")
    if kind != "tensor_type":
        return ValueType(None if kind is None else ir.serde.deserialize_type_proto_for_type(proto), None)
    tensor = proto.tensor_type
    type_ = ir.TensorType(ir.DataType(tensor.elem_type)) if tensor.elem_type else None
    if not tensor.HasField("shape"):
        return ValueType(type_, None)
    return ValueType(type_, ir.Shape([_dimension(dim, user_names) for dim in tensor.shape.dim]))


def _dimension(dim: onnx.TensorShapeProto.Dimension, user_names: frozenset[str]) -> int | str | None:
    if dim.HasField("dim_value"):
        return dim.dim_value if dim.dim_value >= 0 else None
    name = dim.dim_param
    if not name or (_INVENTED_DIMENSION.fullmatch(name) and name not in user_names):
        return None
    return name
