"""Random ONNX graphs of the patterns that networks are made of, with equal sizes on purpose: nothing may guess axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

OPEN = -1
"""The length of an axis that the run decides; only the first one of a tensor."""

_MOST_ELEMENTS = 6000
_SIZES = (2, 3, 4, 6, 8)


class RandomGraph:
    """Grows a graph pattern by pattern. `shapes` are those of its float values, inputs among them."""

    def __init__(self, seed: int, *, batch: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.shapes: dict[str, Shape] = {}
        self.inputs: list[str] = []
        self.constants: dict[str, Array] = {}
        self.nodes: list[onnx.NodeProto] = []
        one_size = self.choice(_SIZES)
        is_cube = self.happens(0.4)
        for rank in (4, self.choice((2, 3, 4))):
            name = f"x{len(self.inputs)}"
            sizes = (one_size if is_cube else self.choice(_SIZES) for _ in range(rank - 1))
            self.shapes[name] = (batch, *sizes)
            self.inputs.append(name)
        wanted = int(self.rng.integers(3, 9))
        for _ in range(40):
            if wanted:
                wanted -= self.choice(PATTERNS)(self) is not None

    def choice(self, among: Sequence[Any]) -> Any:
        return among[int(self.rng.integers(len(among)))]

    def happens(self, chance: float) -> bool:
        return bool(self.rng.random() < chance)

    def pick(self, *ranks: int) -> str | None:
        """A value of one of these ranks, the newer the likelier."""
        found = [
            name
            for name, shape in self.shapes.items()
            if len(shape) in ranks and 0 < math.prod(abs(dim) for dim in shape) < _MOST_ELEMENTS
        ]
        return None if not found else self.choice(found[-4:] if self.happens(0.7) else found)

    def constant(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        made = np.asarray(array)
        self.constants[name] = made.astype(np.float32) if made.dtype == np.float64 else made
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(self.rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]) or 1))

    def node(self, op_type: str, inputs: Sequence[str], shape: Sequence[int], **attributes: Any) -> str:
        (name,) = self.nodes_of(op_type, inputs, [shape], **attributes)
        return name

    def nodes_of(
        self, op_type: str, inputs: Sequence[str], shapes: Sequence[Sequence[int]], **attributes: Any
    ) -> list[str]:
        names = [f"v{len(self.nodes)}_{output}" for output in range(len(shapes))]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=f"n{len(self.nodes)}", **attributes))
        self.shapes.update({name: tuple(shape) for name, shape in zip(names, shapes, strict=True)})
        return names

    def model(self) -> onnx.ModelProto:
        """What nobody reads are outputs, and one value that somebody does."""
        read = {name for node in self.nodes for name in node.input}
        computed = [name for name in self.shapes if name not in self.inputs]
        outputs = dict.fromkeys([*(name for name in computed if name not in read), self.choice(computed)])
        graph = helper.make_graph(
            self.nodes,
            "random",
            [
                helper.make_tensor_value_info(
                    name, TensorProto.FLOAT, ["batch" if dim == OPEN else dim for dim in self.shapes[name]]
                )
                for name in self.inputs
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)

    def feeds(self, batch: int) -> dict[str, Array]:
        return {
            name: self.rng.standard_normal([batch if dim == OPEN else dim for dim in self.shapes[name]]).astype("f")
            for name in self.inputs
        }


def _activated(graph: RandomGraph, x: str) -> str:
    shape = graph.shapes[x]
    kind = graph.choice(["Relu", "Sigmoid", "HardSwish", "LeakyRelu", "Elu", "Clip", "SiLU", "PRelu", "none"])
    if kind == "none":
        return x
    if kind == "Clip":
        return graph.node("Clip", [x, graph.constant(0.0), graph.constant(6.0)], shape)
    if kind == "SiLU":
        return graph.node("Mul", [x, graph.node("Sigmoid", [x], shape)], shape)
    if kind == "PRelu":
        return graph.node("PRelu", [x, graph.constant(graph.rng.random((*shape[1:2], *(1,) * len(shape[2:]))))], shape)
    return graph.node(kind, [x], shape)


def activation(graph: RandomGraph) -> str | None:
    x = graph.pick(3, 4)
    return x and _activated(graph, x)


def convolution(graph: RandomGraph) -> str | None:
    x = graph.pick(3, 4)
    if x is None:
        return None
    batch, channels, *space = graph.shapes[x]
    group = graph.choice([1, 1, channels])
    kernel, stride, padding = graph.choice([1, 2, 3]), graph.choice([1, 1, 2]), [graph.choice([0, 1]) for _ in "be"]
    sizes = [(size + sum(padding) - kernel) // stride + 1 for size in space]
    if min(sizes) < 1:
        return None
    inputs = [x, graph.weight(channels, channels // group, *[kernel] * len(space)), graph.weight(channels)]
    pads = [side for side in padding for _ in space]
    y = graph.node("Conv", inputs, (batch, channels, *sizes), group=group, strides=[stride] * len(space), pads=pads)
    if graph.happens(0.4):
        parameters = [graph.constant(graph.rng.random(channels) + 0.3) for _ in range(4)]
        y = graph.node("BatchNormalization", [y, *parameters], graph.shapes[y])
    return _activated(graph, y)


def transposed_convolution(graph: RandomGraph) -> str | None:
    x = graph.pick(4)
    if x is None:
        return None
    batch, channels, *space = graph.shapes[x]
    kernel, stride, padding = graph.choice([2, 3]), graph.choice([1, 2]), graph.choice([0, 1])
    sizes = [stride * (size - 1) + kernel - 2 * padding for size in space]
    weight = graph.weight(channels, 3, kernel, kernel)
    if min(sizes) < 1:
        return None
    return graph.node("ConvTranspose", [x, weight], (batch, 3, *sizes), strides=[stride] * 2, pads=[padding] * 4)


def pooling(graph: RandomGraph) -> str | None:
    x = graph.pick(4)
    if x is None:
        return None
    batch, channels, *space = graph.shapes[x]
    window, stride, before, behind = graph.choice([2, 3]), graph.choice([1, 2]), *graph.rng.integers(0, 2, 2).tolist()
    sizes = [(size + before + behind - window) // stride + 1 for size in space]
    if min(sizes) < 1:
        return None
    counted = {"count_include_pad": graph.choice([0, 1])}
    kind, attributes = graph.choice([("MaxPool", {}), ("AveragePool", counted)])
    pads = [before, before, behind, behind]
    shape = (batch, channels, *sizes)
    return graph.node(kind, [x], shape, kernel_shape=[window] * 2, strides=[stride] * 2, pads=pads, **attributes)


def gate(graph: RandomGraph) -> str | None:
    """Squeeze and excitation, with the axes dropped or kept."""
    x = graph.pick(4)
    if x is None:
        return None
    shape = graph.shapes[x]
    batch, channels = shape[:2]
    keeps = graph.choice([0, 1])
    shapes = ((batch, channels), (batch, channels, 1, 1))
    y = graph.node("ReduceMean", [x, graph.constant([2, 3])], shapes[keeps], keepdims=keeps)
    if not keeps:
        y = graph.node("MatMul", [y, graph.weight(channels, channels)], shapes[0])
        y = graph.node("Unsqueeze", [y, graph.constant([2, 3])], shapes[1])
    return graph.node("Mul", [graph.node("Sigmoid", [y], shapes[1]), x], shape)


def binary(graph: RandomGraph) -> str | None:
    """With a constant that broadcasts, on either side, or with another value of the shape."""
    x = graph.pick(1, 2, 3, 4, 5)
    if x is None:
        return None
    shape = graph.shapes[x]
    others = [name for name, other in graph.shapes.items() if other == shape]
    sizes = [dim if dim != OPEN and graph.happens(0.5) else 1 for dim in shape][graph.choice([0, 1]) :]
    other = graph.choice(others) if graph.happens(0.5) else graph.constant(graph.rng.standard_normal(sizes))
    return graph.node(
        graph.choice(["Add", "Sub", "Mul", "Max"]), [x, other] if graph.happens(0.6) else [other, x], shape
    )


def shuffle(graph: RandomGraph) -> str | None:
    x = graph.pick(4)
    if x is None or graph.shapes[x][1] % 2:
        return None
    batch, channels, *space = graph.shapes[x]
    kept = 0 if batch == OPEN else batch
    split = graph.constant([kept, 2, channels // 2, *space])
    y = graph.node("Reshape", [x, split], (batch, 2, channels // 2, *space))
    y = graph.node("Transpose", [y], (batch, channels // 2, 2, *space), perm=[0, 2, 1, 3, 4])
    return graph.node("Reshape", [y, graph.constant([kept, channels, *space])], graph.shapes[x])


def concatenation(graph: RandomGraph) -> str | None:
    x = graph.pick(2, 3, 4, 5)
    if x is None:
        return None
    shape = graph.shapes[x]
    axis = graph.choice(range(1, len(shape)))
    fitting = [
        name
        for name, other in graph.shapes.items()
        if (*other[:axis], *other[axis + 1 :]) == (*shape[:axis], *shape[axis + 1 :]) and len(other) == len(shape)
    ]
    y = graph.choice(fitting)
    total = shape[axis] + graph.shapes[y][axis]
    return graph.node("Concat", [y, x], (*shape[:axis], total, *shape[axis + 1 :]), axis=axis - len(shape))


def splitting(graph: RandomGraph) -> str | None:
    x = graph.pick(3, 4)
    if x is None:
        return None
    shape = graph.shapes[x]
    axis = graph.choice(range(1, len(shape)))
    if shape[axis] < 2:
        return None
    sizes = [1, shape[axis] - 1]
    shapes = [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]
    parts = graph.nodes_of("Split", [x, graph.constant(sizes)], shapes, axis=axis)
    return graph.node("Concat", [parts[1], _activated(graph, parts[0])], shape, axis=axis)


def transposition(graph: RandomGraph) -> str | None:
    x = graph.pick(3, 4, 5)
    if x is None:
        return None
    shape = graph.shapes[x]
    order = [0, *(graph.rng.permutation(len(shape) - 1) + 1).tolist()]
    return graph.node("Transpose", [x], [shape[axis] for axis in order], perm=order)


def flattening(graph: RandomGraph) -> str | None:
    """The last axes into one."""
    x = graph.pick(3, 4, 5)
    if x is None:
        return None
    shape = graph.shapes[x]
    kept = graph.choice(range(1, len(shape) - 1))
    target = (*shape[:kept], math.prod(shape[kept:]))
    return graph.node("Reshape", [x, graph.constant([0] * kept + [-1])], target)


def reduction(graph: RandomGraph) -> str | None:
    x = graph.pick(2, 3, 4, 5)
    if x is None:
        return None
    shape = graph.shapes[x]
    axis, keeps = graph.choice(range(1, len(shape))), graph.choice([0, 1])
    left = (*shape[:axis], *[1] * keeps, *shape[axis + 1 :])
    kind = graph.choice(["ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2"])
    return graph.node(kind, [x, graph.constant([axis - len(shape)])], left, keepdims=keeps)


def picking(graph: RandomGraph) -> str | None:
    """Gather forwards and backwards, with and without the axis."""
    x = graph.pick(2, 3, 4)
    if x is None:
        return None
    shape = graph.shapes[x]
    axis = graph.choice(range(1, len(shape)))
    length = shape[axis]
    indices = np.array(graph.choice([0, -1, range(length)[::-1], range(0, length, 2), [0, length - 1, 0]]), np.int64)
    return graph.node(
        "Gather", [x, graph.constant(indices)], (*shape[:axis], *indices.shape, *shape[axis + 1 :]), axis=axis
    )


def padding(graph: RandomGraph) -> str | None:
    x = graph.pick(4)
    if x is None or min(graph.shapes[x][2:]) < 3:
        return None
    before, behind = graph.rng.integers(0, 3, 2).tolist()
    batch, channels, *space = graph.shapes[x]
    pads = graph.constant([0, 0, before, before, 0, 0, behind, behind])
    sizes = [size + before + behind for size in space]
    return graph.node("Pad", [x, pads], (batch, channels, *sizes), mode=graph.choice(["constant", "reflect", "edge"]))


def resizing(graph: RandomGraph) -> str | None:
    x = graph.pick(4)
    if x is None:
        return None
    batch, channels, *space = graph.shapes[x]
    mode = graph.choice(["nearest", "linear"])
    rule = graph.choice(["asymmetric", "half_pixel", "align_corners"])
    scales = graph.constant([1.0, 1.0, 2.0, 2.0])
    sizes = [2 * size for size in space]
    return graph.node(
        "Resize", [x, "", scales], (batch, channels, *sizes), mode=mode, coordinate_transformation_mode=rule
    )


def normalization(graph: RandomGraph) -> str | None:
    x = graph.pick(3, 4)
    if x is None:
        return None
    shape = graph.shapes[x]
    if graph.happens(0.5):
        return graph.node("Softmax", [x], shape, axis=graph.choice(range(1, len(shape))))
    parameters = [graph.constant(graph.rng.random(shape[-1]) + 0.5), graph.weight(shape[-1])]
    return graph.node("LayerNormalization", [x, *parameters], shape, axis=-1, epsilon=0.1)


def attention(graph: RandomGraph) -> str | None:
    """Two heads over the values of rank 3, projected by one matrix each."""
    x = graph.pick(3)
    if x is None or graph.shapes[x][2] % 2:
        return None
    batch, length, width = graph.shapes[x]
    kept = 0 if batch == OPEN else batch
    heads = []
    for _ in range(3):
        y = graph.node("MatMul", [x, graph.weight(width, width)], (batch, length, width))
        y = graph.node("Reshape", [y, graph.constant([kept, length, 2, width // 2])], (batch, length, 2, width // 2))
        heads.append(graph.node("Transpose", [y], (batch, 2, length, width // 2), perm=[0, 2, 1, 3]))
    keys = graph.node("Transpose", [heads[1]], (batch, 2, width // 2, length), perm=[0, 1, 3, 2])
    scores = graph.node("MatMul", [heads[0], keys], (batch, 2, length, length))
    weights = graph.node("Softmax", [scores], (batch, 2, length, length), axis=-1)
    y = graph.node("MatMul", [weights, heads[2]], (batch, 2, length, width // 2))
    y = graph.node("Transpose", [y], (batch, length, 2, width // 2), perm=[0, 2, 1, 3])
    y = graph.node("Reshape", [y, graph.constant([kept, length, width])], (batch, length, width))
    return graph.node("Add", [x, y], (batch, length, width))


PATTERNS: tuple[Callable[[RandomGraph], str | None], ...] = (
    *[convolution] * 4, transposed_convolution, pooling, pooling, gate, *[binary] * 3, activation, shuffle,
    concatenation, splitting, *[transposition] * 2, flattening, reduction, picking, padding, resizing,
    *[normalization] * 2, *[attention] * 2,
)  # fmt: skip
"""What a graph grows by, as often as it stands here. None: the graph has nothing that fits."""
