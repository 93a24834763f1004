"""Floats as the integers that a LiteRT tensor stores, and back.

    stored = clamp(round(real * (1 / scale)) + zero_point)      half to even, all in float32
    real = (stored - zero_point) * scale

These are the numbers of LiteRT's own QUANTIZE and DEQUANTIZE as applications run them (XNNPACK; checked over every
rounding border of int8, uint8 and int16). Its reference kernel divides and rounds halves away from zero instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.errors import BadDataError
from onnxprune.runtime.litert_file import LitertTensor

__all__ = ["real_values", "stored_integers"]


def stored_integers(array: npt.NDArray[Any], tensor: LitertTensor) -> npt.NDArray[Any]:
    """What `tensor` stores for the floats in `array`, which has the stored layout.

    Raises:
        BadDataError: There is a NaN, which no integer stands for.
    """
    dtype = np.dtype(tensor.dtype)
    limits = np.iinfo(dtype)
    scale, zero_point = _parameters(tensor, array.ndim)
    if np.isnan(array).any():
        raise BadDataError(f"Input '{tensor.name}' is stored as {tensor.dtype}, and the data hold NaN.")
    with np.errstate(over="ignore"):
        rounded = np.rint(array * (np.float32(1.0) / scale)) + zero_point.astype(np.float32)
    stored: npt.NDArray[Any] = np.clip(rounded, limits.min, limits.max).astype(dtype)
    return stored


def real_values(array: npt.NDArray[Any], tensor: LitertTensor) -> npt.NDArray[np.float32]:
    """The floats that the integers in `array` stand for."""
    scale, zero_point = _parameters(tensor, array.ndim)
    # int32 holds every difference of 16-bit numbers.
    real: npt.NDArray[np.float32] = (array.astype(np.int32) - zero_point).astype(np.float32) * scale
    return real


def _parameters(tensor: LitertTensor, rank: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    scale = np.array(tensor.scales, np.float32)
    zero_point = np.array(tensor.zero_points, np.int32)
    if scale.size == 1:
        return scale.reshape(()), zero_point.reshape(())
    broadcast = [1] * rank
    broadcast[tensor.axis] = scale.size
    return scale.reshape(broadcast), zero_point.reshape(broadcast)
