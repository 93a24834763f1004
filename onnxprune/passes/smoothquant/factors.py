"""How far to go: the factors for each alpha, and the alpha that makes the layers' outputs most exact.

With X the tensor, channel j, W the weights that read it (Xiao et al. 2023, arXiv:2211.10438, equation 4):

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)        Y = (X / s) (s W)^T

The error of an alpha is |Y - round(X / s) round(s W)^T|^2 over rows of X that were kept, with X rounded to 8 bits over
its range and W to its own scales, summed over the layers of the group relative to each one's signal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.ops.affine import affine_parameters, largest_symmetric_integer, symmetric_scales
from onnxprune.passes.layerwise.statistics import ChannelStatistics

__all__ = ["ALPHAS", "SmoothingChoice", "choose_factors", "smoothing_factors"]

Array = npt.NDArray[Any]

ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_ACTIVATION_BITS = 8
_LARGEST_RATIO = 2.0**12


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothingChoice:
    """`error_ratio` is the error with these factors over that without any."""

    factors: Array
    alpha: float
    error_ratio: float


def smoothing_factors(magnitudes: Array, weight_magnitudes: Array, alpha: float) -> Array:
    """One for each channel, with a geometric mean of 1; channels that are always zero get 1."""
    alive = (magnitudes > 0) & (weight_magnitudes > 0)
    found = np.ones(len(magnitudes))
    if not alive.any():
        return found
    found[alive] = magnitudes[alive] ** alpha / weight_magnitudes[alive] ** (1 - alpha)
    found[alive] /= np.exp(np.mean(np.log(found[alive])))
    return np.clip(found, 1 / _LARGEST_RATIO, _LARGEST_RATIO)


def choose_factors(
    statistics: ChannelStatistics,
    rows: Array,
    weights: Sequence[Array],
    alphas: Sequence[float],
    *,
    per_channel: bool,
    weight_bits: int,
) -> SmoothingChoice:
    """The best of `alphas`.

    Args:
        statistics: Of the tensor's channels.
        rows: Some of its rows, (n, channels).
        weights: Of the layers that read it, (outputs, channels) each.
        alphas: What is tried.
        per_channel: Whether weights have a scale for each output.
        weight_bits: Of their integers.
    """
    reach = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
    options = {alpha: smoothing_factors(statistics.magnitude, reach, alpha) for alpha in alphas}

    def error(factors: Array) -> float:
        return _error(statistics, rows, weights, factors, per_channel=per_channel, weight_bits=weight_bits)

    before = error(np.ones(len(reach)))
    errors = {alpha: error(factors) for alpha, factors in options.items()}
    best = min(errors, key=lambda alpha: errors[alpha])
    ratio = errors[best] / before if before > 0 else 1.0
    return SmoothingChoice(factors=options[best], alpha=best, error_ratio=ratio)


def _error(
    statistics: ChannelStatistics,
    rows: Array,
    weights: Sequence[Array],
    factors: Array,
    *,
    per_channel: bool,
    weight_bits: int,
) -> float:
    low, high = float((statistics.low / factors).min()), float((statistics.high / factors).max())
    scale, zero_point = affine_parameters(low, high, _ACTIVATION_BITS)
    smallest = -(2 ** (_ACTIVATION_BITS - 1)) - zero_point
    given = (rows / factors).astype(np.float32)
    rounded = np.clip(np.rint(given / scale), smallest, smallest + 2**_ACTIVATION_BITS - 1) * np.float32(scale)
    largest = largest_symmetric_integer(weight_bits)
    total = 0.0
    for weight in weights:
        scaled = (weight * factors).astype(np.float32)
        magnitudes = np.abs(scaled).max(axis=1) if per_channel else np.abs(scaled).max(keepdims=True).reshape(-1)
        scales = symmetric_scales(magnitudes, weight_bits)[:, np.newaxis]
        on_grid = np.clip(np.rint(scaled / scales), -largest, largest) * scales
        exact = rows @ weight.T
        signal = float(np.square(exact).sum())
        total += float(np.square(rounded @ on_grid.T - exact).sum()) / max(signal, 1e-30)
    return total
