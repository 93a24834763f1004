"""Histograms of two streams of numbers over the same bins, and how far apart the two distributions are.

The bins have one width, that of the first numbers divided by `NUM_BINS`; where later numbers lie outside, the width is
doubled and neighbours are merged, so between half of the bins and all of them are in use, and memory is fixed.

    kl_nats = sum_i p_i ln(p_i / q_i)        p_i = (n_i + 1/2) / (n + B/2), q_i = (m_i + 1/2) / (m + B/2)

with n_i and m_i numbers of the reference and of the actual stream in bin i, and B bins: half a number is added to each
so that empty bins have a logarithm (Jeffreys' prior). 0 where the histograms are equal; finite always.
64 bins are a quarter of the 256 values of an int8 tensor: finer ones would count the steps of its grid as a difference.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["NUM_BINS", "PairedHistogram"]

NUM_BINS = 64


class PairedHistogram:
    """Counts of a reference (row 0) and an actual stream (row 1)."""

    def __init__(self) -> None:
        self._counts = np.zeros((2, NUM_BINS), dtype=np.int64)
        self._low = 0.0
        # 0 until the first numbers that differ came: they all lie in bin 0 then.
        self._width = 0.0
        self._is_empty = True

    def add(self, reference: npt.NDArray[Any], actual: npt.NDArray[Any]) -> None:
        """Count the numbers of both; they are finite, and there is at least one in each."""
        low = min(float(reference.min()), float(actual.min()))
        high = max(float(reference.max()), float(actual.max()))
        if self._is_empty:
            self._low, self._is_empty = low, False
        self._reach(low, high)
        for row, values in enumerate((reference, actual)):
            if self._width == 0.0:
                self._counts[row, 0] += values.size
                continue
            positions = (np.asarray(values, dtype=np.float64).ravel() - self._low) / self._width
            bins = np.clip(positions.astype(np.int64), 0, NUM_BINS - 1)
            self._counts[row] += np.bincount(bins, minlength=NUM_BINS)

    def kl_nats(self) -> float:
        """The divergence of the actual distribution from the reference; see the top of this file."""
        smoothed = self._counts + 0.5
        p, q = smoothed / smoothed.sum(axis=1, keepdims=True)
        return max(0.0, float(np.sum(p * np.log(p / q))))

    def _reach(self, low: float, high: float) -> None:
        """Make the bins cover [low, high] beside what they cover."""
        if self._width == 0.0:
            if low == high == self._low:
                return
            # All numbers so far were one and the same: they move to the bin where that lies now.
            old, self._low = self._low, min(low, self._low)
            # A little wider, so that the largest number lies in the last bin whatever rounding does.
            self._width = (max(high, old) - self._low) / NUM_BINS * (1 + 1e-12)
            if self._width == 0.0:  # closer together than a float can say
                return
            moved = min(int((old - self._low) / self._width), NUM_BINS - 1)
            counts, self._counts = self._counts[:, 0].copy(), np.zeros_like(self._counts)
            self._counts[:, moved] = counts
            return
        while high > self._low + NUM_BINS * self._width:
            self._merge(at_end=True)
        while low < self._low:
            self._merge(at_end=False)

    def _merge(self, *, at_end: bool) -> None:
        """Double the width; the room that this makes lies behind the numbers so far, or before them."""
        merged = self._counts.reshape(2, NUM_BINS // 2, 2).sum(axis=2)
        room = np.zeros_like(merged)
        self._counts = np.concatenate([merged, room] if at_end else [room, merged], axis=1)
        if not at_end:
            self._low -= NUM_BINS * self._width
        self._width *= 2
