"""Operators whose inputs are all constant, computed at conversion.

Only kinds whose result NumPy gives to the last bit (or rounds as well as a kernel does): masks, indices and small
factors that emitters compose. Big weights are left alone: they would have to be in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxprune.targets.tflite.graph import NUMPY_TYPES, OptionValue, Shape, Tensor, TensorType

__all__ = ["folded"]

_Array: TypeAlias = "npt.NDArray[Any]"

# A causal mask of 1,024 tokens; a larger one is computed faster than it is read from a file.
_MAX_ELEMENTS = 1 << 20


def folded(
    kind: str,
    inputs: Sequence[Tensor | None],
    shape: Shape,
    type_: TensorType,
    options: Mapping[str, OptionValue],
) -> _Array | None:
    """What the operator computes; None where that is left to LiteRT."""
    function = _FUNCTIONS.get(kind)
    if function is None or not set(options) <= _OPTIONS.get(kind, frozenset()):
        return None
    given = [tensor for tensor in inputs if tensor is not None and tensor.constant is not None]
    if len(given) != len(inputs) or max(math.prod(shape), *(tensor.num_elements for tensor in given)) > _MAX_ELEMENTS:
        return None
    if any(tensor.quantization is not None for tensor in given):
        return None
    arrays = [array for tensor in given if (array := tensor.array()) is not None]
    with np.errstate(all="ignore"):
        result = np.asarray(function(*arrays, **options))
    result = np.ascontiguousarray(result.astype(NUMPY_TYPES[type_], copy=False))
    return result.reshape(shape) if result.size == math.prod(shape) else None


def _slice(array: _Array, begin: _Array, size: _Array) -> _Array:
    window = (slice(at, None if count < 0 else at + count) for at, count in zip(begin, size, strict=True))
    return array[tuple(window)]


def _concatenation(*arrays: _Array, axis: int = 0) -> _Array:
    return np.concatenate(arrays, axis=axis)


_FUNCTIONS: Mapping[str, Callable[..., _Array]] = {
    "ADD": np.add,
    "SUB": np.subtract,
    "MUL": np.multiply,
    "MAXIMUM": np.maximum,
    "MINIMUM": np.minimum,
    "NEG": np.negative,
    "EQUAL": np.equal,
    "NOT_EQUAL": np.not_equal,
    "LESS": np.less,
    "LESS_EQUAL": np.less_equal,
    "GREATER": np.greater,
    "GREATER_EQUAL": np.greater_equal,
    "LOGICAL_AND": np.logical_and,
    "LOGICAL_OR": np.logical_or,
    "LOGICAL_NOT": np.logical_not,
    "SELECT_V2": np.where,
    "SLICE": _slice,
    "CONCATENATION": _concatenation,
}
# Options that the functions know.
_OPTIONS: Mapping[str, frozenset[str]] = {"CONCATENATION": frozenset({"axis"})}
