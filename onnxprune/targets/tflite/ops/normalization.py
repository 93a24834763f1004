"""Normalizations, composed of MEAN, products and RSQRT; and SOFTMAX.

What is normalized is centred first: E[(x - E[x])^2], not E[x^2] - E[x]^2, which cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Constant, Tensor
from onnxprune.targets.tflite.ops.sizes import product_of, reshaped_to, size_of
from onnxprune.targets.tflite.ops.table import TFLITE, Emitted, NodeView

__all__ = ["log_softmax_over"]

_SMALLEST = float(np.finfo(np.float32).tiny)


@TFLITE.register("BatchNormalization")
def batch_normalization(node: NodeView, build: Builder) -> Emitted:
    """MUL and ADD with one number for each channel; training mode takes mean and variance of the batch itself."""
    x, epsilon = node.input(0), node.number("epsilon", 1e-5)
    scale, bias, mean, variance = (node.input(position) for position in (1, 2, 3, 4))
    if node.integer("training_mode"):
        return _trained(node, build, x)
    if all(one.constant is not None for one in (scale, bias, mean, variance)):
        factor, offset = _folded(scale, bias, mean, variance, epsilon)
        y = build.binary("MUL", x, _by_channel(build, build.constant_tensor(factor), x.rank))
        return build.binary("ADD", y, _by_channel(build, build.constant_tensor(offset), x.rank))
    factor_tensor = build.binary("MUL", scale, _inverse_root(build, variance, epsilon))
    y = build.binary("SUB", x, _by_channel(build, mean, x.rank))
    y = build.binary("MUL", y, _by_channel(build, factor_tensor, x.rank))
    return build.binary("ADD", y, _by_channel(build, bias, x.rank))


def _folded(scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float) -> tuple[Constant, Constant]:
    """(factor, offset) of a channel, read when they are written."""
    sources = [one.constant for one in (scale, bias, mean, variance)]

    def loaded() -> list[np.ndarray]:
        return [source.load().astype(np.float64) for source in sources if source is not None]

    def factor() -> np.ndarray:
        scales, _, _, variances = loaded()
        factors: np.ndarray = (scales / np.sqrt(variances + epsilon)).astype(np.float32)
        return factors

    def offset() -> np.ndarray:
        scales, biases, means, variances = loaded()
        offsets: np.ndarray = (biases - means * scales / np.sqrt(variances + epsilon)).astype(np.float32)
        return offsets

    dtype = np.dtype(np.float32)
    return Constant(scale.shape, dtype, factor), Constant(scale.shape, dtype, offset)


def _trained(node: NodeView, build: Builder, x: Tensor) -> Emitted:
    """Also gives running = running * momentum + batch * (1 - momentum), for mean and variance."""
    axes = [axis for axis in range(x.rank) if axis != 1]
    centred = _centred(build, x, axes)
    variance = _mean_square(build, centred.numbers, axes)
    y = build.binary("MUL", centred.numbers, _inverse_root(build, variance, node.number("epsilon", 1e-5)))
    y = build.binary("MUL", y, _by_channel(build, node.input(1), x.rank))
    y = build.binary("ADD", y, _by_channel(build, node.input(2), x.rank))
    momentum = node.number("momentum", 0.9)
    running = []
    for former, batch in ((node.input(3), centred.mean), (node.input(4), variance)):
        kept = build.binary("MUL", former, build.constant([momentum]))
        added = build.binary("MUL", build.reshaped(batch, former.shape), build.constant([1 - momentum]))
        running.append(build.binary("ADD", kept, added))
    return [y, *running][: node.num_outputs]


@TFLITE.register("InstanceNormalization")
def instance_normalization(node: NodeView, build: Builder) -> Tensor:
    """Over space."""
    x = node.input(0)
    y = _normalized(build, x, list(range(2, x.rank)), node.number("epsilon", 1e-5))
    y = build.binary("MUL", y, _by_channel(build, node.input(1), x.rank))
    return build.binary("ADD", y, _by_channel(build, node.input(2), x.rank))


@TFLITE.register("GroupNormalization")
def group_normalization(node: NodeView, build: Builder) -> Tensor:
    """Over space and the channels of a group: (N, C, space) -> (N, groups, C / groups, space), and back."""
    x, groups = node.input(0), node.integer("num_groups", 1)
    if x.shape[1] < 0:
        raise UnsupportedError("the number of its channels is not known")
    members = x.shape[1] // groups
    sizes = [size_of(x, axis) for axis in range(x.rank)]
    y = reshaped_to(build, x, [sizes[0], groups, members, *sizes[2:]])
    y = _normalized(build, y, list(range(2, y.rank)), node.number("epsilon", 1e-5))
    # Before opset 21 a group had one scale, not a channel.
    of_scale = (1, groups, 1 if node.version < 21 else members, *(1,) * (x.rank - 2))
    y = build.binary("MUL", y, build.reshaped(node.input(1), of_scale))
    y = build.binary("ADD", y, build.reshaped(node.input(2), of_scale))
    return reshaped_to(build, y, sizes)


@TFLITE.register("LayerNormalization")
def layer_normalization(node: NodeView, build: Builder) -> Emitted:
    """Over `axis` and all behind it; mean and the inverse deviation are outputs as well."""
    x = node.input(0)
    axes = list(range(node.axis(x.rank, -1), x.rank))
    centred = _centred(build, x, axes)
    inverse = _inverse_root(build, _mean_square(build, centred.numbers, axes), node.number("epsilon", 1e-5))
    y = build.binary("MUL", build.binary("MUL", centred.numbers, inverse), node.input(1))
    bias = node.optional(2)
    if bias is not None:
        y = build.binary("ADD", y, bias)
    return [y, centred.mean, inverse][: node.num_outputs]


@TFLITE.register("RMSNormalization")
def rms_normalization(node: NodeView, build: Builder) -> Tensor:
    """Divides by sqrt(E[x^2] + epsilon), over `axis` and all behind it."""
    x = node.input(0)
    axes = list(range(node.axis(x.rank, -1), x.rank))
    inverse = _inverse_root(build, _mean_square(build, x, axes), node.number("epsilon", 1e-5))
    return build.binary("MUL", build.binary("MUL", x, inverse), node.input(1))


@TFLITE.register("MeanVarianceNormalization")
def mean_variance_normalization(node: NodeView, build: Builder) -> Tensor:
    """(x - E[x]) / (deviation + 1e-9)."""
    x = node.input(0)
    axes = [axis % x.rank for axis in node.ints("axes", (0, 2, 3))]
    centred = _centred(build, x, axes).numbers
    deviation = build.op("SQRT", [_mean_square(build, centred, axes)])
    return build.binary("DIV", centred, _plus(build, deviation, 1e-9))


@TFLITE.register("LpNormalization")
def lp_normalization(node: NodeView, build: Builder) -> Tensor:
    """Divides by the norm; 0 where the norm is."""
    x = node.input(0)
    axes = build.constant([node.axis(x.rank, -1)])
    is_first = node.integer("p", 2) == 1
    powers = build.op("ABS" if is_first else "SQUARE", [x])
    shape = tuple(1 if axis == node.axis(x.rank, -1) else dim for axis, dim in enumerate(x.shape))
    norm = build.op("SUM", [powers, axes], shape=shape, type_=x.type, keepDims=True)
    norm = norm if is_first else build.op("SQRT", [norm])
    return build.binary("DIV", x, build.binary("MAXIMUM", norm, _filled(build, x.rank, _SMALLEST)))


@TFLITE.register("LRN")
def local_response_normalization(node: NodeView, build: Builder) -> Tensor:
    """LOCAL_RESPONSE_NORMALIZATION, whose windows reach as far to either side.

    Windows of an even size: the averages come from AVERAGE_POOL_2D over images of (C, space).
    """
    x, size = node.input(0), node.integer("size", 1)
    alpha, beta, bias = node.number("alpha", 1e-4), node.number("beta", 0.75), node.number("bias", 1.0)
    if size % 2 == 1 and x.rank == 4:
        last = build.transposed(x, (0, 2, 3, 1))
        # TFLite's alpha is that of one element.
        options = {"radius": size // 2, "bias": bias, "alpha": alpha / size, "beta": beta}
        y = build.op("LOCAL_RESPONSE_NORMALIZATION", [last], shape=last.shape, type_=x.type, **options)
        return build.transposed(y, (0, 3, 1, 2))
    sizes = [size_of(x, axis) for axis in range(x.rank)]
    squares = reshaped_to(build, build.op("SQUARE", [x]), [*sizes[:2], product_of(sizes[2:]), 1])
    before, behind = (size - 1) // 2, size // 2
    pads = build.constant(np.array([[0, 0], [before, behind], [0, 0], [0, 0]], np.int32))
    batch, channels, area, _ = squares.shape
    wide = (batch, channels if channels < 0 else channels + size - 1, area, 1)
    means = build.op(
        "AVERAGE_POOL_2D",
        [build.op("PAD", [squares, pads], shape=wide, type_=x.type)],
        shape=squares.shape,
        type_=x.type,
        padding="VALID",
        strideH=1,
        strideW=1,
        filterHeight=size,
        filterWidth=1,
    )
    scaled = _plus(build, build.binary("MUL", means, _filled(build, 4, alpha)), bias)
    divisor = build.binary("POW", scaled, _filled(build, 4, beta))
    return build.binary("DIV", x, reshaped_to(build, divisor, sizes))


@TFLITE.register("Softmax")
def softmax(node: NodeView, build: Builder) -> Tensor:
    """SOFTMAX, over the last axis."""
    x = node.input(0)
    return _over_last(build, "SOFTMAX", x, node.axis(x.rank, -1), beta=1.0)


@TFLITE.register("LogSoftmax")
def log_softmax(node: NodeView, build: Builder) -> Tensor:
    """LOG_SOFTMAX, over the last axis."""
    x = node.input(0)
    return log_softmax_over(build, x, node.axis(x.rank, -1))


def log_softmax_over(build: Builder, x: Tensor, axis: int) -> Tensor:
    """LOG_SOFTMAX over `axis`."""
    return _over_last(build, "LOG_SOFTMAX", x, axis)


def _over_last(build: Builder, kind: str, x: Tensor, axis: int, **options: float) -> Tensor:
    order = (*(other for other in range(x.rank) if other != axis), axis)
    last = build.transposed(x, order)
    y = build.op(kind, [last], shape=last.shape, type_=x.type, **options)
    return build.transposed(y, tuple(order.index(position) for position in range(x.rank)))


class _Centred(NamedTuple):
    """Numbers less their mean, and the mean."""

    numbers: Tensor
    mean: Tensor


def _centred(build: Builder, x: Tensor, axes: Sequence[int]) -> _Centred:
    mean = _mean(build, x, axes)
    return _Centred(build.binary("SUB", x, mean), mean)


def _normalized(build: Builder, x: Tensor, axes: Sequence[int], epsilon: float) -> Tensor:
    """Of mean 0 and deviation 1 over `axes`."""
    centred = _centred(build, x, axes).numbers
    return build.binary("MUL", centred, _inverse_root(build, _mean_square(build, centred, axes), epsilon))


def _mean(build: Builder, x: Tensor, axes: Sequence[int]) -> Tensor:
    shape = tuple(1 if axis in axes else dim for axis, dim in enumerate(x.shape))
    return build.op("MEAN", [x, build.constant(list(axes))], shape=shape, type_=x.type, keepDims=True)


def _mean_square(build: Builder, x: Tensor, axes: Sequence[int]) -> Tensor:
    return _mean(build, build.op("SQUARE", [x]), axes)


def _inverse_root(build: Builder, x: Tensor, epsilon: float) -> Tensor:
    """1 / sqrt(x + epsilon)."""
    return build.op("RSQRT", [_plus(build, x, epsilon)])


def _plus(build: Builder, x: Tensor, number: float) -> Tensor:
    return build.binary("ADD", x, _filled(build, x.rank, number))


def _filled(build: Builder, rank: int, number: float) -> Tensor:
    return build.constant(np.full((1,) * rank, number, np.float32))


def _by_channel(build: Builder, vector: Tensor, rank: int) -> Tensor:
    """(C) as (1, C, 1, ...)."""
    return build.reshaped(vector, (1, vector.shape[0], *(1,) * (rank - 2))) if rank > 1 else vector
