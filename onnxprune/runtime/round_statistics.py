"""What a few rounds of timing tell about a ratio, and whether more of them are needed.

A verdict is kept on disk for good, so it must not come from rounds that agree by chance. The error is that of the
trimmed mean (Tukey, McLaughlin 1963; Yuen 1974): one round may be off on either side, as bursts of other work make
it. Student's t widens it for the few rounds that are left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["MIN_ROUNDS", "is_settled", "mean_and_error"]

MIN_ROUNDS = 5
# Nothing is known better than this, whatever a handful of rounds says by chance.
_LEAST_ERROR = 0.002
# Two errors are as far as so many standard deviations of a normal distribution, which leaves 1.4 % beyond them. With
# the looks in between, at most 2.5 % of equal pairs were called slower, and 3.4 % faster, for noise of 0.5 to 8 % a
# round (Monte Carlo, independent normal noise).
_DEVIATIONS_OF_TWO_ERRORS = 2.2
# So many errors end the rounds early. A slower second throws integers away, so that takes more.
_CLEARLY_FASTER = 3.0
_CLEARLY_SLOWER = 6.0
_DOUBTFULLY_SLOWER = 2.0


def mean_and_error(ratios: Sequence[float]) -> tuple[float, float]:
    """The mean of at least `MIN_ROUNDS` ratios without the largest and the smallest, and its error.

    It is beyond two errors from the true one with a chance of 1.4 % on either side, however few the rounds.
    """
    ordered = np.sort(np.asarray(ratios, dtype=np.float64))
    count = len(ordered)
    if count < MIN_ROUNDS:
        raise ValueError(f"{count} rounds are too few to tell an error from.")
    mean = float(ordered[1:-1].mean())
    winsorized = np.clip(ordered, ordered[1], ordered[-2])
    standard_error = float(np.std(winsorized, ddof=1)) / ((1 - 2 / count) * count**0.5)
    return mean, max(standard_error * _student_t(_DEVIATIONS_OF_TWO_ERRORS, count - 3) / 2, _LEAST_ERROR * mean)


def is_settled(ratio: float, error: float, *, tolerance: float) -> bool:
    """True when further rounds would change nothing: which is faster is clear, or the ratio is known to `tolerance`."""
    distance = (ratio - 1) / error
    if distance > _CLEARLY_FASTER or distance < -_CLEARLY_SLOWER:
        return True
    return error <= tolerance * ratio and distance > -_DOUBTFULLY_SLOWER


def _student_t(deviations: float, freedom: float) -> float:
    """The quantile of Student's t where a normal one is at `deviations` (Abramowitz, Stegun 1964, 26.7.5)."""
    z = deviations
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
