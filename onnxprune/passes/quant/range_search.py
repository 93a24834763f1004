"""Choosing the range of a tensor from its histogram: least squared error, or least relative entropy.

Both try ranges that contain zero and lie within the extremes, as affine quantization writes them (zero has an integer
of its own). A range is searched in three rounds: both ends drawn in together, then one end at a time, then each end in
small steps around what was found. That serves one-sided tensors (behind a Relu), lopsided ones (SiLU, GELU) and
symmetric ones alike, which a search for one symmetric threshold does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from onnxprune.passes.quant.histogram import Bins

__all__ = ["entropy_range", "least_squares_range", "squared_errors"]

FloatArray: TypeAlias = npt.NDArray[np.float64]
Costs: TypeAlias = Callable[[FloatArray, FloatArray], FloatArray]
"""(lows, highs) -> one cost for each pair; the smallest wins."""

# Shares of an end that are tried: 1 down to 1/64, each 0.9 of the one before.
_COARSE = np.geomspace(1.0, 1.0 / 64.0, 40)
_FINE = np.geomspace(1.0 / 0.9, 0.9, 13)

# More bins than this only cost time: they would be a thirtieth of a step of eight bits.
_MAX_BINS_LEAST_SQUARES = 2048

# MXNet's share of the mass for a bin that only saturated numbers fill (`_smooth_distribution`).
_SMALLEST_SHARE = 1e-4


def least_squares_range(bins: Bins, low: float, high: float, num_bits: int) -> tuple[float, float]:
    """The range within [low, high] whose quantization has the smallest squared error, rounding and saturation together.

    Never worse in that error than [low, high] itself.
    """
    merged = _merged(bins, _MAX_BINS_LEAST_SQUARES)
    return _search(lambda lows, highs: squared_errors(merged, lows, highs, num_bits), low, high)


def squared_errors(bins: Bins, lows: FloatArray, highs: FloatArray, num_bits: int) -> FloatArray:
    """The summed squared error of each range [low, high], with numbers spread evenly within their bin.

    In steps u = x / scale from zero, a number is off by r(u) = u - clip(round(u), smallest, largest). The integral of
    r(u)^2 from zero is

        G(u) = n / 12 + r^3 / 3,    n = clip(round(u), smallest, largest)

    because each whole step between adds 1/12, and beyond the last integer r just keeps growing. So the error of a bin
    needs G at its edges only: exact whether the step is many bins wide or a fraction of one.
    """
    largest_step = 2**num_bits - 1
    scales = np.maximum((highs - lows) / largest_step, np.finfo(np.float64).tiny)[:, np.newaxis]
    zero_points = np.clip(np.rint(-lows[:, np.newaxis] / scales), 0, largest_step)
    steps = bins.edges / scales
    nearest = np.clip(np.rint(steps), -zero_points, largest_step - zero_points)
    integral = nearest / 12.0 + (steps - nearest) ** 3 / 3.0
    # Mean over the bin: the difference of the integral over the bin's width in steps.
    errors: FloatArray = (np.diff(integral, axis=1) @ bins.counts) * (scales[:, 0] ** 3 / bins.width)
    return errors


def entropy_range(bins: Bins, low: float, high: float, num_bits: int) -> tuple[float, float]:
    """The range within [low, high] whose quantization loses least information (Kullback-Leibler divergence).

    As TensorRT calibrates (Migacz, "8-bit Inference with TensorRT", GTC 2017): P is the distribution with saturated
    numbers added to the last bin, Q the same without them after it was put into 2**num_bits - 1 levels and spread again
    over the bins that hold something. Unlike there, both ends of the range are searched.

    Single numbers that come back exactly, as a flat background gives behind a convolution, are counted like their
    neighbours: spreading such a spike over its level looks like a great loss, though rounding moves it by less than a
    step, and the search would flee into ever smaller ranges.

    A range must hold at least one bin for each level; from 16 bits on none does, and [low, high] is the result.
    """
    num_levels = 2**num_bits - 1
    bins = Bins(edges=bins.edges, counts=_without_spikes(bins.counts))

    def costs(lows: FloatArray, highs: FloatArray) -> FloatArray:
        return np.array([_divergence(bins, *ends, num_levels) for ends in zip(lows, highs, strict=True)])

    return _search(costs, low, high)


def _without_spikes(counts: FloatArray) -> FloatArray:
    """Each count, but no more than its fuller neighbour's, and at least 1 where there was one."""
    padded = np.concatenate([[0.0], counts, [0.0]])
    capped: FloatArray = np.minimum(counts, np.maximum(np.maximum(padded[:-2], padded[2:]), 1.0))
    return capped


def _divergence(bins: Bins, low: float, high: float, num_levels: int) -> float:
    first = int(np.searchsorted(bins.edges, low, side="right")) - 1
    last = int(np.searchsorted(bins.edges, high, side="left"))
    first, last = max(first, 0), min(last, len(bins.counts))
    kept = bins.counts[first:last]
    total = float(bins.counts.sum())
    if len(kept) < num_levels or not kept.any():
        # A finer range than the histogram resolves; the extremes themselves are always allowed.
        return math.inf
    exact = kept.copy()
    exact[0] += bins.counts[:first].sum()
    exact[-1] += bins.counts[last:].sum()
    centres = (bins.edges[first:last] + bins.edges[first + 1 : last + 1]) / 2
    levels = np.rint((centres - low) * (num_levels / (high - low))).astype(np.intp)
    levels = np.clip(levels, 0, num_levels)
    held = np.bincount(levels, weights=kept)
    spread_over = np.bincount(levels, weights=exact > 0)
    spread = np.where(exact > 0, held[levels] / np.maximum(spread_over[levels], 1.0), 0.0)
    is_filled = exact > 0
    p = exact[is_filled] / total
    q = np.maximum(spread[is_filled] / max(float(kept.sum()), 1.0), _SMALLEST_SHARE / len(kept))
    return float(np.sum(p * np.log(p / q)))


def _search(costs: Costs, low: float, high: float) -> tuple[float, float]:
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return low, high
    best = low, high
    tried: list[tuple[FloatArray, FloatArray]] = [(low * _COARSE, high * _COARSE)]
    best = _best_of(costs, best, tried)
    for shares in (_COARSE, _FINE, _FINE):
        if high > 0.0:
            reach = high if shares is _COARSE else best[1]
            highs = np.minimum(reach * shares, high)
            best = _best_of(costs, best, [(np.full_like(highs, best[0]), highs)])
        if low < 0.0:
            reach = low if shares is _COARSE else best[0]
            lows = np.maximum(reach * shares, low)
            best = _best_of(costs, best, [(lows, np.full_like(lows, best[1]))])
    return best


def _best_of(
    costs: Costs, best: tuple[float, float], tried: list[tuple[FloatArray, FloatArray]]
) -> tuple[float, float]:
    """The best of what is `tried` and `best` itself, which wins a tie."""
    lows = np.concatenate([[best[0]], *(lows for lows, _ in tried)])
    highs = np.concatenate([[best[1]], *(highs for _, highs in tried)])
    index = int(np.argmin(costs(lows, highs)))
    return float(lows[index]), float(highs[index])


def _merged(bins: Bins, max_bins: int) -> Bins:
    """Neighbouring bins joined until there are no more than `max_bins`."""
    factor = math.ceil(len(bins.counts) / max_bins)
    if factor == 1:
        return bins
    # Padded with empty bins at the upper end.
    missing = -len(bins.counts) % factor
    counts = np.concatenate([bins.counts, np.zeros(missing)]).reshape(-1, factor).sum(axis=1)
    edges = bins.edges[0] + np.arange(len(counts) + 1) * (bins.width * factor)
    return Bins(edges=edges, counts=counts)
