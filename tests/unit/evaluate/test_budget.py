"""Budgets: what is kept, what is missed, and what could not be measured."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from pydantic import ValidationError

from onnxprune.contracts import (
    Fidelity,
    LatencyRatio,
    LatencySummary,
    Measurements,
    OutputDifference,
    Score,
)
from onnxprune.evaluate.budget import Budget, check_budget

SUMMARY = LatencySummary(p50_ms=1, p90_ms=1, p99_ms=1, num_runs=9, num_warmup=1, threads=1)
SOURCE = Measurements(target="source", size_bytes=1000, score=Score(metric="top-1 accuracy", value=0.876))
MEASURED = Measurements(
    target="onnx",
    size_bytes=400,
    score=Score(metric="top-1 accuracy", value=0.866),
    fidelity=Fidelity(
        difference=OutputDifference(max_abs=0.5, max_rel=0.1, cosine=0.99, snr_db=20.0), num_samples=4, data="eval"
    ),
    latency=LatencyRatio(ratio=2.0, low=1.6, high=2.5, before=SUMMARY, after=SUMMARY),
    latency_on_target=True,
)


@pytest.mark.parametrize(
    ("name", "kept", "missed", "actual"),
    [
        ("artifact_bytes", 400, 399, 400.0),
        ("latency_ratio", 0.5, 0.49, 0.5),
        ("score_drop", 0.01, 0.0099, 0.01),
        ("fidelity_cosine", 0.99, 0.991, 0.99),
        ("fidelity_snr_db", 20.0, 20.1, 20.0),
        ("fidelity_max_abs", 0.5, 0.49, 0.5),
    ],
)
def test_limit_itself_is_kept_and_beyond_is_missed(name: str, kept: float, missed: float, actual: float) -> None:
    for limit, met in ((kept, True), (missed, False)):
        (outcome,) = check_budget(Budget.model_validate({name: limit}), MEASURED, source=SOURCE)
        assert (outcome.name, outcome.target, outcome.limit, outcome.met) == (name, "onnx", limit, met)
        assert outcome.actual == pytest.approx(actual, abs=1e-12)  # 0.876 - 0.866 is not quite 0.01


def test_only_limits_that_are_set_have_an_outcome() -> None:
    assert check_budget(Budget(), MEASURED, source=SOURCE) == ()
    outcomes = check_budget(Budget(score_drop=0.5, artifact_bytes=1), MEASURED, source=SOURCE)
    assert [outcome.name for outcome in outcomes] == ["artifact_bytes", "score_drop"]


def test_what_was_not_measured_is_missed() -> None:
    bare = Measurements(target="onnx", size_bytes=400)
    budget = Budget(latency_ratio=1, score_drop=1, fidelity_cosine=0, fidelity_snr_db=0, fidelity_max_abs=9)
    outcomes = check_budget(budget, bare, source=SOURCE)
    assert len(outcomes) == 5
    assert all(outcome.actual is None and not outcome.met and outcome.note for outcome in outcomes)


def test_latency_on_another_machine_says_nothing_about_the_target() -> None:
    elsewhere = replace(MEASURED, latency_on_target=False)
    (outcome,) = check_budget(Budget(latency_ratio=0.9), elsewhere, source=SOURCE)
    assert (outcome.actual, outcome.met) == (None, False)
    assert outcome.note.startswith("Not measured on the target")


def test_latency_note_has_the_interval_turned_round() -> None:
    (outcome,) = check_budget(Budget(latency_ratio=0.9), MEASURED, source=SOURCE)
    assert outcome.note == "Measured 0.5, 95 % interval 0.4 to 0.625."


def test_loss_that_rises_is_a_drop() -> None:
    before = replace(SOURCE, score=Score(metric="loss", value=1.0, higher_is_better=False))
    after = replace(MEASURED, score=Score(metric="loss", value=1.5, higher_is_better=False))
    (outcome,) = check_budget(Budget(score_drop=0.4), after, source=before)
    assert (outcome.actual, outcome.met) == (0.5, False)


def test_better_score_is_a_negative_drop_and_can_be_demanded() -> None:
    better = replace(MEASURED, score=Score(metric="top-1 accuracy", value=0.9))
    assert check_budget(Budget(score_drop=-0.02), better, source=SOURCE)[0].met
    assert not check_budget(Budget(score_drop=-0.03), better, source=SOURCE)[0].met


def test_equal_outputs_keep_any_noise_limit_and_random_inputs_are_noted() -> None:
    equal = OutputDifference(max_abs=0, max_rel=0, cosine=1, snr_db=math.inf)
    measured = replace(MEASURED, fidelity=Fidelity(difference=equal, num_samples=1, data="random"))
    (outcome,) = check_budget(Budget(fidelity_snr_db=200), measured, source=SOURCE)
    assert outcome.met
    assert "random inputs" in outcome.note


@pytest.mark.parametrize(
    "settings",
    [
        {"artefact_bytes": 3},
        {"artifact_bytes": 0},
        {"latency_ratio": 0},
        {"fidelity_cosine": 1.5},
        {"score_drop": math.nan},
    ],
)
def test_impossible_limits_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Budget.model_validate(settings)


def test_every_limit_is_described() -> None:
    assert all(field.description for field in Budget.model_fields.values())
