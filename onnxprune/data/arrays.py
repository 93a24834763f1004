"""`.npy` and `.npz` files, read sample by sample and never trusted.

A member is read as a stream, compressed or not, so one sample is in memory at a time; axis 0 counts the samples. Only
arrays in Fortran order, whose samples don't lie together, are read whole (up to `MAX_WHOLE_BYTES`).

Refused: pickled objects (nothing is ever unpickled), structured types, members whose size is not what their header
says, and archives that unpack to more than any real data of their size would.
"""

from __future__ import annotations

import contextlib
import os
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from onnxprune.errors import BadDataError

__all__ = ["ArrayFile", "ArrayHeader", "open_array_file"]

MAX_SAMPLE_BYTES = 1 << 30
MAX_WHOLE_BYTES = 256 << 20
# Real data rarely shrink to a hundredth; below a GiB it does no harm.
BOMB_BYTES = 1 << 30
BOMB_RATIO = 100
_MAX_MEMBERS = 10_000
_KINDS = "biufUS"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayHeader:
    """What the header of an array says. `data_offset` is where its numbers begin in the (unpacked) file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_fortran: bool
    data_offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        size = self.dtype.itemsize
        for dim in self.shape[1:]:
            size *= dim
        return size

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole array."""
        return self.row_bytes * (self.shape[0] if self.shape else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayFile:
    """A checked file with arrays by name; a `.npy` file holds one array named ""."""

    path: Path
    arrays: Mapping[str, ArrayHeader]

    def rows(self, names: Sequence[str], indices: Sequence[int]) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """For each of the rising `indices`, the rows along axis 0 of the arrays called `names`.

        Raises:
            BadDataError: The file is damaged.
        """
        with contextlib.ExitStack() as stack, _read_errors(self.path):
            readers = {name: self._row_reader(name, indices, stack) for name in names}
            for _ in indices:
                yield {name: next(reader) for name, reader in readers.items()}

    def whole(self, name: str) -> npt.NDArray[Any]:
        """The array called `name`, all of it.

        Raises:
            BadDataError: The file is damaged, or the array takes more than `MAX_WHOLE_BYTES`.
        """
        with contextlib.ExitStack() as stack, _read_errors(self.path):
            return self._whole(name, self._open(name, stack))

    def _open(self, name: str, stack: contextlib.ExitStack) -> IO[bytes]:
        stream: IO[bytes]
        if self.path.suffix.lower() == ".npy":
            stream = stack.enter_context(self.path.open("rb"))
        else:
            archive = stack.enter_context(zipfile.ZipFile(self.path))
            stream = stack.enter_context(archive.open(f"{name}.npy"))
        stream.seek(self.arrays[name].data_offset)
        return stream

    def _row_reader(self, name: str, indices: Sequence[int], stack: contextlib.ExitStack) -> Iterator[npt.NDArray[Any]]:
        header = self.arrays[name]
        stream = self._open(name, stack)
        if header.is_fortran and len(header.shape) > 1:
            array = self._whole(name, stream)
            yield from (np.ascontiguousarray(array[index]) for index in indices)
            return
        position = 0
        for index in indices:
            if index > position:
                stream.seek((index - position) * header.row_bytes, os.SEEK_CUR)
            content = _read_exactly(stream, header.row_bytes, self.path)
            position = index + 1
            yield np.frombuffer(content, dtype=header.dtype).reshape(header.shape[1:])

    def _whole(self, name: str, stream: IO[bytes]) -> npt.NDArray[Any]:
        header = self.arrays[name]
        if header.total_bytes > MAX_WHOLE_BYTES:
            raise BadDataError(
                f"'{self.path}': array '{name}' is in Fortran order and takes {header.total_bytes:,} bytes; its "
                "samples can't be read one by one.",
                "Save it again with numpy.ascontiguousarray(array).",
            )
        content = _read_exactly(stream, header.total_bytes, self.path)
        order = "F" if header.is_fortran else "C"
        return np.frombuffer(content, dtype=header.dtype).reshape(header.shape, order=order)  # type: ignore[call-overload, no-any-return]


def open_array_file(path: Path) -> ArrayFile:
    """Read and check the headers of a `.npy` or `.npz` file; the numbers stay on disk.

    Raises:
        BadDataError: The file is missing, damaged or hostile; names the file and the array.
    """
    with _read_errors(path):
        if path.suffix.lower() == ".npy":
            with path.open("rb") as file:
                header = _read_header(file, where=f"'{path}'")
                _check_size(header, path.stat().st_size, where=f"'{path}'")
            return ArrayFile(path=path, arrays={"": header})
        return ArrayFile(path=path, arrays=_read_archive(path))


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise BadDataError(f"There is no file '{path}'.", "Check the path.") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise BadDataError(f"'{path}' is damaged ({error}).", "Copy or save it again.") from error
    except OSError as error:
        raise BadDataError(f"'{path}' can't be read: {error.strerror or error}.") from error


def _read_archive(path: Path) -> dict[str, ArrayHeader]:
    arrays: dict[str, ArrayHeader] = {}
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) > _MAX_MEMBERS:
            raise BadDataError(f"'{path}' has {len(members):,} members; an .npz file has one for each input.")
        for member in members:
            where = f"'{path}', member '{member.filename}'"
            if not member.filename.endswith(".npy"):
                raise BadDataError(f"{where} is no array.", "Save the data with numpy.savez(path, input_name=array).")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 0x1:
                raise BadDataError(
                    f"{where} is encrypted or compressed in a way that NumPy does not use.",
                    "Save the data with numpy.savez or numpy.savez_compressed.",
                )
            if member.file_size > BOMB_BYTES and member.file_size > BOMB_RATIO * member.compress_size:
                raise BadDataError(
                    f"{where} unpacks from {member.compress_size:,} to {member.file_size:,} bytes, "
                    "which no real data do.",
                    "If they do, save them uncompressed with numpy.savez.",
                )
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise BadDataError(f"{where} is there twice.", "Save the data again.")
            with archive.open(member) as stream:
                header = _read_header(stream, where=where)
            _check_size(header, member.file_size, where=where)
            arrays[name] = header
    if not arrays:
        raise BadDataError(f"'{path}' holds no arrays.", "Save the data with numpy.savez(path, input_name=array).")
    return arrays


def _read_header(stream: IO[bytes], *, where: str) -> ArrayHeader:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with warnings.catch_warnings():
            # Files written by Python 2 are fine.
            warnings.simplefilter("ignore")
            version = np.lib.format.read_magic(stream)
            reader = readers.get(version)
            if reader is None:
                # 3.0 exists for structured types with names outside of Latin-1.
                raise BadDataError(f"{where} is of an unsupported version of the format.", "Save it with numpy.save.")
            shape, is_fortran, dtype = reader(stream)
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError, tokenize.TokenError) as error:
        raise BadDataError(
            f"{where} is no NumPy array, or its header is damaged.", "Save it again with numpy.save or numpy.savez."
        ) from error
    if dtype.hasobject:
        raise BadDataError(
            f"{where} holds pickled Python objects, which can run code when they are read.",
            "Save it as an array of numbers: one array with all samples along axis 0.",
        )
    if dtype.kind not in _KINDS or dtype.fields is not None:
        raise BadDataError(f"{where} is of type {dtype}, which no model takes.", "Save it as an array of numbers.")
    if any(not isinstance(dim, int) or dim < 0 for dim in shape):
        raise BadDataError(f"{where} has the impossible shape {list(shape)}.", "Save it again.")
    return ArrayHeader(dtype=dtype, shape=tuple(shape), is_fortran=is_fortran, data_offset=stream.tell())


def _check_size(header: ArrayHeader, file_bytes: int, *, where: str) -> None:
    available = file_bytes - header.data_offset
    if header.total_bytes > available:
        raise BadDataError(
            f"{where} is cut off: its header announces {header.total_bytes:,} bytes, and {available:,} are there.",
            "Copy or save it again.",
        )
    if header.row_bytes > MAX_SAMPLE_BYTES:
        raise BadDataError(
            f"{where}: one sample (shape {list(header.shape[1:])}) takes {header.row_bytes:,} bytes.",
            "Axis 0 must count the samples.",
        )


def _read_exactly(stream: IO[bytes], count: int, path: Path) -> bytes:
    content = stream.read(count)
    if len(content) != count:
        raise BadDataError(f"'{path}' ends before its last sample.", "Copy or save it again.")
    return content
