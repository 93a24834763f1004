"""The arithmetic of affine quantization: ranges to scales, numbers to integers and back.

    real = (integer - zero_point) * scale                    (Jacob et al., 2018, arXiv:1712.05877, equation 1)

Integers are *signed* here, from -2**(bits-1) to 2**(bits-1) - 1; an unsigned spelling adds 2**(bits-1) to the integer
and to the zero point. Scales are float32 numbers (held as Python floats), since that is what every runtime stores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = [
    "SMALLEST_SCALE",
    "activation_parameters",
    "affine_parameters",
    "largest_symmetric_integer",
    "quantize_array",
    "representable_range",
    "symmetric_scales",
]

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""Below this a float32 scale is denormal, and runtimes that flush denormals to zero divide by zero."""


def affine_parameters(low: float, high: float, num_bits: int) -> tuple[float, int]:
    """Scale and signed zero point that cover [low, high] and represent zero exactly.

    The range is widened to contain zero. An empty range (a tensor that is always zero) gets scale 1.

    Raises:
        ValueError: A bound is not finite, `low` is above `high`, or the range is wider than a float32 scale can say.
    """
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        raise ValueError(f"[{low}, {high}] is no range.")
    low, high = min(low, 0.0), max(high, 0.0)
    num_steps = 2**num_bits - 1
    smallest = -(2 ** (num_bits - 1))
    if low == high:
        return 1.0, smallest
    # Divided before subtracted: high - low can overflow where its share for one step does not.
    width = high / num_steps - low / num_steps
    if width > float(np.finfo(np.float32).max):
        raise ValueError(f"[{low}, {high}] is too wide for a float32 scale.")
    scale = float(np.float32(max(width, SMALLEST_SCALE)))
    zero_point = round(smallest - low / scale)
    return scale, min(max(zero_point, smallest), smallest + num_steps)


def activation_parameters(low: float, high: float, num_bits: int) -> tuple[float, int]:
    """Scale and signed zero point with which an activation of the range [low, high] is quantized.

    Up to 8 bits these are the `affine_parameters`. With 16 the zero point is 0, as TFLite and NPUs want it, and the
    larger magnitude is the largest integer.

    Raises:
        ValueError: As `affine_parameters` does.
    """
    scale, zero_point = affine_parameters(low, high, num_bits)
    if num_bits <= 8:
        return scale, zero_point
    return float(symmetric_scales(np.array([max(-low, high, 0.0)]), num_bits)[0]), 0


def representable_range(scale: float, zero_point: int, num_bits: int) -> tuple[float, float]:
    """The smallest and the largest real number that the integers stand for: what saturation clips to."""
    smallest = -(2 ** (num_bits - 1))
    return (smallest - zero_point) * scale, (-smallest - 1 - zero_point) * scale


def largest_symmetric_integer(num_bits: int) -> int:
    """127 for 8 bits: symmetric weights use [-127, 127], so that negation stays in range."""
    return int(2 ** (num_bits - 1)) - 1


def symmetric_scales(largest_magnitudes: npt.NDArray[np.floating], num_bits: int) -> npt.NDArray[np.float32]:
    """One symmetric scale for each largest magnitude; 1 where it is zero."""
    scales = np.asarray(largest_magnitudes, dtype=np.float64) / largest_symmetric_integer(num_bits)
    return np.where(scales > 0, np.maximum(scales, SMALLEST_SCALE), 1.0).astype(np.float32)


def quantize_array(
    array: npt.NDArray[np.floating],
    scales: Sequence[float],
    *,
    axis: int | None = None,
    zero_point: int = 0,
    smallest: int,
    largest: int,
    dtype: npt.DTypeLike,
) -> npt.NDArray[np.integer]:
    """Integers of `array`: divided by the scale, rounded half to even as ONNX does, shifted and saturated.

    Args:
        array: Real numbers, any shape.
        scales: One scale, or one for each index of `axis`.
        axis: The axis that has a scale for each index; None for one scale.
        zero_point: Added after rounding.
        smallest: Integers saturate here ...
        largest: ... and here.
        dtype: Element type of the result; must hold both.
    """
    # int32 biases need more digits than float32 has; for big weights half the memory counts.
    divisor: npt.NDArray[np.floating] = np.asarray(scales, dtype=np.float64 if largest > 2**16 else np.float32)
    if axis is not None:
        shape = [1] * array.ndim
        shape[axis] = -1
        divisor = divisor.reshape(shape)
    integers = np.rint(array / divisor)
    integers += zero_point
    saturated: npt.NDArray[np.integer] = np.clip(integers, smallest, largest, out=integers).astype(dtype)
    return saturated
