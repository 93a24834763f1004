"""`onnxprune compare` from the outside."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Command = Callable[..., Any]
BUILD = ("--no-measure", "--no-cache", "-q")


@pytest.fixture
def int8(onnxprune_command: Command, classifier: Any, tmp_path: Path) -> Path:
    """The classifier as int8 artifacts for targets `onnx` and `ort-mobile`."""
    result = onnxprune_command(
        "run", classifier.path, "--passes", "simplify,quant", "--calibration", classifier.calibration,
        "--target", "onnx", "--target", "ort-mobile", "--out", tmp_path / "out", *BUILD,
    )  # fmt: skip
    assert result.code == 0, result.stderr
    return tmp_path / "out"


def test_every_tensor_of_the_artifact_is_compared_with_the_source(
    onnxprune_command: Command, classifier: Any, int8: Path
) -> None:
    options = ("--data", classifier.calibration, "--samples", "4", "--per-tensor", "--json")
    result = onnxprune_command("compare", classifier.path, int8 / "onnx" / "classifier.onnx", *options)
    assert result.code == 0, result.stderr
    found = json.loads(result.stdout)
    tensors = {layer["tensor"]["name"]: layer["tensor"] for layer in found["layers"]}
    assert list(tensors) == ["r1", "r2", "r3", "pooled", "flat", "scores"]
    assert all(25 < tensor["snr_db"] < 70 for tensor in tensors.values())
    assert found["num_samples"] == 4
    assert found["outputs"]["per_output"]["scores"]["snr_db"] > 25


def test_terminal_shows_tables_and_a_verdict(onnxprune_command: Command, classifier: Any, int8: Path) -> None:
    result = onnxprune_command(
        "compare", classifier.path, int8 / "onnx" / "classifier.onnx", "--per-tensor", "--worst-first"
    )
    assert result.code == 0, result.stderr
    assert "No tensor falls below 20 dB." in result.stdout.replace("\n", " ")
    assert "Most error arises in" in result.stdout.replace("\n", " ")


def test_outputs_of_an_ort_file_are_compared_and_its_tensors_refused(
    onnxprune_command: Command, classifier: Any, int8: Path
) -> None:
    ort = int8 / "ort-mobile" / "classifier.ort"
    outputs = onnxprune_command("compare", classifier.path, ort, "--json")
    assert json.loads(outputs.stdout)["outputs"]["snr_db"] > 25
    refused = onnxprune_command("compare", classifier.path, ort, "--per-tensor")
    assert refused.code == 2
    assert "Build target 'onnx'" in refused.stderr.replace("\n", " ")


def test_a_model_that_another_tool_quantized_is_compared_behind_its_rounding(
    onnxprune_command: Command, classifier: Any, tmp_path: Path
) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            samples = np.load(classifier.calibration)["image"]
            self.batches: Iterator[dict[str, Any]] = iter([{"image": sample[None]} for sample in samples])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    path = tmp_path / "static.onnx"
    quantize_static(classifier.path, path, Reader())
    result = onnxprune_command(
        "compare", classifier.path, path, "--data", classifier.calibration, "--per-tensor", "--json"
    )
    assert result.code == 0, result.stderr
    tensors = {layer["tensor"]["name"]: layer["tensor"] for layer in json.loads(result.stdout)["layers"]}
    assert tensors["pooled"]["actual_name"] == "pooled_DequantizeLinear_Output"
    assert all(15 < tensor["snr_db"] < 80 for tensor in tensors.values())


def test_the_model_against_itself_on_random_samples_is_equal(onnxprune_command: Command, classifier: Any) -> None:
    result = onnxprune_command("compare", classifier.path, classifier.path)
    assert result.code == 0
    assert "All outputs are equal." in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--worst-first",), "Give --per-tensor as well"), (("--data", "nowhere"), "nowhere")],
    ids=["order-without-tensors", "no-such-data"],
)
def test_what_makes_no_sense_is_refused(
    onnxprune_command: Command, classifier: Any, arguments: tuple[str, ...], message: str
) -> None:
    result = onnxprune_command("compare", classifier.path, classifier.path, *arguments)
    assert result.code in (2, 10)
    assert message in result.stderr.replace("\n", " ")
