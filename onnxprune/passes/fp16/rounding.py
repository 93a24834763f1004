"""Which weights survive float16: 11 significant bits, from 2**-24 to 65504."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from onnxprune.graph.weights import iter_windows
from onnxprune.passes.fp16.plan import RoundedTensor

__all__ = ["FLOAT16_MAX", "round_weight"]

FLOAT16_MAX = float(np.finfo(np.float16).max)  # 65504

# Rounding to 11 bits has a relative error of at most 2**-11. Above twice that, most numbers of the tensor lie below
# 2**-14, where float16 has fewer bits left for them.
MAX_RELATIVE_ERROR = 2.0**-10

_WINDOW_BYTES = 4 << 20


def round_weight(value: ir.Value) -> RoundedTensor | str:
    """What float16 does to the float32 initializer `value`, or why it must not become that."""
    largest = 0.0
    max_error = 0.0
    lost = 0
    error_energy = 0.0
    energy = 0.0
    for window in iter_windows(value, _WINDOW_BYTES):
        exact = window.array
        if not exact.size:
            continue
        largest = max(largest, float(np.abs(exact).max()))
        if not largest <= FLOAT16_MAX:
            return f"it holds values up to {largest:g}, and float16 ends at {FLOAT16_MAX:g}"
        rounded = exact.astype(np.float16)
        error = np.abs(exact.astype(np.float64) - rounded)
        max_error = max(max_error, float(error.max()))
        lost += int(np.count_nonzero((rounded == 0) & (exact != 0)))
        error_energy += float(np.square(error).sum())
        energy += float(np.square(exact, dtype=np.float64).sum())
    relative_error = math.sqrt(error_energy / energy) if energy else 0.0
    if relative_error > MAX_RELATIVE_ERROR:
        return f"its values are so small that float16 would change them by {relative_error:.1%}"
    return RoundedTensor(name=value.name or "", max_error=max_error, lost=lost)
