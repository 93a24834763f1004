"""Blocks of passes that run several times around: pruning in steps with recovery between."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

Command = Callable[..., Any]
FAST = ("--no-measure",)


@pytest.fixture(autouse=True)
def third_party_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`refit` and `stumble`, as an installed package would bring them."""
    found = [
        SimpleNamespace(name="refit", value="tests.e2e.refit:RefitPass", dist=SimpleNamespace(name="theirs")),
        SimpleNamespace(name="stumble", value="tests.e2e.refit:StumblePass", dist=SimpleNamespace(name="theirs")),
    ]
    own = importlib.metadata.entry_points
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda **selection: found if selection.get("group") == "onnxprune.passes" else own(**selection),
    )


def write_recipe(tmp_path: Path, block: str, rest: str = "") -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(f"passes = [{{ {block} }}]\n{rest}", encoding="utf-8")
    return path


def widths(out: Path) -> dict[str, int]:
    """Filters of each convolution of the artifact."""
    model = onnx.load(next((out / "onnx").glob("*.onnx")))
    return {w.name: w.dims[0] for w in model.graph.initializer if w.name.startswith("conv") and len(w.dims) == 4}


def artifact_hash(out: Path) -> str:
    return hashlib.sha256(next((out / "onnx").glob("*.onnx")).read_bytes()).hexdigest()


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


PRUNE_AND_REFIT = (
    'name = "repeat", times = 4, passes = [{ name = "prune", ratio = 0.5, channel_multiple = 1 }, "refit"]'
)


def test_each_time_around_has_its_report_and_all_of_them_come_to_the_ratio(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path, PRUNE_AND_REFIT)
    result = onnxprune_command(
        "run", classifier.path, "--recipe", recipe, "--calibration", classifier.calibration, "--out", out, *FAST
    )
    assert result.code == 0, result.stderr
    passes = report_of(out)["passes"]
    assert [entry["pass_id"] for entry in passes] == [
        *(f"{name}@{number}" for number in (1, 2, 3, 4) for name in ("prune", "refit")),
        "repeat",
    ]
    by_id = {entry["pass_id"]: entry for entry in passes}
    # 32, 48 and 64 filters lose an eighth of the original each time, and half of it in all.
    removed = [by_id[f"prune@{k}"]["figures"] for k in (1, 2, 3, 4)]
    assert [figures["channels_before"] - figures["channels_after"] for figures in removed] == [18, 18, 18, 18]
    assert widths(out) == {"conv1.weight": 16, "conv2.weight": 24, "conv3.weight": 32}
    assert by_id["repeat"]["figures"]["iterations"] == 4
    assert "[8/8] refit@4" in result.stderr


def test_the_recovery_between_sees_what_the_block_began_with(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    with_refit = write_recipe(tmp_path, PRUNE_AND_REFIT)
    data = ("--calibration", classifier.calibration, "--set", "measure.latency=false", "--set", "measure.load=false")
    onnxprune_command("run", classifier.path, "--recipe", with_refit, "--out", tmp_path / "a", *data)
    without = write_recipe(tmp_path, PRUNE_AND_REFIT.replace(', "refit"', ""))
    onnxprune_command("run", classifier.path, "--recipe", without, "--out", tmp_path / "b", *data)
    recovered, lost = (
        report_of(tmp_path / name)["measurements"][0]["fidelity"]["difference"]["max_abs"] for name in ("a", "b")
    )
    # Ten outputs fitted with 33 free numbers each on 16 samples: all but the ridge's share comes back.
    assert recovered < 0.1 * lost


def test_a_run_that_fails_in_the_third_iteration_resumes_there(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    out, stone = tmp_path / "out", tmp_path / "stone"
    block = f'name = "repeat", times = 4, passes = ["prune", {{ name = "stumble", stone = "{stone}" }}]'
    arguments = ("run", classifier.path, "--recipe", write_recipe(tmp_path, block), "--out", out, *FAST)
    stone.touch()
    assert onnxprune_command(*arguments).code == 9
    stone.unlink()
    assert onnxprune_command(*arguments).code == 0
    resumed = {entry["pass_id"]: entry["resumed"] for entry in report_of(out)["passes"]}
    assert [name for name, was_resumed in resumed.items() if was_resumed] == [
        "prune@1",
        "stumble@1",
        "prune@2",
        "stumble@2",
        "prune@3",
    ]


def test_a_run_that_is_killed_in_the_third_iteration_resumes_there(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path, 'name = "repeat", times = 6, passes = [{ name = "prune", ratio = 0.5 }]')
    arguments = ["run", str(classifier.path), "--recipe", str(recipe), "--out", str(out), *FAST]
    command = Path(sys.executable).with_name("onnxprune")
    process = subprocess.Popen([command, *arguments], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "[3/6] prune@3" in line:
            break
    process.kill()
    process.communicate(timeout=60)
    assert not (out / "onnx").exists()
    assert onnxprune_command(*arguments).code == 0
    resumed = [entry["resumed"] for entry in report_of(out)["passes"]]
    # The process may have come further before the signal reached it.
    assert resumed[:2] == [True, True]
    assert resumed == sorted(resumed, reverse=True)
    assert resumed[-1] is False
    assert widths(out) == {"conv1.weight": 16, "conv2.weight": 24, "conv3.weight": 32}


def test_a_dry_run_judges_a_block_as_a_run_does(onnxprune_command: Command, classifier: Any, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, JUDGED)
    arguments = ("run", classifier.path, "--recipe", recipe, "--eval", classifier.labelled, *FAST)
    onnxprune_command(*arguments, "--out", tmp_path / "a")
    planned = json.loads(onnxprune_command(*arguments, "--out", tmp_path / "b", "--dry-run", "--json").stdout)
    lock = json.loads((tmp_path / "a" / "plan.lock.json").read_text(encoding="utf-8"))
    assert planned["plans"] == {entry["step_id"]: entry["plan"] for entry in lock["passes"]}
    assert not (tmp_path / "b").exists()


def test_another_number_of_iterations_is_another_result(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path, 'name = "repeat", times = 2, passes = ["prune"]')
    arguments = ("run", classifier.path, "--recipe", recipe, "--out", out, *FAST)
    onnxprune_command(*arguments)
    onnxprune_command(*arguments, "--set", "repeat.times=3")
    passes = report_of(out)["passes"]
    assert [(entry["pass_id"], entry["resumed"]) for entry in passes] == [
        ("prune@1", False),
        ("prune@2", False),
        ("prune@3", False),
        ("repeat", False),
    ]


def test_a_plan_repeats_every_iteration_without_recipe_or_data(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, PRUNE_AND_REFIT)
    onnxprune_command(
        "run",
        classifier.path,
        "--recipe",
        recipe,
        "--calibration",
        classifier.calibration,
        "--out",
        tmp_path / "a",
        *FAST,
    )
    classifier.calibration.unlink()
    lock = tmp_path / "a" / "plan.lock.json"
    result = onnxprune_command("run", classifier.path, "--plan", lock, "--out", tmp_path / "b", *FAST)
    assert result.code == 0, result.stderr
    assert artifact_hash(tmp_path / "b") == artifact_hash(tmp_path / "a")
    assert (tmp_path / "b" / "plan.lock.json").read_bytes() == lock.read_bytes()


def test_a_plan_of_a_block_is_not_mixed_with_other_settings_inside_it(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, 'name = "repeat", times = 2, passes = ["prune"]')
    onnxprune_command("run", classifier.path, "--recipe", recipe, "--out", tmp_path / "a", *FAST)
    lock = tmp_path / "a" / "plan.lock.json"
    for setting, says in (
        ("prune.ratio=0.1", "another 'ratio' of pass 'repeat/prune'"),
        ("repeat.times=3", "another 'times'"),
    ):
        result = onnxprune_command(
            "run", classifier.path, "--plan", lock, "--out", tmp_path / "b", "--set", setting, *FAST
        )
        assert result.code == 2
        assert says in result.stderr


# --- stopping early -------------------------------------------------------------------------------------------

JUDGED = 'name = "repeat", times = 6, score_drop = 0.3, passes = [{ name = "prune", ratio = 0.85, min_channels = 1 }]'


def test_a_block_stops_when_the_score_falls_too_far_and_keeps_the_model_before(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path, JUDGED)
    arguments = ("--recipe", recipe, "--eval", classifier.labelled, "--out", out, "--set", "measure.latency=false")
    result = onnxprune_command("run", classifier.path, *arguments)
    assert result.code == 0, result.stderr
    report = report_of(out)
    block = report["passes"][-1]
    kept = int(block["figures"]["iterations"])
    assert 1 <= kept < 6
    assert [entry["pass_id"] for entry in report["passes"]] == [*(f"prune@{k}" for k in range(1, kept + 1)), "repeat"]
    assert block["figures"][f"score{kept}"] >= 0.7
    assert block["figures"][f"score{kept + 1}"] < 0.7
    assert report["measurements"][0]["score"]["value"] == block["figures"][f"score{kept}"]
    assert block["skips"][0]["where"] == f"prune@{kept + 1}"
    assert "score_drop allows 0.3" in block["notes"][0]


def test_a_block_that_stopped_is_repeated_by_its_plan_without_the_evaluator(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, JUDGED)
    onnxprune_command(
        "run", classifier.path, "--recipe", recipe, "--eval", classifier.labelled, "--out", tmp_path / "a", *FAST
    )
    classifier.labelled.unlink()
    lock = tmp_path / "a" / "plan.lock.json"
    result = onnxprune_command("run", classifier.path, "--plan", lock, "--out", tmp_path / "b", *FAST)
    assert result.code == 0, result.stderr
    assert artifact_hash(tmp_path / "b") == artifact_hash(tmp_path / "a")
    assert (tmp_path / "b" / "plan.lock.json").read_bytes() == lock.read_bytes()


def test_a_block_whose_first_iteration_falls_too_far_leaves_the_model_alone(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, JUDGED.replace("0.3", "0.0").replace("times = 6", "times = 1"))
    out = tmp_path / "out"
    result = onnxprune_command(
        "run", classifier.path, "--recipe", recipe, "--eval", classifier.labelled, "--out", out, *FAST
    )
    assert result.code == 0, result.stderr
    assert [entry["pass_id"] for entry in report_of(out)["passes"]] == ["repeat"]
    assert widths(out) == {"conv1.weight": 32, "conv2.weight": 48, "conv3.weight": 64}


def test_a_damaged_plan_of_a_block_is_refused(onnxprune_command: Command, classifier: Any, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, 'name = "repeat", times = 2, passes = ["prune"]')
    onnxprune_command("run", classifier.path, "--recipe", recipe, "--out", tmp_path / "a", *FAST)
    lock = tmp_path / "a" / "plan.lock.json"
    plan = json.loads(lock.read_text())
    next(entry for entry in plan["passes"] if entry["step_id"] == "repeat")["plan"] = {"iterations": 7}
    lock.write_text(json.dumps(plan))
    result = onnxprune_command("run", classifier.path, "--plan", lock, "--out", tmp_path / "b", *FAST)
    assert result.code == 2
    assert "keeps 7 of 2 iterations" in result.stderr


# --- what can't work ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ('name = "repeat", times = 2, score_drop = 0.1, passes = ["prune"]', "'score_drop' of 'repeat' needs an eval"),
        ('name = "repeat", times = 2, passes = ["prune", "quant"]', "Put 'quant' behind 'repeat'"),
        ('name = "repeat", times = 2, passes = ["refit"]', "need calibration data, but the run has none"),
    ],
    ids=["no evaluator", "quant inside", "no data"],
)
def test_a_block_that_cannot_work_is_refused_before_anything_is_read(
    onnxprune_command: Command, tmp_path: Path, block: str, says: str
) -> None:
    recipe = write_recipe(tmp_path, block)
    result = onnxprune_command("run", tmp_path / "missing.onnx", "--recipe", recipe, "--out", tmp_path / "out")
    assert result.code == 2
    assert says in result.stderr
