"""`onnxprune compare` and `profile` on `.tflite` files, from the outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxprune.data.source import open_data
from onnxprune.pipeline import comparison
from tests.tflite_twins import onnx_twin, tflite_twin

Command = Callable[..., Any]


@pytest.fixture
def twins(tmp_path: Path) -> tuple[Path, Path]:
    source, artifact = tmp_path / "twin.onnx", tmp_path / "twin.tflite"
    onnx.save(onnx_twin(), source)
    artifact.write_bytes(tflite_twin(noise=0.02))
    return source, artifact


def test_every_tensor_that_both_have_is_compared_in_the_onnx_models_axes(
    onnxprune_command: Command, twins: tuple[Path, Path]
) -> None:
    result = onnxprune_command("compare", *twins, "--samples", "3", "--per-tensor", "--json")
    assert result.code == 0, result.stderr
    found = json.loads(result.stdout)
    tensors = {layer["tensor"]["name"]: layer["tensor"]["snr_db"] for layer in found["layers"]}
    assert list(tensors) == ["c", "r", "m", "y"]
    assert all(25 < snr_db < 60 for snr_db in tensors.values())
    assert found["not_compared"] == {"scaled": "'twin.onnx' has no tensor of that name"}


def test_random_samples_have_the_size_that_only_the_second_model_prescribes(
    onnxprune_command: Command, twins: tuple[Path, Path]
) -> None:
    onnx.save(onnx_twin("H", "W"), twins[0])
    result = onnxprune_command("compare", *twins, "--json")
    assert result.code == 0, result.stderr
    assert json.loads(result.stdout)["outputs"]["snr_db"] > 25


def test_tflite_file_can_be_the_reference(onnxprune_command: Command, twins: tuple[Path, Path]) -> None:
    result = onnxprune_command("compare", *reversed(twins), "--per-tensor", "--json")
    assert result.code == 0, result.stderr
    layers = json.loads(result.stdout)["layers"]
    assert [(layer["tensor"]["name"], layer["op_type"]) for layer in layers] == [
        ("c", "CONV_2D"),
        ("r", "RELU"),
        ("scaled", "MUL"),  # arithmetic with a constant, which the other model has in 'm' as far as names tell
        ("y", "FULLY_CONNECTED"),
    ]


def test_preprocessing_of_a_tflite_artifact_comes_from_its_provenance(
    onnxprune_command: Command, twins: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins[1].write_bytes(tflite_twin(provenance='{"preprocess": {"resize": [8, 8], "interpolation": "box"}}'))
    np.savez(tmp_path / "x.npz", x=np.ones((2, 3, 8, 8), np.float32))
    used = []

    def open_and_note(data: str, **options: Any) -> Any:
        used.append(options["preprocess"])
        return open_data(data, **options)

    monkeypatch.setattr(comparison, "open_data", open_and_note)
    result = onnxprune_command("compare", *twins, "--data", tmp_path / "x.npz")
    assert result.code == 0, result.stderr
    assert (used[0].resize, used[0].interpolation) == ((8, 8), "box")


def test_profile_of_a_tflite_file_is_timed_in_turn_with_its_source(
    onnxprune_command: Command, twins: tuple[Path, Path]
) -> None:
    result = onnxprune_command("profile", twins[1], "--against", twins[0], "--seconds", "0.05", "--json")
    assert result.code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["against"]["ratio"] > 0
    assert found["load"]["load_time_ms"] > 0
    assert {node["model_node"] for node in found["ops"]["nodes"]} == {"", "c", "y"}
    assert found["input_shapes"] == {"x": [1, 3, 8, 8]}


def test_profile_in_the_terminal_says_what_xnnpack_takes(onnxprune_command: Command, twins: tuple[Path, Path]) -> None:
    result = onnxprune_command("profile", twins[1], "--seconds", "0.05")
    assert result.code == 0, result.stderr
    assert "XNNPACK takes 5 of 5 operators" in result.stdout
    assert "Convolution" in result.stdout


def test_profile_without_litert_profiler_still_has_latency_and_says_why(
    onnxprune_command: Command, twins: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxprune.runtime.litert_profile.FEEDS_FILE", "other.npz")
    result = onnxprune_command("profile", twins[1], "--seconds", "0.05")
    assert result.code == 0, result.stderr
    assert "p50" in result.stdout
    assert "can't be profiled by operator" in result.stdout.replace("\n", " ")


@pytest.mark.parametrize("command", ["compare", "profile"])
def test_libraries_that_litert_can_not_take_are_refused(
    onnxprune_command: Command, twins: tuple[Path, Path], tmp_path: Path, command: str
) -> None:
    library = tmp_path / "ops.so"
    library.write_bytes(b"")
    files = [twins[1], twins[1]] if command == "compare" else [twins[1]]
    result = onnxprune_command(command, *files, "--custom-op-library", library)
    assert result.code == 2
    assert "'--custom-op-library' means nothing for 'twin.tflite'" in result.stderr.replace("\n", " ")


@pytest.mark.parametrize("command", ["compare", "profile"])
def test_damaged_tflite_file_is_one_line_and_exit_code_3(
    onnxprune_command: Command, twins: tuple[Path, Path], command: str
) -> None:
    twins[1].write_bytes(twins[1].read_bytes()[:500])
    files = twins if command == "compare" else twins[1:]
    result = onnxprune_command(command, *files)
    assert result.code == 3
    assert "'twin.tflite' can't be loaded by LiteRT" in result.stderr.replace("\n", " ")
