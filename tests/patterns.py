"""Patterns that a structured pruner meets, one small function each, and networks made of them.

Every pattern takes a feature map (N, C, H, W) with C a multiple of 8 and H, W multiples of 4, and returns one of the
same kind. All its nodes carry its prefix, so that a test can see whether channels really went from *this* pattern.
Weights, biases and BatchNorm statistics are random: an error hides behind zeros and ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from onnxprune.graph.canonical import CanonicalModel
from tests.builders import canonical, proto_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """A feature map of the network under construction."""

    name: str
    channels: int
    size: int


class Net:
    """Collects nodes and weights."""

    def __init__(self, *, seed: int = 0, batch: int | str = "N") -> None:
        self.rng = np.random.default_rng(seed)
        self.batch = batch
        self.prefix = "net"
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, npt.NDArray[Any]] = {}

    def const(self, array: npt.ArrayLike, name: str = "const") -> str:
        """A new initializer; floats become float32, integers int64."""
        data = np.asarray(array)
        data = data.astype(np.float32) if data.dtype.kind == "f" else data.astype(np.int64)
        full = f"{self.prefix}/{name}_{len(self.weights)}"
        self.weights[full] = data
        return full

    def weight(self, *shape: int, name: str = "weight") -> str:
        """Random weights that keep the scale of what goes through them."""
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 4
        return self.const(self.rng.standard_normal(shape) / np.sqrt(fan_in), name)

    def op(self, op_type: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add a node; returns the name of its output, or a tuple of names."""
        stem = f"{self.prefix}/{op_type}_{len(self.nodes)}"
        names = [f"{stem}_out{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=stem, domain=domain, **attributes))
        return names[0] if outputs == 1 else tuple(names)

    def conv(self, x: Feature, out: int, *, kernel: int = 1, groups: int = 1, bias: bool = True) -> Feature:
        """A convolution that keeps the spatial size."""
        weight = self.weight(out, x.channels // groups, kernel, kernel)
        inputs = [x.name, weight, *([self.weight(out, name="bias")] if bias else [])]
        name = self.op("Conv", *inputs, group=groups, pads=[kernel // 2] * 4)
        return Feature(name=name, channels=out, size=x.size)

    def like(self, x: Feature, name: str, *, channels: int | None = None, size: int | None = None) -> Feature:
        """The feature `name`, shaped like `x` but for what is given."""
        return Feature(name=name, channels=channels or x.channels, size=size or x.size)

    def classifier(self, x: Feature) -> str:
        """GlobalAveragePool, Flatten, Gemm with ten outputs."""
        pooled = self.op("GlobalAveragePool", x.name)
        flat = self.op("Flatten", pooled)
        return str(self.op("Gemm", flat, self.weight(10, x.channels), self.weight(10), transB=1))

    def model(self, output: str) -> CanonicalModel:
        """The canonical model of x (N, 3, 8, 8) -> `output` (N, 10)."""
        inputs = {"x": [self.batch, 3, 8, 8]}
        return canonical(proto_of(self.nodes, inputs=inputs, outputs={output: None}, weights=self.weights))


PatternFunction = Callable[[Net, Feature], Feature]
PATTERNS: dict[str, PatternFunction] = {}


def pattern(function: PatternFunction) -> PatternFunction:
    PATTERNS[function.__name__] = function
    return function


def network(names: list[str], *, seed: int = 0, batch: int | str = "N", width: int = 16) -> CanonicalModel:
    """x -> stem -> first pattern -> 1x1 convolution -> second pattern ... -> classifier; prefixes p0, p1 ..."""
    net = Net(seed=seed, batch=batch)
    feature = net.conv(Feature(name="x", channels=3, size=8), width, kernel=3)
    for index, name in enumerate(names):
        net.prefix = f"p{index}"
        feature = PATTERNS[name](net, feature)
        net.prefix = f"link{index}"
        feature = net.conv(feature, width)
        if feature.size != 8:
            net_size = net.const(np.array([8, 8]), "size")
            resized = net.op("Resize", feature.name, "", "", net_size, axes=[2, 3], mode="nearest")
            feature = net.like(feature, resized, size=8)
    net.prefix = "head"
    return net.model(net.classifier(feature))


# --- convolutions ---------------------------------------------------------------------------------------------


@pattern
def conv_relu(net: Net, x: Feature) -> Feature:
    y = net.conv(x, 24, kernel=3)
    return net.like(y, net.op("Relu", y.name))


@pattern
def conv_batch_norm(net: Net, x: Feature) -> Feature:
    y = net.conv(x, 16, bias=False)
    rng = net.rng
    stats = [rng.normal(1, 0.5, 16), rng.normal(0, 1, 16), rng.normal(0, 1, 16), rng.uniform(0.5, 2, 16)]
    return net.like(y, net.op("BatchNormalization", y.name, *(net.const(s.astype(np.float32)) for s in stats)))


@pattern
def depthwise(net: Net, x: Feature) -> Feature:
    return net.conv(x, x.channels, kernel=3, groups=x.channels)


@pattern
def depthwise_multiplier(net: Net, x: Feature) -> Feature:
    return net.conv(x, 2 * x.channels, kernel=3, groups=x.channels)


@pattern
def grouped(net: Net, x: Feature) -> Feature:
    return net.conv(net.conv(x, 16, groups=4), 24, groups=2)


@pattern
def grouped_after_multiplier(net: Net, x: Feature) -> Feature:
    wide = net.conv(x, 2 * x.channels, groups=x.channels)
    return net.conv(wide, 16, groups=x.channels)


@pattern
def conv_transpose(net: Net, x: Feature) -> Feature:
    name = net.op("ConvTranspose", x.name, net.weight(x.channels, 16, 2, 2), net.weight(16), strides=[2, 2])
    return net.like(x, name, channels=16, size=2 * x.size)


@pattern
def conv_transpose_depthwise(net: Net, x: Feature) -> Feature:
    c = x.channels
    name = net.op("ConvTranspose", x.name, net.weight(c, 1, 2, 2), net.weight(c), strides=[2, 2], group=c)
    return net.like(x, name, size=2 * x.size)


@pattern
def conv_transpose_grouped(net: Net, x: Feature) -> Feature:
    name = net.op("ConvTranspose", x.name, net.weight(x.channels, 8, 1, 1), net.weight(16), group=2)
    return net.like(x, name, channels=16)


# --- element-wise ---------------------------------------------------------------------------------------------


@pattern
def residual(net: Net, x: Feature) -> Feature:
    y = net.conv(x, x.channels, kernel=3)
    return net.like(x, net.op("Add", net.op("Relu", y.name), x.name))


@pattern
def residual_projection(net: Net, x: Feature) -> Feature:
    return net.like(x, net.op("Sub", net.conv(x, 24).name, net.conv(x, 24).name), channels=24)


@pattern
def three_way_sum(net: Net, x: Feature) -> Feature:
    parts = [net.conv(x, x.channels).name for _ in range(2)]
    return net.like(x, net.op("Sum", x.name, *parts))


@pattern
def squeeze_excite(net: Net, x: Feature) -> Feature:
    pooled = net.like(x, net.op("GlobalAveragePool", x.name))
    squeezed = net.conv(pooled, 8)
    gate = net.op("HardSigmoid", net.conv(net.like(squeezed, net.op("Relu", squeezed.name)), x.channels).name)
    return net.like(x, net.op("Mul", x.name, gate))


@pattern
def one_channel_gate(net: Net, x: Feature) -> Feature:
    gate = net.op("Sigmoid", net.conv(x, 1).name)
    return net.like(x, net.op("Mul", x.name, gate))


@pattern
def silu_diamond(net: Net, x: Feature) -> Feature:
    y = net.conv(x, 16)
    return net.like(y, net.op("Mul", y.name, net.op("Sigmoid", y.name)))


@pattern
def gated_halves(net: Net, x: Feature) -> Feature:
    left, right = net.op("Split", net.conv(x, 32).name, outputs=2, axis=1, num_outputs=2)
    return net.like(x, net.op("Mul", left, net.op("Sigmoid", right)), channels=16)


@pattern
def activations(net: Net, x: Feature) -> Feature:
    name = net.op("Clip", x.name, net.const(-1.0), net.const(6.0))
    for op_type in ("HardSwish", "Elu", "LeakyRelu", "Softplus", "Tanh"):
        name = net.op(op_type, name)
    return net.like(x, net.op("Cast", net.op("Cast", name, to=TensorProto.FLOAT16), to=TensorProto.FLOAT))


@pattern
def prelu(net: Net, x: Feature) -> Feature:
    return net.like(x, net.op("PRelu", x.name, net.weight(x.channels, 1, 1)))


@pattern
def constants_in_every_position(net: Net, x: Feature) -> Feature:
    c = x.channels
    name = net.op("Mul", x.name, net.weight(c, 1, 1))
    name = net.op("Add", net.weight(1, c, 1, 1), name)
    name = net.op("Max", name, net.weight(c, x.size, x.size), net.const(-0.2))
    nhwc = net.op("Transpose", name, perm=[0, 2, 3, 1])
    nhwc = net.op("Div", nhwc, net.const(net.rng.uniform(0.5, 2, c)))
    return net.like(x, net.op("Transpose", nhwc, perm=[0, 3, 1, 2]))


@pattern
def where(net: Net, x: Feature) -> Feature:
    positive = net.op("Greater", x.name, net.weight(x.channels, 1, 1))
    return net.like(x, net.op("Where", positive, x.name, net.conv(x, x.channels).name))


# --- cutting and joining --------------------------------------------------------------------------------------


@pattern
def concat(net: Net, x: Feature) -> Feature:
    return net.like(x, net.op("Concat", net.conv(x, 8).name, x.name, net.conv(x, 16).name, axis=1), channels=40)


@pattern
def concat_then_add(net: Net, x: Feature) -> Feature:
    both = net.op("Concat", net.conv(x, 8).name, net.conv(x, 16).name, axis=1)
    return net.like(x, net.op("Add", both, net.conv(x, 24).name), channels=24)


@pattern
def concat_constant(net: Net, x: Feature) -> Feature:
    y = net.op("Concat", net.conv(x, 16).name, net.const(np.ones((1, 8, x.size, x.size), np.float32)), axis=1)
    return net.like(x, y, channels=24)


@pattern
def concat_on_width(net: Net, x: Feature) -> Feature:
    both = net.op("Concat", net.conv(x, 16).name, net.conv(x, 16).name, axis=3)
    return net.like(x, net.op("MaxPool", both, kernel_shape=[1, 2], strides=[1, 2]), channels=16)


@pattern
def split_sizes(net: Net, x: Feature) -> Feature:
    y = net.conv(x, 24)
    first, second, third = net.op("Split", y.name, net.const(np.array([8, 4, 12])), outputs=3, axis=1)
    return net.like(x, net.op("Concat", third, net.op("Relu", first), second, axis=1), channels=24)


@pattern
def split_on_height(net: Net, x: Feature) -> Feature:
    top, bottom = net.op("Split", net.conv(x, 16).name, outputs=2, axis=2, num_outputs=2)
    return net.like(x, net.op("Concat", bottom, top, axis=2), channels=16)


@pattern
def slices(net: Net, x: Feature) -> Feature:
    y = net.conv(x, 32)
    axes = net.const(np.array([1]))
    low = net.op("Slice", y.name, net.const(np.array([0])), net.const(np.array([12])), axes)
    high = net.op("Slice", y.name, net.const(np.array([-16])), net.const(np.array([2**62])), axes)
    return net.like(x, net.op("Concat", high, low, axis=1), channels=28)


@pattern
def focus(net: Net, x: Feature) -> Feature:
    """YOLO's stem: every second pixel, on both axes."""
    parts = [
        net.op(
            "Slice",
            x.name,
            net.const(np.array([row, column])),
            net.const(np.array([2**62, 2**62])),
            net.const(np.array([2, 3])),
            net.const(np.array([2, 2])),
        )
        for row in (0, 1)
        for column in (0, 1)
    ]
    return net.like(x, net.op("Concat", *parts, axis=1), channels=4 * x.channels, size=x.size // 2)


@pattern
def gather(net: Net, x: Feature) -> Feature:
    order = net.rng.permutation(24)[:16]
    order[3] -= 24
    return net.like(x, net.op("Gather", net.conv(x, 24).name, net.const(order), axis=1), channels=16)


@pattern
def gather_one_channel(net: Net, x: Feature) -> Feature:
    one = net.op("Unsqueeze", net.op("Gather", x.name, net.const(np.array(5)), axis=1), net.const(np.array([1])))
    return net.like(x, net.op("Mul", net.conv(x, 16).name, net.op("Sigmoid", one)), channels=16)


@pattern
def pad_channels(net: Net, x: Feature) -> Feature:
    """ResNet's option A: the shortcut gets zero channels on both sides."""
    small = net.op("AveragePool", x.name, kernel_shape=[2, 2], strides=[2, 2])
    shortcut = net.op("Pad", small, net.const(np.array([0, 4, 0, 0, 0, 4, 0, 0])))
    y = net.conv(x, x.channels + 8)
    y_small = net.op("MaxPool", y.name, kernel_shape=[2, 2], strides=[2, 2])
    return net.like(x, net.op("Add", y_small, shortcut), channels=x.channels + 8, size=x.size // 2)


@pattern
def pad_space(net: Net, x: Feature) -> Feature:
    name = net.op("Pad", x.name, net.const(np.array([0, 0, 2, 2, 0, 0, 2, 2])), net.const(0.5))
    return net.like(x, name, size=x.size + 4)


# --- reshaping ------------------------------------------------------------------------------------------------


@pattern
def channel_shuffle(net: Net, x: Feature) -> Feature:
    s = x.size
    y = net.conv(x, 24, groups=2)
    name = net.op("Reshape", y.name, net.const(np.array([0, 2, 12, s, s])))
    name = net.op("Transpose", name, perm=[0, 2, 1, 3, 4])
    return net.conv(net.like(y, net.op("Reshape", name, net.const(np.array([-1, 24, s, s])))), 16, groups=2)


@pattern
def pixel_shuffle(net: Net, x: Feature) -> Feature:
    s = x.size
    name = net.op("Reshape", net.conv(x, 32).name, net.const(np.array([-1, 8, 2, 2, s, s])))
    name = net.op("Transpose", name, perm=[0, 1, 4, 2, 5, 3])
    name = net.op("Reshape", name, net.const(np.array([-1, 8, 2 * s, 2 * s])))
    return net.like(x, name, channels=8, size=2 * s)


@pattern
def depth_to_space(net: Net, x: Feature) -> Feature:
    name = net.op("DepthToSpace", net.conv(x, 32).name, blocksize=2, mode="DCR")
    return net.like(x, name, channels=8, size=2 * x.size)


@pattern
def depth_to_space_crd(net: Net, x: Feature) -> Feature:
    name = net.op("DepthToSpace", net.conv(x, 32).name, blocksize=2, mode="CRD")
    return net.like(x, name, channels=8, size=2 * x.size)


@pattern
def space_to_depth(net: Net, x: Feature) -> Feature:
    return net.like(x, net.op("SpaceToDepth", x.name, blocksize=2), channels=4 * x.channels, size=x.size // 2)


@pattern
def nhwc_matmul(net: Net, x: Feature) -> Feature:
    nhwc = net.op("Transpose", x.name, perm=[0, 2, 3, 1])
    hidden = net.op("Add", net.op("MatMul", nhwc, net.weight(x.channels, 24)), net.weight(24))
    out = net.op("MatMul", net.op("Relu", hidden), net.weight(24, 16))
    return net.like(x, net.op("Transpose", out, perm=[0, 3, 1, 2]), channels=16)


@pattern
def tokens(net: Net, x: Feature) -> Feature:
    """(N, C, H, W) -> (N, H*W, C) and back, with the batch read at run time."""
    s, c = x.size, x.channels
    shape = net.op("Shape", x.name)
    batch = net.op("Gather", shape, net.const(np.array([0])), axis=0)
    channels = net.op("Gather", shape, net.const(np.array([1])), axis=0)
    flat_shape = net.op("Concat", batch, channels, net.const(np.array([s * s])), axis=0)
    sequence = net.op("Transpose", net.op("Reshape", x.name, flat_shape), perm=[0, 2, 1])
    mixed = net.op("MatMul", sequence, net.weight(c, 24))
    back = net.op("Transpose", mixed, perm=[0, 2, 1])
    target = net.op("Concat", batch, net.const(np.array([24, s, s])), axis=0)
    return net.like(x, net.op("Reshape", back, target), channels=24)


@pattern
def mixing_from_the_left(net: Net, x: Feature) -> Feature:
    flat = net.op("Reshape", x.name, net.const(np.array([0, 0, -1])))
    mixed = net.op("MatMul", net.weight(24, x.channels), flat)
    return net.like(x, net.op("Reshape", mixed, net.const(np.array([0, 24, x.size, x.size]))), channels=24)


@pattern
def einsum(net: Net, x: Feature) -> Feature:
    return net.like(x, net.op("Einsum", x.name, net.weight(x.channels, 24), equation="nchw,cd->ndhw"), channels=24)


@pattern
def flatten_gemm(net: Net, x: Feature) -> Feature:
    """Each channel owns H*W columns of the Gemm; its units become channels of a 1x1 map, and that is spread out."""
    s = x.size
    flat = net.op("Flatten", net.conv(x, 8).name)
    hidden = net.op("Relu", net.op("Gemm", flat, net.weight(8 * s * s, 24), net.weight(24), alpha=0.5))
    small = net.op("Unsqueeze", hidden, net.const(np.array([2, 3])))
    wide = net.op("Expand", small, net.const(np.array([1, 24, s, s])))
    return net.like(x, wide, channels=24)


@pattern
def unflatten(net: Net, x: Feature) -> Feature:
    """A Gemm whose units are taken apart into channels and places."""
    s = x.size
    pooled = net.op("Flatten", net.op("GlobalMaxPool", x.name))
    wide = net.op("Gemm", pooled, net.weight(16 * s * s, x.channels), transB=1)
    return net.like(x, net.op("Reshape", wide, net.const(np.array([-1, 16, s, s]))), channels=16)


@pattern
def squeeze_and_unsqueeze(net: Net, x: Feature) -> Feature:
    axes = net.const(np.array([2, 3]))
    pooled = net.op("Squeeze", net.op("ReduceMean", x.name, axes, keepdims=1), axes)
    mixed = net.op("MatMul", pooled, net.weight(x.channels, x.channels))
    return net.like(x, net.op("Add", x.name, net.op("Unsqueeze", mixed, axes)))


@pattern
def tile(net: Net, x: Feature) -> Feature:
    return net.like(x, net.op("Tile", x.name, net.const(np.array([1, 2, 1, 1]))), channels=2 * x.channels)


@pattern
def batch_merged_shuffle(net: Net, x: Feature) -> Feature:
    """ShuffleNetV2 as FastestDet spells it; the batch must be 1."""
    s = x.size
    y = net.conv(x, 16)
    name = net.op("Reshape", y.name, net.const(np.array([8, 2, s * s])))
    name = net.op("Transpose", name, perm=[1, 0, 2])
    name = net.op("Reshape", name, net.const(np.array([2, -1, 8, s, s])))
    first = net.op("Gather", name, net.const(np.array(0)), axis=0)
    second = net.op("Gather", name, net.const(np.array(1)), axis=0)
    side = net.conv(Feature(name=second, channels=8, size=s), 8, kernel=3)
    return net.like(x, net.op("Concat", first, side.name, axis=1), channels=16)


# --- pooling, resizing, normalization, recurrence -------------------------------------------------------------


@pattern
def pooling(net: Net, x: Feature) -> Feature:
    name = net.op("MaxPool", x.name, kernel_shape=[3, 3], pads=[1] * 4)
    return net.like(x, net.op("AveragePool", name, kernel_shape=[2, 2], strides=[2, 2]), size=x.size // 2)


@pattern
def sum_over_channels(net: Net, x: Feature) -> Feature:
    total = net.op("ReduceSum", net.conv(x, 16).name, net.const(np.array([1])), keepdims=1)
    return net.like(x, net.op("Mul", x.name, net.op("Sigmoid", total)))


@pattern
def resize_by_shape(net: Net, x: Feature) -> Feature:
    """The size is put together from the shape of another feature map, channels included."""
    small = net.op("MaxPool", x.name, kernel_shape=[2, 2], strides=[2, 2])
    front = net.op("Slice", net.op("Shape", small), net.const(np.array([0])), net.const(np.array([2])))
    back = net.op("Slice", net.op("Shape", x.name), net.const(np.array([2])), net.const(np.array([4])))
    sizes = net.op("Concat", front, back, axis=0)
    return net.like(x, net.op("Resize", small, "", "", sizes, mode="linear"))


@pattern
def resize_to_literal(net: Net, x: Feature) -> Feature:
    scales = net.const(np.array([1.0, 1.0, 2.0, 2.0], np.float32))
    return net.like(x, net.op("Resize", x.name, "", scales, mode="nearest"), size=2 * x.size)


@pattern
def instance_norm(net: Net, x: Feature) -> Feature:
    return net.like(x, net.op("InstanceNormalization", x.name, net.weight(x.channels), net.weight(x.channels)))


@pattern
def softmax_over_space(net: Net, x: Feature) -> Feature:
    return net.like(x, net.op("Softmax", x.name, axis=3))


@pattern
def quantized_weights(net: Net, x: Feature) -> Feature:
    """Weight and activation behind QuantizeLinear/DequantizeLinear, as quantization-aware training leaves them."""
    scale = net.const(0.05)
    zero = f"{net.prefix}/zero_{len(net.weights)}"
    net.weights[zero] = np.zeros((), np.int8)
    coded = net.op("QuantizeLinear", x.name, scale, zero)
    real = net.op("DequantizeLinear", coded, scale, zero)
    weight = f"{net.prefix}/coded_{len(net.weights)}"
    net.weights[weight] = net.rng.integers(-127, 128, (16, x.channels, 1, 1)).astype(np.int8)
    scales = net.const(net.rng.uniform(0.001, 0.01, 16))
    zeros = f"{net.prefix}/zeros_{len(net.weights)}"
    net.weights[zeros] = np.zeros(16, np.int8)
    filters = net.op("DequantizeLinear", weight, scales, zeros, axis=0)
    return net.like(x, net.op("Conv", real, filters), channels=16)


@pattern
def lstm(net: Net, x: Feature) -> Feature:
    """Reads the channels as features of a sequence of pixels; its hidden units stay."""
    s, c, hidden = x.size, x.channels, 8
    flat = net.op("Reshape", net.conv(x, 16).name, net.const(np.array([0, 0, -1])))
    sequence = net.op("Transpose", flat, perm=[2, 0, 1])
    out, _, _ = net.op(
        "LSTM",
        sequence,
        net.weight(1, 4 * hidden, 16),
        net.weight(1, 4 * hidden, hidden),
        net.weight(1, 8 * hidden),
        outputs=3,
        hidden_size=hidden,
    )
    last = net.op("Squeeze", net.op("Transpose", out, perm=[1, 2, 3, 0]), net.const(np.array([0])))
    back = net.op("Reshape", last, net.const(np.array([-1, hidden, s, s])))
    return net.like(x, net.op("Concat", back, x.name, axis=1), channels=c + hidden)
