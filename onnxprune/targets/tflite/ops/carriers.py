"""Element types that LiteRT's kernels lack, carried by others that hold the same numbers.

LiteRT computes in FLOAT32, INT32 and INT64. Without scales, its kernels of 8 and 16 bits abort the process or give
zeros, and hardly any knows unsigned words. So these travel in a wider type and are cast back at the end, where CAST
wraps around as ONNX does. UINT64 has no CAST; BITCAST reads it as INT64, whose sums and products have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import NUMPY_TYPES, Constant, Shape, Tensor, TensorType
from onnxprune.targets.tflite.ops.formulas import Term

__all__ = ["EXTREME_TYPES", "FLOATS", "INTEGERS", "UNSIGNED", "WORDS", "bitcast", "carried", "computed_in", "returned"]

WORDS: frozenset[TensorType] = frozenset({"FLOAT32", "INT32", "INT64"})
"""Types of most kernels."""

FLOATS: frozenset[TensorType] = frozenset({"FLOAT32"})
"""Types of kernels for roots, powers and the like."""

EXTREME_TYPES: frozenset[TensorType] = frozenset({"FLOAT32", "INT32", "INT64", "INT8", "UINT8", "INT16"})
"""Types of kernels that only compare and choose, which need no scales for bytes."""

UNSIGNED: frozenset[TensorType] = frozenset({"UINT8", "UINT16", "UINT32", "UINT64"})
INTEGERS: frozenset[TensorType] = UNSIGNED | frozenset[TensorType]({"INT8", "INT16", "INT32", "INT64"})

_WIDER: dict[TensorType, tuple[TensorType, ...]] = {
    "BOOL": ("INT32",),
    "INT8": ("INT32", "INT64"),
    "UINT8": ("INT32", "INT64"),
    "INT16": ("INT32", "INT64"),
    "UINT16": ("INT32", "INT64"),
    "INT32": ("INT64",),
    "UINT32": ("INT64",),
    "UINT64": ("INT64",),
}
_LEAST = int(np.iinfo(np.int64).min)


def computed_in(
    build: Builder,
    kernel: Collection[TensorType],
    tensors: Sequence[Tensor],
    compute: Callable[[list[Tensor]], Tensor],
    *,
    is_ordered: bool = False,
) -> Tensor:
    """`compute` of tensors of one type, carried by a type of `kernel`, and the result back in theirs.

    `is_ordered`: the result depends on which number is the larger one.
    """
    type_ = tensors[0].type
    result = compute([carried(build, tensor, kernel, is_ordered=is_ordered) for tensor in tensors])
    return returned(build, result, type_, is_ordered=is_ordered)


def carried(build: Builder, tensor: Tensor, kernel: Collection[TensorType], *, is_ordered: bool = False) -> Tensor:
    """The same numbers in a type of `kernel`; UINT64, if `is_ordered`, less 2^63, else modulo 2^64."""
    type_ = tensor.type
    if type_ in kernel:
        return tensor
    carrier = next((wider for wider in _WIDER.get(type_, ()) if wider in kernel), None)
    if carrier is None:
        raise UnsupportedError(f"LiteRT has no kernel for {type_}, nor for a type that holds its numbers")
    if type_ != "UINT64":
        return build.cast(tensor, carrier)
    signed = bitcast(build, tensor, "INT64", tensor.shape)
    return (Term(build, signed) + _LEAST).tensor if is_ordered else signed


def returned(build: Builder, tensor: Tensor, type_: TensorType, *, is_ordered: bool = False) -> Tensor:
    """What `carried` made, in its own type again."""
    if type_ != "UINT64" or tensor.type == "UINT64":
        return build.cast(tensor, type_)
    if is_ordered:
        tensor = (Term(build, tensor) + _LEAST).tensor
    return bitcast(build, tensor, "UINT64", tensor.shape)


def bitcast(build: Builder, tensor: Tensor, type_: TensorType, shape: Shape) -> Tensor:
    """BITCAST: the same bytes read as another type; where that is narrower, `shape` has an axis more."""
    if tensor.constant is None:
        return build.op("BITCAST", [tensor], shape=shape, type_=type_)
    dtype, constant = NUMPY_TYPES[type_], tensor.constant
    load = constant.load
    return build.constant_tensor(
        Constant(shape, dtype, lambda: np.ascontiguousarray(load()).view(dtype).reshape(shape)),
        name=f"{tensor.name}/bits",
    )
