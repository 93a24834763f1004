"""Weights that stay on disk: opened once, mapped only while an array of them is alive.

`FileTensor` replaces `onnx_ir.ExternalTensor`, which maps the *whole* data file for each tensor and keeps it mapped
(mapped pages that were read count as resident memory), and which reads by path, so that saving over the file that a
model was loaded from changes its weights. A `FileTensor` reads through a descriptor that was opened at load time: a
file renamed over the path later does not touch it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.errors import ModelError
from onnxprune.graph.names import printable

__all__ = ["DataFile", "FileTensor", "packed_bytes", "resolve_location"]

# Descriptors are a scarce thing (1024 for a process, by default); a model with one file for each tensor has thousands.
_MAX_OPEN_FILES = 256
_COPY_CHUNK_BYTES = 8 << 20
_open_files: weakref.WeakSet[DataFile] = weakref.WeakSet()
_open_files_lock = threading.Lock()

_SYMLINK_HINT = (
    "Download caches (Hugging Face's among them) keep the real files elsewhere and show symbolic links. Copy the model "
    "with its data so that both are real files in one folder: cp -L FOLDER/* NEW_FOLDER/."
)


def packed_bytes(num_elements: int, dtype: ir.DataType) -> int:
    """Bytes that `num_elements` elements of `dtype` take in a file; types under 8 bits are packed."""
    return (num_elements * dtype.bitwidth + 7) // 8


def resolve_location(location: str, *, tensor: str, model_path: Path) -> Path:
    """The real path of the data file that `tensor` names, proven to lie in the folder of the model.

    Raises:
        ModelError: The location is empty, absolute, leaves the folder (also by a symbolic link), or is no plain file.
    """
    where = f"'{model_path}': tensor '{printable(tensor)}' keeps its data in '{printable(location)}'"
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    if not location or "\0" in location:
        raise ModelError(f"{where}, which is no file name.")
    if posix.is_absolute() or windows.is_absolute() or windows.drive or location.startswith("\\"):
        raise ModelError(
            f"{where}, an absolute path. The format allows only paths inside the model's folder.",
            "Put the data file beside the model and store its bare name as location.",
        )
    if ".." in posix.parts or ".." in windows.parts:
        raise ModelError(
            f"{where}, which leaves the model's folder. A model must not name files outside of it.",
            "Put the data file beside the model and store its bare name as location.",
        )
    folder = Path(os.path.realpath(model_path.parent))
    path = model_path.parent / location
    real = Path(os.path.realpath(path))
    try:
        status = real.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(
            f"{where}, but there is no such file beside the model.",
            "Copy the data file into the model's folder; without it the weights are missing.",
        ) from None
    except OSError as error:
        raise ModelError(f"{where}, which can't be read: {error.strerror}.") from error
    if not real.is_relative_to(folder):
        raise ModelError(
            f"{where}, a symbolic link to '{real}' outside of the model's folder. Such links are not followed, because "
            "a model file could then name any file of this machine.",
            _SYMLINK_HINT,
        )
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{where}, which is not a plain file.")
    return real


class DataFile:
    """One weight file, read as it was when it was opened, even after another file was renamed over its path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        descriptor = self._open()
        status = os.fstat(descriptor)
        self._identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        self.size_bytes = status.st_size
        self._descriptor: int | None = None
        with _open_files_lock:
            if len(_open_files) < _MAX_OPEN_FILES:
                _open_files.add(self)
                self._descriptor = descriptor
                weakref.finalize(self, os.close, descriptor)
        if self._descriptor is None:
            os.close(descriptor)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            raise ModelError(f"'{self.path}' can't be read: {error.strerror}.") from error

    @contextlib.contextmanager
    def descriptor(self) -> Iterator[int]:
        """A descriptor of the unchanged file, for the time of the block.

        Raises:
            ModelError: The file was changed or replaced since the model was loaded.
        """
        descriptor = self._open() if self._descriptor is None else self._descriptor
        try:
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) != self._identity:
                raise ModelError(
                    f"'{self.path}' was changed while the model loaded from it was in use.",
                    "Start again, and write to the file only when no run reads it.",
                )
            yield descriptor
        finally:
            if self._descriptor is None:
                os.close(descriptor)


class FileTensor(ir.LazyTensor):
    """A tensor whose bytes are a region of a `DataFile`; the array is mapped afresh, read-only, at each `numpy()`.

    Pages go when the array goes: keep no array longer than needed, and nothing has to be released by hand.
    """

    __slots__ = ("_data_file", "_offset")

    def __init__(
        self, data_file: DataFile, offset: int, dtype: ir.DataType, shape: ir.Shape, *, name: str | None = None
    ) -> None:
        super().__init__(self._in_memory, dtype=dtype, shape=shape, name=name)
        self._data_file = data_file
        self._offset = offset

    def _in_memory(self) -> ir.Tensor[npt.NDArray[Any]]:
        return ir.Tensor(self.numpy(), dtype=self.dtype, name=self.name)

    @property
    def content_key(self) -> tuple[int, int]:
        """Equal for two tensors that read the same bytes of the same open file."""
        return id(self._data_file), self._offset

    def __repr__(self) -> str:
        return f"FileTensor<{self.dtype},{self.shape}>(name={self.name!r}, file='{self._data_file.path.name}')"

    def numpy(self) -> npt.NDArray[Any]:
        """The array, mapped from the file and read-only (types under 8 bits are unpacked into memory)."""
        if self.dtype.bitwidth < 8:
            packed = np.frombuffer(self.tobytes(), dtype=np.uint8)
            return ir.PackedTensor(packed, self.dtype, shape=self.shape).numpy()
        return self.window(0, self.size).reshape(self.shape.numpy())

    def window(self, start: int, count: int) -> npt.NDArray[Any]:
        """`count` elements from element `start` on in row-major order, mapped and read-only."""
        numpy_type = self.dtype.numpy().newbyteorder("<")
        if count == 0:
            return np.empty(0, dtype=numpy_type)
        first = self._offset + start * numpy_type.itemsize
        aligned = first - first % mmap.ALLOCATIONGRANULARITY
        with self._data_file.descriptor() as descriptor:
            mapped = mmap.mmap(
                descriptor, first - aligned + count * numpy_type.itemsize, offset=aligned, access=mmap.ACCESS_READ
            )
        return np.frombuffer(mapped, dtype=numpy_type, count=count, offset=first - aligned)

    def chunks(self, max_bytes: int = _COPY_CHUNK_BYTES) -> Iterator[bytes]:
        """The bytes in pieces of at most `max_bytes`, read and not mapped."""
        position, end = self._offset, self._offset + self.nbytes
        with self._data_file.descriptor() as descriptor:
            while position < end:
                piece = os.pread(descriptor, min(max_bytes, end - position), position)
                if not piece:
                    raise ModelError(f"'{self._data_file.path}' ended while tensor '{self.name}' was being read.")
                position += len(piece)
                yield piece

    def tobytes(self) -> bytes:
        """All bytes, little-endian and packed as in the file."""
        return b"".join(self.chunks())

    def tofile(self, file: IO[bytes]) -> None:
        """Write the bytes to `file` without mapping them; inside the kernel where the system can."""
        if self._copy_in_kernel(file):
            return
        for piece in self.chunks():
            file.write(piece)

    def _copy_in_kernel(self, file: IO[bytes]) -> bool:
        if not hasattr(os, "copy_file_range"):
            return False
        try:
            target = file.fileno()
        except (AttributeError, OSError):
            return False
        file.flush()
        start = file.tell()
        copied = 0
        with self._data_file.descriptor() as descriptor:
            try:
                while copied < self.nbytes:
                    step = os.copy_file_range(
                        descriptor, target, self.nbytes - copied, self._offset + copied, start + copied
                    )
                    if step == 0:
                        break
                    copied += step
            except OSError as error:
                # Between file systems, or on one that can't: the plain way does it. A full disk is told to the caller.
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV):
                    raise
                copied = 0
        if copied < self.nbytes:
            file.seek(start)
            return False
        file.seek(start + copied)
        return True

    def __array__(self, dtype: Any = None) -> npt.NDArray[Any]:
        return np.asarray(self.numpy(), dtype=dtype)
