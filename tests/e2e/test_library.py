"""The library calls of the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxprune
from onnxprune.graph.writer import content_hash


def test_run_gives_the_report_and_writes_it(classifier: Any, tmp_path: Path) -> None:
    report = onnxprune.run(
        classifier.path,
        passes=["prune", "quant"],
        calibration=str(classifier.calibration),
        settings=["measure.min_seconds=0.05", "prune.ratio=0.25"],
        out=tmp_path / "out",
    )
    assert report.within_budget
    assert report.artifacts[0].model_path.is_file()
    assert (tmp_path / "out" / "report.json").is_file()
    assert not (tmp_path / "out" / ".cache").exists()
    assert report.after.parameters < report.before.parameters


def test_a_recipe_can_be_a_mapping(classifier: Any, tmp_path: Path) -> None:
    report = onnxprune.run(
        classifier.path, recipe={"passes": [{"name": "sparsify", "sparsity": 0.5}]}, measure=False, out=tmp_path / "out"
    )
    assert report.after.nonzero_parameters < report.before.nonzero_parameters
    assert report.measurements[0].latency is None
    assert any("are zeros, but" in warning for warning in report.warnings)


def test_without_passes_outputs_stay_and_the_file_does_not_grow(classifier: Any, tmp_path: Path) -> None:
    report = onnxprune.run(classifier.path, passes=[], out=tmp_path / "out", settings=["measure.load=false"])
    (measured,) = report.measurements
    assert measured.fidelity is not None
    assert measured.fidelity.difference.max_abs == 0
    assert measured.size_bytes <= 1.01 * classifier.path.stat().st_size


def test_single_steps_leave_the_given_state_alone(classifier: Any, tmp_path: Path) -> None:
    state = onnxprune.load(classifier.path)
    before = content_hash(state.model)
    pruned, report = onnxprune.apply(state, "prune", {"ratio": 0.5})
    assert content_hash(state.model) == before
    assert report.figures
    onnxprune.save(pruned, tmp_path / "pruned.onnx")
    weights = {w.name: list(w.dims) for w in onnx.load(tmp_path / "pruned.onnx").graph.initializer}
    assert weights["fc.weight"] == [10, 32]


def test_build_writes_an_artifact_that_runs(classifier: Any, tmp_path: Path) -> None:
    artifact = onnxprune.build(onnxprune.load(classifier.path), "ort-mobile", {"platform": "arm64"}, out=tmp_path)
    assert artifact.model_path == tmp_path / "ort-mobile" / "model.ort"
    assert artifact.model_path.is_file()


def test_a_torch_module_is_a_source(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra 'torch'")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 4, 3)).eval()
    from onnxprune.convert.request import SourceRequest

    request = SourceRequest(source="", example_inputs=torch.zeros(1, 3, 8, 8))
    converted = onnxprune.convert_model(module, request=request)
    assert converted.report.difference is not None
    assert converted.report.difference.max_rel < 1e-5


@pytest.mark.parametrize("config", [{"ratoi": 0.5}, {"ratio": 2.0}])
def test_a_wrong_setting_is_refused(classifier: Any, config: dict[str, float]) -> None:
    state = onnxprune.load(classifier.path)
    with pytest.raises(onnxprune.OnnxPruneError):
        onnxprune.apply(state, "prune", config)


def test_errors_carry_message_and_hint(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    with pytest.raises(onnxprune.OnnxPruneError) as caught:
        onnxprune.load(tmp_path / "x.npz")
    assert caught.value.message
    assert caught.value.hint
