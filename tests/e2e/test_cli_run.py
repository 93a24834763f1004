"""`onnxprune run` from the outside: files, output, exit codes, and what is left when something goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxprune.runtime.host import host_isa

Command = Callable[..., Any]
FAST = ("--set", "measure.min_seconds=0.05", "--set", "measure.load=false")
ONNXPRUNE = str(Path(sys.executable).with_name("onnxprune"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run_arguments(classifier: Any, out: Path, *more: str | Path) -> list[str | Path]:
    return [
        "run",
        classifier.path,
        "--passes",
        "prune,quant",
        "--calibration",
        classifier.calibration,
        "--out",
        out,
        *FAST,
        *more,
    ]


def test_the_main_job_writes_artifacts_plan_and_report(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    before = sha256(classifier.path)
    result = onnxprune_command(
        "run",
        classifier.path,
        "--passes",
        "simplify,prune,quant",
        "--calibration",
        classifier.calibration,
        "--eval",
        classifier.labelled,
        "--target",
        "onnx",
        "--target",
        "ort-mobile",
        "--out",
        out,
        *FAST,
    )
    assert result.code == 0, result.stderr
    assert sha256(classifier.path) == before
    assert sorted(item.name for item in out.iterdir()) == [
        ".cache",
        "onnx",
        "ort-mobile",
        "plan.lock.json",
        "report.json",
    ]
    report = json.loads((out / "report.json").read_text())
    assert [entry["pass_id"] for entry in report["passes"]] == ["simplify", "prune", "quant"]
    assert report["after"]["parameters"] < report["before"]["parameters"]
    assert report["source_measurements"]["score"]["value"] == 1.0
    for artifact in report["artifacts"]:
        made_from = artifact["provenance"]
        assert (made_from["calibration_method"], made_from["calibration_samples"]) == ("minmax", 16)
        assert len(made_from["calibration_hash"]) == 64
        for file in artifact["files"]:
            path = out / artifact["target"] / file["path"]
            assert sha256(path) == file["sha256"]
            assert path.stat().st_size == file["size_bytes"]
    decided = {artifact["target"]: artifact["placement"]["decided_by"] for artifact in report["artifacts"]}
    assert decided == {"onnx": "measured", "ort-mobile": "measured" if host_isa().arch == "arm64" else "table"}
    for expected in ("Parameters", "MACs", "File", "Latency p50", "Score", "Wrote"):
        assert expected in result.stdout
    assert "decided by measurement on this machine" in " ".join(result.stdout.split())
    session = onnxruntime.InferenceSession(out / "onnx" / "classifier.onnx")
    assert [i.name for i in session.get_inputs()] == ["image"]
    assert [o.name for o in session.get_outputs()] == ["scores"]


def test_nothing_is_timed_for_a_placement_without_measuring(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["run", classifier.path, "--passes", "quant", "--calibration", classifier.calibration, "--no-measure"]
    result = onnxprune_command(*arguments, "--out", out)
    assert result.code == 0, result.stderr
    (artifact,) = json.loads((out / "report.json").read_text())["artifacts"]
    assert artifact["placement"]["decided_by"] == "table"
    assert artifact["regions"] == []
    assert "timing regions" not in result.stderr


def test_json_output_is_json_and_nothing_else(onnxprune_command: Command, classifier: Any, tmp_path: Path) -> None:
    result = onnxprune_command(*run_arguments(classifier, tmp_path / "out", "--json"))
    assert json.loads(result.stdout)["schema"] == 1
    assert "[1/2] prune" in result.stderr


def test_json_output_stays_pure_when_user_code_writes_to_the_descriptor(classifier: Any, tmp_path: Path) -> None:
    score = tmp_path / "score.py"
    score.write_text(
        "import os\n\n\ndef score(runner):\n    os.system('echo raw')\n    print('printed')\n    return 0.5\n"
    )
    arguments = ["run", classifier.path, "--passes", "prune", "--eval", f"{score}:score", "--out", tmp_path / "out"]
    process = start([*arguments, *FAST, "--json"])
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["measurements"][0]["score"]["value"] == 0.5
    assert "raw" in stderr


def test_a_failing_evaluator_is_found_before_the_passes(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    score = tmp_path / "score.py"
    score.write_text("def score(runner):\n    raise ValueError('no labels')\n")
    result = onnxprune_command(
        "run", classifier.path, "--passes", "prune", "--eval", f"{score}:score", "--out", tmp_path / "out"
    )
    assert result.code == 9
    assert "no labels" in result.stderr
    assert "[1/1]" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_quiet_says_nothing_on_stderr(onnxprune_command: Command, classifier: Any, tmp_path: Path) -> None:
    assert onnxprune_command(*run_arguments(classifier, tmp_path / "out", "-q")).stderr == ""


def test_a_rerun_resumes_at_the_first_pass_that_differs_and_gives_the_same_bytes(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    artifact = out / "onnx" / "classifier.onnx"
    onnxprune_command(*run_arguments(classifier, out))
    first = sha256(artifact)

    resumed = onnxprune_command(*run_arguments(classifier, out, "--json"))
    assert [entry["resumed"] for entry in json.loads(resumed.stdout)["passes"]] == [True, True]
    assert sha256(artifact) == first

    changed = onnxprune_command(*run_arguments(classifier, out, "--json", "--set", "quant.per_channel=false"))
    assert [entry["resumed"] for entry in json.loads(changed.stdout)["passes"]] == [True, False]
    assert sha256(artifact) != first


def test_no_cache_keeps_nothing_and_gives_the_same_bytes(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    onnxprune_command(*run_arguments(classifier, tmp_path / "a"))
    onnxprune_command(*run_arguments(classifier, tmp_path / "b", "--no-cache"))
    assert not (tmp_path / "b" / ".cache").exists()
    assert sha256(tmp_path / "a" / "onnx" / "classifier.onnx") == sha256(tmp_path / "b" / "onnx" / "classifier.onnx")


def test_a_plan_repeats_a_run_without_recipe_or_data(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    onnxprune_command(*run_arguments(classifier, tmp_path / "a"))
    lock = tmp_path / "a" / "plan.lock.json"
    classifier.calibration.unlink()
    assert str(tmp_path) not in lock.read_text()
    result = onnxprune_command("run", classifier.path, "--plan", lock, "--out", tmp_path / "b")
    assert result.code == 0, result.stderr
    assert sha256(tmp_path / "a" / "onnx" / "classifier.onnx") == sha256(tmp_path / "b" / "onnx" / "classifier.onnx")
    assert (tmp_path / "b" / "plan.lock.json").read_bytes() == lock.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--set", "prune.ratio=0.6"), "made with another 'ratio' of pass 'prune'"),
        (("--passes", "prune"), "made for the passes 'prune', 'quant', and this run asks for 'prune'"),
        (("--set", "onnx.spelling=arm64"), ""),
    ],
    ids=["setting", "passes", "target"],
)
def test_a_plan_is_not_mixed_with_other_decisions(
    onnxprune_command: Command, classifier: Any, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    onnxprune_command(*run_arguments(classifier, tmp_path / "a"))
    lock = tmp_path / "a" / "plan.lock.json"
    result = onnxprune_command("run", classifier.path, "--plan", lock, "--out", tmp_path / "b", *FAST, *arguments)
    if not says:  # another target places anew
        assert result.code == 0, result.stderr
        placed = json.loads((tmp_path / "b" / "plan.lock.json").read_text())["placements"]["onnx"]["target"]
        assert placed == "onnxruntime-arm64"
        return
    assert result.code == 2
    assert says in result.stderr
    assert not (tmp_path / "b").exists()


def test_a_plan_of_another_model_is_refused(onnxprune_command: Command, classifier: Any, tmp_path: Path) -> None:
    onnxprune_command(*run_arguments(classifier, tmp_path / "a"))
    other = tmp_path / "other.onnx"
    model = onnx.load(classifier.path)
    weight = model.graph.initializer[0]
    weight.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(model, other)
    result = onnxprune_command("run", other, "--plan", tmp_path / "a" / "plan.lock.json", "--out", tmp_path / "b")
    assert result.code == 2
    assert "made from another model" in result.stderr


def test_the_cache_deletes_nothing_that_is_not_its_own(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    (cache / "precious").mkdir(parents=True)
    (cache / "precious" / "thesis.txt").write_text("all of it")
    (cache / ("ab" * 32)).mkdir()
    onnxprune_command(*run_arguments(classifier, tmp_path / "out", "--cache", cache))
    first = {item.name for item in cache.iterdir()}
    onnxprune_command(*run_arguments(classifier, tmp_path / "out", "--cache", cache, "--set", "prune.ratio=0.1"))
    second = {item.name for item in cache.iterdir()}
    assert first & second == {"precious", "ab" * 32}
    assert len(first) == len(second) == 4


def test_a_cache_that_is_a_file_is_refused(onnxprune_command: Command, classifier: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    result = onnxprune_command(*run_arguments(classifier, tmp_path / "out", "--cache", tmp_path / "cache"))
    assert result.code == 2
    assert "is a file, not a folder" in result.stderr


def test_a_damaged_cache_entry_is_made_anew(onnxprune_command: Command, classifier: Any, tmp_path: Path) -> None:
    arguments = run_arguments(classifier, tmp_path / "out", "--json")
    onnxprune_command(*arguments)
    for entry in (tmp_path / "out" / ".cache").glob("*/entry.json"):
        entry.write_bytes(entry.read_bytes()[:50])
    result = onnxprune_command(*arguments)
    assert [entry["resumed"] for entry in json.loads(result.stdout)["passes"]] == [False, False]


def test_a_reader_that_has_gone_does_not_hide_a_missed_budget(classifier: Any, tmp_path: Path) -> None:
    arguments = ["run", classifier.path, "--no-measure", "--set", "budget.artifact_bytes=1", "--out", tmp_path / "out"]
    read_end, write_end = os.pipe()
    os.close(read_end)
    completed = subprocess.run(
        [ONNXPRUNE, *map(str, arguments)], stdout=write_end, stderr=subprocess.PIPE, text=True, check=False, timeout=120
    )
    os.close(write_end)
    assert completed.returncode == 8, completed.stderr
    assert "Traceback" not in completed.stderr


def test_a_source_name_that_no_disk_takes_is_refused(onnxprune_command: Command, tmp_path: Path) -> None:
    result = onnxprune_command("run", "x" * 5000 + ".onnx", "--out", tmp_path / "out")
    assert result.code in (2, 3), result.stderr


def test_a_dry_run_prints_changes_and_reasons_and_writes_nothing(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = onnxprune_command(*run_arguments(classifier, tmp_path / "out", "--dry-run"))
    assert result.code == 0, result.stderr
    assert "conv3: Conv narrowed  channels_before 64, channels_after 48" in result.stdout
    assert "reaches the model's output 'scores'" in " ".join(result.stdout.split())
    assert "Plan of prune" not in result.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_a_verbose_dry_run_prints_the_plans(onnxprune_command: Command, classifier: Any, tmp_path: Path) -> None:
    result = onnxprune_command(*run_arguments(classifier, tmp_path / "out", "--dry-run", "-v"))
    assert "Plan of prune" in result.stdout
    assert '"weight": "conv1.weight"' in result.stdout


def test_a_missed_budget_ends_with_8_and_keeps_the_artifact(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = onnxprune_command(*run_arguments(classifier, out, "--set", "budget.artifact_bytes=100"))
    assert result.code == 8
    assert "Budget missed: artifact_bytes" in result.stderr
    assert (out / "onnx" / "classifier.onnx").is_file()
    assert json.loads((out / "report.json").read_text())["budgets"][0]["met"] is False


def test_a_budget_that_holds_ends_with_0(onnxprune_command: Command, classifier: Any, tmp_path: Path) -> None:
    result = onnxprune_command(*run_arguments(classifier, tmp_path / "out", "--set", "budget.artifact_bytes=10000000"))
    assert result.code == 0
    assert "budget met" in result.stdout


def test_calibration_samples_in_the_evaluation_give_a_warning(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    calibration = tmp_path / "overlap.npz"
    np.savez(calibration, image=np.load(classifier.labelled)["image"][:4])
    arguments = run_arguments(classifier, tmp_path / "out", "--eval", classifier.labelled)
    arguments[arguments.index(classifier.calibration)] = calibration
    result = onnxprune_command(*arguments)
    assert result.code == 0, result.stderr
    assert "warning" in result.stdout
    assert "calibration" in result.stdout


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--passes", "quant"), 2, "needs calibration data, but the run has none"),
        (("--passes", "prun"), 2, "Did you mean 'prune'?"),
        (("--target", "tflight"), 2, "Unknown target 'tflight'"),
        (("--set", "prune.ratio=0.5"), 2, "no pass, target or section 'prune'"),
        (("--passes", "prune", "--set", "prune.ratoi=0.5"), 2, "Did you mean 'ratio'?"),
        (("--set", "budget.score_drop=0.1"), 2, "needs an evaluator"),
        (("--recipe", "missing.toml"), 2, "does not exist"),
        (("--plan", "missing.json"), 2, "does not exist"),
        (("--calibration", "missing.npz", "--passes", "quant"), 10, "missing.npz"),
        (("--shape", "image=0,3"), 2, "can't be read"),
        (("--passes", "quant,prune", "--calibration", "x.npz"), 2, "Put 'prune' before 'quant'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_work_is_refused_with_its_code_and_leaves_nothing(
    onnxprune_command: Command, classifier: Any, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    out = tmp_path / "out"
    result = onnxprune_command("run", classifier.path, "--out", out, *arguments)
    assert result.code == code, result.stderr
    assert says in result.stderr
    assert result.stdout == ""
    assert not out.exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 64, b"not a model", None], ids=["empty", "zeros", "text", "truncated"]
)
def test_a_broken_model_file_is_an_error_of_its_own(
    onnxprune_command: Command, classifier: Any, tmp_path: Path, content: bytes | None
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(classifier.path.read_bytes()[:-1000] if content is None else content)
    result = onnxprune_command("run", broken, "--out", tmp_path / "out")
    assert result.code == 3, result.stderr
    assert "broken.onnx" in result.stderr
    assert not (tmp_path / "out").exists()


def test_calibration_data_of_another_shape_is_refused_with_names(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, image=np.zeros((4, 3, 8, 8), np.float32))
    result = onnxprune_command(
        "run", classifier.path, "--passes", "quant", "--calibration", wrong, "--out", tmp_path / "out"
    )
    assert result.code == 10, result.stderr
    assert "'image'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_calibration_data_with_nan_are_refused(onnxprune_command: Command, classifier: Any, tmp_path: Path) -> None:
    data = np.zeros((4, 3, 16, 16), np.float32)
    data[2, 1, 0, 0] = np.nan
    np.savez(tmp_path / "nan.npz", image=data)
    result = onnxprune_command(
        "run", classifier.path, "--passes", "quant", "--calibration", tmp_path / "nan.npz", "--out", tmp_path / "out"
    )
    assert result.code == 10, result.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made_ends_with_11(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    result = onnxprune_command("run", classifier.path, "--out", tmp_path / "file" / "out")
    assert result.code == 11, result.stderr


def test_a_source_inside_the_folder_to_be_replaced_is_refused(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    source = tmp_path / "out" / "onnx" / "model.onnx"
    source.parent.mkdir(parents=True)
    source.write_bytes(classifier.path.read_bytes())
    result = onnxprune_command("run", source, "--out", tmp_path / "out")
    assert result.code == 2
    assert "which the run would replace" in result.stderr
    assert source.read_bytes() == classifier.path.read_bytes()


def start(arguments: list[str | Path], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [ONNXPRUNE, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_disk_that_fills_up_ends_with_11_and_no_partial_artifact(classifier: Any, tmp_path: Path) -> None:
    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    out = tmp_path / "out"
    process = start(["run", classifier.path, "--no-cache", "--out", out, *FAST], preexec_fn=limit_files)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 11, stderr
    assert not out.exists()


@pytest.mark.parametrize(
    "phase", ["Reading", "[1/3] simplify", "[2/3] prune", "[3/3] quant", "Building", "timing"], ids=str
)
def test_ctrl_c_ends_with_130_in_every_phase_and_leaves_no_artifact(
    classifier: Any, tmp_path: Path, phase: str
) -> None:
    out = tmp_path / "out"
    arguments = ["run", classifier.path, "--passes", "simplify,prune,quant", "--calibration", classifier.calibration]
    process = start([*arguments, "--out", out, "--set", "measure.min_seconds=60"], env={**os.environ, "COLUMNS": "200"})
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if phase in line:
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, seen + rest
    assert "Traceback" not in rest
    left = {item.name for item in out.iterdir()} if out.exists() else set()
    assert left <= {".cache"}


def test_a_killed_run_resumes(onnxprune_command: Command, classifier: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = run_arguments(classifier, out)
    process = start([*arguments, "--set", "measure.min_seconds=60"])
    assert process.stderr is not None
    for line in process.stderr:
        if "timing" in line:
            break
    process.kill()
    process.communicate(timeout=60)
    assert not (out / "onnx").exists()
    result = onnxprune_command(*arguments, "--json")
    assert [entry["resumed"] for entry in json.loads(result.stdout)["passes"]] == [True, True]
    assert not [item for item in out.iterdir() if item.name.startswith(".onnxprune-partial")]
