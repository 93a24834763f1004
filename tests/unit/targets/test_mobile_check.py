from __future__ import annotations

import logging
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune.runtime.child import ChildFailure
from onnxprune.targets import mobile_check
from onnxprune.targets.mobile_check import mobile_findings
from tests.builders import conv_net_proto, proto_of


def texts_of(proto: onnx.ModelProto, folder: Path) -> dict[str, str]:
    onnx.save(proto, folder / "net.onnx")
    findings = mobile_findings(folder / "net.onnx", folder=folder, has_int8_activations=False)
    assert {finding.severity for finding in findings} == {"info"}
    return {finding.topic: finding.text for finding in findings}


def test_dynamic_model_is_judged_as_it_is_and_with_fixed_shapes(tmp_path: Path) -> None:
    texts = texts_of(conv_net_proto(), tmp_path)
    assert list(texts) == ["NNAPI", "CoreML (NeuralNetwork)", "CoreML (MLProgram)"]
    assert texts["NNAPI"].startswith(
        "0 of 8 nodes in 0 parts: the model is better off on the CPU provider. "
        "With fixed input shapes (--shape): 8 of 8 nodes in 1 part, and it should run well there. "
        "Not checked: Conv: Only 2D Conv is supported."
    )
    assert texts["NNAPI"].endswith("Android deprecates NNAPI since version 15.")
    assert "Not supported: 'Flatten'." in texts["CoreML (MLProgram)"]


def test_fixed_model_is_judged_once(tmp_path: Path) -> None:
    texts = texts_of(conv_net_proto(batch=1), tmp_path)
    assert texts["CoreML (NeuralNetwork)"].startswith("8 of 8 nodes in 1 part: the model should run well there. Not")
    assert "--shape" not in texts["CoreML (NeuralNetwork)"]


def test_shape_that_depends_on_values_is_told_from_a_dynamic_input(tmp_path: Path) -> None:
    proto = proto_of(
        [
            helper.make_node("NonZero", ["x"], ["where"], name="where"),
            helper.make_node("Cast", ["where"], ["y"], name="cast", to=TensorProto.FLOAT),
        ],
        inputs={"x": [1, 8]},
        outputs={"y": [2, None]},
    )
    text = texts_of(proto, tmp_path)["CoreML (MLProgram)"]
    assert "Nodes with shapes that are known only when it runs: 1." in text
    assert "--shape" not in text


def test_checkers_logging_and_path_stay_in_the_child(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    handlers, path = list(logging.getLogger().handlers), list(sys.path)
    texts_of(conv_net_proto(), tmp_path)
    assert (logging.getLogger().handlers, sys.path) == (handlers, path)
    assert capfd.readouterr() == ("", "")


def test_int8_activations_are_said_to_be_refused_by_nnapi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nodes = {"num_nodes": 0, "num_supported": 0, "num_partitions": 0, "num_dynamic": 0, "verdict": "NO"}
    entry = nodes | {"unsupported_ops": [], "caveats": []}
    answers = {
        name: {"has_dynamic_inputs": False, "as_is": entry, "fixed_shapes": entry} for name in mobile_check.PROVIDERS
    }
    monkeypatch.setattr(mobile_check, "call_in_child", lambda *args, **options: answers)
    findings = mobile_findings(tmp_path / "net.onnx", folder=tmp_path, has_int8_activations=True)
    assert findings[-1].text.startswith("NNAPI takes uint8 activations only")


def test_checker_that_fails_is_a_finding_and_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ChildFailure("ended with code 1; its last words: IndexError")

    monkeypatch.setattr(mobile_check, "call_in_child", fail)
    (finding,) = mobile_findings(tmp_path / "net.onnx", folder=tmp_path, has_int8_activations=False)
    assert finding.severity == "warning"
    assert "Not checked: ONNX Runtime's usability checker ended with code 1" in finding.text
