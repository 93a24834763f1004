"""`onnxprune run --max-drop` and `--min-snr` from the outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onnxprune.convert.onnx_file import load_onnx
from onnxprune.graph.writer import content_hash
from onnxprune.passes.quant.goals import ScoreGoal
from onnxprune.pipeline import run
from onnxprune.pipeline.fallback import promise_warnings

Command = Callable[..., Any]
FAST = ("--set", "measure.min_seconds=0.05", "--set", "measure.load=false", "--no-cache")


def test_layers_return_until_the_drop_holds_and_the_plan_repeats_that_unscored(
    onnxprune_command: Command, classifier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = onnxprune_command(
        "run", classifier.path, "--passes", "simplify,quant", "--calibration", classifier.calibration,
        "--eval", classifier.labelled, "--max-drop", "0.05", "--set", "quant.weight_bits=4", "--json", *FAST,
        "--out", tmp_path / "a",
    )  # fmt: skip
    assert first.code == 0, first.stderr
    report = json.loads(first.stdout)
    quant = report["passes"][1]
    assert quant["figures"]["without_fallback"] > 0.05 >= quant["figures"]["with_fallback"]
    assert quant["figures"]["fallback_layers"] == report["measurements"][0]["fallback"]["num_layers"]
    assert report["source_measurements"]["score"]["value"] - report["measurements"][0]["score"]["value"] <= 0.05
    timed = report["measurements"][0]["fallback"]["latency"]
    assert timed["before"]["p50_ms"] > 0
    assert timed["after"]["p50_ms"] > 0
    monkeypatch.setattr(ScoreGoal, "__init__", lambda *_, **__: pytest.fail("scored again"))
    again = onnxprune_command(
        "run", classifier.path, "--plan", tmp_path / "a" / "plan.lock.json", "--json", *FAST, "--out", tmp_path / "b"
    )
    assert again.code == 0, again.stderr
    repeated = json.loads(again.stdout)
    assert repeated["artifacts"][0]["files"] == report["artifacts"][0]["files"]
    assert repeated["passes"][1]["notes"] == quant["notes"]


def test_terminal_says_what_returned_and_what_it_costs(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    result = onnxprune_command(
        "run", classifier.path, "--passes", "simplify,quant", "--calibration", classifier.calibration,
        "--min-snr", "25", "--set", "quant.weight_bits=4", *FAST, "--out", tmp_path / "a",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert "layers are back in float" in text
    assert "onnx: fallback of" in text
    assert "layers in float, simulated: the outputs keep" in result.stderr


def test_goal_before_a_repair_is_held_against_the_float_model_and_said_to_be_settled_early(
    onnxprune_command: Command, classifier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    references = []
    monkeypatch.setattr(
        run, "promise_warnings", lambda state, *rest: references.append(state.model) or promise_warnings(state, *rest)
    )
    result = onnxprune_command(
        "run", classifier.path, "--passes", "quant,adaround", "--calibration", classifier.calibration,
        "--min-snr", "15", "--set", "quant.weight_bits=4", "--set", "adaround.num_samples=8", "--json", *FAST,
        "--out", tmp_path / "a",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["passes"][1]["figures"]["weights_rounded"] > 0
    assert [content_hash(model) for model in references] == [content_hash(load_onnx(classifier.path))]
    (text,) = [text for text in report["warnings"] if "settled inside 'quant'" in text]
    assert "before 'adaround' could repair them" in text


def test_what_is_not_measured_says_so(onnxprune_command: Command, classifier: Any, tmp_path: Path) -> None:
    result = onnxprune_command(
        "run", classifier.path, "--passes", "simplify,quant", "--calibration", classifier.calibration,
        "--min-snr", "25", "--set", "quant.weight_bits=4", "--no-measure", *FAST, "--out", tmp_path / "a",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    assert "costs is not measured: latency is not measured in this run" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-drop", "0.1", "--passes", "quant"), "an evaluator"),
        (("--max-drop", "0.1", "--min-snr", "20", "--passes", "quant"), "exclude each other"),
        (("--min-snr", "20", "--passes", "simplify"), "'--min-snr' is for the pass 'quant'"),
        (("--min-snr", "20", "--passes", "quant", "--set", "quant.max_drop=0.1"), "not '--min-snr' and 'max_drop'"),
        (("--min-snr", "20", "--passes", "quant,quant"), "can't tell which"),
    ],
    ids=["no-evaluator", "two-goals", "no-quant", "two-places", "two-passes"],
)
def test_a_goal_that_can_not_be_held_is_refused_before_anything_is_opened(
    onnxprune_command: Command, classifier: Any, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = onnxprune_command(
        "run", tmp_path / "missing.onnx", "--calibration", classifier.calibration, *options, "--out", tmp_path / "a"
    )
    assert result.code == 2
    assert message in result.stderr.replace("\n", " ")
