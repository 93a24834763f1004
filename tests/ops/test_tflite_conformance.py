"""The TFLite emitters against ONNX's own cases: each passes in LiteRT, or a fact says why it can't be expressed."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from onnxprune.targets.tflite.ops import TFLITE, exclusions, load_emitters

pytest.importorskip("ai_edge_litert")

from tests.tflite_cases import official_cases
from tests.tflite_verdicts import PASSED, REFUSED, verdicts

load_emitters()

# Few, since every process that takes some collects all cases first.
GROUPS = 4

NUM_CASES = 1353
NUM_EXCLUDED = 58
NUM_OPERATORS = 178


def excluded_names() -> set[str]:
    return {case.name for case in official_cases() for pattern in exclusions() if fnmatchcase(case.name, pattern)}


@pytest.mark.slow
@pytest.mark.parametrize("group", range(GROUPS))
def test_official_cases_pass_in_litert_but_those_that_a_fact_excludes(group: int) -> None:
    names = [case.name for case in official_cases()][group::GROUPS]
    excluded = excluded_names()
    wrong = {
        name: verdict
        for name, verdict in verdicts(names).items()
        if not verdict.startswith(REFUSED if name in excluded else PASSED)
    }
    assert wrong == {}


def test_every_exclusion_names_a_case_and_a_fact() -> None:
    names = [case.name for case in official_cases()]
    idle = [pattern for pattern in exclusions() if not any(fnmatchcase(name, pattern) for name in names)]
    assert idle == []
    assert all(fact.strip() for fact in exclusions().values())


def test_the_number_of_cases_and_of_exclusions_is_known() -> None:
    assert len(official_cases()) == NUM_CASES
    assert len(excluded_names()) == NUM_EXCLUDED


def test_more_than_120_onnx_operators_are_emitted() -> None:
    operators = {key.op_type for key in TFLITE.keys() if not key.domain}  # noqa: SIM118 - a table is no dict
    assert len(operators) == NUM_OPERATORS >= 120
