"""The k smallest of many scores, exactly, without holding them in memory.

A score is a non-negative float32; its bit pattern, read as an unsigned integer, orders like the score itself. The k-th
smallest is found digit by digit (radix selection): first a bracket of upper 16-bit digits that holds it, then, in one
pass over all scores, how many lie below the bracket and how often each value inside it occurs. For many scores the
bracket is guessed from a sample; where the guess was wrong, it is counted out.

Scores that are equal to the k-th are taken in index order, stream by stream, so that the choice is the same on every
machine; and because the order does not depend on k, what is chosen for a smaller k is always part of what is chosen for
a larger one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "INELIGIBLE",
    "Chooser",
    "KeyStream",
    "Keys",
    "NonFiniteScoreError",
    "Selection",
    "StreamSelection",
    "keys_of",
    "select_smallest",
]

Keys: TypeAlias = npt.NDArray[np.uint32]
KeyStream: TypeAlias = Callable[[int], Iterator[Keys]]
"""Called once for each pass; yields the keys of one tensor's units in index order, in windows of any size.

With 1 it yields all, with n it may yield only one in n, spread over the tensor.
"""

INELIGIBLE = np.uint32(0xFFFFFFFF)
"""The key of a unit that must not be chosen; above the key of every float32."""

_SIGN_CLEARED = np.uint32(0x7FFFFFFF)
_FIRST_NON_FINITE_DIGIT = 0x7F80  # exponent all ones: infinities and NaN
_FIRST_NON_FINITE_KEY = np.uint32(_FIRST_NON_FINITE_DIGIT << 16)
_DIGIT_BITS = 16
_DIGIT_COUNT = 1 << _DIGIT_BITS
# A sampled rank is off by far less than this share of all units unless the weights are sorted in some way.
_SAMPLE_MARGIN = 0.005
_MAX_BRACKET_DIGITS = 32


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


def select_smallest(streams: Sequence[KeyStream], ratio: float, *, sampled_share: int = 1) -> Selection:
    """Choose `round(ratio * units)` units, those of the smallest scores of all streams together.

    Args:
        streams: Read two or three times, in order.
        ratio: In [0, 1]. Ineligible units count as units; more than are eligible means all that are eligible.
        sampled_share: The bracket is guessed from one in this many units.

    Raises:
        NonFiniteScoreError: A score is NaN or infinite.
    """
    bracket = _bracket(streams, ratio, share=sampled_share)
    counts = [_count(index, stream, bracket) for index, stream in enumerate(streams)]
    wanted = min(round(ratio * sum(c.units for c in counts)), sum(c.eligible for c in counts))
    if wanted <= 0:
        nothing = (_selection(c, ties=0, chosen=0) for c in counts)
        return Selection(threshold=0.0, streams=tuple(nothing))
    below = sum(c.below for c in counts)
    if sampled_share > 1 and not below < wanted <= below + sum(int(c.occurrences.sum()) for c in counts):
        return select_smallest(streams, ratio)

    inside = np.zeros(bracket.num_keys, np.int64)
    for c in counts:
        inside[c.offsets] += c.occurrences
    cumulated = np.cumsum(inside)
    offset = int(np.searchsorted(cumulated, wanted - below))
    ties_left = wanted - below - int(cumulated[offset] - inside[offset])
    selections = []
    for c in counts:
        own_below = c.below + int(c.occurrences[c.offsets < offset].sum())
        ties = min(int(c.occurrences[c.offsets == offset].sum()), ties_left)
        ties_left -= ties
        selections.append(_selection(c, ties=ties, chosen=own_below + ties))
    threshold = np.array([bracket.first_key + offset], np.uint32).view(np.float32)[0]
    return Selection(threshold=float(threshold), streams=tuple(selections))


class Chooser:
    """Says again which units of one stream `select_smallest` chose; call it once for each window, in order."""

    def __init__(self, *, threshold: float, ties: int) -> None:
        self._limit = np.array([threshold], np.float32).view(np.uint32)[0]
        self._ties_left = ties

    def __call__(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """One boolean for each key."""
        chosen: npt.NDArray[np.bool_] = keys < self._limit
        if self._ties_left:
            equal = np.flatnonzero(keys == self._limit)[: self._ties_left]
            chosen[equal] = True
            self._ties_left -= len(equal)
        return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bracket:
    """Upper digits `first` to `last`."""

    first: int
    last: int

    @property
    def first_key(self) -> int:
        return self.first << _DIGIT_BITS

    @property
    def num_keys(self) -> int:
        return (self.last - self.first + 1) << _DIGIT_BITS


def _bracket(streams: Sequence[KeyStream], ratio: float, *, share: int) -> _Bracket:
    """The digits around the wanted score, by the units that the streams yield for `share`; one digit for 1."""
    counts = np.zeros(_DIGIT_COUNT, np.int64)
    for stream in streams:
        for keys in stream(share):
            counts += np.bincount((keys >> np.uint32(_DIGIT_BITS)).astype(np.intp), minlength=_DIGIT_COUNT)
    units = int(counts.sum())
    counts[-1] = 0  # the digit that only ineligible units have
    cumulated = np.cumsum(counts)
    rank = min(round(ratio * units), int(cumulated[-1]))
    margin = _SAMPLE_MARGIN * units if share > 1 else 0
    first = int(np.searchsorted(cumulated, max(rank - margin, 1)))
    last = int(np.searchsorted(cumulated, min(max(rank + margin, 1), cumulated[-1])))
    first = min(first, _FIRST_NON_FINITE_DIGIT)
    return _Bracket(first=first, last=min(max(first, last), first + _MAX_BRACKET_DIGITS - 1, _FIRST_NON_FINITE_DIGIT))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counts:
    """One stream against a bracket: how many keys are below it, and how often each key inside occurs.

    `offsets` are keys relative to the bracket's first; those that do not occur are left out, because there may be
    thousands of streams.
    """

    units: int
    eligible: int
    zeros: int
    below: int
    offsets: npt.NDArray[np.intp]
    occurrences: npt.NDArray[np.int64]


def _count(index: int, stream: KeyStream, bracket: _Bracket) -> _Counts:
    inside_counts = np.zeros(bracket.num_keys, np.int64)
    first, end = np.uint32(bracket.first_key), np.uint32(bracket.first_key + bracket.num_keys)
    units = ineligible = zeros = below = 0
    for keys in stream(1):
        units += keys.size
        zeros += keys.size - int(np.count_nonzero(keys))
        not_finite = keys >= _FIRST_NON_FINITE_KEY
        if not_finite.any():
            if (keys[not_finite] != INELIGIBLE).any():
                raise NonFiniteScoreError(index)
            ineligible += int(np.count_nonzero(not_finite))
        is_below = keys < first
        below += int(np.count_nonzero(is_below))
        inside = keys[(keys < end) & ~is_below]
        # Few keys are sorted faster than they are counted over the whole bracket; many (all zeros, say) are not.
        if inside.size > bracket.num_keys // 8:
            inside_counts += np.bincount((inside - first).astype(np.intp), minlength=bracket.num_keys)
        elif inside.size:
            occurring, occurrences = np.unique(inside - first, return_counts=True)
            inside_counts[occurring] += occurrences
    offsets = np.flatnonzero(inside_counts)
    return _Counts(
        units=units,
        eligible=units - ineligible,
        zeros=zeros,
        below=below,
        offsets=offsets,
        occurrences=inside_counts[offsets],
    )


def _selection(counts: _Counts, *, ties: int, chosen: int) -> StreamSelection:
    return StreamSelection(ties=ties, chosen=chosen, units=counts.units, eligible=counts.eligible, zeros=counts.zeros)
