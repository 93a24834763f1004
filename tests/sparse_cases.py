"""What a cluster of sparse inference may hold, what breaks it, and what can be brought into its form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.sparse_nets import NhwcNet

Middle = Callable[[NhwcNet, str], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """What breaks a cluster in its middle or at its end, and where the report says so."""

    id: str
    middle: Middle = lambda net, x: x
    end: Middle | None = None
    node: str
    reason: str


def pooled_to(*axes: int) -> Middle:
    return lambda net, x: net.reshape(net.mean(x, "pool", axes=axes), (1, -1))


def windows(net: NhwcNet, x: str) -> str:
    return net.op(
        "MAX_POOL_2D", [x], net.shape(x), "broken", padding="SAME", strideH=1, strideW=1, filterHeight=3, filterWidth=3
    )


def vector(net: NhwcNet, *shape: int) -> str:
    """Random numbers as a constant."""
    return net.constant(net.rng.standard_normal(shape).astype(np.float32), f"vector{len(net.operators)}")


BROKEN = [
    Broken(id="max pooling", middle=windows, node="broken", reason="MAX_POOL_2D has no place"),
    Broken(
        id="concatenation",
        middle=lambda net, x: net.op("CONCATENATION", [x, net.conv(x, 16)], (*net.shape(x)[:3], 32), "broken", axis=3),
        node="broken",
        reason="CONCATENATION has no place",
    ),
    Broken(
        id="prelu",
        middle=lambda net, x: net.op("PRELU", [x, vector(net, 1, 1, 16)], net.shape(x), "broken"),
        node="broken",
        reason="PRELU has no place",
    ),
    Broken(
        id="sub",
        middle=lambda net, x: net.binary("SUB", net.conv(x, 16), x, "broken"),
        node="broken",
        reason="SUB has no place",
    ),
    Broken(id="tanh", middle=lambda net, x: net.unary("TANH", x, "broken"), node="broken", reason="TANH has no place"),
    Broken(
        id="a further 3x3",
        middle=lambda net, x: net.conv(x, 16, 3, padding="SAME", name="broken"),
        node="broken",
        reason="a 3x3 convolution behind the stem",
    ),
    Broken(
        id="1x1 with stride",
        middle=lambda net, x: net.conv(x, 16, 1, 2, name="broken"),
        node="broken",
        reason="a 1x1 convolution with stride",
    ),
    Broken(
        id="depthwise 7x7",
        middle=lambda net, x: net.depthwise(x, 7, name="broken"),
        node="broken",
        reason="must be 3x3 or 5x5",
    ),
    Broken(
        id="depthwise that makes more channels",
        middle=lambda net, x: net.depthwise(x, multiplier=2, name="broken"),
        node="broken",
        reason="multiplier 1",
    ),
    Broken(
        id="depthwise with stride and SAME",
        middle=lambda net, x: net.depthwise(x, stride=2, name="broken"),
        node="broken",
        reason="padded by half its kernel",
    ),
    Broken(
        id="constant second",
        middle=lambda net, x: net.binary("ADD", x, vector(net, 1, 1, 1, 16), "broken"),
        node="broken",
        reason="a constant of ADD",
    ),
    Broken(
        id="constant with one axis",
        middle=lambda net, x: net.binary("ADD", vector(net, 16), x, "broken"),
        node="broken",
        reason="4 axes",
    ),
    Broken(
        id="constant picture",
        middle=lambda net, x: net.binary("ADD", vector(net, 1, 16, 16, 1), x, "broken"),
        node="broken",
        reason="a constant of ADD",
    ),
    Broken(
        id="tokens",
        middle=lambda net, x: net.reshape(x, (1, 8, 32, 16), "broken"),
        node="broken",
        reason="RESHAPE has no place",
    ),
    Broken(
        id="a fused activation that XNNPACK lacks",
        middle=lambda net, x: net.conv(x, 16, activation="TANH", name="broken"),
        node="broken",
        reason="fused activation",
    ),
    Broken(
        id="a resize of one pixel",
        middle=lambda net, x: net.op(
            "RESIZE_BILINEAR",
            [net.mean(x), net.constant(np.array([16, 16], np.int32), "size")],
            net.shape(x),
            "broken",
        ),
        node="broken",
        reason="2 or more",
    ),
    Broken(
        id="something from outside",
        middle=lambda net, x: net.binary("ADD", x, net.input((1, 16, 16, 16), "skip"), "broken"),
        node="broken",
        reason="it also reads 'skip'",
    ),
    Broken(id="a mean over channels", end=pooled_to(3), node="pool", reason="over height and width"),
    Broken(id="a mean over rows", end=pooled_to(1), node="pool", reason="over height and width"),
    Broken(
        id="a mean that is an output",
        end=lambda net, x: net.mean(x, "pool"),
        node="pool",
        reason="is an output of the model",
    ),
    Broken(
        id="a 1x1 head",
        end=lambda net, x: net.reshape(net.conv(net.mean(x), 10, name="head"), (1, 10), "flat"),
        node="flat",
        reason="RESHAPE has no place",
    ),
    Broken(id="pictures as output", end=lambda net, x: net.conv(x, 3, name="out"), node="out", reason="before its end"),
]

SOUND: dict[str, Middle] = {
    "nothing": lambda net, x: x,
    "residual": lambda net, x: net.binary("ADD", x, net.conv(x, 16)),
    "vector first": lambda net, x: net.binary("MUL", vector(net, 1, 1, 1, 16), x),
    "scalar first": lambda net, x: net.binary("ADD", vector(net, 1, 1, 1, 1), x),
    "swish": lambda net, x: net.binary("MUL", x, net.unary("LOGISTIC", x)),
    "hard swish": lambda net, x: net.unary("HARD_SWISH", x),
    "leaky": lambda net, x: net.unary("LEAKY_RELU", x, alpha=0.1),
    "depthwise 5x5": lambda net, x: net.depthwise(x, 5),
    "depthwise 5x5 with stride": lambda net, x: net.depthwise(net.pad(x, 2), 5, 2, padding="VALID"),
    "depthwise 3x3 padded": lambda net, x: net.depthwise(net.pad(x, 1), padding="VALID"),
    "resize": lambda net, x: net.op(
        "RESIZE_BILINEAR", [x, net.constant(np.array([20, 24], np.int32), "size")], (1, 20, 24, 16)
    ),
    "squeeze and excite": lambda net, x: net.binary(
        "MUL", x, net.unary("LOGISTIC", net.conv(net.conv(net.mean(x), 8, activation="RELU"), 16))
    ),
}


def hard_sigmoid(net: NhwcNet, x: str) -> str:
    rank = len(net.shape(x))
    three, sixth = (
        net.constant(np.full((1,) * rank, number, np.float32), f"{name}{len(net.operators)}")
        for name, number in (("three", 3.0), ("sixth", 1 / 6))
    )
    return net.binary("MUL", net.unary("RELU6", net.binary("ADD", x, three)), sixth)


def excited_by_dense_layers(net: NhwcNet, x: str, *, keep_dims: bool = True) -> str:
    pooled = net.reshape(net.mean(x, keep_dims=keep_dims), (1, 16))
    gate = hard_sigmoid(net, net.dense(net.dense(pooled, 8, activation="RELU"), 16))
    return net.binary("MUL", x, net.reshape(gate, (1, 1, 1, 16)))


MIDDLES: dict[str, Middle] = {
    "constant second": lambda net, x: net.binary("ADD", x, vector(net, 1, 1, 1, 16)),
    "constant of one axis": lambda net, x: net.binary("MUL", vector(net, 16), x),
    "scalar": lambda net, x: net.binary("MUL", x, vector(net)),
    "subtraction of a constant": lambda net, x: net.binary("SUB", x, vector(net, 16)),
    "hard swish in parts": lambda net, x: net.binary("MUL", x, hard_sigmoid(net, x)),
    "squeeze and excite": lambda net, x: net.binary(
        "MUL", x, hard_sigmoid(net, net.conv(net.conv(net.mean(x), 8, activation="RELU"), 16))
    ),
    "squeeze and excite without axes": lambda net, x: net.binary(
        "MUL", net.unary("LOGISTIC", net.conv(net.reshape(net.mean(x, keep_dims=False), (1, 1, 1, 16)), 16)), x
    ),
}

HEADS: dict[str, Middle] = {
    "1x1 convolution": lambda net, x: net.reshape(net.conv(net.mean(x, "pool"), 10), (1, 10)),
    "two 1x1 convolutions": lambda net, x: net.reshape(
        net.conv(net.unary("HARD_SWISH", net.conv(net.mean(x, "pool"), 32)), 10), (1, 10)
    ),
    "activation": lambda net, x: net.dense(net.reshape(net.unary("HARD_SWISH", net.mean(x, "pool")), (1, 64)), 10),
    "an output": lambda net, x: net.mean(x, "pool"),
    "an output without axes": lambda net, x: net.mean(x, "pool", keep_dims=False),
    "a 1x1 convolution as output": lambda net, x: net.conv(net.mean(x, "pool"), 10),
    "normalized": lambda net, x: net.binary("ADD", net.mean(x, "pool"), vector(net, 1, 1, 1, 64)),
}
