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
    "WeightWindow",
    "add_initializer",
    "constant_array",
    "iter_windows",
    "replace_weight",
    "replace_weight_lazily",
]


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
        tensor = ir.Tensor(array, dtype=dtype, name=name)
        if tensor.dtype != dtype:
            raise VerificationError(f"The weight made for '{name}' is {tensor.dtype}, but {dtype} was announced.")
        return tensor

    _set_tensor(value, ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name))


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
    flat = tensor.numpy().reshape(-1)
    for start in range(0, flat.size, step):
        yield WeightWindow(start=start, array=flat[start : start + step])
