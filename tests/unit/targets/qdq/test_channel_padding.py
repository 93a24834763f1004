"""Depthwise convolutions with channels in sixteens: other shapes inside, the very same numbers outside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.contracts import CanonicalModel
from onnxprune.targets.qdq import spell
from onnxprune.targets.qdq.channel_padding import pad_depthwise_channels
from tests.builders import canonical, proto_of
from tests.quantization import everything_integer, kernels, normal_batches, plan_for, run

INPUT = (1, 4, 14, 14)
RNG = np.random.default_rng(11)


def weight(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * 0.4).astype(np.float32)


def node(op_type: str, inputs: Sequence[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs, [output], name=output, **attributes)


def inverted_bottleneck(
    *between: onnx.NodeProto, channels: int = 24, outputs: Sequence[str] = ("y",), **constants: np.ndarray
) -> CanonicalModel:
    """x -> "wide" (1x1, Relu) -> "deep" (depthwise 3x3) -> `between`, from "deep" to "b" -> "y" (1x1)."""
    nodes = [
        node("Conv", ["x", "w1", "b1"], "raw"),
        node("Relu", ["raw"], "wide"),
        node("Conv", ["wide", "w2", "b2"], "deep", group=channels, pads=[1] * 4),
        *(between or (node("Relu", ["deep"], "b"),)),
        node("Conv", ["b", "w3"], "y"),
    ]
    weights = {
        "w1": weight(channels, 4, 1, 1),
        "b1": weight(channels),
        "w2": weight(channels, 1, 3, 3),
        "b2": weight(channels),
        "w3": weight(6, channels, 1, 1),
        **constants,
    }
    return canonical(
        proto_of(nodes, inputs={"x": INPUT}, outputs={name: [None] * 4 for name in outputs}, weights=weights)
    )


def both_forms(model: CanonicalModel, **config: object) -> tuple[ir.Model, ir.Model]:
    """Without and with the new channels."""
    plan = plan_for(model, normal_batches(INPUT), **config)
    placement = everything_integer(model, plan)
    kept, padded = (spell(model, plan, placement, "x86-vnni", pad_channels=pad) for pad in (False, True))
    return kept, padded


def groups(model: ir.Model) -> list[int]:
    found = (item.attributes.get_int("group", 1) for item in model.graph if item.op_type == "Conv")
    return [count for count in found if count > 1]


SQUEEZE_AND_EXCITE = (
    node("Sigmoid", ["deep"], "s"),
    node("Mul", ["deep", "s"], "silu"),
    node("GlobalAveragePool", ["silu"], "pooled"),
    node("Conv", ["pooled", "w4", "b4"], "squeezed"),
    node("Relu", ["squeezed"], "r"),
    node("Conv", ["r", "w5", "b5"], "gate"),
    node("Sigmoid", ["gate"], "g"),
    node("Mul", ["silu", "g"], "b"),
)
GATE_WEIGHTS = {"w4": weight(6, 24, 1, 1), "b4": weight(6), "w5": weight(24, 6, 1, 1), "b5": weight(24)}


@pytest.mark.parametrize("per_channel", [True, False], ids=["scales for channels", "one scale"])
def test_bottleneck_gets_channels_up_to_the_next_sixteen_and_the_same_numbers(per_channel: bool) -> None:
    kept, padded = both_forms(inverted_bottleneck(), per_channel=per_channel)
    feeds = normal_batches(INPUT).batches[0]

    assert (groups(kept), groups(padded)) == ([24], [32])
    np.testing.assert_array_equal(run(padded, feeds)[0], run(kept, feeds)[0])
    np.testing.assert_array_equal(run(padded, feeds, optimized=False)[0], run(kept, feeds, optimized=False)[0])


def test_channels_go_along_through_silu_and_a_gate(tmp_path: Path) -> None:
    kept, padded = both_forms(inverted_bottleneck(*SQUEEZE_AND_EXCITE, **GATE_WEIGHTS))
    feeds = normal_batches(INPUT).batches[0]

    assert groups(padded) == [32]
    np.testing.assert_array_equal(run(padded, feeds)[0], run(kept, feeds)[0])
    onnx.checker.check_model(ir.to_proto(padded), full_check=True)
    assert kernels(padded, tmp_path)["DequantizeLinear"] == 1


def test_hard_swish_whose_shift_is_one_number_lets_them_through() -> None:
    model = inverted_bottleneck(
        node("HardSigmoid", ["deep"], "h", alpha=1 / 6, beta=0.5), node("Mul", ["deep", "h"], "b")
    )
    kept, padded = both_forms(model)
    feeds = normal_batches(INPUT).batches[0]

    assert groups(padded) == [32]
    np.testing.assert_array_equal(run(padded, feeds)[0], run(kept, feeds)[0])


def test_multiple_of_sixteen_is_left_alone() -> None:
    kept, padded = both_forms(inverted_bottleneck(channels=32))

    assert groups(padded) == groups(kept) == [32]


@pytest.mark.parametrize(
    ("between", "outputs", "constants"),
    [
        ((node("Relu", ["deep"], "b"),), ("y", "b"), {}),
        ((node("Concat", ["deep", "wide"], "c", axis=2), node("Relu", ["c"], "b")), ("y",), {}),
        ((node("Mul", ["deep", "k"], "b"),), ("y",), {"k": weight(24, 1, 1)}),
        ((node("Softmax", ["deep"], "b", axis=1),), ("y",), {}),
    ],
    ids=["model output", "concatenation", "factor for each channel", "softmax over channels"],
)
def test_tensor_that_something_else_looks_at_keeps_its_channels(
    between: Sequence[onnx.NodeProto], outputs: Sequence[str], constants: dict[str, np.ndarray]
) -> None:
    kept, padded = both_forms(inverted_bottleneck(*between, outputs=outputs, **constants))

    assert groups(padded) == groups(kept) == [24]


def test_channels_are_not_worth_it_where_the_operators_between_cost_more() -> None:
    names = [f"s{index}" for index in range(40)]
    chain = [node("Sigmoid", [before], after) for before, after in zip(["deep", *names], [*names, "b"], strict=True)]

    kept, padded = both_forms(inverted_bottleneck(*chain, channels=17))

    assert groups(padded) == groups(kept) == [17]


def test_weight_of_two_convolutions_is_padded_for_one_and_kept_for_the_other() -> None:
    model = inverted_bottleneck(
        node("Relu", ["deep"], "b"),
        node("Conv", ["x", "w1"], "other"),
        node("GlobalAveragePool", ["other"], "z"),
        outputs=("y", "z"),
    )
    kept, padded = both_forms(model)
    feeds = normal_batches(INPUT).batches[0]

    assert groups(padded) == [32]
    for one, other in zip(run(padded, feeds), run(kept, feeds), strict=True):
        np.testing.assert_array_equal(one, other)


def test_second_run_changes_nothing() -> None:
    _, padded = both_forms(inverted_bottleneck())

    assert pad_depthwise_channels(padded) == 0


def test_arm_keeps_its_channels() -> None:
    model = inverted_bottleneck()
    plan = plan_for(model, normal_batches(INPUT))

    assert groups(spell(model, plan, everything_integer(model, plan), "arm64")) == [24]


def test_names_that_the_new_weights_would_have_may_be_taken_already() -> None:
    model = inverted_bottleneck(
        node("Relu", ["deep"], "w2_dequantized_padded"),
        node("Relu", ["w2_dequantized_padded"], "deep_1_padded_dequantized"),
        node("Relu", ["deep_1_padded_dequantized"], "deep_1_padded"),
        node("Relu", ["deep_1_padded"], "b"),
    )

    kept, padded = both_forms(model)

    assert groups(padded) == [32]
    onnx.checker.check_model(ir.to_proto(padded), full_check=True)
    names = [found.name for found in padded.graph]
    assert len(names) == len(set(names))
    feeds = normal_batches(INPUT).batches[0]
    np.testing.assert_array_equal(run(padded, feeds)[0], run(kept, feeds)[0])
