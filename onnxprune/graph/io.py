"""Loading and saving, with every trap of the format fenced.

Loading looks at the file's bytes, then at the parsed proto (`onnxprune.graph.guard`), and only then hands over to
onnx_ir. Big weights stay on disk (`onnxprune.graph.external`). Saving writes under temporary names and renames at the
end, so that a failed or killed run leaves no half file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from onnxprune.errors import ModelError
from onnxprune.graph.external import DataFile, FileTensor, resolve_location
from onnxprune.graph.guard import check_head, check_proto
from onnxprune.graph.names import printable
from onnxprune.graph.sparse import densify
from onnxprune.graph.writer import MAX_PROTO_BYTES, model_bytes, save_model

__all__ = ["external_data_files", "load_model", "model_bytes", "model_from_proto", "read_proto", "save_model"]


def load_model(path: Path) -> ir.Model:
    """The model at `path`; weights in external data stay on disk until they are read, and are read-only then.

    Raises:
        ModelError: The file is missing, damaged, hostile, or holds what can't be represented; names file and tensor.
    """
    # Absolute, because containment checks need a folder; not resolved, because data files lie beside the link.
    path = Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve would follow links, Path.absolute keeps '..'
    return model_from_proto(read_proto(path), path)


def read_proto(path: Path) -> onnx.ModelProto:
    """The parsed file at `path`, not checked beyond being ONNX at all; external data are not read."""
    try:
        size_bytes = path.stat().st_size
        if not path.is_file():
            raise ModelError(
                f"'{path}' is not a file.",
                "A TensorFlow SavedModel is a folder; an ONNX model is one file, with its data files beside it.",
            )
        with path.open("rb") as file:
            check_head(path, file.read(512), size_bytes)
            if size_bytes > MAX_PROTO_BYTES:
                raise ModelError(
                    f"'{path}' has {size_bytes / 2**30:.1f} GiB in one file; the format (protobuf) ends at 2 GiB.",
                    "Save it again with its weights as external data: "
                    "onnx.save(model, path, save_as_external_data=True).",
                )
            file.seek(0)
            content = file.read()
    except FileNotFoundError:
        raise ModelError(f"There is no file '{path}'.", "Check the path.") from None
    except OSError as error:
        raise ModelError(f"'{path}' can't be read: {error.strerror}.") from error
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise ModelError(
            f"'{path}' is damaged: it begins like an ONNX model but can't be parsed ({error}). "
            "It may be cut off by an interrupted download or a full disk.",
            "Get or export the file again.",
        ) from error
    return proto


def model_from_proto(proto: onnx.ModelProto, path: Path) -> ir.Model:
    """The checked model that `proto` describes; `path` is where it came from (for data files and messages).

    The proto may be changed, and must not be used afterwards.
    """
    check_proto(proto, path)
    densify(proto, path)
    for entry in (*proto.opset_import, *(entry for function in proto.functions for entry in function.opset_import)):
        # Two spellings of one domain; onnx_ir knows only the empty one.
        entry.domain = "" if entry.domain == "ai.onnx" else entry.domain
    try:
        model = ir.from_proto(proto)
    except ir.serde.SerdeError as error:
        raise ModelError(f"'{path}' holds what can't be represented: {_root_cause(error)}.") from error
    _adopt_tensors(model, path)
    return model


def external_data_files(path: Path) -> tuple[Path, ...]:
    """The files beside the model at `path` that hold its weights, sorted; empty where all weights are in the model.

    Raises:
        ModelError: As `load_model`.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - as above
    proto = read_proto(path)
    check_proto(proto, path)
    locations = {
        entry.value
        for tensor in _proto_tensors(proto)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return tuple(sorted(path.parent / location for location in locations))


def _proto_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    graphs = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            nodes.extend(graph.node)
            continue
        for attribute in nodes.pop().attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            graphs.extend(attribute.graphs)


def _adopt_tensors(model: ir.Model, path: Path) -> None:
    """Replace onnx_ir's tensors by ones that hold neither the proto nor a map of a whole data file."""
    files: dict[Path, DataFile] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _adopted(value.const_value, path, files)
    bodies = [model.graph, *(function.graph for function in model.functions.values())]
    for node in (node for body in bodies for node in body.all_nodes()):
        for name, attribute in node.attributes.items():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.TENSOR:
                node.attributes[name] = ir.AttrTensor(name, _adopted(attribute.as_tensor(), path, files))
            elif attribute.type == ir.AttributeType.TENSORS:
                node.attributes[name] = ir.AttrTensors(
                    name, [_adopted(tensor, path, files) for tensor in attribute.as_tensors()]
                )


def _adopted(tensor: ir.TensorProtocol, path: Path, files: dict[Path, DataFile]) -> ir.TensorProtocol:
    if isinstance(tensor, ir.ExternalTensor):
        real = resolve_location(os.fspath(tensor.location), tensor=tensor.name or "", model_path=path)
        data_file = files.get(real)
        if data_file is None:
            data_file = files[real] = DataFile(real)
        return FileTensor(data_file, tensor.offset or 0, tensor.dtype, tensor.shape, name=tensor.name)
    if isinstance(tensor, ir.StringTensor):
        # The proto's container would keep the whole parsed file in memory.
        return ir.StringTensor(list(tensor.string_data()), shape=tensor.shape, name=tensor.name)
    # One copy, made here: a proto's tensor copies its bytes at each access and keeps the whole parsed file alive.
    return ir.Tensor(
        np.asarray(tensor.numpy()), dtype=tensor.dtype, name=tensor.name, doc_string=tensor.doc_string or None
    )


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return printable(str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__)
