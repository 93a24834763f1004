"""TFLite's storage of a constant with many zeros: its non-zeros, and where they stand.

    dense (a, ..., n) -> rows (a * ..., n) -> values (nnz,), segments (rows + 1,), indices (nnz,)

The traversal order is that of the axes, all axes but the last are dense, the last one is SPARSE_CSR, and there are no
blocks: the one form that XNNPACK's delegate unpacks for its convolutions. The index vectors take the narrowest type
that the schema has for their numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.targets.tflite.graph import Constant, Sparsity

__all__ = ["encode_rows"]

# Of the schema's SparseIndexVector. There is no vector of uint32.
_INDEX_TYPES = (np.uint8, np.uint16, np.int32)


def encode_rows(dense: Constant) -> tuple[Constant, Sparsity] | None:
    """The non-zeros of `dense` and their places; None where that takes no fewer bytes, or there are no non-zeros.

    A buffer without bytes is no constant to TFLite, so a tensor of zeros alone stays dense. Negative zeros count as
    zeros: they come back positive. NaN is a non-zero.
    """
    if len(dense.shape) < _MIN_RANK or 0 in dense.shape:
        return None
    rows = dense.array().reshape(-1, dense.shape[-1])
    is_kept = rows != 0
    counts = np.count_nonzero(is_kept, axis=1)
    total = int(counts.sum())
    if total == 0:
        return None
    segments = _narrowed(np.concatenate([[0], np.cumsum(counts)]), total)
    indices = _narrowed(np.nonzero(is_kept)[1], dense.shape[-1] - 1)
    sparsity = Sparsity(segments=segments, indices=indices)
    if total * dense.dtype.itemsize + sparsity.nbytes >= dense.nbytes:
        return None
    return Constant((total,), dense.dtype, lambda: _non_zeros(dense.array())), sparsity


_MIN_RANK = 2


def _non_zeros(dense: npt.NDArray[Any]) -> npt.NDArray[Any]:
    kept: npt.NDArray[Any] = dense[dense != 0]
    return kept


def _narrowed(numbers: npt.NDArray[Any], largest: int) -> npt.NDArray[Any]:
    dtype = next(one for one in _INDEX_TYPES if largest <= np.iinfo(one).max)
    return numbers.astype(dtype)
