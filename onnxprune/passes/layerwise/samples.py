"""A bounded number of calibration samples: some to decide with, others to judge the decision on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from onnxprune.contracts import Batch, CalibrationSource
from onnxprune.errors import BadDataError
from onnxprune.passes.calibration import batch_size

__all__ = ["MAX_INPUT_BYTES", "SampleSplit", "count_samples", "split_samples"]

MAX_INPUT_BYTES = 256 << 20
"""Samples that are held in memory together take no more than this."""

# Every fourth batch judges: enough for a stable ratio of signal to noise, and most are left to decide with.
_JUDGE_EVERY = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSplit:
    """Batches to decide with and batches to judge on, both spread evenly over the calibration set."""

    fit: tuple[Batch, ...]
    judge: tuple[Batch, ...]
    is_held_out: bool
    """False where the set has a single batch, which then serves for both."""

    @property
    def judged_on(self) -> str:
        """For reports: what the figures were measured on."""
        kind = "held-out samples" if self.is_held_out else "the samples it was decided with (there is one batch only)"
        return f"{count_samples(self.judge)} {kind}"


def split_samples(source: CalibrationSource, *, max_samples: int) -> SampleSplit:
    """At most `max_samples` samples of `source`, and no more than `MAX_INPUT_BYTES`, a quarter of them to judge on.

    Raises:
        BadDataError: The source has no sample.
    """
    first = next(iter(source), None)
    if first is None:
        raise BadDataError("The calibration data hold no sample.", "Give at least one; 32 to 512 are usual.")
    num_batches = math.ceil(source.num_samples / max(batch_size(first), 1))
    bytes_each = max(1, sum(array.nbytes for array in first.values()))
    wanted = min(num_batches, max(1, max_samples // max(batch_size(first), 1)), max(2, MAX_INPUT_BYTES // bytes_each))
    chosen = {number * num_batches // wanted for number in range(wanted)}
    taken = tuple(dict(batch) for number, batch in enumerate(source) if number in chosen)
    if len(taken) < 2:
        return SampleSplit(fit=taken, judge=taken, is_held_out=False)
    every = min(_JUDGE_EVERY, len(taken))
    return SampleSplit(
        fit=tuple(batch for number, batch in enumerate(taken) if number % every != every - 1),
        judge=tuple(batch for number, batch in enumerate(taken) if number % every == every - 1),
        is_held_out=True,
    )


def count_samples(batches: Iterable[Batch]) -> int:
    """Samples in all batches together."""
    return sum(batch_size(batch) for batch in batches)
