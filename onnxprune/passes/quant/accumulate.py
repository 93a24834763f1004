"""What calibration keeps of a tensor from batch to batch: its range by one of five methods, in fixed memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxprune.passes.quant.histogram import MAX_COUNTED, StreamingHistogram
from onnxprune.passes.quant.range_search import entropy_range, least_squares_range

__all__ = [
    "CalibrationMethod",
    "ChannelExtremes",
    "ChannelRanges",
    "RangeAccumulator",
    "RangeRule",
    "TensorRange",
    "accumulator_for",
]

CalibrationMethod: TypeAlias = Literal["minmax", "moving-average", "percentile", "entropy", "mse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRange:
    """What calibration says about one tensor: numbers outside of [low, high] will saturate."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelRanges:
    """The extremes of each channel of one tensor, which holds `num_positions` numbers of each in one sample."""

    lows: npt.NDArray[np.float32]
    highs: npt.NDArray[np.float32]
    num_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeRule:
    """How a stream of numbers becomes a range.

    `percentile` is read by "percentile", `momentum` by "moving-average", `num_bits` by "entropy" and "mse", which weigh
    rounding against saturation.
    """

    method: CalibrationMethod = "minmax"
    percentile: float = 99.99
    momentum: float = 0.99
    num_bits: int = 8


class RangeAccumulator(Protocol):
    """The running range of one tensor."""

    def add(self, array: npt.NDArray[np.float32], low: float, high: float, num_samples: int) -> None:
        """Take in the finite numbers, from `low` to `high`, of a tensor that belongs to `num_samples` samples."""
        ...

    def range(self) -> TensorRange | None:
        """The range so far; None before anything was added."""
        ...


def accumulator_for(rule: RangeRule) -> RangeAccumulator:
    """An empty accumulator that follows `rule`."""
    if rule.method == "minmax":
        return _Extremes()
    if rule.method == "moving-average":
        return _MovingAverage(rule.momentum)
    return _Histogram(rule)


class _Extremes:
    """The smallest and the largest number."""

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf

    def add(self, array: npt.NDArray[np.float32], low: float, high: float, num_samples: int) -> None:
        self._low, self._high = min(self._low, low), max(self._high, high)

    def range(self) -> TensorRange | None:
        return TensorRange(low=self._low, high=self._high) if math.isfinite(self._low) else None


class _MovingAverage:
    """The average of each batch's extremes, in which a batch counts `momentum` times as much as the next one.

        average = sum(momentum**(n-i) * x_i) / sum(momentum**(n-i))

    The division makes it a plain mean of few batches, where a running average that starts at the first batch would
    still be that batch's extremes.
    """

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self._low = self._high = self._weight = 0.0

    def add(self, array: npt.NDArray[np.float32], low: float, high: float, num_samples: int) -> None:
        # Divided as it goes: sums of numbers near the largest float32 stay finite in float64.
        self._weight = self._weight * self._momentum + 1.0
        self._low += (low - self._low) / self._weight
        self._high += (high - self._high) / self._weight

    def range(self) -> TensorRange | None:
        return TensorRange(low=self._low, high=self._high) if self._weight else None


class _Histogram:
    """A range from the distribution of the numbers."""

    def __init__(self, rule: RangeRule) -> None:
        self._rule = rule
        self._histogram = StreamingHistogram()

    def add(self, array: npt.NDArray[np.float32], low: float, high: float, num_samples: int) -> None:
        self._histogram.add(array, low, high, max_counted=MAX_COUNTED * num_samples)

    def range(self) -> TensorRange | None:
        histogram, rule = self._histogram, self._rule
        low, high = histogram.low, histogram.high
        if not math.isfinite(low):
            return None
        if rule.method == "percentile":
            low, high = histogram.percentile_range(rule.percentile)
        elif low != 0.0 or high != 0.0:
            search = entropy_range if rule.method == "entropy" else least_squares_range
            low, high = search(histogram.bins(), low, high, rule.num_bits)
        return TensorRange(low=low, high=high)


class ChannelExtremes:
    """The smallest and the largest number of each index of one axis."""

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._lows: npt.NDArray[np.float32] | None = None
        self._highs: npt.NDArray[np.float32] | None = None
        self._num_positions = 0

    def add(self, array: npt.NDArray[np.float32], num_samples: int) -> None:
        """Take in a tensor of finite numbers, not empty, that belongs to `num_samples` samples."""
        axis = self._axis % array.ndim
        others = tuple(dim for dim in range(array.ndim) if dim != axis)
        lows, highs = array.min(axis=others), array.max(axis=others)
        if self._lows is None or self._highs is None:
            self._lows, self._highs = lows, highs
        else:
            self._lows, self._highs = np.minimum(self._lows, lows), np.maximum(self._highs, highs)
        self._num_positions = max(self._num_positions, array.size // (lows.size * num_samples))

    def ranges(self) -> ChannelRanges | None:
        """The extremes so far; None before anything was added."""
        if self._lows is None or self._highs is None:
            return None
        return ChannelRanges(lows=self._lows, highs=self._highs, num_positions=self._num_positions)
