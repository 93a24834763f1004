"""The deployment scripts and the CI workflow of examples/ do what they say."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=280)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["compress.py", "steps.py"])
def test_a_deployment_script_ends_well_and_says_what_it_ships(script: str, tmp_path: Path) -> None:
    completed = run([sys.executable, f"examples/deploy/{script}", str(tmp_path / "out")])
    assert completed.returncode == 0, completed.stderr
    assert "bytes" in completed.stdout
    assert list((tmp_path / "out").rglob("*.ort"))


@pytest.mark.slow
def test_the_workflows_command_holds_its_budgets(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the workflow")
    workflow = yaml.safe_load((REPOSITORY / "examples/ci/workflow.yml").read_text())
    steps = workflow["jobs"]["compress"]["steps"]
    (line,) = [step["run"] for step in steps if step.get("run", "").startswith("onnxprune ")]
    words = shlex.split(line)
    command = words[: words.index(">")]
    command[0] = str(Path(sys.executable).with_name("onnxprune"))
    command[command.index("--out") + 1] = str(tmp_path / "out")
    completed = run(command)
    assert completed.returncode == 0, completed.stderr
    assert all(outcome["met"] for outcome in json.loads(completed.stdout)["budgets"])


def test_the_workflows_command_fails_when_a_budget_is_missed(tmp_path: Path) -> None:
    completed = run(
        [
            str(Path(sys.executable).with_name("onnxprune")),
            "run",
            "examples/digits/models/detector.onnx",
            "--no-measure",
            "--set",
            "budget.artifact_bytes=1000",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert completed.returncode == 8, completed.stderr
