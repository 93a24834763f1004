"""Timings of whole models: what is kept, what it stands for, and what a damaged file costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.contracts import CanonicalModel
from onnxprune.runtime import model_timing
from onnxprune.runtime.latency import PairTiming
from onnxprune.runtime.model_timing import ModelTimer
from tests.builders import canonical, conv_net, proto_of

FEEDS = {"x": np.zeros((1, 3, 8, 8), dtype=np.float32)}
TIMING = PairTiming(before_ms=2.0, after_ms=1.0, ratio=2.0, error=0.01)


def timer(folder: Path | None) -> ModelTimer:
    return ModelTimer(threads=1, folder=folder)


def pair(found: ModelTimer, before: ir.Model, after: ir.Model) -> PairTiming:
    return found.pair(before, after, FEEDS, round_seconds=0.01, max_rounds=3)


def small(*, stride: int = 1) -> CanonicalModel:
    return canonical(
        proto_of(
            [helper.make_node("Conv", ["x", "w"], ["y"], name="conv", strides=[stride] * 2)],
            inputs={"x": [1, 3, 8, 8]},
            outputs={"y": [None] * 4},
            weights={"w": np.ones((4, 3, 3, 3), dtype=np.float32)},
        )
    )


def test_a_pair_is_timed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pair(timer(tmp_path), conv_net(), conv_net())
    monkeypatch.setattr(model_timing, "timed_pair", lambda *_args, **_options: pytest.fail("timed again"))
    assert pair(timer(tmp_path), conv_net(), conv_net()) == first
    assert first.before_ms > 0


def test_other_order_threads_and_layout_are_other_timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_timing, "timed_pair", lambda *_args, **_options: TIMING)
    a, b = small(), small(stride=2)
    pair(timer(tmp_path), a, b)
    pair(timer(tmp_path), b, a)
    pair(ModelTimer(threads=2, folder=tmp_path), a, b)
    pair(ModelTimer(threads=1, folder=tmp_path, blocked_layout=False), a, b)
    assert len(list(tmp_path.rglob("pair-*.json"))) == 4


@pytest.mark.parametrize("asked", [{"round_seconds": 0.3, "max_rounds": 3}, {"round_seconds": 0.01, "max_rounds": 8}])
def test_a_quick_timing_does_not_answer_for_a_thorough_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    monkeypatch.setattr(model_timing, "timed_pair", lambda *_args, **_options: TIMING)
    pair(timer(tmp_path), small(), small())
    thorough = replace(TIMING, error=0.001)
    monkeypatch.setattr(model_timing, "timed_pair", lambda *_args, **_options: thorough)
    assert timer(tmp_path).pair(small(), small(), FEEDS, **asked) == thorough


@pytest.mark.parametrize("content", ["", "[]", '{"before_ms": 1}', '{"before_ms": NaN}'])
def test_a_damaged_file_is_timed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(model_timing, "timed_pair", lambda *_args, **_options: TIMING)
    pair(timer(tmp_path), small(), small())
    (path,) = tmp_path.rglob("pair-*.json")
    path.write_text(content, encoding="utf-8")
    assert pair(timer(tmp_path), small(), small()) == TIMING
    assert "ratio" in path.read_text(encoding="utf-8")


def test_a_folder_that_can_not_be_written_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_timing, "timed_pair", lambda *_args, **_options: TIMING)
    file = tmp_path / "file"
    file.touch()
    assert pair(timer(file), small(), small()) == TIMING
    assert pair(timer(None), small(), small()) == TIMING


def test_node_times_cover_the_nodes_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"float": conv_net()}
    first = timer(tmp_path).node_times(models, FEEDS, run_s=0.1)
    monkeypatch.setattr(model_timing, "profile_ops", lambda *_args, **_options: pytest.fail("profiled again"))
    assert timer(tmp_path).node_times(models, FEEDS, run_s=0.1) == first
    assert {"stem/conv", "block/conv", "head/gemm"} <= {node.model_node for node in first["float"]}
