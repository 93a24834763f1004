"""A histogram of a stream of numbers in fixed memory, for the methods that look at more than the extremes.

Bins are equal and cover [-reach, reach), where `reach` is a power of two. A number outside doubles `reach`: each pair
of neighbouring bins becomes one bin of twice the width, and since all edges are multiples of the bin width, no count
ends up in a wrong bin. So the histogram equals the one that would have been made with the final reach from the start,
whatever the order of the samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_COUNTED", "NUM_BINS", "Bins", "StreamingHistogram"]

NUM_BINS = 8192
"""64 KiB a tensor. An outlier a hundred times as large as the percentile still leaves about 40 bins for the rest."""

MAX_COUNTED = 1 << 15
"""Of a tensor that holds more numbers in one sample, every k-th is counted: a thirtieth of a feature map says as much
about the distribution, and counting is what a histogram costs. Extremes see all numbers."""

# Numbers at a time: what is computed on the way stays in the processor's cache.
_CHUNK = 1 << 15

# The bin of a number is computed as number / width in float32, where a smaller reach would underflow.
_SMALLEST_EXPONENT = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Bins:
    """The occupied part of a histogram: `counts[i]` numbers lie in [edges[i], edges[i + 1])."""

    edges: npt.NDArray[np.float64]
    counts: npt.NDArray[np.float64]

    @property
    def width(self) -> float:
        """Of each bin."""
        return float(self.edges[1] - self.edges[0])


class StreamingHistogram:
    """Counts numbers; `percentile_range` cuts both tails, `bins` is for other ways to choose a range."""

    def __init__(self) -> None:
        self._counts = np.zeros(NUM_BINS, dtype=np.int64)
        self._exponent: int | None = None
        self._num_adds = 0
        self.low = math.inf
        self.high = -math.inf

    @property
    def count(self) -> int:
        """How many numbers were counted."""
        return int(self._counts.sum())

    @property
    def bin_width(self) -> float:
        """Width of one bin; 0 while only zeros, or nothing, were added."""
        return 0.0 if self._exponent is None else math.ldexp(2.0 / NUM_BINS, self._exponent)

    def add(self, numbers: npt.NDArray[np.float32], low: float, high: float, *, max_counted: int | None = None) -> None:
        """Count finite `numbers`, whose smallest is `low` and whose largest is `high`.

        Of more than `max_counted` numbers, about that many are counted, at even distances. The distance has no factor
        in common with the number of numbers, so that they come from all rows and columns, and the first one moves on
        from call to call.
        """
        self.low, self.high = min(self.low, low), max(self.high, high)
        flat = _thinned(numbers.reshape(-1), max_counted, self._num_adds)
        self._num_adds += 1
        magnitude = max(abs(low), abs(high))
        if magnitude > 0.0:
            # frexp: magnitude < 2**exponent, strictly, so that the largest number has a bin.
            self._grow_to(max(math.frexp(magnitude)[1], _SMALLEST_EXPONENT))
        if self._exponent is None:
            self._counts[NUM_BINS // 2] += flat.size
            return
        for start in range(0, flat.size, _CHUNK):
            # A product with a power of two and the floor of it are exact in float32.
            positions = flat[start : start + _CHUNK] * np.float32(1.0 / self.bin_width)
            np.floor(positions, out=positions)
            positions += np.float32(NUM_BINS // 2)
            self._counts += np.bincount(positions.astype(np.intp), minlength=NUM_BINS)

    def percentile_range(self, percentile: float) -> tuple[float, float]:
        """The range that holds the middle `percentile` percent of the numbers; half of the rest is cut at each end.

        Exact up to one bin, and never wider than the smallest and the largest number.

        Raises:
            ValueError: Nothing was added.
        """
        if self.count == 0:
            raise ValueError("The histogram is empty.")
        if self._exponent is None or percentile >= 100.0:
            return self.low, self.high
        share = (1.0 - percentile / 100.0) / 2.0
        cumulative = np.concatenate([[0], np.cumsum(self._counts)]).astype(np.float64) / self.count
        edges = (np.arange(NUM_BINS + 1) - NUM_BINS // 2) * self.bin_width
        # The first edge at or below the lower cut, and the first at or above the upper one.
        first = int(np.searchsorted(cumulative, share, side="right")) - 1
        last = int(np.searchsorted(cumulative, 1.0 - share, side="left"))
        return max(float(edges[first]), self.low), min(float(edges[last]), self.high)

    def bins(self) -> Bins:
        """The occupied bins.

        Exact zeros, as a Relu makes them, are left out as far as they can be told: zero has an integer of its own in
        any range, so they say nothing about which range is good. They are what the bin that begins at zero holds
        beyond its fuller neighbour.

        Raises:
            ValueError: Nothing but zeros was added.
        """
        if self._exponent is None:
            raise ValueError("The histogram holds no number but zero.")
        counts = self._counts.astype(np.float64)
        middle = NUM_BINS // 2
        counts[middle] = min(counts[middle], max(counts[middle - 1], counts[middle + 1], 1.0))
        occupied = np.flatnonzero(self._counts)
        first, last = min(int(occupied[0]), middle), max(int(occupied[-1]), middle - 1) + 1
        edges = np.arange(first - middle, last + 1 - middle, dtype=np.float64) * self.bin_width
        return Bins(edges=edges, counts=counts[first:last])

    def _grow_to(self, exponent: int) -> None:
        if self._exponent is None:
            self._exponent = exponent
            return
        while self._exponent < exponent:
            merged = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts[:] = 0
            self._counts[NUM_BINS // 4 : NUM_BINS // 4 + NUM_BINS // 2] = merged
            self._exponent += 1


def _thinned(flat: npt.NDArray[np.float32], max_counted: int | None, turn: int) -> npt.NDArray[np.float32]:
    if max_counted is None or flat.size <= max_counted:
        return flat
    stride = math.ceil(flat.size / max_counted)
    while math.gcd(stride, flat.size) != 1:
        stride += 1
    return flat[turn % stride :: stride]
