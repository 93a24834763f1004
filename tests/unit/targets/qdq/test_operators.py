"""Every integer operator: found by ONNX Runtime, and equal to what the graph says within one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper

from onnxprune.contracts import CanonicalModel
from onnxprune.targets.qdq import SpellingName, place, spell
from onnxprune.targets.qdq.kernels import KERNELS
from tests.builders import canonical, proto_of
from tests.quantization import everything_integer, kernels, normal_batches, plan_for, run, signal_to_noise_db

Node = onnx.NodeProto
INPUT_SHAPE = (1, 4, 12, 12)


@dataclass(frozen=True, kw_only=True)
class OperatorCase:
    """`nodes` lead from "a" (8 channels, 12 x 12, made by a convolution) to "b", which a convolution reads."""

    id: str
    nodes: Sequence[Node]
    kernel: str
    channels_out: int = 8
    weights: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    opset: int = 20


def make(op_type: str, inputs: Sequence[str], output: str = "b", **attributes: Any) -> Node:
    outputs = [output] if isinstance(output, str) else list(output)
    return helper.make_node(op_type, inputs, outputs, name=f"{op_type}_{output}", **attributes)


def normal(*shape: int, scale: float = 0.3, seed: int = 7) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def ints(*numbers: int) -> npt.NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


BATCH_NORM = {
    "gamma": normal(8) + 1,
    "beta": normal(8),
    "mean": normal(8),
    "variance": np.abs(normal(8)) + np.float32(0.5),
}

CASES = [
    OperatorCase(
        id="Conv with Relu",
        nodes=[make("Conv", ["a", "w", "c"], "m", pads=[1] * 4), make("Relu", ["m"])],
        weights={"w": normal(8, 8, 3, 3), "c": normal(8)},
        kernel="QLinearConv",
    ),
    OperatorCase(
        id="Conv with Relu6",
        nodes=[make("Conv", ["a", "w"], "m", pads=[1] * 4), make("Clip", ["m", "zero", "six"])],
        weights={"w": normal(8, 8, 3, 3) * 5, "zero": np.float32(0), "six": np.float32(6)},
        kernel="QLinearConv",
    ),
    OperatorCase(
        id="depthwise Conv",
        nodes=[make("Conv", ["a", "w", "c"], group=8, pads=[1] * 4)],
        weights={"w": normal(8, 1, 3, 3), "c": normal(8)},
        kernel="QLinearConv",
    ),
    OperatorCase(
        id="grouped Conv with dilation",
        nodes=[make("Conv", ["a", "w"], group=2, dilations=[2, 2])],
        weights={"w": normal(8, 4, 3, 3)},
        kernel="QLinearConv",
    ),
    OperatorCase(
        id="ConvTranspose with Relu",
        nodes=[make("ConvTranspose", ["a", "w", "c"], "m", strides=[2, 2]), make("Relu", ["m"])],
        weights={"w": normal(8, 8, 2, 2), "c": normal(8)},
        kernel="QLinearConv",
    ),
    OperatorCase(
        id="ConvTranspose with overlapping windows",
        nodes=[make("ConvTranspose", ["a", "w"], strides=[2, 2], pads=[1] * 4, output_padding=[1, 1])],
        weights={"w": normal(8, 8, 3, 3)},
        kernel="QLinearConv",
    ),
    OperatorCase(
        id="residual Add",
        nodes=[make("Conv", ["a", "w"], "m"), make("Add", ["m", "a"], "s"), make("Relu", ["s"])],
        weights={"w": normal(8, 8, 1, 1)},
        kernel="QLinearAdd",
    ),
    OperatorCase(id="Sum of two", nodes=[make("Sigmoid", ["a"], "m"), make("Sum", ["m", "a"])], kernel="QLinearAdd"),
    OperatorCase(
        id="Add of a constant", nodes=[make("Add", ["a", "k"])], weights={"k": normal(8, 1, 1)}, kernel="QLinearAdd"
    ),
    OperatorCase(
        id="Sub of a constant", nodes=[make("Sub", ["a", "k"])], weights={"k": normal(8, 1, 1)}, kernel="QLinearAdd"
    ),
    OperatorCase(
        id="Div by a constant", nodes=[make("Div", ["a", "k"])], weights={"k": np.float32(2.5)}, kernel="QLinearMul"
    ),
    OperatorCase(id="SiLU", nodes=[make("Sigmoid", ["a"], "g"), make("Mul", ["a", "g"])], kernel="QLinearSigmoid"),
    OperatorCase(id="HardSwish", nodes=[make("HardSwish", ["a"])], opset=22, kernel="QLinearMul"),
    OperatorCase(
        id="HardSigmoid gate",
        nodes=[make("HardSigmoid", ["a"], "g", alpha=1 / 6, beta=0.5), make("Mul", ["a", "g"])],
        kernel="QLinearMul",
    ),
    OperatorCase(id="LeakyRelu", nodes=[make("LeakyRelu", ["a"], alpha=0.1)], kernel="QLinearLeakyRelu"),
    OperatorCase(
        id="Relu behind a tensor with two readers",
        nodes=[make("Relu", ["a"], "r"), make("Add", ["a", "r"])],
        kernel="QLinearAdd",
    ),
    OperatorCase(
        id="BatchNormalization and Relu behind a Concat",
        nodes=[
            make("Concat", ["a", "a"], "m", axis=2),
            make("BatchNormalization", ["m", *BATCH_NORM], "n"),
            make("Relu", ["n"]),
        ],
        weights=dict(BATCH_NORM),
        kernel="QLinearConv",
    ),
    OperatorCase(
        id="Concat of a branch and its input",
        nodes=[make("MaxPool", ["a"], "m", kernel_shape=[3, 3], pads=[1] * 4), make("Concat", ["a", "m"], axis=1)],
        channels_out=16,
        kernel="QLinearConcat",
    ),
    OperatorCase(
        id="squeeze and excitation",
        nodes=[
            make("GlobalAveragePool", ["a"], "p"),
            make("Conv", ["p", "w"], "h"),
            make("Sigmoid", ["h"], "g"),
            make("Mul", ["a", "g"]),
        ],
        weights={"w": normal(8, 8, 1, 1)},
        kernel="QLinearGlobalAveragePool",
    ),
    OperatorCase(
        id="ReduceMean over the spatial axes",
        nodes=[make("ReduceMean", ["a", "axes"], "p", keepdims=1), make("Mul", ["a", "p"])],
        weights={"axes": ints(-1, 2)},
        kernel="QLinearGlobalAveragePool",
    ),
    OperatorCase(
        id="ReduceMean without kept axes",
        nodes=[
            make("ReduceMean", ["a", "axes"], "p", keepdims=0),
            make("Unsqueeze", ["p", "axes"], "u"),
            make("Mul", ["a", "u"]),
        ],
        weights={"axes": ints(2, 3)},
        kernel="QLinearGlobalAveragePool",
    ),
    OperatorCase(
        id="GlobalMaxPool", nodes=[make("GlobalMaxPool", ["a"], "p"), make("Mul", ["a", "p"])], kernel="ReduceMax"
    ),
    OperatorCase(
        id="MaxPool", nodes=[make("MaxPool", ["a"], kernel_shape=[2, 2], strides=[2, 2])], kernel="NhwcMaxPool"
    ),
    OperatorCase(
        id="AveragePool without padding",
        nodes=[make("AveragePool", ["a"], kernel_shape=[2, 2], strides=[2, 2])],
        kernel="QLinearConv",
    ),
    OperatorCase(
        id="AveragePool with counted padding",
        nodes=[make("AveragePool", ["a"], kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1)],
        kernel="QLinearConv",
    ),
    OperatorCase(
        id="AveragePool over everything",
        nodes=[make("AveragePool", ["a"], kernel_shape=[12, 12])],
        kernel="QLinearGlobalAveragePool",
    ),
    OperatorCase(
        id="Pad with zeros", nodes=[make("Pad", ["a", "p"])], weights={"p": ints(0, 0, 1, 1, 0, 0, 1, 1)}, kernel="Pad"
    ),
    OperatorCase(
        id="Pad with reflections",
        nodes=[make("Pad", ["a", "p"], mode="reflect")],
        weights={"p": ints(0, 0, 1, 1, 0, 0, 1, 1)},
        kernel="Pad",
    ),
    OperatorCase(
        id="SpaceToDepth",
        nodes=[make("SpaceToDepth", ["a"], blocksize=2)],
        channels_out=32,
        kernel="SpaceToDepth",
    ),
    OperatorCase(
        id="DepthToSpace", nodes=[make("DepthToSpace", ["a"], blocksize=2)], channels_out=2, kernel="DepthToSpace"
    ),
    OperatorCase(
        id="Resize to the nearest",
        nodes=[make("Resize", ["a", "", "scales"], mode="nearest")],
        weights={"scales": np.array([1, 1, 2, 2], dtype=np.float32)},
        kernel="Gather",
    ),
    OperatorCase(
        id="Resize to a size that is no multiple",
        nodes=[
            make("Resize", ["a", "", "", "sizes"], coordinate_transformation_mode="asymmetric", nearest_mode="floor")
        ],
        weights={"sizes": ints(1, 8, 17, 30)},
        kernel="Gather",
    ),
    OperatorCase(
        id="Split into two readers",
        nodes=[make("Split", ["a", "sizes"], ("u", "v"), axis=1), make("Add", ["u", "v"])],
        weights={"sizes": ints(4, 4)},
        channels_out=4,
        kernel="Split",
    ),
    OperatorCase(
        id="channel shuffle",
        nodes=[
            make("Reshape", ["a", "five"], "m"),
            make("Transpose", ["m"], "n", perm=[0, 2, 1, 3, 4]),
            make("Reshape", ["n", "four"]),
        ],
        weights={"five": ints(1, 2, 4, 12, 12), "four": ints(1, 8, 12, 12)},
        kernel="Reshape",
    ),
    OperatorCase(
        id="Slice of channels",
        nodes=[make("Slice", ["a", "start", "end", "axis"])],
        weights={"start": ints(2), "end": ints(6), "axis": ints(1)},
        channels_out=4,
        kernel="Slice",
    ),
    OperatorCase(
        id="ReduceMax over the spatial axes",
        nodes=[make("ReduceMax", ["a", "axes"], "p", keepdims=1), make("Mul", ["a", "p"])],
        weights={"axes": ints(2, 3)},
        kernel="ReduceMax",
    ),
    OperatorCase(
        id="Gather of channels",
        nodes=[make("Gather", ["a", "wanted"], axis=1)],
        weights={"wanted": ints(7, 0, 3)},
        channels_out=3,
        kernel="Gather",
    ),
    OperatorCase(
        id="GatherElements",
        nodes=[make("GatherElements", ["a", "wanted"], axis=3)],
        weights={"wanted": np.random.default_rng(4).integers(0, 12, (1, 8, 12, 12))},
        kernel="GatherElements",
    ),
    OperatorCase(
        id="Expand of pooled channels",
        nodes=[make("GlobalAveragePool", ["a"], "p"), make("Expand", ["p", "shape"])],
        weights={"shape": ints(1, 8, 12, 12)},
        kernel="Expand",
    ),
    OperatorCase(
        id="Tile",
        nodes=[make("Tile", ["a", "times"])],
        weights={"times": ints(1, 2, 1, 1)},
        channels_out=16,
        kernel="Tile",
    ),
    OperatorCase(
        id="Flatten and back",
        nodes=[make("Flatten", ["a"], "f", axis=2), make("Reshape", ["f", "shape"])],
        weights={"shape": ints(1, 8, 12, 12)},
        kernel="Reshape",
    ),
    OperatorCase(
        id="Squeeze and back",
        nodes=[
            make("GlobalAveragePool", ["a"], "p"),
            make("Squeeze", ["p", "axes"], "q"),
            make("Unsqueeze", ["q", "axes"], "r"),
            make("Mul", ["a", "r"]),
        ],
        weights={"axes": ints(2, 3)},
        kernel="QLinearGlobalAveragePool",
    ),
    OperatorCase(id="Softmax over channels", nodes=[make("Softmax", ["a"], axis=1)], kernel="QLinearSoftmax"),
]


def sandwich(case: OperatorCase) -> CanonicalModel:
    """x -> Conv -> "a" -> the case -> "b" -> Conv -> "y"; outputs are "y" and "b"."""
    proto = proto_of(
        [
            make("Conv", ["x", "first"], "a", pads=[1] * 4),
            *case.nodes,
            make("Conv", ["b", "last"], "y"),
        ],
        inputs={"x": INPUT_SHAPE},
        outputs={"y": [None] * 4, "b": [None] * 4},
        weights={
            "first": normal(8, 4, 3, 3, seed=1),
            "last": normal(20, case.channels_out, 1, 1, seed=2),
            **case.weights,
        },
        opset=case.opset,
    )
    return canonical(proto)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_operator_between_convolutions_runs_in_integers_and_keeps_its_meaning(
    case: OperatorCase, tmp_path: Path
) -> None:
    model = sandwich(case)
    source = normal_batches(INPUT_SHAPE)
    plan = plan_for(model, source)
    # The 7-bit weights of "x86" are exact on every processor that tests run on.
    spelled = spell(model, plan, everything_integer(model, plan), "x86")
    feeds = source.batches[0]

    found = kernels(spelled, tmp_path)
    assert found[case.kernel] > 0, found
    # One conversion on the way in and one for each output: nothing in between is float.
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 2), found
    meant, fused = run(spelled, feeds, optimized=False)[1], run(spelled, feeds)[1]
    # A rounding that falls the other way in one operator may move a later one: two steps at most, and hardly ever.
    steps = np.abs(np.rint((meant - fused) / plan.activations["b"].scale))
    assert steps.max() <= 2
    assert np.count_nonzero(steps > 1) <= 0.01 * steps.size
    exact = run(model, feeds)[1]
    # Two to five roundings to 8 bits and 7-bit weights; a wrong scale, axis or sign would end below 10 dB.
    assert signal_to_noise_db(exact, meant) > 22


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_signed_and_unsigned_activations_are_the_same_integers(case: OperatorCase) -> None:
    model = sandwich(case)
    source = normal_batches(INPUT_SHAPE)
    plan = plan_for(model, source)
    placement = everything_integer(model, plan)

    unsigned, signed = (
        run(spell(model, plan, placement, spelling), source.batches[0], optimized=False)[1]
        for spelling in ("x86-vnni", "arm64")
    )

    np.testing.assert_array_equal(unsigned, signed)


@dataclass(frozen=True, kw_only=True)
class FlatCase:
    """`nodes` lead from "x" of shape `shape` to "y"; all of them become one kernel."""

    id: str
    nodes: Sequence[Node]
    shape: tuple[int, ...]
    weights: dict[str, npt.NDArray[Any]]
    kernel: str


FLAT_CASES = [
    FlatCase(
        id="Gemm with transposed weight",
        nodes=[make("Gemm", ["x", "w", "c"], "y", transB=1)],
        shape=(3, 16),
        weights={"w": normal(10, 16), "c": normal(10)},
        kernel="QGemm",
    ),
    FlatCase(
        id="Gemm with a row as bias and Relu",
        nodes=[make("Gemm", ["x", "w", "c"], "m"), make("Relu", ["m"], "y")],
        shape=(3, 16),
        weights={"w": normal(16, 10), "c": normal(1, 10)},
        kernel="QGemm",
    ),
    FlatCase(
        id="Gemm without bias",
        nodes=[make("Gemm", ["x", "w"], "y", transB=1)],
        shape=(3, 16),
        weights={"w": normal(10, 16)},
        kernel="QGemm",
    ),
    FlatCase(
        id="MatMul of a sequence",
        nodes=[make("MatMul", ["x", "w"], "y")],
        shape=(2, 5, 16),
        weights={"w": normal(16, 10)},
        kernel="QLinearMatMul",
    ),
    FlatCase(
        id="MatMul with a stack of matrices",
        nodes=[make("MatMul", ["x", "w"], "y")],
        shape=(2, 5, 16),
        weights={"w": normal(2, 16, 10)},
        kernel="QLinearMatMul",
    ),
    FlatCase(
        id="Conv over time",
        nodes=[make("Conv", ["x", "w", "c"], "y")],
        shape=(1, 4, 20),
        weights={"w": normal(8, 4, 3), "c": normal(8)},
        kernel="QLinearConv",
    ),
    FlatCase(
        id="Conv over a volume",
        nodes=[make("Conv", ["x", "w"], "y", pads=[1] * 6)],
        shape=(1, 4, 5, 6, 7),
        weights={"w": normal(8, 4, 3, 3, 3)},
        kernel="QLinearConv",
    ),
]


def test_every_operator_of_the_table_is_among_the_cases() -> None:
    tried = {node.op_type for case in (*CASES, *FLAT_CASES) for node in case.nodes}
    keys = KERNELS.keys()

    assert {key.op_type for key in keys} <= tried


@pytest.mark.parametrize("spelling", ["x86", "arm64"])
@pytest.mark.parametrize("case", FLAT_CASES, ids=lambda case: case.id)
def test_layer_alone_becomes_one_integer_kernel(case: FlatCase, spelling: SpellingName, tmp_path: Path) -> None:
    model = canonical(
        proto_of(
            case.nodes, inputs={"x": case.shape}, outputs={"y": [None] * len(case.shape)}, weights=dict(case.weights)
        )
    )
    source = normal_batches(case.shape)
    plan = plan_for(model, source)
    spelled = spell(model, plan, place(model, plan, spelling), spelling)

    assert kernels(spelled, tmp_path)[case.kernel] == 1
    (meant,) = run(spelled, source.batches[0], optimized=False)
    (fused,) = run(spelled, source.batches[0])
    # One layer: its products are exact, so only the last rounding may differ.
    assert np.abs(meant - fused).max() <= plan.activations["y"].scale * 1.001
    (exact,) = run(model, source.batches[0])
    assert signal_to_noise_db(exact, meant) > 28


def test_convolution_and_relu_equal_an_emulation_in_numpy() -> None:
    weight, bias = normal(8, 4, 1, 1), normal(8)
    model = canonical(
        proto_of(
            [make("Conv", ["x", "w", "c"], "m"), make("Relu", ["m"], "y")],
            inputs={"x": (1, 4, 6, 6)},
            outputs={"y": [None] * 4},
            weights={"w": weight, "c": bias},
        )
    )
    source = normal_batches((1, 4, 6, 6))
    plan = plan_for(model, source)
    x = source.batches[0]["x"]

    (actual,) = run(spell(model, plan, place(model, plan, "x86-vnni"), "x86-vnni"), {"x": x}, optimized=False)

    given, made = plan.activations["x"], plan.activations["y"]
    scales = np.array(plan.weights["w"].scales)
    x_integers = np.clip(np.rint(x / np.float32(given.scale)) + given.zero_point, -128, 127)
    w_integers = np.rint(weight[:, :, 0, 0] / scales[:, None])
    assert np.abs(w_integers).max() == 127
    bias_integers = np.rint(bias / (given.scale * scales))
    sums = np.einsum("oi,nihw->nohw", w_integers, x_integers - given.zero_point) + bias_integers[:, None, None]
    real = sums * (given.scale * scales)[:, None, None]
    y_integers = np.clip(np.rint(real / made.scale) + made.zero_point, -128, 127)
    # The emulation rounds from exact products, ONNX Runtime from float32: one step where they fall apart.
    assert np.abs((y_integers - made.zero_point) * made.scale - actual).max() <= made.scale * 1.001
    assert made.zero_point == -128
