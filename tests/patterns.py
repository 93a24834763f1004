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
        self.opset = 20
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, npt.NDArray[Any]] = {}

    def needs_opset(self, opset: int) -> None:
        """The model gets this opset, or the newest that another pattern needs."""
        self.opset = max(self.opset, opset)

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
        proto = proto_of(self.nodes, inputs=inputs, outputs={output: None}, weights=self.weights, opset=self.opset)
        for domain in sorted({node.domain for node in self.nodes} - {""}):
            proto.opset_import.append(helper.make_opsetid(domain, 1))
        return canonical(proto)


PatternFunction = Callable[[Net, Feature], Feature]
PATTERNS: dict[str, PatternFunction] = {}


def pattern(function: PatternFunction) -> PatternFunction:
    """Registers a pattern under its name, which no other one has."""
    if function.__name__ in PATTERNS:
        raise ValueError(f"Two patterns are named '{function.__name__}'.")
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


# --- recurrent layers -----------------------------------------------------------------------------------------


def to_sequence(net: Net, x: Feature, channels: int) -> str:
    """(N, C, H, W) -> (H*W, N, channels)."""
    flat = net.op("Reshape", net.conv(x, channels).name, net.const(np.array([0, 0, -1])))
    return str(net.op("Transpose", flat, perm=[2, 0, 1]))


def from_sequence(net: Net, x: Feature, sequence: str, channels: int) -> Feature:
    """(H*W, N, channels) -> (N, channels, H, W)."""
    back = net.op("Transpose", sequence, perm=[1, 2, 0])
    return net.like(x, net.op("Reshape", back, net.const(np.array([0, 0, x.size, x.size]))), channels=channels)


def batch_of(net: Net, x: Feature) -> str:
    """The batch size, as a vector of one element."""
    return str(net.op("Gather", net.op("Shape", x.name), net.const(np.array([0])), axis=0))


@pattern
def lstm_stack(net: Net, x: Feature) -> Feature:
    """Two bidirectional layers as PyTorch exports them; their states are zeros of a literal width."""
    hidden, sequence = 8, to_sequence(net, x, 16)
    shape = net.op("Concat", net.const(np.array([4])), batch_of(net, x), net.const(np.array([hidden])), axis=0)
    zeros = net.op("ConstantOfShape", shape)
    for layer, features in enumerate((16, 2 * hidden)):
        bounds = (net.const(np.array([2 * layer])), net.const(np.array([2 * layer + 2])), net.const(np.array([0])))
        state = net.op("Slice", zeros, *bounds)
        out, _, _ = net.op(
            "LSTM",
            *(sequence, net.weight(2, 4 * hidden, features), net.weight(2, 4 * hidden, hidden)),
            *(net.weight(2, 8 * hidden), "", state, state),
            outputs=3,
            hidden_size=hidden,
            direction="bidirectional",
        )
        sequence = net.op("Reshape", net.op("Transpose", out, perm=[0, 2, 1, 3]), net.const(np.array([0, 0, -1])))
    return from_sequence(net, x, sequence, 2 * hidden)


@pattern
def lstm_with_peepholes(net: Net, x: Feature) -> Feature:
    """States that are learned, as wide as the batch needs; the cell state goes on, too."""
    hidden, sequence = 8, to_sequence(net, x, 16)
    shape = net.op("Concat", net.const(np.array([1])), batch_of(net, x), net.const(np.array([hidden])), axis=0)
    states = [net.op("Expand", net.weight(1, 1, hidden), shape) for _ in range(2)]
    out, _, cell = net.op(
        "LSTM",
        *(sequence, net.weight(1, 4 * hidden, 16), net.weight(1, 4 * hidden, hidden), net.weight(1, 8 * hidden), ""),
        *(*states, net.weight(1, 3 * hidden)),
        outputs=3,
        hidden_size=hidden,
    )
    both = net.op("Add", net.op("Squeeze", out, net.const(np.array([1]))), cell)
    return from_sequence(net, x, both, hidden)


def gru(net: Net, x: Feature, *, linear_before_reset: int) -> Feature:
    """The first state is computed by another layer."""
    hidden, sequence = 8, to_sequence(net, x, 16)
    pooled = net.op("Flatten", net.op("GlobalAveragePool", x.name))
    first = net.op("Unsqueeze", net.op("MatMul", pooled, net.weight(x.channels, hidden)), net.const(np.array([0])))
    weights = (net.weight(1, 3 * hidden, 16), net.weight(1, 3 * hidden, hidden), net.weight(1, 6 * hidden))
    out, _ = net.op(
        "GRU",
        *(sequence, *weights, "", first),
        outputs=2,
        hidden_size=hidden,
        linear_before_reset=linear_before_reset,
    )
    return from_sequence(net, x, net.op("Squeeze", out, net.const(np.array([1]))), hidden)


@pattern
def gru_reset_first(net: Net, x: Feature) -> Feature:
    return gru(net, x, linear_before_reset=0)


@pattern
def gru_reset_last(net: Net, x: Feature) -> Feature:
    return gru(net, x, linear_before_reset=1)


@pattern
def rnn_last_state(net: Net, x: Feature) -> Feature:
    """Backwards, without a bias; only the last state is used, as channels that gate the feature map."""
    _, last = net.op(
        "RNN",
        *(to_sequence(net, x, 16), net.weight(1, 8, 16), net.weight(1, 8, 8)),
        outputs=2,
        hidden_size=8,
        direction="reverse",
    )
    states = net.op("Squeeze", last, net.const(np.array([0])))
    gate = net.op("Sigmoid", net.op("MatMul", states, net.weight(8, x.channels)))
    return net.like(x, net.op("Mul", x.name, net.op("Unsqueeze", gate, net.const(np.array([2, 3])))))


# --- cutting with steps, counts that stand in the graph -------------------------------------------------------


@pattern
def slices_with_steps(net: Net, x: Feature) -> Feature:
    """Every second channel; and all of them backwards, down to the first."""
    y = net.conv(x, 24)
    axes = net.const(np.array([-3]))
    every = net.op("Slice", y.name, *(net.const(np.array([n])) for n in (1, 2**62)), axes, net.const(np.array([2])))
    bounds = [net.const(np.array([n])) for n in (-1, -(2**62))]
    backwards = net.op("Slice", y.name, *bounds, net.const(np.array([1])), net.const(np.array([-1])))
    return net.like(x, net.op("Concat", backwards, every, axis=1), channels=36)


@pattern
def class_token(net: Net, x: Feature) -> Feature:
    """A learned token is expanded to the batch and put before the others; a literal holds its width."""
    s, c = x.size, 16
    flat = net.op("Reshape", net.conv(x, c).name, net.const(np.array([0, 0, s * s])))
    tokens = net.op("Transpose", flat, perm=[0, 2, 1])
    shape = net.op("Concat", batch_of(net, x), net.const(np.array([1])), net.const(np.array([c])), axis=0)
    first = net.op("Expand", net.weight(1, 1, c), shape)
    sequence = net.op("Add", net.op("Concat", first, tokens, axis=1), net.weight(1, s * s + 1, c))
    mixed = net.op("MatMul", sequence, net.weight(c, 24))
    rest = net.op("Slice", mixed, *(net.const(np.array([n])) for n in (1, 2**62, 1)))
    back = net.op("Transpose", rest, perm=[0, 2, 1])
    return net.like(x, net.op("Reshape", back, net.const(np.array([0, 24, s, s]))), channels=24)


@pattern
def divided_by_its_norm(net: Net, x: Feature) -> Feature:
    """The norm over the channels is expanded to the shape of what it divides."""
    y = net.conv(x, 16)
    norm = net.op("Add", net.op("ReduceL2", y.name, net.const(np.array([1])), keepdims=1), net.const(0.1))
    return net.like(y, net.op("Div", y.name, net.op("Expand", norm, net.op("Shape", y.name))))


@pattern
def added_zeros(net: Net, x: Feature) -> Feature:
    """A buffer of a literal width, made in the graph."""
    y = net.conv(x, 16)
    tail = net.const(np.array([16, x.size, x.size]))
    buffer = net.op("ConstantOfShape", net.op("Concat", batch_of(net, x), tail, axis=0))
    return net.like(y, net.op("Add", y.name, buffer))


# --- products -------------------------------------------------------------------------------------------------


@pattern
def einsum_with_ellipsis(net: Net, x: Feature) -> Feature:
    """A layer on the last axis, and one without an arrow, whose axes come out in the order of their letters."""
    nhwc = net.op("Transpose", x.name, perm=[0, 2, 3, 1])
    hidden = net.op("Relu", net.op("Einsum", nhwc, net.weight(x.channels, 24), equation="...i, io -> ...o"))
    mixed = net.op("Einsum", hidden, net.weight(24, 16), equation="bcdi,ia")  # -> a b c d
    return net.like(x, net.op("Transpose", mixed, perm=[1, 0, 2, 3]), channels=16)


@pattern
def einsum_attention(net: Net, x: Feature) -> Feature:
    """Two activations are multiplied over their channels, and a third one is weighted with the result."""
    query, key, value = (net.conv(x, channels).name for channels in (16, 16, 24))
    scores = net.op("Softmax", net.op("Einsum", query, key, equation="nchw,ncij->nhwij"), axis=-1)
    return net.like(x, net.op("Einsum", scores, value, equation="nhwij,ncij->nchw"), channels=24)


@pattern
def gemm_transposes(net: Net, x: Feature) -> Feature:
    """All four ways to store the operands, with factors, and C as a row, a number and a matrix of one row."""
    pooled = net.op("Flatten", net.op("GlobalAveragePool", x.name))
    a = net.op("Gemm", pooled, net.weight(x.channels, 24), net.weight(24), alpha=0.5, beta=2.0)
    a = net.op("Transpose", net.op("Tanh", a), perm=[1, 0])
    b = net.op("Gemm", a, net.weight(24, 24), net.weight(1, name="number"), transA=1)
    b = net.op("Transpose", net.op("Relu", b), perm=[1, 0])
    c = net.op("Gemm", b, net.weight(x.channels, 24), net.weight(1, x.channels), transA=1, transB=1, beta=-1.0)
    return net.like(x, net.op("Add", x.name, net.op("Unsqueeze", c, net.const(np.array([2, 3])))))


@pattern
def matmul_vectors(net: Net, x: Feature) -> Feature:
    """A vector from either side: the axis that is summed over vanishes."""
    nhwc = net.op("Transpose", net.conv(x, 16).name, perm=[0, 2, 3, 1])
    gate = net.op("Sigmoid", net.op("MatMul", nhwc, net.weight(16)))
    flat = net.op("Reshape", net.conv(x, 24).name, net.const(np.array([0, 0, -1])))
    shift = net.op("Reshape", net.op("MatMul", net.weight(24), flat), net.const(np.array([0, 1, x.size, x.size])))
    gated = net.op("Mul", x.name, net.op("Unsqueeze", gate, net.const(np.array([1]))))
    return net.like(x, net.op("Add", gated, shift))


# --- indices --------------------------------------------------------------------------------------------------


@pattern
def gather_elements(net: Net, x: Feature) -> Feature:
    """Positions of a feature map in another order; the order is expanded to all channels by a literal."""
    s, c = x.size, 16
    flat = net.op("Reshape", net.conv(x, c).name, net.const(np.array([0, c, s * s])))
    shape = net.op("Concat", batch_of(net, x), net.const(np.array([c])), net.const(np.array([s * s])), axis=0)
    order = net.op("Expand", net.const(net.rng.permutation(s * s)), shape)
    picked = net.op("GatherElements", flat, order, axis=2)
    return net.like(x, net.op("Reshape", picked, net.const(np.array([0, c, s, s]))), channels=c)


@pattern
def scatter_nd(net: Net, x: Feature) -> Feature:
    """The first rows are overwritten with those of another feature map."""
    rows_first = [net.op("Transpose", net.conv(x, 16).name, perm=[2, 0, 3, 1]) for _ in range(2)]
    some = net.op("Slice", rows_first[1], *(net.const(np.array([n])) for n in (0, 3, 0)))
    placed = net.op("ScatterND", rows_first[0], net.const(np.array([[4], [0], [2]])), some)
    return net.like(x, net.op("Transpose", placed, perm=[1, 3, 0, 2]), channels=16)


@pattern
def grid_sample(net: Net, x: Feature) -> Feature:
    """The places are computed by a layer of their own, from two channels that stay."""
    places = net.op("Tanh", net.op("Transpose", net.conv(net.conv(x, 8), 2).name, perm=[0, 2, 3, 1]))
    return net.like(x, net.op("GridSample", net.conv(x, 16).name, places, mode="linear"), channels=16)


@pattern
def fold(net: Net, x: Feature) -> Feature:
    """PyTorch's Fold: blocks of two by two, laid out side by side."""
    s = x.size
    rows = net.op("Reshape", net.conv(x, 32).name, net.const(np.array([0, 0, s * s])))
    image = net.op("Col2Im", rows, net.const(np.array([2 * s, 2 * s])), net.const(np.array([2, 2])), strides=[2, 2])
    return net.like(x, image, channels=8, size=2 * s)


# --- quantized weights ----------------------------------------------------------------------------------------


def coded(net: Net, array: npt.NDArray[Any], dtype: Any, name: str = "coded") -> str:
    """An integer initializer of its own type."""
    full = f"{net.prefix}/{name}_{len(net.weights)}"
    net.weights[full] = array.astype(dtype)
    return full


@pattern
def quantized_layer(net: Net, x: Feature) -> Feature:
    """As static quantization writes it: activations per tensor, weights and bias per filter, the bias in int32."""

    def quantized(name: str) -> str:
        settings = (net.const(0.04), coded(net, np.array(3), np.uint8, "zero"))
        return str(net.op("DequantizeLinear", net.op("QuantizeLinear", name, *settings), *settings))

    scale = net.const(net.rng.uniform(0.001, 0.01, 24))
    weight = coded(net, net.rng.integers(-127, 128, (24, x.channels, 3, 3)), np.int8)
    filters = net.op("DequantizeLinear", weight, scale, coded(net, np.zeros(24), np.int8, "zeros"), axis=0)
    bias_scale = net.const(net.rng.uniform(0.001, 0.01, 24))
    bias = net.op("DequantizeLinear", coded(net, net.rng.integers(-99, 99, 24), np.int32), bias_scale, axis=0)
    y = net.op("Conv", quantized(x.name), filters, bias, pads=[1] * 4)
    return net.like(x, quantized(net.op("Relu", y)), channels=24)


@pattern
def quantized_weight_behind_others(net: Net, x: Feature) -> Feature:
    """A weight in blocks of eight along its inputs, which is cast and turned round before it is multiplied."""
    net.needs_opset(21)
    nhwc = net.op("Transpose", net.conv(x, 16).name, perm=[0, 2, 3, 1])
    weight = coded(net, net.rng.integers(-127, 128, (24, 16)), np.int8)
    scales = net.const(net.rng.uniform(0.001, 0.01, (24, 2)))
    table = net.op("DequantizeLinear", weight, scales, axis=1, block_size=8)
    half = net.op("Cast", net.op("Cast", table, to=TensorProto.FLOAT16), to=TensorProto.FLOAT)
    mixed = net.op("MatMul", nhwc, net.op("Transpose", half, perm=[1, 0]))
    return net.like(x, net.op("Transpose", mixed, perm=[0, 3, 1, 2]), channels=24)


# --- attention operators --------------------------------------------------------------------------------------


def to_tokens(net: Net, x: Feature, channels: int) -> str:
    """(N, C, H, W) -> (N, H*W, channels)."""
    flat = net.op("Reshape", net.conv(x, channels).name, net.const(np.array([0, 0, -1])))
    return str(net.op("Transpose", flat, perm=[0, 2, 1]))


def from_tokens(net: Net, x: Feature, tokens: str, channels: int) -> Feature:
    """(N, H*W, channels) -> (N, channels, H, W)."""
    back = net.op("Transpose", tokens, perm=[0, 2, 1])
    return net.like(x, net.op("Reshape", back, net.const(np.array([0, 0, x.size, x.size]))), channels=channels)


def project(net: Net, tokens: str, width: int, out: int) -> str:
    return str(net.op("Add", net.op("MatMul", tokens, net.weight(width, out)), net.weight(out)))


@pattern
def attention_of_heads(net: Net, x: Feature) -> Feature:
    """ONNX's Attention on (N, heads, positions, width), with a bias for each head and the default scale."""
    net.needs_opset(23)
    tokens, operands = to_tokens(net, x, 16), []
    for width in (8, 8, 6):
        by_head = net.op("Reshape", project(net, tokens, 16, 4 * width), net.const(np.array([0, 0, 4, width])))
        operands.append(net.op("Transpose", by_head, perm=[0, 2, 1, 3]))
    y = net.op("Attention", *operands, net.weight(4, x.size**2, x.size**2, name="mask"))
    back = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.const(np.array([0, 0, 24])))
    return from_tokens(net, x, project(net, back, 24, 16), 16)


@pattern
def packed_attention_of_two_heads(net: Net, x: Feature) -> Feature:
    """Packed heads, so few that their width is cut: the default scale must stay that of the whole width."""
    net.needs_opset(23)
    tokens = to_tokens(net, x, 16)
    operands = [project(net, tokens, 16, out) for out in (16, 16, 12)]
    y = net.op("Attention", *operands, q_num_heads=2, kv_num_heads=2, is_causal=1)
    return from_tokens(net, x, project(net, y, 12, 16), 16)


@pattern
def attention_with_grouped_queries(net: Net, x: Feature) -> Feature:
    """Two query heads read one key head."""
    net.needs_opset(23)
    tokens = to_tokens(net, x, 16)
    operands = [project(net, tokens, 16, out) for out in (32, 16, 16)]
    y = net.op("Attention", *operands, q_num_heads=8, kv_num_heads=4)
    return from_tokens(net, x, project(net, y, 32, 16), 16)


@pattern
def fused_attention(net: Net, x: Feature) -> Feature:
    """com.microsoft's Attention makes Q, K and V itself, from one weight."""
    tokens = to_tokens(net, x, 16)
    y = net.op("Attention", tokens, net.weight(16, 96), net.weight(96), domain="com.microsoft", num_heads=4)
    return from_tokens(net, x, project(net, y, 32, 16), 16)


@pattern
def fused_attention_of_two_heads(net: Net, x: Feature) -> Feature:
    """Parts of different widths, and a bias for the scores."""
    tokens = to_tokens(net, x, 16)
    scores = net.weight(1, 2, x.size**2, x.size**2, name="scores")
    y = net.op(
        "Attention",
        *(tokens, net.weight(16, 56), net.weight(56), "", "", scores),
        domain="com.microsoft",
        num_heads=2,
        qkv_hidden_sizes=[16, 16, 24],
    )
    return from_tokens(net, x, project(net, y, 24, 16), 16)


@pattern
def multi_head_attention(net: Net, x: Feature) -> Feature:
    tokens = to_tokens(net, x, 16)
    operands = [net.op("MatMul", tokens, net.weight(16, out)) for out in (32, 32, 24)]
    scores = net.weight(1, 4, x.size**2, x.size**2, name="scores")
    inputs = (*operands, net.weight(88), "", scores)
    y = net.op("MultiHeadAttention", *inputs, domain="com.microsoft", num_heads=4)
    return from_tokens(net, x, project(net, y, 24, 16), 16)


@pattern
def multi_head_attention_of_two_heads(net: Net, x: Feature) -> Feature:
    tokens = to_tokens(net, x, 16)
    operands = [net.op("MatMul", tokens, net.weight(16, out)) for out in (16, 16, 12)]
    y = net.op("MultiHeadAttention", *operands, net.weight(44), domain="com.microsoft", num_heads=2)
    return from_tokens(net, x, project(net, y, 12, 16), 16)


@pattern
def group_query_attention(net: Net, x: Feature) -> Feature:
    """Two query heads share a key head; without a cache."""
    tokens = to_tokens(net, x, 16)
    operands = [project(net, tokens, 16, out) for out in (64, 32, 32)]
    length = x.size**2
    rows = net.op("Cast", batch_of(net, x), to=TensorProto.INT64)
    last = net.op("Expand", coded(net, np.array([length - 1]), np.int32, "last"), rows)
    inputs = (*operands, "", "", last, coded(net, np.array(length), np.int32, "total"))
    y, _, _ = net.op("GroupQueryAttention", *inputs, outputs=3, domain="com.microsoft", num_heads=8, kv_num_heads=4)
    return from_tokens(net, x, project(net, y, 64, 16), 16)


@pattern
def rotary_positions(net: Net, x: Feature) -> Feature:
    """Queries and keys are turned by their positions; heads go as a whole."""
    net.needs_opset(23)
    tokens, length = to_tokens(net, x, 16), x.size**2
    angles = [net.const(net.rng.standard_normal((1, length, 4)).astype(np.float32)) for _ in range(2)]
    shape = net.op("Concat", batch_of(net, x), net.const(np.array([length, 4])), axis=0)
    tables = [net.op("Expand", table, shape) for table in angles]
    turned = [net.op("RotaryEmbedding", project(net, tokens, 16, 32), *tables, num_heads=4) for _ in range(2)]
    y = net.op("Attention", *turned, project(net, tokens, 16, 32), q_num_heads=4, kv_num_heads=4)
    return from_tokens(net, x, project(net, y, 32, 16), 16)


@pattern
def fused_products(net: Net, x: Feature) -> Feature:
    """What ONNX Runtime makes of transposes, scales and activations around products."""
    ms = "com.microsoft"
    flat = net.op("Reshape", net.conv(x, 16).name, net.const(np.array([0, 0, -1])))  # (N, C, L)
    hidden = net.op("FusedMatMul", flat, net.weight(24, 16), domain=ms, transA=1, transB=1, alpha=0.5)
    hidden = net.op("BiasGelu", hidden, net.weight(24), domain=ms)
    hidden = net.op("QuickGelu", hidden, domain=ms)
    y = from_tokens(net, x, hidden, 24)
    z = net.conv(x, 16)
    inputs = (y.name, net.weight(16, 24, 1, 1), net.weight(16), z.name)
    return net.like(z, net.op("FusedConv", *inputs, domain=ms, activation="Relu"))


@pattern
def skip_normalization(net: Net, x: Feature) -> Feature:
    """The sum of two branches and a bias is normalized, and goes on as it is, too."""
    ms, tokens = "com.microsoft", to_tokens(net, x, 16)
    branch = net.op("MatMul", tokens, net.weight(16, 16))
    scale, shift, bias = (net.weight(16) for _ in range(3))
    y, _, _, total = net.op(
        "SkipLayerNormalization", tokens, branch, scale, shift, bias, outputs=4, domain=ms, epsilon=1e-3
    )
    again = net.op("SkipSimplifiedLayerNormalization", net.op("MatMul", y, net.weight(16, 16)), total, scale, domain=ms)
    return from_tokens(net, x, net.op("SimplifiedLayerNormalization", again, net.weight(16), axis=-1), 16)


@pattern
def deformable(net: Net, x: Feature) -> Feature:
    """Offsets and a mask come from layers of their own, whose channels stay."""
    offsets, mask = net.conv(net.conv(x, 8), 18), net.conv(x, 9)
    inputs = (x.name, net.weight(24, x.channels, 3, 3), offsets.name, net.weight(24), net.op("Sigmoid", mask.name))
    return net.like(x, net.op("DeformConv", *inputs, kernel_shape=[3, 3], pads=[1] * 4), channels=24)
