"""Activations."""

from __future__ import annotations

import math

from onnxprune.targets.tflite.build import Builder
from onnxprune.targets.tflite.graph import Tensor
from onnxprune.targets.tflite.ops.carriers import EXTREME_TYPES, FLOATS, UNSIGNED, WORDS, carried, computed_in
from onnxprune.targets.tflite.ops.formulas import Term
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

_NAMESAKES = {"HardSwish": "HARD_SWISH", "Sigmoid": "LOGISTIC"}
_CLIPS = {(0.0, math.inf): "RELU", (0.0, 6.0): "RELU6", (0.0, 1.0): "RELU_0_TO_1", (-1.0, 1.0): "RELU_N1_TO_1"}
# exp(20)^2 is far from overflowing, and tanh(20) is 1.
_MISH_END = 20.0


def _x(node: NodeView, build: Builder) -> Term:
    return Term(build, node.input(0))


@TFLITE.register(*_NAMESAKES)
def activation(node: NodeView, build: Builder) -> Tensor:
    """The operator of that name."""
    return build.op(_NAMESAKES[node.op_type], [node.input(0)])


@TFLITE.register("Relu")
def relu(node: NodeView, build: Builder) -> Tensor:
    """RELU; MAXIMUM of integers."""
    x = node.input(0)
    if x.type == "FLOAT32":
        return build.op("RELU", [x])
    if x.type in UNSIGNED:
        return x
    return computed_in(build, EXTREME_TYPES, [x], lambda one: Term(build, one[0]).at_least(0).tensor)


@TFLITE.register("Clip")
def clip(node: NodeView, build: Builder) -> Tensor:
    """RELU, RELU6, RELU_0_TO_1 or RELU_N1_TO_1 where these are the limits, else MAXIMUM and MINIMUM."""
    x, low, high = node.input(0), node.optional(1), node.optional(2)
    if x.type == "FLOAT32":
        kind = _CLIPS.get((_limit(low, -math.inf), _limit(high, math.inf)))
        if kind is not None:
            return build.op(kind, [x])
    kinds = [
        (kind, limit)
        for kind, limit, free in (("MAXIMUM", low, -math.inf), ("MINIMUM", high, math.inf))
        if limit is not None and _limit(limit, free) != free
    ]
    if not kinds:
        return x

    def clipped(given: list[Tensor]) -> Tensor:
        result, *limits = given
        for (kind, _), limit in zip(kinds, limits, strict=True):
            result = build.binary(kind, result, limit)
        return result

    return computed_in(build, EXTREME_TYPES, [x, *(limit for _, limit in kinds)], clipped, is_ordered=True)


def _limit(tensor: Tensor | None, free: float) -> float:
    """The number of a constant limit; `free` where it is left out; NaN where it is computed."""
    if tensor is None:
        return free
    if tensor.constant is None:
        return math.nan
    return float(tensor.constant.array().reshape(()))


@TFLITE.register("LeakyRelu")
def leaky_relu(node: NodeView, build: Builder) -> Tensor:
    """LEAKY_RELU."""
    return _x(node, build).unary("LEAKY_RELU", alpha=node.number("alpha", 0.01)).tensor


@TFLITE.register("PRelu")
def prelu(node: NodeView, build: Builder) -> Tensor:
    """PRELU; of integers a SELECT_V2 of the number and its product."""
    x, slope = node.input(0), node.input(1)
    if x.type == "FLOAT32":
        return build.binary("PRELU", x, slope)
    if x.type in UNSIGNED:
        return x

    def composed(pair: list[Tensor]) -> Tensor:
        number, factor = (Term(build, one) for one in pair)
        return (number < 0).selecting(number * factor, number).tensor

    return computed_in(build, WORDS, [x, slope], composed)


@TFLITE.register("Elu")
def elu(node: NodeView, build: Builder) -> Tensor:
    """ELU, and LEAKY_RELU for an alpha that is not 1: what is negative behind ELU is what alpha scales."""
    return _elu(_x(node, build), node.number("alpha", 1.0)).tensor


@TFLITE.register("Selu")
def selu(node: NodeView, build: Builder) -> Tensor:
    """ELU, LEAKY_RELU and MUL."""
    alpha, gamma = node.number("alpha", 1.67326319217681884765625), node.number("gamma", 1.05070102214813232421875)
    return (_elu(_x(node, build), alpha) * gamma).tensor


def _elu(x: Term, alpha: float) -> Term:
    made = x.unary("ELU")
    return made if alpha == 1.0 else made.unary("LEAKY_RELU", alpha=alpha)


@TFLITE.register("Celu")
def celu(node: NodeView, build: Builder) -> Tensor:
    """ELU of x / alpha, times alpha."""
    alpha, x = node.number("alpha", 1.0), _x(node, build)
    if alpha < 0:
        # Both of its halves have their zero on the other side then.
        return (x.unary("RELU") + ((x * (1 / alpha)).unary("ELU") * alpha).at_most(0)).tensor
    return (x.unary("ELU") if alpha == 1.0 else (x * (1 / alpha)).unary("ELU") * alpha).tensor


@TFLITE.register("ThresholdedRelu")
def thresholded_relu(node: NodeView, build: Builder) -> Tensor:
    """GREATER and SELECT_V2."""
    x = _x(node, build)
    return (x > node.number("alpha", 1.0)).selecting(x, 0).tensor


@TFLITE.register("Shrink")
def shrink(node: NodeView, build: Builder) -> Tensor:
    """X - bias above lambd, x + bias below -lambd, 0 between: two comparisons and two SELECT_V2."""
    bias, limit = node.number("bias", 0.0), node.number("lambd", 0.5)

    x = Term(build, carried(build, node.input(0), FLOATS))
    lower = (x < -limit).selecting(x + bias if bias else x, 0)
    return (x > limit).selecting(x - bias if bias else x, lower).tensor


@TFLITE.register("HardSigmoid")
def hard_sigmoid(node: NodeView, build: Builder) -> Tensor:
    """RELU6 of six times the line, and a sixth of that: XNNPACK has RELU6."""
    alpha, beta = node.number("alpha", 0.2), node.number("beta", 0.5)
    x = _x(node, build)
    # float32(1/6) stands for a sixth.
    line = x if abs(6 * alpha - 1) < 1e-6 else x * (6 * alpha)
    return ((line + 6 * beta).unary("RELU6") * (1 / 6)).tensor


@TFLITE.register("Swish")
def swish(node: NodeView, build: Builder) -> Tensor:
    """LOGISTIC and MUL."""
    alpha, x = node.number("alpha", 1.0), _x(node, build)
    return (x * (x if alpha == 1.0 else x * alpha).unary("LOGISTIC")).tensor


@TFLITE.register("Mish")
def mish(node: NodeView, build: Builder) -> Tensor:
    """X n / (n + 2) with n = e^x (e^x + 2), which is x tanh(softplus(x))."""
    x = _x(node, build)
    power = x.at_most(_MISH_END).unary("EXP")
    n = power * (power + 2)
    return (x * (n / (n + 2))).tensor


@TFLITE.register("Gelu")
def gelu(node: NodeView, build: Builder) -> Tensor:
    """GELU, exact or with tanh."""
    return _x(node, build).unary("GELU", approximate=node.text("approximate", "none") == "tanh").tensor


@TFLITE.register("Softplus")
def softplus(node: NodeView, build: Builder) -> Tensor:
    """RELU and the logarithm of 1 + EXP of the negative magnitude, which can't overflow."""
    x = _x(node, build)
    return (x.unary("RELU") + (1 + (-abs(x)).unary("EXP")).unary("LOG")).tensor


@TFLITE.register("Softsign")
def softsign(node: NodeView, build: Builder) -> Tensor:
    """ABS, ADD and DIV."""
    x = _x(node, build)
    return (x / (abs(x) + 1)).tensor
