"""A small trained-looking classifier on disk, data for it, and the command line called in this process."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.cli.main import main

WIDTHS = (3, 32, 48, 64)
CLASSES = 10
SIZE = 16


@dataclass(frozen=True)
class CommandResult:
    code: int
    stdout: str
    stderr: str


@pytest.fixture
def onnxprune_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., CommandResult]:
    """Calls `onnxprune ARGUMENTS` in this process, and gives exit code and output."""

    def call(*arguments: str | Path) -> CommandResult:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["onnxprune", *map(str, arguments)])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return CommandResult(ended.value.code, captured.out, captured.err)

    return call


def build_classifier() -> onnx.ModelProto:
    """Three Conv-BatchNorm-Relu blocks, global pooling, Gemm: 'image' 1x3x16x16 -> 'scores' 1x10."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []

    def constant(name: str, array: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    value = "image"
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(WIDTHS), start=1):
        kernel = constant(f"conv{index}.weight", rng.normal(0, np.sqrt(2 / (9 * fan_in)), (fan_out, fan_in, 3, 3)))
        nodes.append(
            helper.make_node("Conv", [value, kernel], [f"c{index}"], f"conv{index}", pads=[1] * 4, strides=[1, 1])
        )
        statistics = [
            constant(f"bn{index}.scale", rng.uniform(0.5, 1.5, fan_out)),
            constant(f"bn{index}.bias", rng.normal(0, 0.2, fan_out)),
            constant(f"bn{index}.mean", rng.normal(0, 0.2, fan_out)),
            constant(f"bn{index}.var", rng.uniform(0.5, 1.5, fan_out)),
        ]
        nodes.append(helper.make_node("BatchNormalization", [f"c{index}", *statistics], [f"b{index}"], f"bn{index}"))
        nodes.append(helper.make_node("Relu", [f"b{index}"], [f"r{index}"], f"relu{index}"))
        value = f"r{index}"
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["pooled"], "pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"))
    nodes.append(
        helper.make_node(
            "Gemm",
            [
                "flat",
                constant("fc.weight", rng.normal(0, 0.2, (CLASSES, WIDTHS[-1]))),
                constant("fc.bias", rng.normal(size=CLASSES)),
            ],
            ["scores"],
            "fc",
            transB=1,
        )
    )
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", CLASSES])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {"labels": "0,1,2,3,4,5,6,7,8,9"})
    onnx.checker.check_model(model, full_check=True)
    return model


@dataclass(frozen=True)
class Classifier:
    path: Path
    calibration: Path
    labelled: Path


@pytest.fixture
def classifier(tmp_path: Path) -> Classifier:
    """The model, 16 calibration samples, and 64 other samples labelled with what the model itself says."""
    import onnxruntime

    path = tmp_path / "classifier.onnx"
    onnx.save(build_classifier(), path)
    rng = np.random.default_rng(1)
    calibration = tmp_path / "calibration.npz"
    np.savez(calibration, image=rng.normal(size=(16, 3, SIZE, SIZE)).astype(np.float32))
    images = rng.normal(size=(64, 3, SIZE, SIZE)).astype(np.float32)
    scores = onnxruntime.InferenceSession(path).run(None, {"image": images})[0]
    labelled = tmp_path / "labelled.npz"
    np.savez(labelled, image=images, labels=np.argmax(scores, axis=1))
    return Classifier(path, calibration, labelled)
