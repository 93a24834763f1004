"""`onnxprune run --latency-ratio` and `--verify-pruning` from the outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onnxprune.passes.prune.latency_search import Stopwatch

Command = Callable[..., Any]
FAST = ("--set", "measure.min_seconds=0.05", "--set", "measure.load=false")


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


def test_widths_chosen_by_time_stand_in_the_plan_and_are_repeated_without_timing(
    onnxprune_command: Command, classifier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--passes", "prune", "--latency-ratio", "0.6", "--verify-pruning", "--json", *FAST)
    first = onnxprune_command("run", classifier.path, *options, "--out", tmp_path / "a")
    assert first.code == 0, first.stderr
    figures = json.loads(first.stdout)["passes"][0]["figures"]
    assert figures["oracle_difference"] < 1e-4
    lock = tmp_path / "a" / "plan.lock.json"
    (planned,) = json.loads(lock.read_text(encoding="utf-8"))["passes"]
    assert planned["plan"]["latency_ratio_measured"] == figures["latency_ratio_measured"]
    monkeypatch.setattr(Stopwatch, "__init__", lambda *_, **__: pytest.fail("timed again"))
    again = onnxprune_command("run", classifier.path, "--plan", lock, "--json", *FAST, "--out", tmp_path / "b")
    assert again.code == 0, again.stderr
    files = [json.loads(result.stdout)["artifacts"][0]["files"] for result in (first, again)]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--passes", "prune", "--no-measure"), "nothing is measured in this run"),
        (
            ("--passes", "prune", "--target", "ort-mobile", "--set", "targets.ort-mobile.platform=arm64"),
            "is not the target 'ort-mobile'",
        ),
        (("--passes", "simplify"), "'--latency-ratio' is for the pass 'prune'"),
        (("--passes", "prune", "--set", "prune.channel_multiple=8"), "leave channel_multiple alone"),
        (("--passes", "prune", "--set", "prune.ratio=0.5"), "not '--latency-ratio' and 'ratio'"),
    ],
    ids=["no-measure", "another-machine", "no-prune", "multiple", "two-targets"],
)
def test_a_time_that_can_not_be_measured_is_refused_before_anything_is_opened(
    onnxprune_command: Command, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = onnxprune_command("run", tmp_path / "missing.onnx", "--latency-ratio", "0.5", *options)
    assert result.code == 2
    assert message in result.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ratio", ["0", "1.5", "half"])
def test_a_time_that_is_no_part_of_the_original_is_refused(
    onnxprune_command: Command, tmp_path: Path, ratio: str
) -> None:
    assert onnxprune_command("run", tmp_path / "m.onnx", "--passes", "prune", "--latency-ratio", ratio).code == 2


def test_a_plan_can_be_repeated_with_a_check_that_it_was_not_made_with(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    made = onnxprune_command("run", classifier.path, "--passes", "prune", "--no-measure", "--out", tmp_path / "a")
    assert made.code == 0, made.stderr
    lock = tmp_path / "a" / "plan.lock.json"
    options = ("--plan", lock, "--passes", "prune", "--verify-pruning", "--no-measure", "--json")
    checked = onnxprune_command("run", classifier.path, *options, "--out", tmp_path / "b")
    assert checked.code == 0, checked.stderr
    assert json.loads(checked.stdout)["passes"][0]["figures"]["oracle_difference"] < 1e-4
