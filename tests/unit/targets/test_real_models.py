"""A detector from the field: grouped convolutions, channel shuffles, 500 values, opset 11 raised to 18."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxprune.contracts import ModelState, TargetContext
from onnxprune.convert.onnx_file import load_onnx
from onnxprune.targets.ort_format import read_ort_facts
from onnxprune.targets.ort_mobile import OrtMobileConfig, OrtMobileTarget


@pytest.mark.parametrize("style", ["fixed", "runtime"])
def test_detector_gives_the_same_running_ort_file_twice(shared_data: Path, tmp_path: Path, style: str) -> None:
    state = ModelState(model=load_onnx(shared_data / "fastestdet" / "FastestDet.onnx"))
    target = OrtMobileTarget(OrtMobileConfig.model_validate({"optimization_style": style}))
    artifacts = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        artifacts.append(target.build(state, TargetContext(folder=folder, stem="detector")))
    first, second = artifacts
    assert first.files == second.files
    assert first.outputs[0].shape == (1, 85, 22, 22)
    assert read_ort_facts(first.model_path).has_runtime_optimizations is (style == "runtime")
