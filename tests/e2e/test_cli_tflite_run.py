"""`onnxprune run --target tflite` from the outside, and comparing what it made with its source."""

from __future__ import annotations

import builtins
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxprune.runtime.litert import litert_runner_from_path
from tests.builders import proto_of

Command = Callable[..., Any]
TFLITE = ("--target", "tflite")
ONNXPRUNE = str(Path(sys.executable).with_name("onnxprune"))


def stored_types(path: Path) -> list[str]:
    """What the file takes and gives."""
    runner = litert_runner_from_path(path)
    return [tensor.dtype for tensor in (*runner.stored_inputs, *runner.stored_outputs)]


def test_one_plan_serves_two_targets_within_the_same_budget(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    first = onnxprune_command(
        "run", classifier.path, "--passes", "simplify,quant", "--calibration", classifier.calibration,
        "--eval", classifier.labelled, *TFLITE, "--target", "ort-mobile", "--set", "budget.score_drop=0.1",
        "--set", "budget.artifact_bytes=100000", "--set", "measure.latency=false", "--json", "--no-cache",
        "--out", tmp_path / "a",
    )  # fmt: skip
    assert first.code == 0, first.stderr
    report = json.loads(first.stdout)
    assert [artifact["target"] for artifact in report["artifacts"]] == ["tflite", "ort-mobile"]
    assert len(report["budgets"]) == 4
    assert all(outcome["met"] for outcome in report["budgets"])
    scores = [measured["score"]["value"] for measured in report["measurements"]]
    assert abs(scores[0] - scores[1]) < 0.05
    lock = json.loads((tmp_path / "a" / "plan.lock.json").read_text())
    assert set(lock["placements"]["tflite"]["integer_nodes"]) >= {"conv1", "conv2", "conv3", "fc"}

    again = onnxprune_command(
        "run", classifier.path, "--plan", tmp_path / "a" / "plan.lock.json", "--no-measure", "--json", "--no-cache",
        "--out", tmp_path / "b",
    )  # fmt: skip
    assert again.code == 0, again.stderr
    files, repeated = (
        {artifact["target"]: artifact["files"] for artifact in one["artifacts"]}
        for one in (report, json.loads(again.stdout))
    )
    assert repeated == files


@pytest.mark.parametrize(
    ("options", "interface", "largest_bytes"),
    [
        (("--set", "targets.tflite.precision=fp32"), "float32", 200_000),
        (("--set", "targets.tflite.precision=fp16"), "float32", 100_000),
        (("--set", "targets.tflite.precision=dynamic-int8"), "float32", 60_000),
        (("--passes", "quant", "--set", "quant.mode=dynamic"), "float32", 60_000),
        (("--passes", "quant", "--set", "quant.mode=weight-only"), "float32", 60_000),
        (("--passes", "quant"), "float32", 60_000),
        (("--passes", "quant", "--set", "targets.tflite.precision=int8"), "int8", 60_000),
    ],
    ids=["fp32", "fp16", "dynamic-int8", "mode-dynamic", "mode-weight-only", "mode-static", "int8"],
)
def test_every_precision_keeps_the_outputs_and_has_the_interface_that_it_promises(
    onnxprune_command: Command,
    classifier: Any,
    tmp_path: Path,
    options: tuple[str, ...],
    interface: str,
    largest_bytes: int,
) -> None:
    result = onnxprune_command(
        "run", classifier.path, *options, "--calibration", classifier.calibration, *TFLITE, "--json", "--no-cache",
        "--set", "measure.latency=false", "--set", "measure.load=false", "--out", tmp_path / "a",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    path = tmp_path / "a" / "tflite" / "classifier.tflite"
    assert stored_types(path) == [interface, interface]
    assert path.stat().st_size < largest_bytes
    (measured,) = json.loads(result.stdout)["measurements"]
    # Random weights: static int8 of this network keeps about 30 dB, everything else more.
    assert measured["fidelity"]["difference"]["snr_db"] > 20


def test_samples_are_fed_in_batches_as_large_as_the_data_have_them(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    result = onnxprune_command(
        "run", classifier.path, "--set", "targets.tflite.batch=4", *TFLITE, "--no-cache", "--no-measure",
        "--out", tmp_path / "a",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    path = tmp_path / "a" / "tflite" / "classifier.tflite"
    assert [spec.shape for spec in litert_runner_from_path(path).inputs] == [(4, 3, 16, 16)]
    assert "interface: fp32; input 'image' float32[4, 3, 16, 16]" in " ".join(result.stdout.split())


def unsupported(path: Path) -> Path:
    onnx.save(
        proto_of(
            [
                helper.make_node("Relu", ["x"], ["r"], name="fine"),
                helper.make_node("Det", ["r"], ["y"], name="volume"),
            ],
            inputs={"x": [2, 9, 9]},
            outputs={"y": [2]},
        ),
        path,
    )
    return path


def test_model_that_can_not_be_expressed_is_refused_before_the_first_pass(
    onnxprune_command: Command, tmp_path: Path
) -> None:
    result = onnxprune_command(
        "run", unsupported(tmp_path / "x.onnx"), "--passes", "simplify", *TFLITE, "--out", tmp_path / "a"
    )
    assert result.code == 7
    assert "Det 'volume'" in result.stderr
    assert "[1/1]" not in result.stderr
    assert not (tmp_path / "a").exists()


def test_what_no_output_needs_is_no_reason_to_refuse(onnxprune_command: Command, tmp_path: Path) -> None:
    path = unsupported(tmp_path / "x.onnx")
    model = onnx.load(path)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, [2, 9, 9]))
    onnx.save(model, path)
    result = onnxprune_command("run", path, *TFLITE, "--no-measure", "--no-cache", "--out", tmp_path / "a")
    assert result.code == 0, result.stderr


def test_missing_litert_is_exit_code_4_with_the_line_that_installs_it(
    onnxprune_command: Command, classifier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without_litert(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("ai_edge_litert"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_litert)
    result = onnxprune_command("run", classifier.path, *TFLITE, "--out", tmp_path / "a")
    assert result.code == 4
    assert "pip install" in result.stderr
    assert "[tflite]" in result.stderr
    assert not (tmp_path / "a").exists()


def test_latency_of_another_processor_is_no_budget(onnxprune_command: Command, classifier: Any, tmp_path: Path) -> None:
    from onnxprune.runtime.host import host_isa

    other = "arm64" if host_isa().arch == "x86-64" else "x86-64"
    result = onnxprune_command(
        "run", classifier.path, *TFLITE, "--set", f"targets.tflite.platform={other}", "--set",
        "budget.latency_ratio=0.9", "--out", tmp_path / "a",
    )  # fmt: skip
    assert result.code == 2
    assert "'latency_ratio' can't be measured for 'tflite'" in result.stderr.replace("\n", " ")


def test_layers_that_left_8_bits_are_timed_against_the_file_without_that(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    result = onnxprune_command(
        "run", classifier.path, "--passes", "simplify,quant", "--calibration", classifier.calibration,
        "--min-snr", "25", "--set", "quant.weight_bits=4", *TFLITE, "--set", "targets.tflite.platform=auto",
        "--set", "measure.min_seconds=0.05", "--set", "measure.load=false", "--json", "--no-cache",
        "--out", tmp_path / "a",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    (measured,) = json.loads(result.stdout)["measurements"]
    assert measured["fallback"]["num_layers"] > 0
    assert measured["fallback"]["latency"]["after"]["p50_ms"] > 0
    assert measured["fidelity"]["difference"]["snr_db"] > 24


def test_ctrl_c_while_the_file_is_built_leaves_nothing(classifier: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [ONNXPRUNE, "run", classifier.path, *TFLITE, "--no-cache", "--out", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "Building for tflite" in line:
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith(("out", ".onnxprune"))] == []


@pytest.mark.parametrize(
    ("options", "least_db"),
    [((), 100), (("--set", "targets.tflite.precision=fp16"), 45), (("--passes", "quant"), 15)],
    ids=["fp32", "fp16", "int8"],
)
def test_most_tensors_inside_are_compared_with_the_source(
    onnxprune_command: Command, classifier: Any, tmp_path: Path, options: tuple[str, ...], least_db: float
) -> None:
    built = onnxprune_command(
        "run", classifier.path, *options, "--calibration", classifier.calibration, *TFLITE, "--no-measure",
        "--no-cache", "--out", tmp_path / "a",
    )  # fmt: skip
    assert built.code == 0, built.stderr
    result = onnxprune_command(
        "compare", classifier.path, tmp_path / "a" / "tflite" / "classifier.tflite", "--per-tensor", "--json",
        "--data", classifier.calibration,
    )  # fmt: skip
    assert result.code == 0, result.stderr
    found = json.loads(result.stdout)
    compared = {layer["tensor"]["name"]: layer["tensor"]["snr_db"] for layer in found["layers"]}
    # A convolution, its normalization and its Relu are one operator, whose result has the name of the last.
    assert set(compared) >= {"r1", "r2", "r3", "scores"}
    assert min(compared.values()) > least_db


def test_first_tensor_that_is_wrong_is_the_one_behind_the_broken_weight(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    model = onnx.load(classifier.path)
    (weight,) = [one for one in model.graph.initializer if one.name == "conv2.weight"]
    weight.CopyFrom(numpy_helper.from_array(np.flip(numpy_helper.to_array(weight), 0).copy(), weight.name))
    broken = tmp_path / "broken.onnx"
    onnx.save(model, broken)
    built = onnxprune_command("run", broken, *TFLITE, "--no-measure", "--no-cache", "--out", tmp_path / "a")
    assert built.code == 0, built.stderr
    result = onnxprune_command(
        "compare", classifier.path, tmp_path / "a" / "tflite" / "broken.tflite", "--per-tensor", "--json",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    layers = [layer["tensor"] for layer in json.loads(result.stdout)["layers"]]
    wrong = [tensor["name"] for tensor in layers if tensor["snr_db"] < 20]
    assert wrong[0] == "r2"
    assert [tensor["name"] for tensor in layers if tensor["snr_db"] > 100] == ["r1"]
