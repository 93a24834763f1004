"""The last stage: a `Model` becomes a flatbuffer.

Equal constants are stored once. The bytes depend on nothing but the model.

A flatbuffer ends at 2 GiB. Above `MAX_INSIDE_BYTES` the constants stand behind it, and each buffer says where
(`Buffer.offset` and `size`, counted from the start of the file):

    flatbuffer | padding to 16 | constant | padding to 16 | constant ...

Constants are read one at a time while they are written: a model need not fit into memory.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from onnxprune.targets.tflite.graph import Constant, Graph, Model, Operator, Shape, Sparsity, Tensor
from onnxprune.targets.tflite.schema import options_of, schema
from onnxprune.targets.tflite.versions import operator_version

__all__ = ["MAX_INSIDE_BYTES", "WrittenFile", "serialize", "write_tflite"]

MAX_INSIDE_BYTES = 1_500_000_000
"""Constants of more bytes stand behind the flatbuffer; above it, there must be room for the graph itself."""

# What the schema demands of buffers (force_align), and kernels of the weights they read in place.
_ALIGNMENT = 16
_FILE_IDENTIFIER = b"TFL3"
_SCHEMA_VERSION = 3
_FIRST_LARGE_CODE = 127
_GRAPH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """How a file was written: bytes of all constants, each once, and whether they stand behind the flatbuffer."""

    constant_bytes: int
    is_behind: bool


def serialize(model: Model) -> bytes:
    """The `.tflite` file, in memory."""
    stream = io.BytesIO()
    _Writer(model).write(stream, MAX_INSIDE_BYTES)
    return stream.getvalue()


def write_tflite(model: Model, path: Path, *, max_inside_bytes: int = MAX_INSIDE_BYTES) -> WrittenFile:
    """Write the file at `path`.

    Args:
        model: What to write.
        path: Is overwritten.
        max_inside_bytes: Constants of more bytes in all stand behind the flatbuffer.

    Raises:
        OSError: It can't be written.
    """
    with path.open("wb") as stream:
        return _Writer(model).write(stream, max_inside_bytes)


@dataclass(slots=True)
class _Stored:
    """A buffer to be written. `offset` is where it stands behind the flatbuffer; 0: inside."""

    constant: Constant
    stays_inside: bool
    offset: int = 0

    def content(self) -> npt.NDArray[np.uint8]:
        return np.ascontiguousarray(self.constant.array()).reshape(-1).view(np.uint8)


class _Writer:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.schema = schema()
        self.stored: list[_Stored] = []
        self.codes: list[Any] = []
        self._buffer_of: dict[bytes, int] = {}
        self._code_of: dict[tuple[str, int], int] = {}

    def write(self, stream: IO[bytes], max_inside_bytes: int) -> WrittenFile:
        made = self.schema.ModelT()
        made.version = _SCHEMA_VERSION
        made.description = self.model.description
        made.subgraphs = [self._graph(graph) for graph in self.model.graphs]
        made.signatureDefs = [self._signature(made.subgraphs[0])]
        made.metadata = [self._metadata(name, content) for name, content in sorted(self.model.metadata.items())]
        made.operatorCodes = self.codes
        made.buffers = [self.schema.BufferT(), *(_buffer(self.schema, one) for one in self.stored)]
        total = sum(one.constant.nbytes for one in self.stored)
        if total <= max_inside_bytes:
            stream.write(_packed(made, total))
            return WrittenFile(constant_bytes=total, is_behind=False)
        self._write_behind(made, stream)
        return WrittenFile(constant_bytes=total, is_behind=True)

    def _write_behind(self, made: Any, stream: IO[bytes]) -> None:
        behind = [one for one in self.stored if not one.stays_inside]
        for one in behind:
            # Any number but 0 takes the same room, so the first draft is as long as the last.
            one.offset = _ALIGNMENT
        inside = sum(one.constant.nbytes for one in self.stored if one.stays_inside)
        end = len(_packed(made, inside))
        for one in behind:
            one.offset = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = one.offset + one.constant.nbytes
        stream.write(_packed(made, inside))
        for one in behind:
            stream.write(b"\0" * (one.offset - stream.tell()))
            stream.write(one.content().data)

    def _graph(self, graph: Graph) -> Any:
        made = self.schema.SubGraphT()
        made.name = graph.name
        indices = {name: index for index, name in enumerate(_used_tensors(graph))}
        made.tensors = [self._tensor(graph.tensors[name]) for name in indices]
        made.inputs = [indices[name] for name in graph.inputs]
        made.outputs = [indices[name] for name in graph.outputs]
        made.operators = [self._operator(operator, graph, indices) for operator in graph.operators]
        return made

    def _tensor(self, tensor: Tensor) -> Any:
        made = self.schema.TensorT()
        made.name = tensor.name
        made.type = getattr(self.schema.TensorType, tensor.type)
        made.shape = [max(dim, 1) if dim < 0 else dim for dim in tensor.shape]
        if not tensor.is_static:
            made.shapeSignature = list(tensor.shape)
        made.hasRank = True
        made.buffer = 0 if tensor.constant is None else self._buffer(tensor.constant)
        if tensor.quantization is not None:
            quantization = self.schema.QuantizationParametersT()
            quantization.scale = np.array(tensor.quantization.scales, np.float32)
            quantization.zeroPoint = np.array(tensor.quantization.zero_points, np.int64)
            quantization.quantizedDimension = tensor.quantization.axis
            made.quantization = quantization
        if tensor.sparsity is not None:
            made.sparsity = self._sparsity(tensor.shape, tensor.sparsity)
        return made

    def _sparsity(self, shape: Shape, sparsity: Sparsity) -> Any:
        made = self.schema.SparsityParametersT()
        made.traversalOrder = list(range(len(shape)))
        made.dimMetadata = [self._dense_axis(dim) for dim in shape[:-1]]
        rows = self.schema.DimensionMetadataT()
        rows.format = self.schema.DimensionType.SPARSE_CSR
        rows.arraySegmentsType, rows.arraySegments = self._index_vector(sparsity.segments)
        rows.arrayIndicesType, rows.arrayIndices = self._index_vector(sparsity.indices)
        made.dimMetadata.append(rows)
        return made

    def _dense_axis(self, dim: int) -> Any:
        made = self.schema.DimensionMetadataT()
        made.format, made.denseSize = self.schema.DimensionType.DENSE, dim
        return made

    def _index_vector(self, numbers: npt.NDArray[Any]) -> tuple[int, Any]:
        name = {1: "Uint8Vector", 2: "Uint16Vector", 4: "Int32Vector"}[numbers.dtype.itemsize]
        made = getattr(self.schema, f"{name}T")()
        made.values = numbers
        return int(getattr(self.schema.SparseIndexVector, name)), made

    def _buffer(self, constant: Constant, *, stays_inside: bool = False) -> int:
        content = _Stored(constant, stays_inside)
        digest = hashlib.sha256(content.content().data).digest()
        known = self._buffer_of.get(digest)
        if known is None:
            # Buffer 0 is the empty one.
            known = self._buffer_of[digest] = len(self.stored) + 1
            self.stored.append(content)
        return known

    def _operator(self, operator: Operator, graph: Graph, indices: dict[str, int]) -> Any:
        made = self.schema.OperatorT()
        made.opcodeIndex = self._code(operator.kind, operator_version(operator, graph))
        made.inputs = [indices[name] if name else -1 for name in operator.inputs]
        made.outputs = [indices[name] for name in operator.outputs]
        kind, kind_2, table = options_of(operator.kind, dict(operator.options))
        if kind_2:
            made.builtinOptions2Type, made.builtinOptions2 = kind_2, table
        else:
            made.builtinOptionsType, made.builtinOptions = kind, table
        return made

    def _code(self, kind: str, version: int) -> int:
        known = self._code_of.get((kind, version))
        if known is None:
            known = self._code_of[kind, version] = len(self.codes)
            made = self.schema.OperatorCodeT()
            made.builtinCode = getattr(self.schema.BuiltinOperator, kind)
            made.deprecatedBuiltinCode = min(made.builtinCode, _FIRST_LARGE_CODE)
            made.version = version
            self.codes.append(made)
        return known

    def _signature(self, main: Any) -> Any:
        made = self.schema.SignatureDefT()
        made.signatureKey = "serving_default"
        made.inputs = [self._port(*port) for port in zip(self.model.input_names, main.inputs, strict=True)]
        made.outputs = [self._port(*port) for port in zip(self.model.output_names, main.outputs, strict=True)]
        return made

    def _port(self, name: str, tensor: int) -> Any:
        made = self.schema.TensorMapT()
        made.name, made.tensorIndex = name, tensor
        return made

    def _metadata(self, name: str, content: bytes) -> Any:
        made = self.schema.MetadataT()
        constant = Constant.of(np.frombuffer(content, np.uint8))
        made.name, made.buffer = name, self._buffer(constant, stays_inside=True)
        return made


def _used_tensors(graph: Graph) -> list[str]:
    """Inputs, what operators read and write in their order, outputs: each once."""
    names = [*graph.inputs]
    for operator in graph.operators:
        names.extend(name for name in (*operator.inputs, *operator.outputs) if name)
    return list(dict.fromkeys((*names, *graph.outputs)))


def _packed(made: Any, content_bytes: int) -> memoryview:
    """The flatbuffer, without a copy; room is taken once."""
    import flatbuffers

    builder = flatbuffers.Builder(content_bytes + _GRAPH_BYTES)
    builder.Finish(made.Pack(builder), _FILE_IDENTIFIER)
    return memoryview(builder.Bytes)[builder.Head() :]


def _buffer(module: Any, stored: _Stored) -> Any:
    class AlignedBuffer(module.BufferT):  # type: ignore[misc]
        """A buffer that is read when it is packed; the generated writer aligns bytes by nothing."""

        def Pack(self, builder: Any) -> int:  # noqa: N802 - the schema's name
            if stored.offset:
                module.BufferStart(builder)
                module.BufferAddOffset(builder, stored.offset)
                module.BufferAddSize(builder, stored.constant.nbytes)
                return int(module.BufferEnd(builder))
            content = stored.content()
            builder.StartVector(1, content.size, _ALIGNMENT)
            builder.head -= content.size
            memoryview(builder.Bytes)[builder.Head() : builder.Head() + content.size] = content.data
            data = builder.EndVector()
            module.BufferStart(builder)
            module.BufferAddData(builder, data)
            return int(module.BufferEnd(builder))

    return AlignedBuffer()
