"""Convolutions through LiteRT against ONNX Runtime: what the official one-node cases leave out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from onnxprune.errors import TargetError
from tests.tflite_runs import assert_same_as_ort, emitted, kinds, litert_outputs, one_node

# Sums of a few dozen products in another order.
RELATIVE, ABSOLUTE = 1e-4, 1e-5


@dataclass(frozen=True, kw_only=True)
class Case:
    """A convolution: `x` and `weight` are shapes."""

    id: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    has_bias: bool = True
    is_weight_fed: bool = False
    dynamic: tuple[int, ...] = (0,)


CONV = [
    Case(id="one axis", x=(2, 4, 9), weight=(3, 4, 3), attributes={"pads": [1, 2], "strides": [2]}),
    Case(id="one axis, all sizes open", x=(2, 4, 9), weight=(3, 4, 3), dynamic=(0, 2)),
    Case(id="no bias", x=(1, 3, 7, 8), weight=(4, 3, 3, 2), has_bias=False),
    Case(id="computed weight", x=(1, 3, 7, 8), weight=(4, 3, 3, 2), is_weight_fed=True),
    Case(id="groups", x=(2, 6, 7, 8), weight=(4, 3, 3, 3), attributes={"group": 2, "pads": [1, 0, 0, 1]}),
    Case(id="depthwise", x=(2, 6, 7, 8), weight=(6, 1, 3, 3), attributes={"group": 6, "pads": [1, 1, 1, 1]}),
    Case(id="depthwise, two filters a channel", x=(2, 3, 7, 8), weight=(6, 1, 3, 3), attributes={"group": 3}),
    Case(
        id="depthwise, dilated and strided",
        x=(2, 3, 11, 10),
        weight=(3, 1, 3, 3),
        attributes={"group": 3, "dilations": [2, 3], "strides": [2, 1]},
    ),
    Case(
        id="dilated and strided",
        x=(1, 3, 11, 10),
        weight=(3, 3, 3, 2),
        attributes={"dilations": [2, 3], "strides": [2, 3]},
    ),
    Case(
        id="SAME_UPPER of open sizes",
        x=(1, 3, 11, 10),
        weight=(3, 3, 3, 2),
        attributes={"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        dynamic=(0, 2, 3),
    ),
    Case(id="SAME_LOWER", x=(1, 3, 11, 10), weight=(3, 3, 4, 2), attributes={"auto_pad": "SAME_LOWER"}),
    Case(
        id="three axes",
        x=(2, 3, 5, 6, 7),
        weight=(4, 3, 2, 3, 3),
        attributes={"pads": [1, 0, 1, 0, 1, 1], "strides": [1, 2, 1]},
    ),
    Case(
        id="three axes in groups, dilated along the first",
        x=(2, 4, 6, 6, 5),
        weight=(6, 2, 2, 3, 3),
        attributes={"group": 2, "pads": [1, 1, 1, 1, 1, 1], "strides": [2, 1, 1], "dilations": [2, 1, 1]},
    ),
]

TRANSPOSED = [
    Case(id="same", x=(2, 3, 4, 5), weight=(3, 2, 4, 4), attributes={"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Case(
        id="cut",
        x=(2, 3, 4, 5),
        weight=(3, 2, 3, 3),
        attributes={"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
    ),
    Case(id="open sizes", x=(2, 3, 4, 5), weight=(3, 2, 2, 2), attributes={"strides": [2, 2]}, dynamic=(0, 2, 3)),
    Case(
        id="open sizes, cut",
        x=(2, 3, 4, 5),
        weight=(3, 2, 3, 3),
        attributes={"strides": [2, 1], "pads": [0, 1, 1, 1]},
        dynamic=(0, 2, 3),
    ),
    Case(
        id="output_shape", x=(2, 3, 4, 5), weight=(3, 2, 3, 3), attributes={"strides": [2, 2], "output_shape": [8, 11]}
    ),
    Case(id="one axis, no bias", x=(2, 3, 5), weight=(3, 2, 4), attributes={"strides": [3]}, has_bias=False),
    Case(
        id="dilated, computed weight",
        x=(1, 3, 4, 5),
        weight=(3, 2, 3, 2),
        attributes={"dilations": [2, 3]},
        is_weight_fed=True,
    ),
    Case(id="two groups", x=(2, 4, 4, 5), weight=(4, 3, 3, 3), attributes={"group": 2, "strides": [2, 2]}),
    Case(
        id="depthwise",
        x=(2, 6, 4, 5),
        weight=(6, 1, 4, 4),
        attributes={"group": 6, "strides": [2, 2], "pads": [1, 1, 1, 1]},
    ),
    Case(
        id="depthwise, more dropped than the kernel reaches",
        x=(2, 6, 5, 5),
        weight=(6, 1, 2, 2),
        attributes={"group": 6, "strides": [2, 2], "pads": [2, 0, 1, 2]},
    ),
    Case(
        id="three axes in groups",
        x=(1, 4, 3, 3, 3),
        weight=(4, 1, 2, 2, 2),
        attributes={"group": 2, "strides": [2, 1, 2]},
    ),
    Case(id="three axes, cut", x=(1, 2, 3, 3, 3), weight=(2, 3, 3, 3, 3), attributes={"pads": [1, 1, 1, 0, 1, 1]}),
]


def _run(op_type: str, case: Case, filters: int) -> list[str]:
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.normal(size=shape).astype(np.float32) for shape in (case.x, case.weight, (filters,)))
    feeds, constants = {"x": x}, {"weight": weight}
    if case.is_weight_fed:
        feeds, constants = {"x": x, "weight": weight}, {}
    if case.has_bias:
        constants["bias"] = bias
    proto = one_node(op_type, feeds, constants=constants, dynamic={"x": case.dynamic}, **case.attributes)
    return kinds(assert_same_as_ort(proto, feeds, relative=RELATIVE, absolute=ABSOLUTE))


@pytest.mark.parametrize("case", CONV, ids=lambda case: case.id)
def test_convolution_agrees_with_onnx_runtime(case: Case) -> None:
    _run("Conv", case, case.weight[0])


@pytest.mark.parametrize("case", TRANSPOSED, ids=lambda case: case.id)
def test_transposed_convolution_agrees_with_onnx_runtime(case: Case) -> None:
    _run("ConvTranspose", case, case.weight[1] * case.attributes.get("group", 1))


@pytest.mark.parametrize(("group", "wanted"), [(1, "CONV_2D"), (2, "CONV_2D"), (4, "DEPTHWISE_CONV_2D")])
def test_groups_of_one_channel_are_depthwise_and_others_need_no_split(group: int, wanted: str) -> None:
    case = Case(id="", x=(1, 4, 5, 5), weight=(8, 4 // group, 3, 3), attributes={"group": group}, dynamic=())
    assert [kind for kind in _run("Conv", case, 8) if kind != "TRANSPOSE"] == [wanted]


def test_transposed_convolution_that_drops_as_same_does_needs_no_slice() -> None:
    case = Case(
        id="", x=(1, 3, 4, 5), weight=(3, 2, 4, 4), attributes={"strides": [2, 2], "pads": [1, 1, 1, 1]}, dynamic=()
    )
    assert [kind for kind in _run("ConvTranspose", case, 2) if kind != "TRANSPOSE"] == ["TRANSPOSE_CONV"]


def test_depthwise_transposed_convolution_is_one_convolution_and_no_split_into_channels() -> None:
    case = Case(id="", x=(1, 32, 4, 5), weight=(32, 1, 4, 4), attributes={"group": 32, "strides": [2, 2]}, dynamic=())
    found = _run("ConvTranspose", case, 32)
    assert "DEPTHWISE_CONV_2D" in found
    assert "SPLIT" not in found


@pytest.mark.parametrize("channels", [2, 40], ids=["exact at once", "in two parts"])
def test_integer_convolution_is_exact_where_float32_alone_would_round(channels: int) -> None:
    x = np.full((1, channels, 6, 6), 255, np.uint8)
    x[0, 0] = np.arange(36, dtype=np.uint8).reshape(6, 6)
    weight = np.full((2, channels, 3, 3), 127, np.int8)
    weight[0, :, 1, 1] = -128
    weight[1, :, 0, 2] = 13
    proto = one_node("ConvInteger", {"x": x}, constants={"weight": weight}, output_type=6)
    found = litert_outputs(emitted(proto), {"x": x})["y"]
    wanted = np.zeros((1, 2, 4, 4), np.int64)
    for row in range(4):
        for column in range(4):
            patch = x[0, :, row : row + 3, column : column + 3].astype(np.int64)
            wanted[0, :, row, column] = (patch[None] * weight.astype(np.int64)).sum(axis=(1, 2, 3))
    np.testing.assert_array_equal(found, wanted)


def test_integer_convolution_whose_sums_outgrow_24_bits_is_refused() -> None:
    x, weight = np.zeros((1, 2000, 3, 3), np.uint8), np.full((1, 2000, 3, 3), 127, np.int8)
    with pytest.raises(TargetError, match="24 bits"):
        emitted(one_node("ConvInteger", {"x": x}, constants={"weight": weight}, output_type=6))


def test_same_lower_over_a_size_that_only_the_run_knows_is_refused() -> None:
    feeds, weight = {"x": np.zeros((1, 1, 9, 9), np.float32)}, {"weight": np.zeros((1, 1, 3, 3), np.float32)}
    attributes = {"auto_pad": "SAME_LOWER", "strides": [2, 2]}
    with pytest.raises(TargetError, match="SAME_LOWER depends on a size"):
        emitted(one_node("Conv", feeds, constants=weight, dynamic={"x": (2, 3)}, **attributes))


def test_auto_pad_with_output_padding_is_refused_because_runtimes_disagree() -> None:
    feeds, weight = {"x": np.zeros((1, 1, 4, 4), np.float32)}, {"weight": np.zeros((1, 1, 3, 3), np.float32)}
    attributes = {"auto_pad": "SAME_UPPER", "strides": [2, 2], "output_padding": [1, 1]}
    with pytest.raises(TargetError, match="runtimes disagree"):
        emitted(one_node("ConvTranspose", feeds, constants=weight, **attributes))
