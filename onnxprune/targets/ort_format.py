"""The `.ort` file format, as far as it must be read and put in order.

A `.ort` file is a flatbuffer (schema `ort.fbs` of ONNX Runtime, identifier "ORTM"):

    InferenceSession
      0 ort_version               version of the format, not of ONNX Runtime
      1 model                     opsets, metadata, graph: nodes, weights
      3 kernel_type_str_resolver  which arguments of an operator decide its kernel's types

Flatbuffers are written from the end to the front. ONNX Runtime writes the resolver last, in the order of a hash map
whose seed differs from process to process: the same model gives other bytes each time, in the first few hundred bytes
of the file and nowhere else (*tried* with 1.31.1). `normalize_ort_file` writes that front again in sorted order and
leaves the rest of the file where it is, so that the same model gives the same bytes.
"""

from __future__ import annotations

import mmap
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from onnxprune.errors import TargetError

__all__ = ["OpUse", "OrtFileFacts", "minimum_ort_version", "normalize_ort_file", "read_ort_facts"]

IDENTIFIER = b"ORTM"

# The front moves by a multiple of this, so that whatever ONNX Runtime aligned behind it stays aligned.
_ALIGNMENT = 64
_COPY_CHUNK_BYTES = 1 << 24

# First ONNX Runtime release that reads a version of the format: its "ORT format versions" page, and for 6 the
# maintainers in microsoft/onnxruntime#20670.
_FORMAT_SINCE: Mapping[str, tuple[int, int]] = {"5": (1, 13), "6": (1, 16)}
# First ONNX Runtime release that implements an ONNX opset (its "compatibility" page).
_OPSET_SINCE: Mapping[int, tuple[int, int]] = {
    18: (1, 14),
    19: (1, 15),
    20: (1, 17),
    21: (1, 18),
    22: (1, 21),
    23: (1, 23),
    24: (1, 24),
}


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class OpUse:
    """An operator that occurs in a file; `domain` is "" for ONNX's own."""

    domain: str
    op_type: str
    since_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OrtFileFacts:
    """What a `.ort` file says about itself. `ops` counts nodes, those of subgraphs included."""

    format_version: str
    opsets: Mapping[str, int]
    metadata: Mapping[str, str]
    ops: Mapping[OpUse, int]
    has_runtime_optimizations: bool


def minimum_ort_version(facts: OrtFileFacts) -> str | None:
    """The oldest ONNX Runtime ("1.17") that knows the file's format and opset; None where a version is unknown."""
    format_since = _FORMAT_SINCE.get(facts.format_version)
    opset = facts.opsets.get("", 0)
    opset_since = _OPSET_SINCE.get(opset, (1, 13) if 0 < opset < min(_OPSET_SINCE) else None)
    if format_since is None or opset_since is None:
        return None
    return ".".join(map(str, max(format_since, opset_since)))


def read_ort_facts(path: Path) -> OrtFileFacts:
    """The facts of the `.ort` file at `path`.

    Raises:
        TargetError: It is not a `.ort` file, or is cut off.
    """
    with path.open("rb") as file, _mapped(file, path) as buffer:
        try:
            return _facts(buffer)
        except (struct.error, IndexError, ValueError) as error:
            raise TargetError(f"'{path.name}' is damaged: its flatbuffer points outside the file.") from error


def normalize_ort_file(path: Path) -> None:
    """Give the `.ort` file at `path` the bytes that follow from its content alone (see the top of this file).

    Doing it again changes nothing. The file is replaced when the new one is complete.

    Raises:
        TargetError: It is not a `.ort` file, or is cut off.
        OSError: Writing failed; the old file is still there.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with path.open("rb") as file, _mapped(file, path) as buffer:
            try:
                front, tail_start = _sorted_front(buffer)
            except (struct.error, IndexError, ValueError) as error:
                raise TargetError(f"'{path.name}' is damaged: its flatbuffer points outside the file.") from error
            with partial.open("wb") as out:
                out.write(front)
                file.seek(tail_start)
                shutil.copyfileobj(file, out, _COPY_CHUNK_BYTES)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _mapped(file: BinaryIO, path: Path) -> mmap.mmap:
    try:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise TargetError(f"'{path.name}' is empty.") from error
    if buffer[4:8] != IDENTIFIER:
        buffer.close()
        raise TargetError(f"'{path.name}' is no ORT format model: it lacks the identifier 'ORTM'.")
    return buffer


class _Table:
    """A flatbuffer table in `buffer` at `position`; a field that is not there reads as its default."""

    __slots__ = ("_buffer", "_vtable", "_vtable_size", "position")

    def __init__(self, buffer: mmap.mmap, position: int) -> None:
        self._buffer = buffer
        self.position = position
        self._vtable = position - _read(buffer, "<i", position)
        self._vtable_size = _read(buffer, "<H", self._vtable)

    @property
    def first_byte(self) -> int:
        """Where the table or its vtable begins, whichever comes first."""
        return min(self.position, self._vtable)

    def field(self, slot: int) -> int | None:
        """Where the value of `slot` stands."""
        entry = 4 + 2 * slot
        if entry >= self._vtable_size:
            return None
        offset = _read(self._buffer, "<H", self._vtable + entry)
        return self.position + offset if offset else None

    def number(self, slot: int, kind: str) -> int:
        at = self.field(slot)
        return _read(self._buffer, kind, at) if at is not None else 0

    def text(self, slot: int) -> str:
        at = self._target(slot)
        if at is None:
            return ""
        size = _read(self._buffer, "<I", at)
        return self._buffer[at + 4 : at + 4 + size].decode()

    def table(self, slot: int) -> _Table | None:
        at = self._target(slot)
        return _Table(self._buffer, at) if at is not None else None

    def tables(self, slot: int) -> Iterator[_Table]:
        start = self._target(slot)
        if start is None:
            return
        for index in range(_read(self._buffer, "<I", start)):
            at = start + 4 + 4 * index
            yield _Table(self._buffer, at + _read(self._buffer, "<I", at))

    def _target(self, slot: int) -> int | None:
        at = self.field(slot)
        return at + _read(self._buffer, "<I", at) if at is not None else None


def _read(buffer: mmap.mmap, kind: str, position: int) -> int:
    if position < 0:
        raise ValueError("negative position")
    value: int = struct.unpack_from(kind, buffer, position)[0]
    return value


def _root(buffer: mmap.mmap) -> _Table:
    return _Table(buffer, _read(buffer, "<I", 0))


def _facts(buffer: mmap.mmap) -> OrtFileFacts:
    root = _root(buffer)
    model = root.table(1)
    graph = model.table(7) if model is not None else None
    if model is None or graph is None:
        raise ValueError("no graph")
    ops: dict[OpUse, int] = {}
    for node in _nodes(graph):
        # ONNX Runtime writes "ai.onnx" as "".
        use = OpUse(domain=node.text(2), op_type=node.text(5), since_version=node.number(3, "<i"))
        ops[use] = ops.get(use, 0) + 1
    return OrtFileFacts(
        format_version=root.text(0),
        opsets={entry.text(0): entry.number(1, "<q") for entry in model.tables(1)},
        metadata={entry.text(0): entry.text(1) for entry in model.tables(9)},
        ops=dict(sorted(ops.items())),
        has_runtime_optimizations=any(_has_records(subgraph) for subgraph in _graphs(graph)),
    )


def _graphs(graph: _Table) -> Iterator[_Table]:
    yield graph
    for node in graph.tables(2):
        for attribute in node.tables(10):
            subgraph = attribute.table(7)
            if subgraph is not None:
                yield from _graphs(subgraph)
            for listed in attribute.tables(12):
                yield from _graphs(listed)


def _nodes(graph: _Table) -> Iterator[_Table]:
    for subgraph in _graphs(graph):
        yield from subgraph.tables(2)


def _has_records(graph: _Table) -> bool:
    optimizations = graph.table(8)
    return optimizations is not None and any(True for _ in optimizations.tables(0))


@dataclass(frozen=True, slots=True)
class _KernelTypes:
    """For one operator: by type name ("T"), the arguments (0 input or 1 output, index) that have that type."""

    op_id: str
    arguments: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]


def _sorted_front(buffer: mmap.mmap) -> tuple[bytes, int]:
    """The new front, and where in the old file what stays begins."""
    root = _root(buffer)
    model = root.table(1)
    if model is None:
        raise ValueError("no model")
    # The model is complete before root and resolver are written, so everything of it lies at or behind this point.
    tail_start = model.first_byte
    front, model_field = _build_front(root.text(0), _kernel_types(root))
    padding = (tail_start - len(front)) % _ALIGNMENT
    front.extend(bytes(padding))
    new_model_position = model.position - tail_start + len(front)
    struct.pack_into("<I", front, model_field, new_model_position - model_field)
    return bytes(front), tail_start


def _kernel_types(root: _Table) -> list[_KernelTypes]:
    resolver = root.table(3)
    if resolver is None:
        return []
    return sorted(
        (
            _KernelTypes(
                entry.text(0),
                tuple(
                    sorted(
                        (typed.text(0), tuple((a.number(0, "<b"), a.number(1, "<I")) for a in typed.tables(1)))
                        for typed in entry.tables(1)
                    )
                ),
            )
            for entry in resolver.tables(0)
        ),
        key=lambda entry: entry.op_id.encode(),  # readers search by bytes
    )


def _build_front(format_version: str, kernel_types: list[_KernelTypes]) -> tuple[bytearray, int]:
    """Root and resolver as a flatbuffer, and where in it the offset of the model is to be written."""
    import flatbuffers

    builder = flatbuffers.Builder(1024)
    resolver = _build_resolver(builder, kernel_types)
    version = builder.CreateString(format_version)
    builder.StartObject(4)
    builder.PrependUOffsetTRelativeSlot(0, version, 0)
    builder.PrependUint32Slot(1, 1, 0)  # the place of the model's offset
    builder.PrependUOffsetTRelativeSlot(3, resolver, 0)
    builder.Finish(builder.EndObject(), file_identifier=IDENTIFIER)
    front = bytearray(builder.Output())
    root = struct.unpack_from("<I", front, 0)[0]
    vtable = root - struct.unpack_from("<i", front, root)[0]
    return front, root + struct.unpack_from("<H", front, vtable + 4 + 2 * 1)[0]


def _build_resolver(builder: Any, kernel_types: list[_KernelTypes]) -> int:
    entries = []
    for entry in kernel_types:
        typed_entries = []
        for type_name, arguments in entry.arguments:
            argument_tables = []
            for kind, index in arguments:
                builder.StartObject(2)
                builder.PrependInt8Slot(0, kind, 0)
                builder.PrependUint32Slot(1, index, 0)
                argument_tables.append(builder.EndObject())
            typed_entries.append(_build_keyed(builder, type_name, argument_tables))
        entries.append(_build_keyed(builder, entry.op_id, typed_entries))
    listed = _build_vector(builder, entries)
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, listed, 0)
    resolver: int = builder.EndObject()
    return resolver


def _build_keyed(builder: Any, key: str, tables: list[int]) -> int:
    listed = _build_vector(builder, tables)
    name = builder.CreateString(key)
    builder.StartObject(2)
    builder.PrependUOffsetTRelativeSlot(0, name, 0)
    builder.PrependUOffsetTRelativeSlot(1, listed, 0)
    table: int = builder.EndObject()
    return table


def _build_vector(builder: Any, tables: list[int]) -> int:
    builder.StartVector(4, len(tables), 4)
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    vector: int = builder.EndVector()
    return vector
