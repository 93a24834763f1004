"""What a model file must be before anything is computed from it.

`check_head` looks at the first bytes, `check_proto` at the parsed message: versions, names, types, every tensor's
dimensions against the bytes that are really there, external data, and (in `onnxprune.graph.structure`) the graph.
Nothing here allocates more than the file itself; names go into messages escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from onnxprune.errors import ModelError, quoted_list
from onnxprune.graph.external import packed_bytes, resolve_location
from onnxprune.graph.names import is_safe_name, printable
from onnxprune.graph.structure import check_structure

__all__ = ["check_head", "check_proto"]

_MAX_DIMENSION = 2**31 - 1
_MAX_INTERFACE_ELEMENTS = 2**36
_MIN_IR_VERSION = 3
_MIN_OPSET = 7

_OTHER_FORMATS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"PK\x03\x04", "a ZIP archive", "PyTorch (.pt2, .pth) and Keras (.keras) files are: give it that ending."),
    (0, b"\x89HDF", "an HDF5 file", "Keras weights are: name it with the ending .h5."),
    (4, b"TFL3", "a TFLite model", "Name it with the ending .tflite."),
    (4, b"ORTM", "an ONNX Runtime (.ort) model", "It can't be turned back; use the ONNX file that it was made from."),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself", "Fetch the file: git lfs pull."),
    (0, b"\x80\x02", "a Python pickle", "Old PyTorch files are: give the network as a factory with --weights."),
    (0, b"\x1f\x8b", "a gzip archive", "Unpack it first."),
    (0, b"<!DOCTYPE", "a web page", "The download was probably answered with an error or a login page."),
    (0, b"<html", "a web page", "The download was probably answered with an error or a login page."),
)


def check_head(path: Path, head: bytes, size_bytes: int) -> None:
    """Refuse what is recognizably not an ONNX model by its first bytes.

    Raises:
        ModelError: Empty file, text, or another format; says which.
    """
    if size_bytes == 0:
        raise ModelError(f"'{path}' is empty.", "Get or export the file again.")
    for offset, magic, what, hint in _OTHER_FORMATS:
        if head[offset : offset + len(magic)].lower() == magic.lower():
            raise ModelError(f"'{path}' is not an ONNX model but {what}.", hint)
    # The text form of ONNX begins with '<' or a field name; a binary model begins with field 1, a varint.
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        raise ModelError(
            f"'{path}' is a text file, not an ONNX model.",
            "Models are read in the binary form only; onnx.load and onnx.save convert textual ones.",
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where something stands, for messages."""

    path: Path

    def error(self, text: str, hint: str = "") -> ModelError:
        return ModelError(f"'{self.path}': {text}", hint)


def check_proto(proto: onnx.ModelProto, path: Path) -> None:
    """Check everything that can be checked without computing anything.

    Raises:
        ModelError: Names the file and the tensor, value, node or function at fault.
    """
    place = _Place(path)
    _check_versions(proto, place)
    if len(proto.training_info):
        raise place.error(
            "the model carries training information (training_info), which would be lost.",
            "Export the model for inference.",
        )
    graphs, nodes = _all_parts(proto)
    _check_names(proto, graphs, nodes, place)
    for graph in graphs:
        for value in (*graph.input, *graph.output, *graph.value_info):
            _check_type(value, place)
        for tensor in graph.initializer:
            _check_tensor(tensor, tensor.name, place)
        for sparse in graph.sparse_initializer:
            _check_tensor(sparse.values, sparse.values.name, place)
            _check_tensor(sparse.indices, sparse.values.name, place)
    for role, values in (("input", proto.graph.input), ("output", proto.graph.output)):
        for value in values:
            _check_interface(value, role, place)
    for node in nodes:
        _check_node(node, place)
    check_structure(proto, path)


def _check_versions(proto: onnx.ModelProto, place: _Place) -> None:
    if not proto.HasField("graph") or not proto.ir_version:
        raise place.error("this is not an ONNX model: it has no graph.", "Get or export the file again.")
    if not _MIN_IR_VERSION <= proto.ir_version <= onnx.IR_VERSION:
        raise place.error(
            f"the file has IR version {proto.ir_version}; versions {_MIN_IR_VERSION} to {onnx.IR_VERSION} are known to "
            f"onnx {onnx.__version__}.",
            "A newer version means that a newer onnx wrote it: export with an older one, or update onnxprune.",
        )
    versions: dict[str, int] = {}
    for entry in proto.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if versions.setdefault(domain, entry.version) != entry.version:
            raise place.error(f"opset domain '{printable(domain or 'ai.onnx')}' is imported in two versions.")
        if entry.version < 1:
            raise place.error(
                f"opset domain '{printable(domain or 'ai.onnx')}' is imported in version {entry.version}, "
                "which can't exist."
            )
    if not versions:
        raise place.error("the model imports no operator set.", "Export it again.")
    opset = versions.get("")
    if opset is not None and not _MIN_OPSET <= opset <= onnx.defs.onnx_opset_version():
        known = f"{_MIN_OPSET} to {onnx.defs.onnx_opset_version()} are known"
        raise place.error(f"the model is in opset {opset}; {known}.", "Export it with opset 18 to 24.")


def _all_parts(proto: onnx.ModelProto) -> tuple[list[onnx.GraphProto], list[onnx.NodeProto]]:
    graphs: list[onnx.GraphProto] = []
    nodes: list[onnx.NodeProto] = []
    waiting: list[onnx.GraphProto] = [proto.graph]
    unseen: list[onnx.NodeProto] = [node for function in proto.functions for node in function.node]
    while waiting or unseen:
        if waiting:
            graph = waiting.pop()
            graphs.append(graph)
            unseen.extend(graph.node)
        while unseen:
            node = unseen.pop()
            nodes.append(node)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    waiting.append(attribute.g)
                waiting.extend(attribute.graphs)
    return graphs, nodes


# --- names ------------------------------------------------------------------------------------------------------


def _check_names(
    proto: onnx.ModelProto, graphs: Iterable[onnx.GraphProto], nodes: Iterable[onnx.NodeProto], place: _Place
) -> None:
    for what, name in _all_names(proto, graphs, nodes):
        # Protobuf hands over what is not UTF-8 as bytes.
        if not isinstance(name, str):
            raise place.error(
                f"the name {name[:60]!r} of a {what} is not UTF-8 text; the file is damaged.",
                "Get or export the file again.",
            )
        if not is_safe_name(name):
            raise place.error(
                f"the name '{printable(name)}' of a {what} contains control or invisible characters.",
                "Such names can forge log lines and reports, so they are refused. Rename it where the model is made.",
            )
    for what, text in _all_texts(proto, graphs, nodes):
        if not isinstance(text, str):
            raise place.error(
                f"the {what} {text[:60]!r} is not UTF-8 text; the file is damaged.", "Get or export the file again."
            )


def _all_names(
    proto: onnx.ModelProto, graphs: Iterable[onnx.GraphProto], nodes: Iterable[onnx.NodeProto]
) -> Iterator[tuple[str, str]]:
    for entry in proto.opset_import:
        yield "operator domain", entry.domain
    for function in proto.functions:
        yield "function", function.name
        yield "function domain", function.domain
        yield "function overload", function.overload
        yield from (("function value", name) for name in (*function.input, *function.output))
        yield from (("attribute", name) for name in function.attribute)
        yield from (("operator domain", entry.domain) for entry in function.opset_import)
    for graph in graphs:
        yield "graph", graph.name
        for value in (*graph.input, *graph.output, *graph.value_info):
            yield "value", value.name
            yield from (("dimension", dim.dim_param) for dim in value.type.tensor_type.shape.dim)
        yield from (("tensor", tensor.name) for tensor in graph.initializer)
        for annotation in graph.quantization_annotation:
            yield "value", annotation.tensor_name
            yield from (("value", entry.value) for entry in annotation.quant_parameter_tensor_names)
    for node in nodes:
        yield "node", node.name
        yield "operator", node.op_type
        yield "operator domain", node.domain
        yield "function overload", node.overload
        yield from (("value", name) for name in (*node.input, *node.output))
        for attribute in node.attribute:
            yield "attribute", attribute.name
            yield "attribute", attribute.ref_attr_name


def _all_texts(
    proto: onnx.ModelProto, graphs: Iterable[onnx.GraphProto], nodes: Iterable[onnx.NodeProto]
) -> Iterator[tuple[str, str]]:
    yield from (("producer", text) for text in (proto.producer_name, proto.producer_version, proto.domain))
    described = (proto, *proto.functions, *graphs, *nodes)
    for message in described:
        yield "doc string", message.doc_string
        for entry in message.metadata_props:
            yield "metadata key", entry.key
            yield "metadata value", entry.value
    for graph in graphs:
        for part in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            yield "doc string", part.doc_string
            for entry in part.metadata_props:
                yield "metadata key", entry.key
                yield "metadata value", entry.value
        for tensor in graph.initializer:
            yield from (("external data entry", text) for e in tensor.external_data for text in (e.key, e.value))
    for node in nodes:
        yield from (("doc string", attribute.doc_string) for attribute in node.attribute)


# --- types ------------------------------------------------------------------------------------------------------

_TYPE_NAMES = {
    "map_type": "a map",
    "sequence_type": "a sequence",
    "optional_type": "an optional",
    "opaque_type": "an opaque type",
    "sparse_tensor_type": "a sparse tensor",
}


def _check_type(value: onnx.ValueInfoProto, place: _Place) -> None:
    kinds = list(_nested_kinds(value.type))
    for kind in kinds:
        if kind in ("map_type", "opaque_type"):
            raise place.error(
                f"value '{printable(value.name)}' is {_TYPE_NAMES[kind]}; such types are not supported.",
                "Classifiers from scikit-learn converters: export with the option zipmap=False.",
            )
    tensor = value.type.tensor_type
    if kinds == ["tensor_type"] and tensor.elem_type not in ir.DataType.__members__.values():
        raise place.error(f"value '{printable(value.name)}' has the unknown element type {tensor.elem_type}.")
    known = [dim.dim_value for dim in tensor.shape.dim if dim.HasField("dim_value")]
    for size in known:
        if not 0 <= size <= _MAX_DIMENSION:
            raise place.error(
                f"value '{printable(value.name)}' has a dimension of {size}; 0 to {_MAX_DIMENSION} can be.",
                "A dimension that is not known in advance must have a name or nothing, not a negative number.",
            )
    if math.prod(known) > _MAX_INTERFACE_ELEMENTS:
        raise place.error(f"value '{printable(value.name)}' of shape {known} has {math.prod(known):.1e} elements.")


def _nested_kinds(type_: onnx.TypeProto) -> Iterator[str]:
    kind = type_.WhichOneof("value")
    while kind is not None:
        yield kind
        if kind not in ("sequence_type", "optional_type", "map_type"):
            return
        nested = getattr(type_, kind)
        type_ = nested.value_type if kind == "map_type" else nested.elem_type
        kind = type_.WhichOneof("value")


def _check_interface(value: onnx.ValueInfoProto, role: str, place: _Place) -> None:
    if not value.name:
        raise place.error(f"an {role} of the model has no name.")
    kind = value.type.WhichOneof("value")
    if kind == "tensor_type" and value.type.tensor_type.elem_type:
        return
    if kind is None or kind == "tensor_type":
        if role == "output":
            return  # inference says it
        raise place.error(f"{role} '{printable(value.name)}' has no element type.", "Export the model again.")
    raise place.error(
        f"{role} '{printable(value.name)}' is {_TYPE_NAMES.get(kind, kind)}; inputs and outputs must be tensors.",
        "Cut the model before the operator that makes it (onnx.utils.extract_model).",
    )


# --- tensors ----------------------------------------------------------------------------------------------------


_ATTRIBUTE_FIELDS = {
    onnx.AttributeProto.TENSOR: "t",
    onnx.AttributeProto.GRAPH: "g",
    onnx.AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    onnx.AttributeProto.TYPE_PROTO: "tp",
}


def _check_node(node: onnx.NodeProto, place: _Place) -> None:
    names = [attribute.name for attribute in node.attribute]
    if len(set(names)) != len(names):
        twice = sorted({printable(name) for name in names if names.count(name) > 1})
        raise place.error(
            f"node '{printable(node.name)}' ({printable(node.op_type)}) has attribute {quoted_list(twice)} twice."
        )
    for attribute in node.attribute:
        label = f"{printable(node.name or node.op_type)}.{printable(attribute.name)}"
        field = _ATTRIBUTE_FIELDS.get(attribute.type)
        is_reference = bool(attribute.ref_attr_name)
        if attribute.type == onnx.AttributeProto.UNDEFINED and not is_reference:
            raise place.error(f"attribute '{label}' has no type.", "Export the model again.")
        if field is not None and not is_reference and not attribute.HasField(field):
            raise place.error(f"attribute '{label}' has a type but no value.", "Export the model again.")
        if attribute.HasField("t"):
            _check_tensor(attribute.t, attribute.t.name or label, place)
        for tensor in attribute.tensors:
            _check_tensor(tensor, tensor.name or label, place)
        if attribute.HasField("sparse_tensor"):
            _check_tensor(attribute.sparse_tensor.values, label, place)
            _check_tensor(attribute.sparse_tensor.indices, label, place)
        if attribute.HasField("tp") and "map_type" in _nested_kinds(attribute.tp):
            raise place.error(f"attribute '{label}' is a map type, which is not supported.")


_INT32_TYPES = frozenset(
    {"INT32", "INT16", "INT8", "UINT16", "UINT8", "BOOL", "FLOAT16", "BFLOAT16"}
    | {name for name in ir.DataType.__members__ if name.startswith(("FLOAT8", "FLOAT6"))}
)
_PACKED_TYPES = frozenset({"INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2"})


def _check_tensor(tensor: onnx.TensorProto, name: str, place: _Place) -> None:
    shown = f"tensor '{printable(name)}'"
    dims = list(tensor.dims)
    if any(not 0 <= dim <= 2**48 for dim in dims) or math.prod(dim for dim in dims if dim) > 2**48:
        raise place.error(f"{shown} has the dimensions {dims}, which no tensor can have.")
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        raise place.error(f"{shown} has the unknown element type {tensor.data_type}.") from None
    if dtype == ir.DataType.UNDEFINED:
        raise place.error(f"{shown} has no element type.")
    num_elements = math.prod(dims)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(tensor, name, dtype, num_elements, place)
        return
    if tensor.HasField("segment"):
        raise place.error(f"{shown} is cut into segments, which nothing can read any more.")
    present, needed, unit = _amounts(tensor, dtype, num_elements)
    if present != needed:
        raise place.error(
            f"{shown} of shape {dims} ({dtype.name}) needs {needed} {unit} but has {present}.",
            "The file is damaged; get or export it again.",
        )


def _amounts(tensor: onnx.TensorProto, dtype: ir.DataType, num_elements: int) -> tuple[int, int, str]:
    if dtype == ir.DataType.STRING:
        return len(tensor.string_data), num_elements, "strings"
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data), packed_bytes(num_elements, dtype), "bytes"
    if dtype.name in _PACKED_TYPES:
        return len(tensor.int32_data), packed_bytes(num_elements, dtype), "entries"
    if dtype.name in _INT32_TYPES:
        return len(tensor.int32_data), num_elements, "entries"
    if dtype in (ir.DataType.UINT32, ir.DataType.UINT64):
        return len(tensor.uint64_data), num_elements, "entries"
    if dtype == ir.DataType.INT64:
        return len(tensor.int64_data), num_elements, "entries"
    parts = 2 if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else 1
    wide = dtype in (ir.DataType.DOUBLE, ir.DataType.COMPLEX128)
    return len(tensor.double_data if wide else tensor.float_data), parts * num_elements, "entries"


def _check_external(tensor: onnx.TensorProto, name: str, dtype: ir.DataType, num_elements: int, place: _Place) -> None:
    shown = f"tensor '{printable(name)}'"
    if dtype == ir.DataType.STRING:
        raise place.error(f"{shown} keeps strings in an external file, which the format does not allow.")
    entries = {entry.key: entry.value for entry in tensor.external_data}
    real = resolve_location(entries.get("location", ""), tensor=name, model_path=place.path)
    needed = packed_bytes(num_elements, dtype)
    offset = _external_number(entries.get("offset", "0"), "offset", shown, place)
    length = _external_number(entries.get("length") or str(needed), "length", shown, place)
    if length != needed:
        raise place.error(
            f"{shown} of shape {list(tensor.dims)} ({dtype.name}) needs {needed} bytes but announces {length}."
        )
    size_bytes = real.stat().st_size
    if offset + needed > size_bytes:
        raise place.error(
            f"{shown} needs {needed} bytes from byte {offset} on, but '{real.name}' ends at byte {size_bytes}.",
            "The data file is cut off or belongs to another model; get both files again.",
        )


def _external_number(text: str, key: str, shown: str, place: _Place) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise place.error(f"{shown} has the external data {key} '{printable(text)}', which is not a size.")
    return int(text)
