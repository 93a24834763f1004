from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune.errors import TargetError
from onnxprune.runtime.sessions import ort_runner_from_path
from onnxprune.targets.ort_child import MODEL_FILE
from onnxprune.targets.ort_format import OrtFileFacts, minimum_ort_version, normalize_ort_file, read_ort_facts
from tests.builders import conv_net_proto


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `.ort` file as ONNX Runtime writes it."""
    import onnxruntime

    folder = tmp_path_factory.mktemp("ort")
    onnx.save(conv_net_proto(), folder / "net.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / MODEL_FILE)
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(
        folder / "net.onnx", options, providers=["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"]
    )
    return folder / MODEL_FILE


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    path = tmp_path / "copy.ort"
    path.write_bytes(converted.read_bytes())
    return path


def test_facts_are_read_from_the_file(converted: Path) -> None:
    facts = read_ort_facts(converted)
    assert facts.format_version == "6"
    assert facts.opsets[""] == 20
    assert facts.metadata == {"author": "somebody", "labels": "a,b,c"}
    assert {(use.domain, use.op_type): count for use, count in facts.ops.items()} == {
        ("", "Flatten"): 1,
        ("", "Gemm"): 1,
        ("", "GlobalAveragePool"): 1,
        ("com.microsoft", "FusedConv"): 2,
    }
    assert not facts.has_runtime_optimizations


def test_normalized_file_says_and_computes_the_same(converted: Path, copy: Path) -> None:
    normalize_ort_file(copy)
    assert read_ort_facts(copy) == read_ort_facts(converted)
    image = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8), dtype=np.float32)}
    np.testing.assert_array_equal(
        ort_runner_from_path(copy).run(image)["y"], ort_runner_from_path(converted).run(image)["y"]
    )
    assert [path.name for path in copy.parent.iterdir()] == ["copy.ort"]


def test_normalizing_again_changes_nothing(copy: Path) -> None:
    normalize_ort_file(copy)
    once = copy.read_bytes()
    normalize_ort_file(copy)
    assert copy.read_bytes() == once


def test_order_that_the_resolver_was_written_in_does_not_matter(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxprune.targets import ort_format

    build = ort_format._build_front
    # What ONNX Runtime's hash map does: write the same entries in some order.
    monkeypatch.setattr(
        ort_format, "_build_front", lambda version, types: build(version, random.Random(4).sample(types, len(types)))
    )
    shuffled = tmp_path / "shuffled.ort"
    shuffled.write_bytes(copy.read_bytes())
    normalize_ort_file(shuffled)
    monkeypatch.undo()
    normalize_ort_file(copy)
    assert shuffled.read_bytes() != copy.read_bytes()
    normalize_ort_file(shuffled)
    assert shuffled.read_bytes() == copy.read_bytes()


@pytest.mark.parametrize("operation", [read_ort_facts, normalize_ort_file])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "'bad.ort' is empty"),
        (b"something else entirely", "'bad.ort' is no ORT format model"),
        (b"\x10\x00\x00\x00ORTM", "'bad.ort' is damaged"),
        (b"\xff\xff\xff\xffORTM" + bytes(64), "'bad.ort' is damaged"),
    ],
    ids=["empty", "other", "cut off", "wild offset"],
)
def test_what_is_no_ort_file_is_refused_and_left_alone(
    tmp_path: Path, operation: object, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.ort"
    path.write_bytes(content)
    with pytest.raises(TargetError, match=message):
        operation(path)  # type: ignore[operator]
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.ort"]
    assert path.read_bytes() == content


def test_file_cut_off_in_the_middle_is_refused(copy: Path) -> None:
    content = copy.read_bytes()
    copy.write_bytes(content[: len(content) // 8])
    with pytest.raises(TargetError, match=r"'copy\.ort' is damaged"):
        read_ort_facts(copy)


@pytest.mark.parametrize(
    ("format_version", "opset", "expected"),
    [
        ("6", 15, "1.16"),
        ("6", 18, "1.16"),
        ("6", 20, "1.17"),
        ("6", 24, "1.24"),
        ("5", 18, "1.14"),
        ("7", 20, None),
        ("6", 99, None),
        ("6", 0, None),
    ],
)
def test_oldest_runtime_follows_from_format_and_opset(format_version: str, opset: int, expected: str | None) -> None:
    facts = OrtFileFacts(
        format_version=format_version, opsets={"": opset}, metadata={}, ops={}, has_runtime_optimizations=False
    )
    assert minimum_ort_version(facts) == expected
