from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune.contracts import CanonicalModel, JsonObject
from onnxprune.errors import TargetError
from onnxprune.runtime.child import ChildFailure
from onnxprune.targets import proof
from onnxprune.targets.proof import Arithmetic, arithmetic_of, compare_in_this_process, prove, write_reference
from tests.builders import canonical, conv_net, conv_net_proto, proto_of

SAME = {"max_rel": 0.0, "snr_db": math.inf}


def answer(**compared: JsonObject) -> JsonObject:
    spec = {"name": "x", "dtype": "float32", "shape": ["N", 3, 8, 8]}
    outputs = [{"name": "y", "dtype": "float32", "shape": ["N", 10]}]
    metadata = {"author": "somebody", "labels": "a,b,c"}
    return {"inputs": [spec], "outputs": outputs, "metadata": metadata, "outputs_compared": compared}


def prove_answer(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    found: JsonObject,
    arithmetic: Arithmetic = "float32",
    model: CanonicalModel | None = None,
) -> proof.Proof:
    """What `prove` makes of a child that answers `found`."""
    monkeypatch.setattr(proof, "call_in_child", lambda *args, **options: found)
    return prove(
        tmp_path / "reference.onnx",
        tmp_path / "net.ort",
        model=model or conv_net(),
        arithmetic=arithmetic,
        folder=tmp_path,
        seed=0,
    )


@pytest.mark.parametrize(
    ("arithmetic", "entry"),
    [
        ("float32", {"max_rel": 1e-3, "snr_db": 60.0}),
        ("float16", {"max_rel": 0.05, "snr_db": 30.0}),
        ("int8", {"max_rel": 0.5, "snr_db": 10.0}),
        ("saturating", {"max_rel": 1.9, "snr_db": -3.0}),
        ("float32", {"equal_ratio": 0.99}),
        ("int8", {"equal_ratio": 0.0}),
        ("int8", {"shapes": [[7, 4], [6, 4]]}),
    ],
)
def test_difference_at_its_limit_passes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arithmetic: Arithmetic, entry: JsonObject
) -> None:
    prove_answer(monkeypatch, tmp_path, answer(y=entry), arithmetic)


@pytest.mark.parametrize(
    ("arithmetic", "entry", "message"),
    [
        (
            "float32",
            {"max_rel": 1.1e-3, "snr_db": 60.0},
            r"off by 0\.0011 of its largest value, above the limit",
        ),
        ("float32", {"max_rel": math.nan, "snr_db": math.nan}, "off by nan"),
        ("float16", {"max_rel": 0.06, "snr_db": 30.0}, r"off by 0\.06"),
        ("int8", {"max_rel": 0.5, "snr_db": 9.9}, r"reaches 9\.9 dB instead of at least 10 dB"),
        ("int8", {"max_rel": math.nan, "snr_db": math.nan}, "reaches nan dB"),
        ("saturating", {"max_rel": math.nan, "snr_db": math.nan}, "reaches nan dB"),
        ("float32", {"equal_ratio": 0.98}, r"is equal in only 98\.0% of its elements"),
        ("float32", {"shapes": [[7, 4], [6, 4]]}, r"has the shape \[6, 4\] instead of \[7, 4\]"),
        ("int8", {"shapes": [[7, 4], [7]]}, r"has the shape \[7\] instead of \[7, 4\]"),
    ],
)
def test_difference_above_its_limit_names_output_and_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arithmetic: Arithmetic, entry: JsonObject, message: str
) -> None:
    with pytest.raises(TargetError, match=rf"'net\.ort' does not compute .*: output 'y' .*{message}"):
        prove_answer(monkeypatch, tmp_path, answer(y=entry), arithmetic)


def test_saturation_below_the_int8_limit_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    low = answer(y={"max_rel": 0.3, "snr_db": 5.0})
    (finding,) = prove_answer(monkeypatch, tmp_path, low, "saturating").findings
    assert (finding.topic, finding.severity) == ("int8", "warning")
    assert "'y' reached 5.0 dB" in finding.text
    high = answer(y={"max_rel": 0.01, "snr_db": 35.0})
    assert prove_answer(monkeypatch, tmp_path, high, "saturating").findings == ()


def test_a_decision_behind_the_integers_that_turns_round_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proto = conv_net_proto()
    proto.graph.node[-1].output[0] = "logits"
    proto.graph.node.append(onnx.helper.make_node("Softmax", ["logits"], ["y"], "softmax"))
    found = answer(y={"max_rel": 1.0, "snr_db": 0.0})
    (finding,) = prove_answer(monkeypatch, tmp_path, found, "int8", canonical(proto)).findings
    assert (finding.topic, finding.severity) == ("int8", "warning")
    assert "nearly equal candidates" in finding.text
    with pytest.raises(TargetError, match=r"reaches 0\.0 dB"):
        prove_answer(monkeypatch, tmp_path, found, "int8")
    not_a_number = answer(y={"max_rel": math.nan, "snr_db": math.nan})
    with pytest.raises(TargetError, match="reaches nan dB"):
        prove_answer(monkeypatch, tmp_path, not_a_number, "int8", canonical(proto))


def test_worst_output_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = answer(y={"max_rel": 1e-6, "snr_db": 90.0}, z={"max_rel": 1e-4, "snr_db": 70.0}, k={"equal_ratio": 1.0})
    proven = prove_answer(monkeypatch, tmp_path, found)
    assert (proven.max_relative, proven.snr_db) == (1e-4, 70.0)


def test_changed_interface_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = answer(y=SAME)
    found["outputs"][0]["name"] = "logits"
    with pytest.raises(TargetError, match=r"'net\.ort' has the outputs 'logits', but the model has 'y'"):
        prove_answer(monkeypatch, tmp_path, found)


def test_lost_metadata_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = answer(y=SAME)
    del found["metadata"]["labels"]
    with pytest.raises(TargetError, match=r"'net\.ort' lost the model's metadata 'labels'"):
        prove_answer(monkeypatch, tmp_path, found)


def test_crash_is_told_with_its_signal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def crash(*args: object, **options: object) -> None:
        raise ChildFailure("was killed by SIGKILL, perhaps for lack of memory")

    monkeypatch.setattr(proof, "call_in_child", crash)
    with pytest.raises(TargetError, match="was killed by SIGKILL, perhaps for lack of memory while it loaded and ran"):
        prove(tmp_path / "r", tmp_path / "net.ort", model=conv_net(), arithmetic="int8", folder=tmp_path, seed=0)


def compare(reference: onnx.ModelProto, artifact: onnx.ModelProto, folder: Path) -> JsonObject:
    onnx.save(reference, folder / "reference.onnx")
    onnx.save(artifact, folder / "artifact.onnx")
    return compare_in_this_process(
        {
            "reference": str(folder / "reference.onnx"),
            "artifact": str(folder / "artifact.onnx"),
            "seed": 0,
            "custom_op_libraries": [],
            "replay_saved_optimizations": False,
        },
        folder,
    )


def test_reference_written_by_the_other_writer_agrees_with_the_model(tmp_path: Path) -> None:
    path = write_reference(conv_net(), tmp_path)
    found = compare(onnx.load(path), conv_net_proto(), tmp_path)
    assert found["outputs_compared"]["y"]["max_rel"] < 1e-6  # fused kernels round once less
    assert found["outputs"] == [{"name": "y", "dtype": "float32", "shape": ["N", 10]}]
    assert found["metadata"] == {"author": "somebody", "labels": "a,b,c"}


def test_integer_outputs_are_compared_by_the_share_of_equal_elements(tmp_path: Path) -> None:
    def best(offset: int) -> onnx.ModelProto:
        return proto_of(
            [
                helper.make_node("ArgMax", ["x"], ["best"], name="best", axis=1, keepdims=0),
                helper.make_node("Add", ["best", "offset"], ["y"], name="shift"),
            ],
            inputs={"x": [4, 5]},
            outputs={"y": [4]},
            weights={"offset": np.array([0, 0, 0, offset], np.int64)},
            output_type=TensorProto.INT64,
        )

    assert compare(best(0), best(0), tmp_path)["outputs_compared"] == {"y": {"equal_ratio": 1.0}}
    assert compare(best(0), best(1), tmp_path)["outputs_compared"] == {"y": {"equal_ratio": 0.75}}


def test_outputs_of_another_length_are_reported_with_both_shapes(tmp_path: Path) -> None:
    def positive(limit: float) -> onnx.ModelProto:
        return proto_of(
            [
                helper.make_node("Greater", ["x", "limit"], ["above"], name="above"),
                helper.make_node("NonZero", ["above"], ["y"], name="where"),
            ],
            inputs={"x": [1, 50]},
            outputs={"y": [2, None]},
            weights={"limit": np.array(limit, np.float32)},
            output_type=TensorProto.INT64,
        )

    found = compare(positive(-9), positive(9), tmp_path)["outputs_compared"]["y"]
    assert found["shapes"] == [[2, 50], [2, 0]]


def test_limits_follow_from_the_kind_of_model() -> None:
    single, half = conv_net(), conv_net(dtype=np.float16)
    assert arithmetic_of(single, is_quantized=False, host_saturates=True) == "float32"
    assert arithmetic_of(half, is_quantized=False, host_saturates=False) == "float16"
    assert arithmetic_of(single, is_quantized=True, host_saturates=False) == "int8"
    assert arithmetic_of(single, is_quantized=True, host_saturates=True) == "saturating"
