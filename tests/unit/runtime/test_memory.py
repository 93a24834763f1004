from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.errors import MissingExtraError, ModelError, OutputError, UsageError
from onnxprune.runtime.memory import measure_load, peak_rss_bytes
from tests.builders import conv_net, proto_of
from tests.tflite_twins import tflite_twin

MIB = 1 << 20


def test_load_figures_are_those_of_a_fresh_process_however_big_this_one_is(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(ir.to_proto(conv_net()), path)
    ballast = np.ones(400 * MIB, np.uint8)  # on Linux a child starts with this in its ru_maxrss
    figures = measure_load(path, repeats=1)
    assert peak_rss_bytes() > ballast.nbytes
    assert 20 * MIB < figures.baseline_rss_bytes < 300 * MIB
    assert figures.baseline_rss_bytes <= figures.peak_rss_bytes < 350 * MIB
    assert 0 < figures.load_time_ms < 60_000


def test_weights_count_in_the_peak(tmp_path: Path) -> None:
    path = tmp_path / "wide.onnx"
    weight = np.ones((2048, 4096), np.float32)  # 32 MiB
    proto = proto_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        inputs={"x": ["N", 2048]},
        outputs={"y": ["N", 4096]},
        weights={"w": weight},
    )
    onnx.save(proto, path)
    figures = measure_load(path, repeats=1)
    assert figures.peak_rss_bytes - figures.baseline_rss_bytes > weight.nbytes


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no model file '.*gone\.onnx'"):
        measure_load(tmp_path / "gone.onnx")
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"'bad\.onnx' can't be loaded"):
        measure_load(bad, repeats=1)
    with pytest.raises(UsageError, match="at least 1 process"):
        measure_load(bad, repeats=0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_of_this_process_is_at_least_what_it_holds() -> None:
    held = np.ones(32 * MIB, np.uint8)
    assert peak_rss_bytes() > held.nbytes


def test_tflite_files_are_loaded_by_litert(tmp_path: Path) -> None:
    path = tmp_path / "twin.tflite"
    path.write_bytes(tflite_twin())
    figures = measure_load(path, repeats=1)
    assert 0 < figures.load_time_ms < 60_000
    assert 20 * MIB < figures.baseline_rss_bytes <= figures.peak_rss_bytes < 300 * MIB
    path.write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"'twin\.tflite' can't be loaded by LiteRT"):
        measure_load(path, repeats=1)


def test_missing_litert_is_named_before_a_process_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "twin.tflite"
    path.write_bytes(tflite_twin())
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"onnxprune\[tflite\]"):
        measure_load(path, repeats=1)
