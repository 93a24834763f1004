"""What a report says about the judgement of a step."""

from __future__ import annotations

import pytest

from onnxprune.passes.layerwise.gain import Gain
from onnxprune.passes.layerwise.report import gain_notes


def gain(before_db: float, after_db: float) -> Gain:
    return Gain(before_db=before_db, after_db=after_db, measured_on="8 held-out samples")


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (gain(23.12, 23.09), "hardly changed the outputs (23.1 -> 23.1 dB"),
        (gain(23.1, 21.0), "made the outputs worse (23.1 -> 21.0 dB"),
        (gain(23.1, 23.2), "hardly changed the outputs (23.1 -> 23.2 dB"),
    ],
    ids=["worse-by-less-than-is-shown", "worse", "not-worth-it"],
)
def test_verdict_on_a_step_that_was_undone_agrees_with_the_figures_beside_it(found: Gain, verdict: str) -> None:
    (note,) = gain_notes(found, is_undone=True, subject="the factors", count=0, skipped=(), idle="")
    assert note.startswith(f"Undone: the factors would have {verdict}")


def test_no_data_and_nothing_done_are_told_apart() -> None:
    (text,) = gain_notes(None, is_undone=False, subject="the factors", count=2, skipped=("conv",), idle="all is float")
    assert text == "Not judged: there were no data, so it is not known whether the factors help."


@pytest.mark.parametrize(
    ("skipped", "text"),
    [
        ((), "Nothing was done: all is float."),
        (("conv",), "Nothing was done: the report has a reason for each layer that was skipped."),
    ],
)
def test_step_that_did_nothing_says_where_the_reason_is(skipped: tuple[str, ...], text: str) -> None:
    assert gain_notes(None, is_undone=False, subject="the factors", count=0, skipped=skipped, idle="all is float") == (
        text,
    )


def test_step_that_helped_needs_no_note() -> None:
    assert gain_notes(gain(20.0, 23.0), is_undone=False, subject="the factors", count=2, skipped=(), idle="") == ()
