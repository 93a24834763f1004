"""Channel classes: what belongs together, and how time grows."""

from __future__ import annotations

import time

import numpy as np
from onnx import helper

from onnxprune.contracts import CanonicalModel
from onnxprune.ops.channels import Role
from onnxprune.passes.prune import analyze_channels
from tests.builders import canonical, conv_net, proto_of


def test_a_residual_stream_is_one_group_that_knows_all_its_places() -> None:
    groups = {group.id: group for group in analyze_channels(conv_net()).groups}
    stream = groups["stem.weight[0]"]
    assert (len(stream), stream.layers, stream.frozen_reason) == (16, ("stem/conv", "block/conv"), None)
    assert {(slices.key, slices.role) for slices in stream.slices} == {
        ("stem.weight[0]", Role.FILTER),
        ("block.weight[0]", Role.FILTER),
        ("stem.bias[0]", Role.PARAMETER),
        ("block.bias[0]", Role.PARAMETER),
        ("block.weight[1]", Role.INPUT),
        ("head.weight[1]", Role.INPUT),
    }


def test_flatten_gives_each_channel_a_block_of_columns() -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"], name="conv"),
        helper.make_node("Flatten", ["h"], ["f"]),
        helper.make_node("Gemm", ["f", "b"], ["y"], name="gemm", transB=1),
    ]
    weights = {
        "a": rng.standard_normal((8, 3, 1, 1)).astype(np.float32),
        "b": rng.standard_normal((10, 8 * 4)).astype(np.float32),
    }
    model = canonical(proto_of(nodes, inputs={"x": ["N", 3, 2, 2]}, outputs={"y": None}, weights=weights))
    group = analyze_channels(model).groups[0]
    columns = next(slices for slices in group.slices if slices.key == "b[1]")
    assert columns.positions.tolist() == [[4 * channel + place for place in range(4)] for channel in range(8)]


def stack(blocks: int) -> CanonicalModel:
    """That many residual blocks of 16 channels."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("Conv", ["x", "w"], ["r0"], name="stem")]
    weights = {"w": rng.standard_normal((16, 3, 1, 1)).astype(np.float32)}
    for index in range(blocks):
        source, target = f"r{index}", f"r{index + 1}"
        weights[f"a{index}"] = rng.standard_normal((16, 16, 1, 1)).astype(np.float32)
        weights[f"b{index}"] = rng.standard_normal((16, 16, 1, 1)).astype(np.float32)
        nodes += [
            helper.make_node("Conv", [source, f"a{index}"], [f"h{index}"], name=f"a{index}"),
            helper.make_node("Relu", [f"h{index}"], [f"q{index}"], name=f"q{index}"),
            helper.make_node("Conv", [f"q{index}", f"b{index}"], [f"g{index}"], name=f"b{index}"),
            helper.make_node("Add", [f"g{index}", source], [target], name=f"s{index}"),
        ]
    last = f"r{blocks}"
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["y"]))
    return canonical(proto_of(nodes, inputs={"x": [1, 3, 4, 4]}, outputs={"y": None}, weights=weights))


def test_time_of_the_analysis_grows_linearly_with_the_number_of_blocks() -> None:
    small, large = stack(30), stack(300)

    def seconds(model: CanonicalModel) -> float:
        taken = []
        for _ in range(3):
            started = time.process_time()
            analyze_channels(model)
            taken.append(time.process_time() - started)
        return min(taken)

    # Ten times the blocks: 10 where linear, 100 where quadratic.
    assert seconds(large) / seconds(small) < 25
