"""The same samples for models whose inputs have another float type, such as an fp16 artifact beside its fp32 source."""

from __future__ import annotations

from collections.abc import Sequence

from onnxprune.contracts import Batch, TensorSpec, numpy_dtype
from onnxprune.data.fit import is_float

__all__ = ["feeds_for"]


def feeds_for(inputs: Sequence[TensorSpec], feeds: Batch) -> Batch:
    """`feeds` with every float array in the float type of its input; the rest, and what fits, stays as it is."""
    wanted = {spec.name: numpy_dtype(spec.dtype) for spec in inputs}
    return {
        name: array.astype(wanted[name])
        if name in wanted and array.dtype != wanted[name] and is_float(array.dtype) and is_float(wanted[name])
        else array
        for name, array in feeds.items()
    }
