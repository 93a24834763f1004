"""Where two models drift apart: tensor by tensor, over samples, in memory that does not depend on their number.

With reference r and actual a, all numbers of one tensor over all samples taken as one vector:

    snr_db     10 log10(sum r^2 / sum (a - r)^2)      infinite where equal
    cosine     <r, a> / (|r| |a|)                     1 where both are zero throughout, 0 where one is
    kl_nats    divergence of the two histograms       see `onnxprune.evaluate.value_counts`
    max_abs    max |a - r|

Numbers that are not finite count as equal where both have the same one at the same place. Where they differ, max_abs
and kl_nats are infinite, cosine is 0 and snr_db is minus infinity.

No runtime is named here: a `TensorSource` makes a `Runner` that returns the tensors it is asked for, whatever computes
them. Each tensor costs a few sums and two small histograms. Tensors that together need more than `MAX_BYTES` are taken
in several sweeps over the samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxprune.contracts import Batch, NullProgress, Progress, Runner
from onnxprune.data.fit import is_float, shape_text
from onnxprune.errors import BadDataError
from onnxprune.evaluate.feeds import feeds_for
from onnxprune.evaluate.value_counts import PairedHistogram

__all__ = [
    "MAX_BYTES",
    "ComparedTensors",
    "TensorDifference",
    "TensorPair",
    "TensorSource",
    "TensorSums",
    "compare_tensors",
    "noise_ratio",
]

MAX_BYTES = 1 << 30
"""Tensors that runtimes hand out at once; more are taken in further sweeps over the samples."""

UNKNOWN_TENSOR_BYTES = 4 << 20
"""Assumed for a tensor whose size is not known."""


_PIECE = 1 << 15


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPair:
    """Two tensors that stand for the same thing: `reference` in one model, `actual` in the other.

    `size_bytes` is what both together take for one batch.
    """

    reference: str
    actual: str
    size_bytes: int = UNKNOWN_TENSOR_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """How far one tensor is from its reference; see the top of `onnxprune.evaluate.tensor_diff`.

    `max_reference` is the largest absolute value of the reference, `num_values` how many numbers were compared.
    """

    name: str
    actual_name: str
    snr_db: float
    cosine: float
    kl_nats: float
    max_abs: float
    max_reference: float
    num_values: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedTensors:
    """Every pair that could be compared, in the order given, and why the others could not."""

    tensors: tuple[TensorDifference, ...]
    not_compared: Mapping[str, str]
    num_batches: int
    num_sweeps: int


class TensorSource(Protocol):
    """A model that can be asked for the tensors inside it."""

    def runner(self, names: Sequence[str]) -> Runner:
        """A runner that gives at least the tensors called `names`."""
        ...


class TensorSums:
    """The running sums of one pair of tensors."""

    def __init__(self, *, with_histogram: bool = True) -> None:
        self._reference_power = 0.0
        self._actual_power = 0.0
        self._product = 0.0
        self._error_power = 0.0
        self._max_abs = 0.0
        self._max_reference = 0.0
        self._num_values = 0
        self._is_broken = False
        self._histogram = PairedHistogram() if with_histogram else None

    def add(self, reference: npt.NDArray[Any], actual: npt.NDArray[Any]) -> None:
        """Count in the numbers of one batch, the same shape in both."""
        self._num_values += reference.size
        first, second = reference.reshape(-1), actual.reshape(-1)
        # In pieces that stay in the processor's cache: several times as fast.
        for start in range(0, first.size, _PIECE):
            piece = slice(start, start + _PIECE)
            self._add(first[piece].astype(np.float64), second[piece].astype(np.float64))

    def _add(self, r: npt.NDArray[np.float64], a: npt.NDArray[np.float64]) -> None:
        with np.errstate(invalid="ignore"):
            error = a - r
        error_power = float(error @ error)
        # One sum tells whether all numbers are finite, but for squares that overflow.
        if not math.isfinite(error_power):
            finite = np.isfinite(r) & np.isfinite(a)
            if not np.array_equal(r[~finite], a[~finite], equal_nan=True):
                self._is_broken = True
            r, a = r[finite], a[finite]
            error = a - r
            error_power = float(error @ error)
        if r.size == 0:
            return
        self._reference_power += float(r @ r)
        self._actual_power += float(a @ a)
        self._product += float(r @ a)
        self._error_power += error_power
        self._max_abs = max(self._max_abs, float(error.max()), -float(error.min()))
        self._max_reference = max(self._max_reference, float(r.max()), -float(r.min()))
        if self._histogram is not None:
            self._histogram.add(r, a)

    @property
    def snr_db(self) -> float:
        """The signal-to-noise ratio so far."""
        if self._is_broken:
            return -math.inf
        if self._error_power == 0.0:
            return math.inf
        ratio = self._reference_power / self._error_power
        return 10.0 * math.log10(ratio) if ratio > 0.0 else -math.inf

    @property
    def cosine(self) -> float:
        """The cosine so far."""
        if self._is_broken:
            return 0.0
        if self._error_power == 0.0:
            return 1.0
        norms = math.sqrt(self._reference_power) * math.sqrt(self._actual_power)
        return min(1.0, max(-1.0, self._product / norms)) if norms > 0.0 else 0.0

    def difference(self, pair: TensorPair) -> TensorDifference:
        """Everything about the pair so far."""
        kl_nats = math.nan
        if self._histogram is not None:
            kl_nats = math.inf if self._is_broken else self._histogram.kl_nats()
        return TensorDifference(
            name=pair.reference,
            actual_name=pair.actual,
            snr_db=self.snr_db,
            cosine=self.cosine,
            kl_nats=kl_nats,
            max_abs=math.inf if self._is_broken else self._max_abs,
            max_reference=self._max_reference,
            num_values=self._num_values,
        )


def noise_ratio(snr_db: float) -> float:
    """Noise power over signal power: 20 dB is 0.01, infinitely many are 0."""
    if snr_db == math.inf:
        return 0.0
    return math.inf if snr_db < -3000 else float(10.0 ** (-snr_db / 10.0))


def compare_tensors(
    reference: TensorSource,
    actual: TensorSource,
    pairs: Sequence[TensorPair],
    batches: Iterable[Batch],
    *,
    with_histograms: bool = True,
    max_bytes: int = MAX_BYTES,
    progress: Progress | None = None,
) -> ComparedTensors:
    """The difference of every pair over all batches, in the order of `pairs`.

    A pair whose shapes differ, or that is not of floats on both sides, is not compared; the result says so.

    Args:
        reference: The model to compare with.
        actual: The other one; may be the same object, which then runs once for both sides.
        pairs: Names that correspond; each reference name once.
        batches: Iterated once for each sweep: always the same batches.
        with_histograms: False leaves `kl_nats` out (NaN), which takes most of the time.
        max_bytes: See `MAX_BYTES`.
        progress: Follows the batches.

    Raises:
        BadDataError: There are no batches.
    """
    progress = progress or NullProgress()
    sums: dict[str, TensorSums] = {}
    not_compared: dict[str, str] = {}
    sweeps = _sweeps(pairs, max_bytes)
    num_batches = 0
    for number, group in enumerate(sweeps, start=1):
        wanted, found = [pair.reference for pair in group], [pair.actual for pair in group]
        is_same = actual is reference
        first = reference.runner([*wanted, *found] if is_same else wanted)
        second = first if is_same else actual.runner(found)
        text = "Comparing tensors" if len(sweeps) == 1 else f"Comparing tensors, sweep {number} of {len(sweeps)}"
        num_batches = 0
        for batch in progress.track(batches, text):
            expected = first.run(feeds_for(first.inputs, batch))
            given = expected if is_same else second.run(feeds_for(second.inputs, batch))
            for pair in group:
                reason = _reason_not_to_compare(expected[pair.reference], given[pair.actual])
                if reason is not None:
                    not_compared.setdefault(pair.reference, reason)
                elif pair.reference not in not_compared:
                    found_sums = sums.setdefault(pair.reference, TensorSums(with_histogram=with_histograms))
                    found_sums.add(expected[pair.reference], given[pair.actual])
            num_batches += 1
    if pairs and num_batches == 0:
        raise BadDataError("There are no samples to compare tensors on.", "Give at least one.")
    return ComparedTensors(
        tensors=tuple(
            sums[pair.reference].difference(pair)
            for pair in pairs
            if pair.reference in sums and pair.reference not in not_compared
        ),
        not_compared=not_compared,
        num_batches=num_batches,
        num_sweeps=len(sweeps),
    )


def _reason_not_to_compare(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> str | None:
    if not (is_float(one.dtype) and is_float(other.dtype)):
        return f"it is {one.dtype} here and {other.dtype} there, and floats are compared"
    if one.shape != other.shape:
        return f"its shape is {shape_text(one.shape)} here and {shape_text(other.shape)} there"
    return None


def _sweeps(pairs: Sequence[TensorPair], max_bytes: int) -> list[list[TensorPair]]:
    """Pairs in groups that fit into `max_bytes`; one that does not fit stands alone."""
    sweeps: list[list[TensorPair]] = []
    filled = 0
    for pair in pairs:
        if not sweeps or filled + pair.size_bytes > max_bytes:
            sweeps.append([])
            filled = 0
        sweeps[-1].append(pair)
        filled += pair.size_bytes
    return sweeps
