"""Writing models: the same model gives the same bytes, big weights are streamed, equal weights are stored once.

What is left out, because a reader derives it again: shapes of values that ONNX's own inference finds, types of
initializers, and module paths that the node's name or the exporter's metadata already say.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnxprune.errors import OutputError
from onnxprune.graph.external import FileTensor
from onnxprune.graph.limits import BIG_WEIGHTS_BYTES
from onnxprune.graph.metadata import MODULE_PATH_KEY, derived_module_path
from onnxprune.graph.names import printable
from onnxprune.graph.protos import fill_graph, sorted_metadata, tensor_head
from onnxprune.graph.shapes import values_beyond_inference
from onnxprune.graph.weights import EditedTensor, weight_bytes

__all__ = ["MAX_PROTO_BYTES", "content_hash", "model_bytes", "save_model"]

MAX_PROTO_BYTES = 2**31 - 1
"""Protobuf's limit for one message."""

_INLINE_UP_TO_BYTES = 1024
_PAGE_BYTES = 4096
_SAMPLE_BYTES = 4096
_COPY_CHUNK_BYTES = 8 << 20
_EDIT_WINDOW_BYTES = 1 << 20
_QUANT_PARAMETERS = "quant_parameter_tensor_names"


def model_bytes(model: ir.Model) -> bytes:
    """The model as one ONNX file's bytes, weights included; for models well below 2 GiB.

    Raises:
        OutputError: The weights don't fit into one protobuf message.
    """
    if weight_bytes(model) > MAX_PROTO_BYTES:
        raise OutputError("The model's weights are too big for one ONNX file (2 GiB).", "Save it with external data.")
    return _serialized(_model_proto(model, _InlineStore(), _undefined_by_onnx(model)))


def save_model(model: ir.Model, path: Path, *, external_data: bool | None = None) -> None:
    """Write `model` to `path`, and its big weights to `<name>.data` beside it if `external_data` is True.

    With None, weights go there when they are more than 1.5 GB. `path` may be the file the model was loaded from: files
    appear by renaming when they are complete, and loaded weights go on reading the old file.

    Raises:
        OutputError: The files can't be written; nothing is left of them then.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - as in io.load_model
    size_bytes = weight_bytes(model)
    if external_data is None:
        external_data = size_bytes > BIG_WEIGHTS_BYTES
    if not external_data and size_bytes > MAX_PROTO_BYTES:
        raise OutputError(
            f"'{path}' can't be written: {size_bytes / 2**30:.1f} GiB of weights don't fit into one file (2 GiB).",
            "Leave `external_data` at None or set it to True.",
        )
    value_info = values_beyond_inference(model)
    data_name = f"{path.name}.data"
    with _new_files(path) as parts:
        if external_data:
            with parts.open(path.with_name(data_name)) as data:
                proto = _model_proto(model, _FileStore(data, data_name), value_info)
        else:
            proto = _model_proto(model, _InlineStore(), value_info)
        with parts.open(path) as file:
            file.write(_serialized(proto))


def content_hash(model: ir.Model) -> str:
    """sha256 (hex) over graph and weights, whose bytes are read one window after the other."""
    proto = _model_proto(model, _DigestStore(), frozenset())
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def _serialized(proto: onnx.ModelProto) -> bytes:
    size_bytes = proto.ByteSize()
    if size_bytes > MAX_PROTO_BYTES:
        raise OutputError("The model is too big for one ONNX file (2 GiB).", "Save it with external data.")
    return bytes(proto.SerializeToString(deterministic=True))


# --- files that appear complete or not at all -------------------------------------------------------------------


class _Parts:
    """Files being written under temporary names beside their final ones."""

    def __init__(self) -> None:
        self.finished: list[tuple[Path, Path]] = []

    @contextlib.contextmanager
    def open(self, path: Path) -> Iterator[IO[bytes]]:
        """A new file that will be called `path`; readable too."""
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        self.finished.append((part, path))
        # O_EXCL: never write into a file, or through a link, that somebody put there.
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "w+b") as file:
            yield file


@contextlib.contextmanager
def _new_files(path: Path) -> Iterator[_Parts]:
    """All files written in the block are renamed to their names at its end, or none is left."""
    parts = _Parts()
    try:
        yield parts
        # In the order they were written: the data file is there before the model that names it.
        for part, final in parts.finished:
            part.replace(final)
    except OSError as error:
        raise OutputError(
            f"Writing '{path}' failed: {error.strerror or error}.",
            "Check that the folder exists, may be written to, and has room.",
        ) from error
    finally:
        for part, _ in parts.finished:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


# --- where weights go -------------------------------------------------------------------------------------------


class _Store(Protocol):
    def put(self, tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto | str:
        """The tensor's proto, or the name under which an equal tensor of the same graph was put before."""
        ...

    def next_graph(self) -> None:
        """Tensors of another graph follow: names put before are no longer offered."""
        ...


class _InlineStore:
    """Weights inside the model."""

    def __init__(self) -> None:
        self._by_identity: dict[tuple[object, ...], str] = {}
        self._by_content: dict[tuple[object, ...], onnx.TensorProto] = {}

    def next_graph(self) -> None:
        self._by_identity.clear()
        self._by_content.clear()

    def put(self, tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto | str:
        identity = _identity(tensor)
        if identity in self._by_identity:
            return self._by_identity[identity]
        if isinstance(tensor, ir.StringTensor):
            proto = tensor_head(tensor, name)
            proto.string_data.extend(tensor.string_data())
            self._by_identity[identity] = name
            return proto
        content = tensor.tobytes()
        key = (tensor.dtype, tuple(tensor.shape.numpy()), content[:_SAMPLE_BYTES], content[-_SAMPLE_BYTES:])
        known = self._by_content.get(key)
        if known is not None and known.raw_data == content:
            return known.name
        proto = tensor_head(tensor, name)
        proto.raw_data = content
        self._by_identity[identity] = name
        self._by_content.setdefault(key, proto)
        return proto


class _FileStore:
    """Weights above 1 KiB in a data file, one after the other; the others inside the model."""

    def __init__(self, file: IO[bytes], location: str) -> None:
        self._file = file
        self._location = location
        self._inline = _InlineStore()
        self._by_identity: dict[tuple[object, ...], str] = {}
        self._by_content: dict[tuple[object, ...], tuple[str, int]] = {}

    def next_graph(self) -> None:
        self._inline.next_graph()
        self._by_identity.clear()
        self._by_content.clear()

    def put(self, tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto | str:
        if isinstance(tensor, ir.StringTensor) or tensor.nbytes <= _INLINE_UP_TO_BYTES:
            return self._inline.put(tensor, name)
        identity = _identity(tensor)
        if identity in self._by_identity:
            return self._by_identity[identity]
        offset = self._aligned_end(tensor.nbytes)
        self._file.seek(offset)
        _write_tensor(tensor, self._file)
        if self._file.tell() - offset != tensor.nbytes:
            raise OutputError(f"Weight '{printable(name)}' gave another number of bytes than its shape announces.")
        key = (tensor.dtype, tuple(tensor.shape.numpy()), *self._samples(offset, tensor.nbytes))
        known = self._by_content.get(key)
        if known is not None and self._regions_equal(known[1], offset, tensor.nbytes):
            self._file.seek(offset)
            self._file.truncate()
            return known[0]
        self._by_identity[identity] = name
        self._by_content.setdefault(key, (name, offset))
        proto = tensor_head(tensor, name)
        proto.data_location = onnx.TensorProto.EXTERNAL
        for entry_key, entry in (("location", self._location), ("offset", offset), ("length", tensor.nbytes)):
            proto.external_data.add(key=entry_key, value=str(entry))
        return proto

    def _aligned_end(self, size_bytes: int) -> int:
        # Whole pages let a runtime map a big weight by itself; small ones would only waste space.
        alignment = _PAGE_BYTES if size_bytes >= 256 * _PAGE_BYTES else 16
        end = self._file.seek(0, os.SEEK_END)
        return -(-end // alignment) * alignment

    def _samples(self, offset: int, size_bytes: int) -> tuple[bytes, bytes, bytes]:
        return (
            self._read(offset, min(_SAMPLE_BYTES, size_bytes)),
            self._read(offset + size_bytes // 2, min(_SAMPLE_BYTES, size_bytes - size_bytes // 2)),
            self._read(offset + max(0, size_bytes - _SAMPLE_BYTES), min(_SAMPLE_BYTES, size_bytes)),
        )

    def _regions_equal(self, first: int, second: int, size_bytes: int) -> bool:
        for start in range(0, size_bytes, _COPY_CHUNK_BYTES):
            count = min(_COPY_CHUNK_BYTES, size_bytes - start)
            if self._read(first + start, count) != self._read(second + start, count):
                return False
        return True

    def _read(self, offset: int, count: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(count)


class _Digest(io.RawIOBase):
    """A file of which only the hash is kept."""

    def __init__(self) -> None:
        super().__init__()
        self._sha256 = hashlib.sha256()

    def write(self, content: Any) -> int:
        self._sha256.update(content)
        return len(content)

    def digest(self) -> bytes:
        return self._sha256.digest()


class _DigestStore:
    """Weights as the hashes of their bytes."""

    def put(self, tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto | str:
        proto = tensor_head(tensor, name)
        if isinstance(tensor, ir.StringTensor):
            proto.string_data.extend(tensor.string_data())
            return proto
        digest = _Digest()
        _write_tensor(tensor, cast(IO[bytes], digest))
        proto.raw_data = digest.digest()
        return proto

    def next_graph(self) -> None:
        return None


def _identity(tensor: ir.TensorProtocol) -> tuple[object, ...]:
    if isinstance(tensor, FileTensor):
        return tensor.content_key, tensor.dtype, tuple(tensor.shape.numpy())
    return (id(tensor),)


def _write_tensor(tensor: ir.TensorProtocol, file: IO[bytes]) -> None:
    if isinstance(tensor, FileTensor):
        tensor.tofile(file)
        return
    if isinstance(tensor, EditedTensor):
        for window in tensor.windows(_EDIT_WINDOW_BYTES):
            file.write(_little_endian_bytes(window.array))
        return
    if tensor.dtype.bitwidth < 8:
        file.write(tensor.tobytes())
        return
    # One evaluation of a lazy weight, written without a further copy; the array is freed before the next one is made.
    file.write(_little_endian_bytes(tensor.numpy()))


def _little_endian_bytes(array: npt.NDArray[Any]) -> memoryview:
    """The bytes of `array`, not copied where they are in order already. Works for types that NumPy has not, too."""
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data


# --- the proto --------------------------------------------------------------------------------------------------


class _FileStyle:
    """How a model looks in a file: weights by `store`, and types only where a reader could not derive them."""

    def __init__(self, store: _Store, told: frozenset[ir.Value]) -> None:
        self._store = store
        self._told = told

    def begin_graph(self) -> None:
        self._store.next_graph()

    def initializer(self, value: ir.Value) -> onnx.TensorProto | str | None:
        if value.const_value is None:
            return None
        stored = self._store.put(value.const_value, value.name or "")
        if isinstance(stored, str) and (value.is_graph_output() or value.is_graph_input()):
            # A name of the interface must exist by itself.
            return _InlineStore().put(value.const_value, value.name or "")
        return stored

    def value_info(self, value: ir.Value) -> onnx.ValueInfoProto | None:
        return ir.serde.serialize_value(value) if value in self._told else None

    def interface(self, value: ir.Value, *, outermost: bool) -> onnx.ValueInfoProto:
        return ir.serde.serialize_value(value)

    def node_metadata(self, node: ir.Node) -> Mapping[str, str]:
        if node.metadata_props.get(MODULE_PATH_KEY) != derived_module_path(node):
            return node.metadata_props
        return {key: text for key, text in node.metadata_props.items() if key != MODULE_PATH_KEY}


def _model_proto(model: ir.Model, store: _Store, told: frozenset[ir.Value]) -> onnx.ModelProto:
    proto = onnx.ModelProto(ir_version=model.ir_version)
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        if content := getattr(model, field):
            setattr(proto, field, content)
    for domain, version in sorted(model.opset_imports.items()):
        proto.opset_import.add(domain=domain, version=version)
    sorted_metadata(proto.metadata_props, model.metadata_props)
    fill_graph(proto.graph, model.graph, _FileStyle(store, told))
    proto.functions.extend(ir.serde.serialize_function(function) for function in model.functions.values())
    _add_quantization_annotations(proto.graph, model.graph)
    return proto


def _undefined_by_onnx(model: ir.Model) -> frozenset[ir.Value]:
    """Outputs of operators that ONNX does not define: nobody else can say their types and shapes."""
    return frozenset(
        value for node in model.graph.all_nodes() if node.domain not in ("", "ai.onnx") for value in node.outputs
    )


def _add_quantization_annotations(proto: onnx.GraphProto, graph: ir.Graph) -> None:
    """Keep annotations whose tensors are all still there; passes may have removed or renamed some."""
    written = {tensor.name for tensor in proto.initializer}
    node_outputs = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *node_outputs):
        parameters = value.meta.get(_QUANT_PARAMETERS)
        if parameters and value.name and written.issuperset(parameters.values()):
            annotation = proto.quantization_annotation.add(tensor_name=value.name)
            sorted_metadata(annotation.quant_parameter_tensor_names, parameters)
