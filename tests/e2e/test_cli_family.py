"""`onnxprune run` with several models: one recipe, a folder for each, and the worst exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnxprune import api

Command = Callable[..., Any]
FAST = ("--no-measure", "--passes", "prune")


@pytest.fixture
def family(classifier: Any, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Three models; the second is no model."""
    first, broken, third = (tmp_path / f"{name}.onnx" for name in ("small", "broken", "large"))
    shutil.copy(classifier.path, first)
    shutil.copy(classifier.path, third)
    broken.write_bytes(b"not a model")
    return first, broken, third


def test_each_model_gets_a_folder_and_one_line(
    onnxprune_command: Command, family: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = onnxprune_command("run", family[0], family[2], "--out", out, *FAST)
    assert result.code == 0, result.stderr
    for name in ("small", "large"):
        assert (out / name / "onnx" / f"{name}.onnx").is_file()
        assert (out / name / "report.json").is_file()
        assert any(
            line.startswith(name) and line.endswith("built") for line in map(str.strip, result.stdout.split("\n"))
        )
    assert "Model 2 of 2: large" in result.stderr


def test_a_model_that_fails_leaves_the_others_alone_and_gives_its_exit_code(
    onnxprune_command: Command, family: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = onnxprune_command("run", *family, "--out", out, *FAST)
    assert result.code == 3
    assert "error: broken: " in result.stderr
    assert "failed (3)" in result.stdout
    assert (out / "large" / "onnx" / "large.onnx").is_file()
    assert not (out / "broken").exists()


def test_json_is_a_list_with_a_report_or_an_error_for_each(
    onnxprune_command: Command, family: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    result = onnxprune_command("run", *family, "--out", tmp_path / "out", *FAST, "--json")
    members = json.loads(result.stdout)
    assert [(member["name"], member["exit_code"]) for member in members] == [("small", 0), ("broken", 3), ("large", 0)]
    assert [member["report"] is not None for member in members] == [True, False, True]
    assert "broken.onnx" in members[1]["error"]


def test_a_failure_weighs_more_than_a_missed_budget(
    onnxprune_command: Command, family: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    budget = ("--set", "budget.artifact_bytes=1")
    missed = onnxprune_command("run", family[0], family[2], "--out", tmp_path / "a", *FAST, *budget)
    assert missed.code == 8
    assert "budget missed: artifact_bytes" in " ".join(missed.stdout.split())
    assert onnxprune_command("run", *family, "--out", tmp_path / "b", *FAST, *budget).code == 3


def test_a_dry_run_of_several_models_writes_nothing(
    onnxprune_command: Command, family: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    result = onnxprune_command("run", family[0], family[2], "--out", tmp_path / "out", *FAST, "--dry-run")
    assert result.code == 0, result.stderr
    assert result.stdout.count("Changed by prune") == 2
    assert not (tmp_path / "out").exists()


def test_models_of_one_name_are_told_apart_by_their_folders(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    sources = []
    for folder in ("resnet18", "resnet50"):
        (tmp_path / folder).mkdir()
        sources.append(shutil.copy(classifier.path, tmp_path / folder / "model.onnx"))
    out = tmp_path / "out"
    result = onnxprune_command("run", *sources, "--out", out, *FAST)
    assert result.code == 0, result.stderr
    assert sorted(item.name for item in out.iterdir()) == ["resnet18-model", "resnet50-model"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("{0}", "{0}"), "Several models would be written to the folder"),
        (("{0}", "{2}", "--plan", "x.json"), "'--plan' repeats the decisions for one model"),
        (("{0}", "{2}", "--weights", "w.pth"), "'--weights' belongs to one model"),
        (("{0}", "{2}", "--set", "prune.ratoi=0.5"), "Did you mean 'ratio'?"),
    ],
    ids=["twice", "plan", "weights", "recipe"],
)
def test_what_cannot_work_for_several_models_is_refused_before_the_first(
    onnxprune_command: Command,
    family: tuple[Path, Path, Path],
    tmp_path: Path,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    out = tmp_path / "out"
    filled = [argument.format(*family) for argument in arguments]
    result = onnxprune_command("run", *filled, "--passes", "prune", "--out", out)
    assert result.code == 2
    assert says in result.stderr
    assert not out.exists()


def test_an_interrupt_ends_the_whole_family_and_says_how_far_it_came(
    onnxprune_command: Command, family: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = api.run_job

    def interrupted_at_the_second(job: api.Job) -> Any:
        if job.options.out.name != "small":
            raise KeyboardInterrupt
        return real(job)

    monkeypatch.setattr(api, "run_job", interrupted_at_the_second)
    result = onnxprune_command("run", *family, "--out", tmp_path / "out", *FAST)
    assert result.code == 130
    assert "no artifact was written for 'broken'; 1 models before it are done" in result.stderr
    assert (tmp_path / "out" / "small" / "onnx" / "small.onnx").is_file()


def test_one_skip_pattern_serves_models_that_name_the_same_part_differently(
    onnxprune_command: Command, family: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    other = onnx.load(family[2])
    for node in other.graph.node:
        node.name = node.name.replace("conv1", "stem")
    for weight in other.graph.initializer:
        weight.name = weight.name.replace("conv1", "stem")
    for node in other.graph.node:
        node.input[:] = [name.replace("conv1", "stem") for name in node.input]
    onnx.save(other, family[2])
    out = tmp_path / "out"
    arguments = ("run", family[0], family[2], "--out", out, *FAST, "--set")
    assert onnxprune_command(*arguments, "prune.skip=['conv1']").code == 2
    result = onnxprune_command(*arguments, "prune.skip=['conv1|stem']")
    assert result.code == 0, result.stderr
    for name, weight_name in (("small", "conv1.weight"), ("large", "stem.weight")):
        weights = {w.name: w.dims[0] for w in onnx.load(out / name / "onnx" / f"{name}.onnx").graph.initializer}
        assert weights[weight_name] == 32
