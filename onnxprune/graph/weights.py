"""Reading and replacing weights. Only these functions write `const_value`, so that shape and type always follow it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.errors import VerificationError
from onnxprune.graph.external import FileTensor
from onnxprune.graph.names import UniqueNames, printable

__all__ = [
    "EditedTensor",
    "StartEdit",
    "WeightWindow",
    "add_initializer",
    "constant_array",
    "iter_windows",
    "replace_weight",
    "replace_weight_by_windows",
    "replace_weight_lazily",
    "weight_bytes",
]

StartEdit = Callable[[], Callable[[npt.NDArray[Any]], npt.NDArray[Any]]]
"""Starts one reading of a weight: gives the function that edits its windows in row-major order (and may count)."""

_EDIT_WINDOW_BYTES = 1 << 20


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, those of subgraphs included; a tensor that several share counts once."""
    tensors = {
        id(value.const_value): value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    }
    return sum(tensors.values())


def constant_array(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The array of an initializer, or None where `value` is missing or computed.

    The array may be a read-only view of the file the model was loaded from: copy it before writing into it, and let
    go of it soon, because its mapped pages count as memory while it lives.
    """
    if value is None or value.const_value is None or value.producer() is not None:
        return None
    return value.const_value.numpy()


def replace_weight(value: ir.Value, array: npt.NDArray[Any], *, dtype: ir.DataType | None = None) -> None:
    """Make `array` the content of initializer `value`, with shape and element type following it.

    Args:
        value: An initializer; its name stays.
        array: Any shape and type; not copied, so the caller must not write into it afterwards.
        dtype: Needed only where NumPy's type does not say it (bfloat16 held as uint16, float8 held as uint8).
    """
    _set_tensor(value, ir.Tensor(np.asarray(array), dtype=dtype, name=value.name))


def replace_weight_lazily(
    value: ir.Value, shape: tuple[int, ...], dtype: ir.DataType, make: Callable[[], npt.NDArray[Any]]
) -> None:
    """Like `replace_weight`, but `make` is called each time the array is read and nothing is kept in memory.

    `make` must give the same array each time; it is checked against `shape` and `dtype` when it is called.
    """
    name = value.name

    def evaluate() -> ir.Tensor[Any]:
        array = np.asarray(make())
        if array.shape != shape:
            raise VerificationError(
                f"The weight made for '{name}' has shape {list(array.shape)}, but {list(shape)} was announced."
            )
        try:
            return ir.Tensor(array, dtype=dtype, name=name)
        except TypeError:
            raise VerificationError(
                f"The weight made for '{name}' is {array.dtype}, but {dtype.name} was announced."
            ) from None

    _set_tensor(value, ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name))


class EditedTensor(ir.LazyTensor):
    """Another tensor's elements, edited window by window each time they are read; nothing is kept in memory."""

    __slots__ = ("_source", "_start_edit")

    def __init__(self, source: ir.Value, start_edit: StartEdit, dtype: ir.DataType, shape: ir.Shape) -> None:
        super().__init__(self._in_memory, dtype=dtype, shape=shape, name=source.name)
        self._source = source
        self._start_edit = start_edit

    def windows(self, max_bytes: int) -> Iterator[WeightWindow]:
        """As `iter_windows`, which calls this."""
        edit = self._start_edit()
        for window in iter_windows(self._source, max_bytes):
            yield WeightWindow(start=window.start, array=edit(window.array))

    def _in_memory(self) -> ir.Tensor[npt.NDArray[Any]]:
        array = np.empty(self.size, self.dtype.numpy())
        for window in self.windows(_EDIT_WINDOW_BYTES):
            array[window.start : window.start + window.array.size] = window.array
        return ir.Tensor(array.reshape(self.shape.numpy()), dtype=self.dtype, name=self.name)


def replace_weight_by_windows(value: ir.Value, start_edit: StartEdit, *, dtype: ir.DataType | None = None) -> None:
    """Let initializer `value` be what an edit of its present elements gives, computed whenever they are read.

    Args:
        value: An initializer; shape and name stay.
        start_edit: Must give the same elements each time. The edit takes and returns arrays of one dimension and equal
            size.
        dtype: Element type of what the edit returns; None: the present one.
    """
    tensor = value.const_value
    if tensor is None:
        raise VerificationError(f"'{printable(value.name or '')}' is not an initializer, so it has no weight to edit.")
    source = ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=tensor)
    _set_tensor(value, EditedTensor(source, start_edit, dtype or tensor.dtype, ir.Shape(tensor.shape.numpy())))


def _set_tensor(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    if not value.is_initializer():
        raise VerificationError(f"'{printable(value.name or '')}' is not an initializer, so its weight can't be set.")
    value.const_value = tensor
    value.shape = ir.Shape(tensor.shape.numpy())
    # A new type object: clones of a model share theirs, and writing `value.dtype` would change all of them.
    value.type = ir.TensorType(tensor.dtype)


def add_initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any], names: UniqueNames) -> ir.Value:
    """A new initializer of `graph`, named `name` or the next free name like it."""
    tensor = ir.Tensor(np.asarray(array))
    return add_tensor(graph, name, tensor, names)


def add_tensor(graph: ir.Graph, name: str, tensor: ir.TensorProtocol, names: UniqueNames) -> ir.Value:
    """A new initializer of `graph` that holds `tensor`, named `name` or the next free name like it."""
    value = ir.Value(
        name=names.claim(name),
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightWindow:
    """Elements `start` to `start + array.size` of a weight in row-major order; `array` has one dimension."""

    start: int
    array: npt.NDArray[Any]


def iter_windows(value: ir.Value, max_bytes: int) -> Iterator[WeightWindow]:
    """The elements of initializer `value` in row-major order, at most `max_bytes` of them in memory at a time.

    Weights on disk are mapped window by window: each window's pages are gone when the caller lets go of its array.
    Weights in memory are cut into views.
    """
    tensor = value.const_value
    if tensor is None:
        raise VerificationError(f"'{printable(value.name or '')}' is not an initializer, so it has no weight to read.")
    step = max(1, max_bytes // max(1, tensor.dtype.bitwidth // 8))
    if isinstance(tensor, FileTensor) and tensor.dtype.bitwidth >= 8:
        for start in range(0, tensor.size, step):
            yield WeightWindow(start=start, array=tensor.window(start, min(step, tensor.size - start)))
        return
    if isinstance(tensor, EditedTensor):
        yield from tensor.windows(max_bytes)
        return
    flat = tensor.numpy().reshape(-1)
    for start in range(0, flat.size, step):
        yield WeightWindow(start=start, array=flat[start : start + step])
