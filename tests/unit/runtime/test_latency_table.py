"""Times of single layers: what is measured, what is kept on disk, and what a damaged file costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onnxprune.runtime import latency_table, timing_store
from onnxprune.runtime.latency_table import Dim, LayerSpec, OperandSpec, default_table_folder, layer_times


def operand(*dims: Dim | int, is_weight: bool = False, dtype: str = "float32") -> OperandSpec:
    return OperandSpec(
        dtype=dtype, dims=tuple(dim if isinstance(dim, Dim) else Dim(dim) for dim in dims), is_weight=is_weight
    )


def convolution(*, depthwise: bool = False, attributes: str = '{"pads": [1, 1, 1, 1]}') -> LayerSpec:
    """A 3x3 convolution on 6x6 places; variable 0 counts its inputs, variable 1 its filters."""
    filters = Dim(1, 0) if depthwise else Dim(1, 1)
    return LayerSpec(
        op_type="Conv",
        opset=20,
        attributes=attributes,
        operands=(
            operand(1, Dim(1, 0), 6, 6),
            operand(filters, 1 if depthwise else Dim(1, 0), 3, 3, is_weight=True),
            operand(filters, is_weight=True),
        ),
        num_outputs=1,
        counts=(("group", Dim(1, 0)),) if depthwise else (),
        output=operand(1, filters, 6, 6),
    )


GEMM = LayerSpec(
    op_type="Gemm",
    opset=20,
    attributes='{"transB": 1}',
    operands=(operand(1, Dim(4, 0)), operand(Dim(1, 1), Dim(4, 0), is_weight=True), None),
    num_outputs=1,
    output=operand(1, Dim(1, 1)),
)
LSTM = LayerSpec(
    op_type="LSTM",
    opset=20,
    attributes="{}",
    operands=(
        operand(3, 1, Dim(1, 0)),
        operand(1, Dim(4, 1), Dim(1, 0), is_weight=True),
        operand(1, Dim(4, 1), Dim(1, 1), is_weight=True),
    ),
    num_outputs=3,
    counts=(("hidden_size", Dim(1, 1)),),
    output=operand(3, 1, 1, Dim(1, 1)),
)


@pytest.mark.parametrize(
    ("spec", "points"),
    [
        (convolution(), [(8, 16), (5, 7)]),
        (convolution(depthwise=True), [(16,), (9,)]),
        (GEMM, [(3, 8)]),
        (LSTM, [(4, 8)]),
    ],
    ids=["conv", "depthwise", "gemm", "lstm"],
)
def test_every_point_of_a_layer_gets_a_time(spec: LayerSpec, points: list[tuple[int, ...]]) -> None:
    found = layer_times({spec: points})[spec]
    assert set(found) == set(points)
    assert all(timing.time_ms > 0 for timing in found.values())


def test_points_that_can_not_run_are_left_out_and_the_others_are_timed() -> None:
    broken = convolution(attributes='{"pads": [1]}')
    found = layer_times({broken: [(4, 4)], convolution(): [(4, 4)]})
    assert found[broken] == {}
    assert set(found[convolution()]) == {(4, 4)}


def test_what_was_measured_once_is_read_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = layer_times({GEMM: [(2, 4), (3, 4)]}, folder=tmp_path)
    monkeypatch.setattr(latency_table, "_measure", lambda *_: pytest.fail("measured again"))
    assert layer_times({GEMM: [(2, 4), (3, 4)]}, folder=tmp_path) == first


def test_new_points_are_added_to_the_file_of_their_layer(tmp_path: Path) -> None:
    first = layer_times({GEMM: [(2, 4)]}, folder=tmp_path)
    layer_times({GEMM: [(3, 4)]}, folder=tmp_path)
    both = layer_times({GEMM: [(2, 4), (3, 4)]}, folder=tmp_path)
    assert both[GEMM][2, 4] == first[GEMM][2, 4]
    assert len(list(tmp_path.rglob("*.json"))) == 1


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"points": [[[2, 4], -1.0, false]]}', '{"layer": [], "points": [[[2, 4], 1.0, false]]}'],
)
def test_a_damaged_file_is_measured_again(tmp_path: Path, content: str) -> None:
    layer_times({GEMM: [(2, 4)]}, folder=tmp_path)
    (path,) = tmp_path.rglob("*.json")
    path.write_text(content, encoding="utf-8")
    assert set(layer_times({GEMM: [(2, 4)]}, folder=tmp_path)[GEMM]) == {(2, 4)}
    assert json.loads(path.read_text(encoding="utf-8"))["points"][0][0] == [2, 4]


def test_other_threads_and_processors_have_other_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer_times({GEMM: [(2, 4)]}, folder=tmp_path)
    layer_times({GEMM: [(2, 4)]}, folder=tmp_path, threads=2)
    monkeypatch.setattr(timing_store, "processor_name", lambda: "another one")
    layer_times({GEMM: [(2, 4)]}, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_can_not_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert set(layer_times({GEMM: [(2, 4)]}, folder=file)[GEMM]) == {(2, 4)}


def test_the_table_lies_in_the_cache_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_table.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_table_folder() == Path("/somewhere/onnxprune/latency")
