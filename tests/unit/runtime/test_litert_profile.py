"""Times by operator from LiteRT's profiler, and how rows are led back to the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxprune.errors import ModelError, UsageError
from onnxprune.graph.tensor_graph import GraphNode, TensorGraph
from onnxprune.runtime import litert_profile
from onnxprune.runtime.feeds import working_feeds
from onnxprune.runtime.litert import litert_runner_from_path
from onnxprune.runtime.litert_profile import profile_tflite
from onnxprune.runtime.op_profile import OpProfile
from tests.tflite_files import Tensor, tflite_file
from tests.tflite_twins import tflite_twin

WHOLE, OPERATOR, INSIDE = 1, 2, 8


def test_profile_has_xnnpacks_operators_with_the_files_names_where_those_are_certain(tmp_path: Path) -> None:
    path = tmp_path / "twin.tflite"
    path.write_bytes(tflite_twin())
    x = np.random.default_rng(0).standard_normal((64, 3, 8, 8), dtype=np.float32)
    found = profile_tflite(path, {"x": x}, runs=5)
    named = {node.model_node: node.op_type for node in found.nodes if node.model_node}
    assert set(named) == {"c", "y"}
    assert named["c"].startswith("Convolution")
    assert named["y"].startswith("Fully Connected")
    assert sum(node.share for node in found.nodes) == pytest.approx(1.0)
    assert 0 < found.nodes_ms <= found.run_ms
    assert (found.num_runs, found.threads) == (5, 1)
    assert "XNNPACK takes 5 of 5 operators" in found.note
    assert sum(kind.num_nodes for kind in found.op_types) == len(found.nodes)


def test_trained_file_in_two_parts_has_every_convolution_by_name(shared_data: Path) -> None:
    path = shared_data / "mlperf_tiny_models" / "kws_int8.tflite"
    runner = litert_runner_from_path(path)
    found = profile_tflite(path, working_feeds(runner, seed=0), runs=3)
    products = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
    expected = {node.name for node in runner.graph.nodes if node.op_type in products}
    kept = {node.name for node in runner.graph.nodes if node.op_type in ("AVERAGE_POOL_2D", "SOFTMAX")}
    assert {node.model_node for node in found.nodes if node.model_node} == expected | kept
    assert "XNNPACK takes 11 of 13 operators, in 2 parts" in found.note


def profile_of(runs: list[list[list[object]]], types: list[str], parts: list[list[int]]) -> OpProfile:
    nodes = tuple(
        GraphNode(name=f"n{place}", op_type=kind, onnx_type=kind, reads=(), writes=())
        for place, kind in enumerate(types)
    )
    return litert_profile._profile(runs, TensorGraph(nodes=nodes, tensors={}), parts, threads=1)


def test_parts_that_begin_anew_are_told_apart_and_runs_are_averaged() -> None:
    def run(scale: int) -> list[list[object]]:
        return [
            [WHOLE, "LiteRT::Run[buffer registration]", 0, 1000],
            [WHOLE, "Invoke", 0, 60 * scale],
            [INSIDE, "Convolution (NHWC, F32) IGEMM", 0, 10 * scale],
            [INSIDE, "Clamp (NC)", 1, 5 * scale],
            [OPERATOR, "TOPK_V2", 1, 20 * scale],
            [INSIDE, "Fully Connected (NC, F32) GEMM", 0, 15 * scale],
        ]

    found = profile_of([run(1), run(3)], ["CONV_2D", "TOPK_V2", "FULLY_CONNECTED"], [[0], [2]])
    rows = [(node.name, node.model_node, node.op_type, node.mean_ms) for node in found.nodes]
    assert rows == [
        ("n1", "n1", "TOPK_V2", pytest.approx(0.040)),
        ("XNNPACK 2.1", "n2", "Fully Connected (NC, F32) GEMM", pytest.approx(0.030)),
        ("XNNPACK 1.1", "n0", "Convolution (NHWC, F32) IGEMM", pytest.approx(0.020)),
        ("XNNPACK 1.2", "", "Clamp (NC)", pytest.approx(0.010)),
    ]
    assert found.run_ms == pytest.approx(0.120)
    assert found.nodes_ms == pytest.approx(0.100)


@pytest.mark.parametrize(
    "parts", [[[0, 1]], [[0], [1]]], ids=["more products in XNNPACK", "parts that LiteRT splits otherwise"]
)
def test_rows_that_may_stand_for_another_operator_have_no_name_of_the_file(parts: list[list[int]]) -> None:
    run: list[list[object]] = [
        [WHOLE, "Invoke", 0, 60],
        [INSIDE, "Convolution (NHWC, F32) IGEMM", 0, 10],
        [INSIDE, "Convolution (NHWC, F32) IGEMM", 1, 10],
        [INSIDE, "Convolution (NHWC, F32) IGEMM", 2, 10],
    ]
    found = profile_of([run], ["CONV_2D", "CONV_2D"], parts)
    assert [node.model_node for node in found.nodes] == ["", "", ""]


def test_profile_without_a_run_is_an_error() -> None:
    with pytest.raises(ModelError, match="holds no run"):
        profile_of([[[WHOLE, "LiteRT::Run[buffer registration]", 0, 3]]], [], [])


def test_file_with_loops_is_refused_because_their_time_would_count_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "twin.tflite"
    path.write_bytes(tflite_twin())
    monkeypatch.setattr(litert_profile, "_WITH_BODIES", frozenset({"MEAN"}))
    with pytest.raises(ModelError, match="counts the time in the body of MEAN twice"):
        profile_tflite(path, {"x": np.zeros((1, 3, 8, 8), np.float32)})


def test_profiler_that_crashes_is_an_error_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "twin.tflite"
    path.write_bytes(tflite_twin())
    monkeypatch.setattr(litert_profile, "FEEDS_FILE", "other.npz")
    with pytest.raises(ModelError, match=r"'twin\.tflite' can't be profiled by operator: LiteRT's profiler failed"):
        profile_tflite(path, {"x": np.zeros((1, 3, 8, 8), np.float32)})


@pytest.mark.parametrize(("runs", "warmup"), [(0, 1), (1, -1)])
def test_nonsense_counts_are_refused(tmp_path: Path, runs: int, warmup: int) -> None:
    with pytest.raises(UsageError, match="at least 1 run and no negative warm-up"):
        profile_tflite(tmp_path / "any.tflite", {}, runs=runs, warmup=warmup)


def test_operator_without_xnnpack_is_profiled_by_its_own_name(tmp_path: Path) -> None:
    from tests.tflite_files import Node

    path = tmp_path / "floor.tflite"
    shape = (1 << 16,)
    path.write_bytes(
        tflite_file(
            tensors={"x": Tensor(shape=shape, dtype=np.int32), "y": Tensor(shape=shape, dtype=np.int32)},
            operators=[Node(name="ABS", inputs=["x"], outputs=["y"], options_type="AbsOptions", version=4)],
            inputs=["x"],
            outputs=["y"],
        )
    )
    found = profile_tflite(path, {"x": np.ones(shape, np.int32)}, runs=3)
    assert [(node.name, node.op_type) for node in found.nodes] == [("y", "ABS")]
    assert found.note == "XNNPACK takes none of the 1 operators."
