from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from onnxprune.errors import UsageError
from onnxprune.runtime.profile import profile_ops
from tests.builders import conv_net, conv_net_proto, proto_of

FEEDS = {"x": np.zeros((1, 3, 8, 8), np.float32)}


def test_profile_without_optimization_has_every_node_once_with_shares_that_add_up() -> None:
    profile = profile_ops(conv_net(), FEEDS, runs=5, warmup=2, optimization="disabled")
    assert {node.model_node for node in profile.nodes} == {
        "stem/conv",
        "stem/relu",
        "block/conv",
        "block/add",
        "block/relu",
        "head/pool",
        "head/flatten",
        "head/gemm",
    }
    assert sum(node.share for node in profile.nodes) == pytest.approx(1.0)
    assert sum(kind.share for kind in profile.op_types) == pytest.approx(1.0)
    assert {node.calls_per_run for node in profile.nodes} == {1.0}
    assert (profile.num_runs, profile.threads) == (5, 1)
    assert {kind.op_type: kind.num_nodes for kind in profile.op_types}["Relu"] == 2
    assert 0 < profile.nodes_ms <= profile.run_ms
    times = [node.mean_ms for node in profile.nodes]
    assert times == sorted(times, reverse=True)


def test_fused_nodes_are_led_back_to_the_convolution_and_its_module() -> None:
    profile = profile_ops(conv_net(), FEEDS, runs=2, warmup=1)
    convolutions = {node.model_node: node.module_path for node in profile.nodes if "Conv" in node.op_type}
    assert convolutions == {"stem/conv": "stem", "block/conv": "block"}


def test_file_is_profiled_with_its_module_paths(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(conv_net_proto(), path)
    profile = profile_ops(path, FEEDS, runs=2, optimization="disabled")
    assert {node.model_node: node.module_path for node in profile.nodes}["stem/conv"] == "stem"
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.onnx"]


def test_time_inside_a_loop_body_is_not_counted_for_the_loop_as_well() -> None:
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["next"], name="inner"),
            helper.make_node("Identity", ["go"], ["go_on"], name="pass_on"),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [128, 128]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [128, 128]),
        ],
    )
    proto = proto_of(
        [helper.make_node("Loop", ["count", "", "x"], ["y"], name="outer", body=body)],
        inputs={"x": [128, 128]},
        outputs={"y": [128, 128]},
        weights={"count": np.array(4, np.int64), "w": np.eye(128, dtype=np.float32)},
    )
    profile = profile_ops(ir.from_proto(proto), {"x": np.ones((128, 128), np.float32)}, runs=3, optimization="disabled")
    by_name = {node.name: node for node in profile.nodes}
    assert by_name["inner"].calls_per_run == 4.0
    assert by_name["outer"].calls_per_run == 1.0
    assert profile.nodes_ms <= profile.run_ms
    assert sum(node.share for node in profile.nodes) == pytest.approx(1.0)


@pytest.mark.parametrize(("runs", "warmup"), [(0, 1), (1, -1)])
def test_nonsense_counts_are_refused(runs: int, warmup: int) -> None:
    with pytest.raises(UsageError, match="at least 1 run"):
        profile_ops(conv_net(), FEEDS, runs=runs, warmup=warmup)
