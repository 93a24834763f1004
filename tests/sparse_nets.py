"""Small channels-last TFLite graphs, made by hand, as the stages before leave them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from onnxprune.targets.tflite.build import broadcast_shape
from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.graph import (
    NUMPY_TYPES,
    Constant,
    Graph,
    Model,
    Operator,
    OptionValue,
    Quantization,
    Shape,
    Tensor,
)

__all__ = ["NhwcNet", "classes", "mobile_net", "model_of", "sandwich", "with_packed_weights"]


class NhwcNet:
    """Adds one operator after another; each takes and gives tensor names, and is the ONNX node of its own name."""

    def __init__(self, *, seed: int = 0, zeros: float = 0.8) -> None:
        self.rng = np.random.default_rng(seed)
        self.zeros = zeros
        """Share of zeros in the filters of 1x1 convolutions."""
        self.tensors: dict[str, Tensor] = {}
        self.operators: list[Operator] = []
        self.inputs: list[str] = []

    def input(self, shape: Shape, name: str = "x") -> str:
        """A float input."""
        self.tensors[name] = Tensor(name=name, type="FLOAT32", shape=shape)
        self.inputs.append(name)
        return name

    def constant(self, array: npt.NDArray[np.generic], name: str) -> str:
        """A constant."""
        type_ = next(key for key, dtype in NUMPY_TYPES.items() if dtype == array.dtype)
        self.tensors[name] = Tensor(name=name, type=type_, shape=array.shape, constant=Constant.of(array))
        return name

    def op(self, kind: str, inputs: Sequence[str], shape: Shape, name: str = "", **options: OptionValue) -> str:
        """Any operator with one output, of the type of its first input that is not constant."""
        name = name or f"{kind.lower()}{len(self.operators)}"
        self.tensors[name] = Tensor(name=name, type="FLOAT32", shape=shape)
        self.operators.append(
            Operator(kind=kind, inputs=tuple(inputs), outputs=(name,), options=options, node=f"node {name}")
        )
        return name

    def shape(self, name: str) -> Shape:
        """The shape of a tensor."""
        return self.tensors[name].shape

    def weights(self, shape: Shape, name: str, *, zeros: float = 0.0) -> str:
        """Seeded weights, scaled so that activations keep their size."""
        fan_in = int(np.prod(shape[1:]))
        array = self.rng.standard_normal(shape) * np.sqrt(2 / (fan_in * max(1 - zeros, 0.05)))
        flat = array.reshape(-1)
        flat[self.rng.permutation(flat.size)[: int(zeros * flat.size)]] = 0
        return self.constant(array.astype(np.float32), name)

    def bias(self, size: int, name: str) -> str:
        """A small bias: layers of zeros alone would hide mistakes."""
        return self.constant((0.1 * self.rng.standard_normal(size)).astype(np.float32), name)

    def pad(self, x: str, amount: int, name: str = "") -> str:
        """PAD of height and width on all four sides."""
        batch, height, width, channels = self.shape(x)
        name = name or f"pad{len(self.operators)}"
        paddings = self.constant(np.array([[0, 0], [amount] * 2, [amount] * 2, [0, 0]], np.int32), f"{name}/paddings")
        return self.op("PAD", [x, paddings], (batch, height + 2 * amount, width + 2 * amount, channels), name)

    def conv(
        self, x: str, filters: int, kernel: int = 1, stride: int = 1, *, name: str = "", padding: str = "VALID",
        activation: str = "NONE",
    ) -> str:  # fmt: skip
        """CONV_2D. A 1x1 has many zeros."""
        batch, height, width, channels = self.shape(x)
        name = name or f"conv{len(self.operators)}"
        zeros = self.zeros if kernel == 1 else 0.0
        weight = self.weights((filters, kernel, kernel, channels), f"{name}/weight", zeros=zeros)
        return self.op(
            "CONV_2D",
            [x, weight, self.bias(filters, f"{name}/bias")],
            (batch, *_slid(height, width, kernel, stride, padding), filters),
            name,
            padding=padding,
            strideH=stride,
            strideW=stride,
            dilationHFactor=1,
            dilationWFactor=1,
            fusedActivationFunction=activation,
        )

    def depthwise(
        self, x: str, kernel: int = 3, stride: int = 1, *, name: str = "", padding: str = "SAME",
        activation: str = "RELU6", multiplier: int = 1,
    ) -> str:  # fmt: skip
        """DEPTHWISE_CONV_2D."""
        batch, height, width, channels = self.shape(x)
        name = name or f"depthwise{len(self.operators)}"
        made = channels * multiplier
        weight = self.constant(
            (self.rng.standard_normal((1, kernel, kernel, made)) / kernel).astype(np.float32), f"{name}/weight"
        )
        return self.op(
            "DEPTHWISE_CONV_2D",
            [x, weight, self.bias(made, f"{name}/bias")],
            (batch, *_slid(height, width, kernel, stride, padding), made),
            name,
            padding=padding,
            strideH=stride,
            strideW=stride,
            dilationHFactor=1,
            dilationWFactor=1,
            depthMultiplier=multiplier,
            fusedActivationFunction=activation,
        )

    def binary(self, kind: str, left: str, right: str, name: str = "") -> str:
        """ADD, MUL or SUB."""
        return self.op(kind, [left, right], broadcast_shape(self.shape(left), self.shape(right)), name)

    def unary(self, kind: str, x: str, name: str = "", **options: OptionValue) -> str:
        """An operator of one tensor that keeps its shape."""
        return self.op(kind, [x], self.shape(x), name, **options)

    def mean(self, x: str, name: str = "", *, keep_dims: bool = True, axes: tuple[int, ...] = (1, 2)) -> str:
        """MEAN."""
        name = name or f"mean{len(self.operators)}"
        shape = tuple(
            1 if axis in axes else dim for axis, dim in enumerate(self.shape(x)) if keep_dims or axis not in axes
        )
        axes_tensor = self.constant(np.array(axes, np.int32), f"{name}/axes")
        return self.op("MEAN", [x, axes_tensor], shape, name, keepDims=keep_dims)

    def reshape(self, x: str, shape: Shape, name: str = "") -> str:
        """RESHAPE."""
        name = name or f"reshape{len(self.operators)}"
        target = self.constant(np.array(shape, np.int32), f"{name}/shape")
        known = self.shape(x)
        made = shape if -1 in known else np.empty(known).reshape(shape).shape
        return self.op("RESHAPE", [x, target], made, name, newShape=shape)

    def dense(self, x: str, units: int, name: str = "", *, activation: str = "NONE") -> str:
        """FULLY_CONNECTED."""
        name = name or f"dense{len(self.operators)}"
        weight = self.weights((units, self.shape(x)[-1]), f"{name}/weight")
        inputs = [x, weight, self.bias(units, f"{name}/bias")]
        return self.op("FULLY_CONNECTED", inputs, (self.shape(x)[0], units), name, fusedActivationFunction=activation)

    def graph(self, *outputs: str) -> Graph:
        """All of it."""
        return Graph(
            name="main",
            tensors=dict(self.tensors),
            operators=tuple(self.operators),
            inputs=tuple(self.inputs),
            outputs=outputs,
        )


def sandwich(
    middle: Callable[[NhwcNet, str], str] = lambda net, x: x,
    end: Callable[[NhwcNet, str], str] | None = None,
    *,
    zeros: float = 0.8,
) -> Graph:
    """Stem, depthwise, 1x1, `middle`, 1x1 and `end` (MEAN and classes by default): qualifies if those two do."""
    net = NhwcNet(zeros=zeros)
    x = net.conv(net.pad(net.input((1, 32, 32, 3)), 1), 16, 3, 2, name="stem", activation="RELU6")
    x = middle(net, net.conv(net.depthwise(x), 16, name="narrow"))
    x = net.conv(x, 64, name="wide", activation="RELU6")
    return net.graph((end or classes)(net, x))


def classes(net: NhwcNet, x: str) -> str:
    """MEAN, RESHAPE, FULLY_CONNECTED."""
    return net.dense(net.reshape(net.mean(x, "pool"), (-1, net.shape(x)[-1])), 10, name="classes")


def mobile_net(*, zeros: float = 0.8, size: int = 32, batch: int = 1, width: int = 16) -> Graph:
    """A small MobileNetV2 in the form that XNNPACK's sparse inference takes: stem, three blocks, MEAN, classes."""
    net = NhwcNet(zeros=zeros)
    x = net.conv(net.pad(net.input((batch, size, size, 3)), 1), width, 3, 2, name="stem", activation="RELU6")
    x = net.conv(net.depthwise(x), width)
    for stride, kernel in ((1, 3), (2, 3), (1, 5)):
        inner = net.conv(x, 4 * width, activation="RELU6")
        if stride == 2:
            inner = net.depthwise(net.pad(inner, kernel // 2), kernel, 2, padding="VALID")
        else:
            inner = net.depthwise(inner, kernel)
        y = net.conv(inner, width)
        x = net.binary("ADD", x, y) if stride == 1 else y
    return net.graph(classes(net, net.conv(x, 8 * width, name="last", activation="RELU6")))


def with_packed_weights(graph: Graph, how: Literal["FLOAT16", "INT8"]) -> Graph:
    """Filters of CONV_2D in half precision, or as int8 with a scale a filter, behind DEQUANTIZE."""
    editor = Editor(graph)
    for operator in graph.operators:
        if operator.kind != "CONV_2D":
            continue
        weight = editor.tensors[operator.inputs[1]]
        array = weight.array()
        assert array is not None
        quantization = None
        packed = array.astype(np.float16)
        if how == "INT8":
            scales = np.maximum(np.abs(array).reshape(len(array), -1).max(axis=1), 1e-6) / 127
            packed = np.round(array / scales.reshape(-1, 1, 1, 1)).astype(np.int8)
            quantization = Quantization(scales=tuple(scales.tolist()), zero_points=(0,) * len(scales))
        stored = editor.add(
            Tensor(
                name=f"{weight.name}/packed",
                type=how,
                shape=weight.shape,
                constant=Constant.of(packed),
                quantization=quantization,
            )
        )
        unpacking, floats = editor.computed(
            "DEQUANTIZE", [stored.name], name=f"{weight.name}/floats", shape=weight.shape, type_="FLOAT32", node=""
        )
        inputs = (operator.inputs[0], floats.name, *operator.inputs[2:])
        editor.replace(operator, unpacking, replace(operator, inputs=inputs))
    return editor.graph()


def model_of(graph: Graph) -> Model:
    """A model of one graph."""
    return Model(graphs=(graph,), input_names=graph.inputs, output_names=graph.outputs)


def _slid(height: int, width: int, kernel: int, stride: int, padding: str) -> tuple[int, int]:
    reach = kernel - 1 if padding == "VALID" else 0
    return tuple(-(-(dim - reach) // stride) for dim in (height, width))  # type: ignore[return-value]
