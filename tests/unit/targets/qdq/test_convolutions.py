"""Convolutions in the form that is fast: other weights, the very same integers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.contracts import CanonicalModel
from onnxprune.targets.qdq import SpellingName, place, spell
from onnxprune.targets.qdq.convolutions import ConvolutionShape, WiderConvolution, merged_groups, padded_input_channels
from tests.builders import canonical, proto_of
from tests.quantization import kernels, normal_batches, plan_for, run

RNG = np.random.default_rng(5)


def shape_of(*, groups: int, inputs: int, outputs: int, window: int = 9) -> ConvolutionShape:
    return ConvolutionShape(groups=groups, inputs_per_group=inputs, outputs_per_group=outputs, window=window)


def convolution(weight: np.ndarray, channels: int, *, groups: int = 1) -> CanonicalModel:
    """x -> Conv -> Relu -> Conv 1x1 -> y."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["m"], name="conv", group=groups, pads=[1] * 4),
        helper.make_node("Relu", ["m"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "last"], ["y"], name="last"),
    ]
    weights = {
        "w": weight,
        "b": RNG.standard_normal(weight.shape[0]).astype(np.float32),
        "last": RNG.standard_normal((5, weight.shape[0], 1, 1)).astype(np.float32),
    }
    return canonical(proto_of(nodes, inputs={"x": (1, channels, 9, 9)}, outputs={"y": [None] * 4}, weights=weights))


def spelled(model: CanonicalModel, channels: int, spelling: SpellingName) -> ir.Model:
    plan = plan_for(model, normal_batches((1, channels, 9, 9)))
    return spell(model, plan, place(model, plan, spelling), spelling)


def group_of(model: ir.Model, name: str) -> int:
    (node,) = (node for node in model.graph if node.name == name)
    return node.attributes.get_int("group", 1)


@pytest.mark.parametrize(
    ("shape", "merged"),
    [
        (shape_of(groups=32, inputs=4, outputs=4), 8),
        (shape_of(groups=32, inputs=32, outputs=32), 1),
        (shape_of(groups=2, inputs=64, outputs=64), 1),
        (shape_of(groups=13, inputs=8, outputs=8), 13),
        (shape_of(groups=64, inputs=1, outputs=1), 1),
        (shape_of(groups=1, inputs=64, outputs=64), 1),
    ],
    ids=["32x4d", "32x32d", "two wide groups", "prime number of narrow groups", "depthwise", "no groups"],
)
def test_narrow_groups_are_merged_to_the_width_that_was_fastest(shape: ConvolutionShape, merged: int) -> None:
    assert merged_groups(shape) == merged


@pytest.mark.parametrize(
    ("shape", "added"),
    [
        (shape_of(groups=1, inputs=3, outputs=64), 1),
        (shape_of(groups=1, inputs=1, outputs=16), 3),
        (shape_of(groups=1, inputs=4, outputs=64), 0),
        (shape_of(groups=1, inputs=58, outputs=64), 0),
        (shape_of(groups=1, inputs=3, outputs=12), 0),
        (shape_of(groups=1, inputs=3, outputs=64, window=1), 0),
    ],
    ids=["picture", "grey picture", "four channels", "inside a network", "no direct kernel", "no window"],
)
def test_only_pictures_before_a_direct_kernel_get_channels(shape: ConvolutionShape, added: int) -> None:
    assert padded_input_channels(shape) == added


def test_merged_weight_has_each_group_in_its_own_columns() -> None:
    weight = np.arange(1, 9, dtype=np.float32).reshape(4, 2, 1, 1)

    merged = WiderConvolution(groups=4, merged=2, added_inputs=0).weight(weight)

    assert merged[:, :, 0, 0].tolist() == [[1, 2, 0, 0], [0, 0, 3, 4], [5, 6, 0, 0], [0, 0, 7, 8]]


@pytest.mark.parametrize(
    ("outputs", "inputs", "groups"), [(16, 4, 8), (24, 3, 4), (16, 1, 8)], ids=["square", "wider", "two filters each"]
)
def test_merged_groups_give_the_very_numbers_of_the_arm_spelling_that_keeps_them(
    outputs: int, inputs: int, groups: int
) -> None:
    channels = inputs * groups
    model = convolution(RNG.standard_normal((outputs, inputs, 3, 3)).astype(np.float32), channels, groups=groups)
    feeds = normal_batches((1, channels, 9, 9)).batches[0]

    merged, kept = spelled(model, channels, "x86-vnni"), spelled(model, channels, "arm64")

    assert (group_of(kept, "conv"), group_of(merged, "conv")) == (groups, 1)
    np.testing.assert_array_equal(run(merged, feeds, optimized=False)[0], run(kept, feeds, optimized=False)[0])


def test_one_scale_for_the_whole_weight_stays_one_when_groups_are_merged() -> None:
    model = convolution(RNG.standard_normal((16, 4, 3, 3)).astype(np.float32), 32, groups=8)
    source = normal_batches((1, 32, 9, 9))
    plan = plan_for(model, source, per_channel=False)
    placement = place(model, plan, "x86-vnni")

    merged, kept = (spell(model, plan, placement, spelling) for spelling in ("x86-vnni", "arm64"))

    feeds = source.batches[0]
    np.testing.assert_array_equal(run(merged, feeds, optimized=False)[0], run(kept, feeds, optimized=False)[0])


def test_picture_gets_a_fourth_channel_behind_its_quantization_and_the_same_numbers(tmp_path: Path) -> None:
    model = convolution(RNG.standard_normal((16, 3, 3, 3)).astype(np.float32), 3)
    feeds = normal_batches((1, 3, 9, 9)).batches[0]

    padded, kept = spelled(model, 3, "x86-vnni"), spelled(model, 3, "arm64")

    assert [value.shape for value in padded.graph.inputs] == [value.shape for value in model.graph.inputs]
    assert Counter(node.op_type for node in padded.graph)["Pad"] == 1
    assert kernels(padded, tmp_path)["QLinearConv"] == 2
    np.testing.assert_array_equal(run(padded, feeds, optimized=False)[0], run(kept, feeds, optimized=False)[0])


def test_weight_that_two_convolutions_share_with_other_groups_is_written_for_each() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["m"], name="grouped", group=2, pads=[1] * 4),
        helper.make_node("Slice", ["x", "zero", "four", "one"], ["s"], name="half"),
        helper.make_node("Conv", ["s", "w"], ["n"], name="whole", pads=[1] * 4),
        helper.make_node("Add", ["m", "n"], ["y"], name="add"),
    ]
    weights = {
        "w": RNG.standard_normal((8, 4, 3, 3)).astype(np.float32),
        **{name: np.array([number], dtype=np.int64) for name, number in (("zero", 0), ("four", 4), ("one", 1))},
    }
    model = canonical(proto_of(nodes, inputs={"x": (1, 8, 9, 9)}, outputs={"y": [None] * 4}, weights=weights))
    feeds = normal_batches((1, 8, 9, 9)).batches[0]

    both, kept = spelled(model, 8, "x86-vnni"), spelled(model, 8, "arm64")

    assert (group_of(both, "grouped"), group_of(both, "whole")) == (1, 1)
    np.testing.assert_array_equal(run(both, feeds, optimized=False)[0], run(kept, feeds, optimized=False)[0])
