"""The k smallest of many scores, exactly, without holding them in memory.

A score is a non-negative float32; its bit pattern, read as an unsigned integer, orders like the score itself. The k-th
smallest is found digit by digit (radix selection): one pass over all scores counts the upper 16 bits, a second one
counts the lower 16 bits of those scores whose upper half is the one that the k-th lies in. Scores that are equal to the
k-th are taken in index order, stream by stream, so that the choice is the same on every machine; and because the order
does not depend on k, what is chosen for a smaller k is always part of what is chosen for a larger one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "INELIGIBLE",
    "KeyStream",
    "Keys",
    "NonFiniteScoreError",
    "Selection",
    "StreamSelection",
    "choose",
    "keys_of",
    "select_smallest",
]

Keys: TypeAlias = npt.NDArray[np.uint32]
KeyStream: TypeAlias = Callable[[], Iterator[Keys]]
"""Called once for each pass; yields the keys of one tensor's units in index order, in windows of any size."""

INELIGIBLE = np.uint32(0xFFFFFFFF)
"""The key of a unit that must not be chosen; above the key of every float32."""

_SIGN_CLEARED = np.uint32(0x7FFFFFFF)
_FIRST_NON_FINITE_DIGIT = 0x7F80  # exponent all ones: infinities and NaN
_DIGIT_COUNT = 1 << 16
_LOW_DIGIT = np.uint32(0xFFFF)


class NonFiniteScoreError(ValueError):
    """A stream holds NaN or infinite scores; `stream` is its position."""

    def __init__(self, stream: int) -> None:
        super().__init__(f"Stream {stream} holds scores that are not finite.")
        self.stream = stream


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSelection:
    """What is chosen in one stream: every key below the common threshold, and the first `ties` equal to it.

    `chosen` counts both, `units` all units, `eligible` those that could be chosen, `zeros` those with score 0.
    """

    ties: int
    chosen: int
    units: int
    eligible: int
    zeros: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """`threshold` is the score of the last unit chosen (0.0 when none is)."""

    threshold: float
    streams: tuple[StreamSelection, ...]

    @property
    def chosen(self) -> int:
        """Units chosen in all streams."""
        return sum(stream.chosen for stream in self.streams)


def keys_of(scores: npt.NDArray[np.float32]) -> Keys:
    """The keys of float32 `scores` of any sign: the order of their magnitudes."""
    return np.bitwise_and(np.ascontiguousarray(scores).view(np.uint32), _SIGN_CLEARED)


def select_smallest(streams: Sequence[KeyStream], count: Callable[[int], int]) -> Selection:
    """Choose the smallest scores of all streams together.

    Args:
        streams: Read twice, in order.
        count: From the number of units in all streams (eligible or not) to how many to choose; more than are eligible
            means all that are eligible.

    Raises:
        NonFiniteScoreError: A score is NaN or infinite.
    """
    counts = [_count(index, stream) for index, stream in enumerate(streams)]
    digits = np.zeros(_DIGIT_COUNT, np.int64)
    for stream_counts in counts:
        digits[stream_counts.digits] += stream_counts.occurrences
    num_eligible = int(digits.sum())
    wanted = min(count(sum(stream_counts.units for stream_counts in counts)), num_eligible)
    if wanted <= 0:
        nothing = (_selection(stream_counts, ties=0, chosen=0) for stream_counts in counts)
        return Selection(threshold=0.0, streams=tuple(nothing))
    high, wanted_in_high = _digit_of(wanted, digits)

    insides = [_count_inside(stream, high) for stream in streams]
    low_digits = np.zeros(_DIGIT_COUNT, np.int64)
    for inside in insides:
        low_digits[inside.digits] += inside.occurrences
    low, ties_left = _digit_of(wanted_in_high, low_digits)

    selections = []
    for stream_counts, inside in zip(counts, insides, strict=True):
        below_high = int(stream_counts.occurrences[stream_counts.digits < high].sum())
        below = below_high + int(inside.occurrences[inside.digits < low].sum())
        ties = min(int(inside.occurrences[inside.digits == low].sum()), ties_left)
        ties_left -= ties
        selections.append(_selection(stream_counts, ties=ties, chosen=below + ties))
    threshold = np.array([(high << 16) | low], np.uint32).view(np.float32)[0]
    return Selection(threshold=float(threshold), streams=tuple(selections))


def choose(windows: Iterator[Keys], *, threshold: float, ties: int) -> Iterator[npt.NDArray[np.bool_]]:
    """Which units `select_smallest` chose in one stream: one boolean for each key, window by window."""
    limit = np.array([threshold], np.float32).view(np.uint32)[0]
    for keys in windows:
        chosen = keys < limit
        if ties:
            equal = np.flatnonzero(keys == limit)[:ties]
            chosen[equal] = True
            ties -= len(equal)
        yield chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class _DigitCounts:
    """How often each digit occurs in one stream.

    Sparse, because weights use a few hundred of the 65,536 digits, and there may be thousands of streams.
    """

    digits: npt.NDArray[np.intp]
    occurrences: npt.NDArray[np.int64]
    units: int
    zeros: int


def _count(index: int, stream: KeyStream) -> _DigitCounts:
    """Upper digits of the eligible keys."""
    counts = np.zeros(_DIGIT_COUNT, np.int64)
    zeros = 0
    for keys in stream():
        counts += np.bincount(_high_digit(keys), minlength=_DIGIT_COUNT)
        zeros += keys.size - int(np.count_nonzero(keys))
    units = int(counts.sum())
    counts[-1] = 0  # the digit that only ineligible units have
    if counts[_FIRST_NON_FINITE_DIGIT:].any():
        raise NonFiniteScoreError(index)
    digits = np.flatnonzero(counts)
    return _DigitCounts(digits=digits, occurrences=counts[digits], units=units, zeros=zeros)


def _count_inside(stream: KeyStream, high: int) -> _DigitCounts:
    """Lower digits of the keys whose upper digit is `high`."""
    counts = np.zeros(_DIGIT_COUNT, np.int64)
    first, last = np.uint32(high << 16), np.uint32((high << 16) | _LOW_DIGIT)
    for keys in stream():
        inside = keys[(keys >= first) & (keys <= last)]
        if inside.size:
            counts += np.bincount((inside & _LOW_DIGIT).astype(np.intp), minlength=_DIGIT_COUNT)
    digits = np.flatnonzero(counts)
    return _DigitCounts(digits=digits, occurrences=counts[digits], units=int(counts.sum()), zeros=0)


def _digit_of(wanted: int, counts: npt.NDArray[np.int64]) -> tuple[int, int]:
    """The digit that the `wanted`-th smallest has, and its position (from 1) among those with that digit."""
    cumulated = np.cumsum(counts)
    digit = int(np.searchsorted(cumulated, wanted))
    return digit, wanted - int(cumulated[digit] - counts[digit])


def _selection(counts: _DigitCounts, *, ties: int, chosen: int) -> StreamSelection:
    return StreamSelection(
        ties=ties, chosen=chosen, units=counts.units, eligible=int(counts.occurrences.sum()), zeros=counts.zeros
    )


def _high_digit(keys: Keys) -> npt.NDArray[np.intp]:
    return (keys >> np.uint32(16)).astype(np.intp)
