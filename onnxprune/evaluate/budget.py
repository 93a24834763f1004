"""Limits that an artifact must keep. A limit that could not be measured is not kept."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pydantic import Field

from onnxprune.contracts import BudgetOutcome, Measurements, PassConfig, Score

__all__ = ["Budget", "check_budget", "is_at_most", "score_drop"]

# 0.876 - 0.866 is 0.010000000000000009: differences of floats are compared to this.
_ROUNDING = 1e-9


class Budget(PassConfig):
    """What an artifact may cost; limits that are not set are not looked at."""

    artifact_bytes: int | None = Field(default=None, ge=1, description="At most this many bytes to ship.")
    latency_ratio: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Median latency of the artifact over the source's, at most (0.5: twice as fast).",
    )
    score_drop: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="The score may get worse by at most this much (0.01: one point of a score from 0 to 1).",
    )
    fidelity_cosine: float | None = Field(
        default=None, ge=-1, le=1, description="Cosine between the outputs and the source's, at least."
    )
    fidelity_snr_db: float | None = Field(
        default=None, allow_inf_nan=False, description="Signal-to-noise ratio of the outputs in decibels, at least."
    )
    fidelity_max_abs: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="Largest absolute difference of an output, at most."
    )


def check_budget(budget: Budget, measured: Measurements, *, source: Measurements) -> tuple[BudgetOutcome, ...]:
    """One outcome for each limit that is set, in the order of the fields of `Budget`."""
    return tuple(_outcomes(budget, measured, source))


def _outcomes(budget: Budget, measured: Measurements, source: Measurements) -> Iterator[BudgetOutcome]:
    target = measured.target
    if budget.artifact_bytes is not None:
        yield _at_most("artifact_bytes", target, budget.artifact_bytes, float(measured.size_bytes))
    if budget.latency_ratio is not None:
        yield _latency_outcome(budget.latency_ratio, measured)
    if budget.score_drop is not None:
        drop, note = _score_drop(measured, source)
        yield _at_most("score_drop", target, budget.score_drop, drop, note)
    difference = measured.fidelity.difference if measured.fidelity is not None else None
    note = "" if difference is not None else "Outputs were not compared."
    if measured.fidelity is not None and measured.fidelity.data == "random":
        note = "Measured on random inputs, which say little about real ones."
    if budget.fidelity_cosine is not None:
        cosine = difference.cosine if difference is not None else None
        yield _at_least("fidelity_cosine", target, budget.fidelity_cosine, cosine, note)
    if budget.fidelity_snr_db is not None:
        snr_db = difference.snr_db if difference is not None else None
        yield _at_least("fidelity_snr_db", target, budget.fidelity_snr_db, snr_db, note)
    if budget.fidelity_max_abs is not None:
        max_abs = difference.max_abs if difference is not None else None
        yield _at_most("fidelity_max_abs", target, budget.fidelity_max_abs, max_abs, note)


def _latency_outcome(limit: float, measured: Measurements) -> BudgetOutcome:
    latency = measured.latency
    if latency is None:
        return _at_most("latency_ratio", measured.target, limit, None, "Latency was not measured.")
    # `LatencyRatio` is a speed-up, before over after; the budget is the other way round.
    found = f"{1 / latency.ratio:.3g}, 95 % interval {1 / latency.high:.3g} to {1 / latency.low:.3g}"
    if not measured.latency_on_target:
        note = f"Not measured on the target: this machine, on which it is {found}, says nothing about it."
        return _at_most("latency_ratio", measured.target, limit, None, note)
    return _at_most("latency_ratio", measured.target, limit, 1 / latency.ratio, f"Measured {found}.")


def _score_drop(measured: Measurements, source: Measurements) -> tuple[float | None, str]:
    before, after = source.score, measured.score
    if before is None or after is None:
        return None, "The score was not measured."
    return score_drop(before, after), f"{before.metric}: {before.value:.4g} before, {after.value:.4g} after."


def score_drop(before: Score, after: Score) -> float:
    """By how much `after` is worse than `before`; negative where it is better."""
    return before.value - after.value if before.higher_is_better else after.value - before.value


def is_at_most(actual: float, limit: float) -> bool:
    """True when `actual` keeps `limit`, whatever floats say in the last digits; NaN keeps none."""
    return actual <= limit + _ROUNDING * max(1.0, abs(limit))


def _at_most(name: str, target: str, limit: float, actual: float | None, note: str = "") -> BudgetOutcome:
    met = actual is not None and is_at_most(actual, limit)
    return BudgetOutcome(name=name, target=target, limit=limit, actual=actual, met=met, note=note)


def _at_least(name: str, target: str, limit: float, actual: float | None, note: str = "") -> BudgetOutcome:
    met = actual is not None and not math.isnan(actual) and actual >= limit - _ROUNDING * max(1.0, abs(limit))
    return BudgetOutcome(name=name, target=target, limit=limit, actual=actual, met=met, note=note)
