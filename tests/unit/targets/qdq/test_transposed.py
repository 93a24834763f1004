"""ConvTranspose as an ordinary convolution, for many strides, paddings and sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.contracts import CanonicalModel
from onnxprune.targets.qdq import place, spell
from onnxprune.targets.qdq.transposed import phases_of, refuse_conv_transpose
from tests.builders import canonical, proto_of
from tests.quantization import kernels, normal_batches, plan_for, run, signal_to_noise_db

INPUT = (2, 6, 5, 7)
RNG = np.random.default_rng(8)


def upsampling(kernel: tuple[int, int], *, groups: int = 1, **attributes: Any) -> CanonicalModel:
    """x -> ConvTranspose -> "u" -> Conv 1x1 -> y."""
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w", "b"], ["u"], name="up", group=groups, **attributes),
        helper.make_node("Conv", ["u", "last"], ["y"], name="last"),
    ]
    weights = {
        "w": (RNG.standard_normal((6, 4, *kernel)) * 0.3).astype(np.float32),
        "b": RNG.standard_normal(4 * groups).astype(np.float32),
        "last": (RNG.standard_normal((16, 4 * groups, 3, 3)) * 0.3).astype(np.float32),
    }
    return canonical(proto_of(nodes, inputs={"x": INPUT}, outputs={"y": [None] * 4, "u": [None] * 4}, weights=weights))


def node_of(model: CanonicalModel) -> ir.Node:
    (node,) = (node for node in model.graph if node.name == "up")
    return node


@pytest.mark.parametrize("per_channel", [True, False], ids=["scales for channels", "one scale"])
@pytest.mark.parametrize(
    ("kernel", "attributes"),
    [
        ((2, 2), {"strides": [2, 2]}),
        ((4, 4), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ((3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
        ((3, 3), {"strides": [2, 2]}),
        ((3, 3), {}),
        ((5, 2), {"strides": [3, 1], "pads": [2, 0, 1, 1]}),
        ((2, 3), {"strides": [3, 4]}),
        ((1, 1), {"strides": [2, 2]}),
    ],
    ids=str,
)
def test_every_output_is_that_of_the_float_operator(
    kernel: tuple[int, int], attributes: dict[str, Any], per_channel: bool, tmp_path: Path
) -> None:
    model = upsampling(kernel, **attributes)
    source = normal_batches(INPUT)
    plan = plan_for(model, source, per_channel=per_channel)
    feeds = source.batches[0]

    spelled = spell(model, plan, place(model, plan, "x86-vnni"), "x86-vnni")

    (_, exact), (_, integer) = run(model, feeds), run(spelled, feeds, optimized=False)
    assert integer.shape == exact.shape
    # One layer of 8 bits; a weight in the wrong place would end below 10 dB.
    assert signal_to_noise_db(exact, integer) > 30
    found = kernels(spelled, tmp_path)
    assert (found["QLinearConv"], found["ConvTranspose"], found["Conv"]) == (2, 0, 0)


@pytest.mark.parametrize(
    "attributes",
    [
        {"strides": [2, 2], "groups": 2},
        {"dilations": [2, 2]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"pads": [0, 2, 0, 2]},
    ],
    ids=str,
)
def test_what_no_convolution_can_do_stays_float_and_says_why(attributes: dict[str, Any]) -> None:
    model = upsampling((2, 2), **attributes)
    plan = plan_for(model, normal_batches(INPUT))

    placement = place(model, plan, "x86-vnni")

    assert phases_of(node_of(model)) is None
    assert placement.float_nodes["up"] == refuse_conv_transpose(node_of(model))


def test_phase_without_weights_for_an_offset_has_zeros_there() -> None:
    phases = phases_of(node_of(upsampling((3, 3), strides=[2, 2], pads=[1] * 4, output_padding=[1, 1])))
    assert phases is not None

    weight = phases.weight(np.ones((6, 4, 3, 3), dtype=np.float32))

    # Phase (0, 0) has weight 1 of each axis, phase (1, 1) has weights 0 and 2.
    assert weight.shape == (16, 6, 2, 2)
    assert [int(weight[4 * phase, 0].sum()) for phase in range(4)] == [1, 2, 2, 4]
