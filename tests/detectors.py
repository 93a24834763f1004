"""Heads of detectors as exporters write them, with seeded weights: what decoding looks like in a graph.

Each begins with two convolutions on `x` (1, 8, 16, 16), whose output `f` is what the head reads. Names of nodes that
decode begin with "decode".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto, helper

from onnxprune.contracts import CanonicalModel
from tests.builders import canonical, proto_of

SHAPE = (1, 8, 16, 16)
SIDE = 8
CELLS = SIDE * SIDE
CLASSES = 6


class Head:
    """Collects nodes and constants."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self._rng = np.random.default_rng(5)
        self.features = self.relu(self.conv("x", "stem", 16, 8, stride=2))
        self.features = self.relu(self.conv(self.features, "body", 32, 16))

    def node(self, op_type: str, inputs: list[str], name: str, outputs: int = 1, **attributes: Any) -> str:
        """Append a node; its (first) output has its name, further ones a number behind it."""
        names = [name, *(f"{name}.{number}" for number in range(1, outputs))]
        self.nodes.append(helper.make_node(op_type, inputs, names, name=name, **attributes))
        return name

    def constant(self, name: str, value: Any, dtype: type = np.float32) -> str:
        self.constants[name] = np.asarray(value, dtype)
        return name

    def conv(
        self, data: str, name: str, channels: int, given: int, *, stride: int = 1, gain: Any = 1.0, bias: Any = 0.0
    ) -> str:
        weight = self._rng.standard_normal((channels, given, 1, 1)) * np.sqrt(1 / given)
        self.constant(f"{name}.weight", weight * np.broadcast_to(gain, (channels,)).reshape(-1, 1, 1, 1))
        self.constant(f"{name}.bias", np.broadcast_to(bias, (channels,)))
        return self.node("Conv", [data, f"{name}.weight", f"{name}.bias"], name, strides=[stride, stride])

    def relu(self, data: str) -> str:
        return self.node("Relu", [data], f"{data}.relu")

    def reshape(self, data: str, name: str, shape: list[int]) -> str:
        return self.node("Reshape", [data, self.constant(f"{name}.shape", shape, np.int64)], name)

    def slice(self, data: str, name: str, start: int, end: int, axis: int) -> str:
        bounds = [
            self.constant(f"{name}.{part}", [value], np.int64)
            for part, value in zip("sea", (start, end, axis), strict=True)
        ]
        return self.node("Slice", [data, *bounds], name)

    def model(self, outputs: dict[str, list[Any] | None]) -> CanonicalModel:
        return canonical(proto_of(self.nodes, inputs={"x": SHAPE}, outputs=outputs, weights=self.constants))


def grid() -> np.ndarray:
    """(1, cells, 2): x and y of each cell."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.stack([x, y], -1).reshape(1, -1, 2).astype(np.float32)


def yolox() -> CanonicalModel:
    """Two levels, each Concat(box, sigmoid(objectness), sigmoid(classes)) -> Reshape; Concat of the levels, decoded."""
    head = Head()
    levels = []
    for level in (0, 1):
        parts = [
            head.conv(head.features, f"box{level}", 4, 32),
            head.node("Sigmoid", [head.conv(head.features, f"obj{level}", 1, 32, bias=-3)], f"decode.obj{level}"),
            head.node("Sigmoid", [head.conv(head.features, f"cls{level}", CLASSES, 32, bias=-2)], f"decode.cls{level}"),
        ]
        joined = head.node("Concat", parts, f"decode.level{level}", axis=1)
        levels.append(head.reshape(joined, f"rows{level}", [1, 5 + CLASSES, CELLS]))
    joined = head.node("Concat", levels, "decode.levels", axis=2)
    rows = head.node("Transpose", [joined], "transposed", perm=[0, 2, 1])
    offsets = head.slice(rows, "offsets", 0, 2, 2)
    cells = head.constant("cells", np.concatenate([grid(), grid()], 1))
    stride = head.constant("stride", 32.0)
    centres = head.node("Mul", [head.node("Add", [offsets, cells], "decode.add"), stride], "decode.centres")
    grown = head.node("Exp", [head.slice(rows, "sizes", 2, 4, 2)], "decode.exp")
    sizes = head.node("Mul", [grown, stride], "decode.sizes")
    scores = head.slice(rows, "scores", 4, 5 + CLASSES, 2)
    head.node("Concat", [centres, sizes, scores], "y", axis=2)
    return head.model({"y": [1, 2 * CELLS, 5 + CLASSES]})


def yolov8() -> CanonicalModel:
    """Distributions over 16 bins for the four sides, their expectation by a 1x1 convolution, boxes beside scores."""
    head = Head()
    joined = head.node(
        "Concat",
        [head.conv(head.features, "sides", 64, 32), head.conv(head.features, "cls", CLASSES, 32)],
        "decode.joined",
        axis=1,
    )
    rows = head.reshape(joined, "rows", [1, 64 + CLASSES, CELLS])
    head.constant("parts", [64, CLASSES], np.int64)
    head.node("Split", [rows, "parts"], "split", outputs=2, axis=1)
    bins = head.reshape("split", "bins", [1, 4, 16, CELLS])
    shares = head.node("Softmax", [head.node("Transpose", [bins], "turned", perm=[0, 2, 1, 3])], "decode.dfl", axis=1)
    weight = head.constant("dfl.weight", np.arange(16).reshape(1, 16, 1, 1))
    distances = head.reshape(head.node("Conv", [shares, weight], "decode.expectation"), "sides4", [1, 4, CELLS])
    anchors = head.constant("anchors", grid().transpose(0, 2, 1) + 0.5)
    low = head.node("Sub", [anchors, head.slice(distances, "lt", 0, 2, 1)], "decode.low")
    high = head.node("Add", [anchors, head.slice(distances, "rb", 2, 4, 1)], "decode.high")
    centre = head.node("Div", [head.node("Add", [low, high], "decode.sum"), head.constant("two", 2.0)], "decode.half")
    boxes = head.node("Concat", [centre, head.node("Sub", [high, low], "decode.size")], "decode.boxes", axis=1)
    pixels = head.node("Mul", [boxes, head.constant("stride", 16.0)], "decode.pixels")
    head.node("Concat", [pixels, head.node("Sigmoid", ["split.1"], "decode.scores")], "y", axis=1)
    return head.model({"y": [1, 4 + CLASSES, CELLS]})


def ssd() -> CanonicalModel:
    """Offsets to priors, decoded, and NonMaxSuppression in the graph."""
    head = Head()
    offsets = head.node("Transpose", [head.conv(head.features, "box", 4, 32)], "box.last", perm=[0, 2, 3, 1])
    offsets = head.reshape(offsets, "box.rows", [1, CELLS, 4])
    priors = head.constant("priors", grid() * 32 + 16)
    centres = head.node(
        "Add",
        [head.node("Mul", [head.slice(offsets, "xy", 0, 2, 2), head.constant("variance", 3.2)], "decode.mul"), priors],
        "decode.centres",
    )
    sizes = head.node("Exp", [head.slice(offsets, "wh", 2, 4, 2)], "decode.exp")
    half = head.node("Mul", [sizes, head.constant("half", 16.0)], "decode.half")
    low, high = head.node("Sub", [centres, half], "decode.low"), head.node("Add", [centres, half], "decode.high")
    boxes = head.node("Concat", [low, high], "decode.boxes", axis=2)
    logits = head.reshape(head.conv(head.features, "cls", CLASSES, 32), "cls.rows", [1, CLASSES, CELLS])
    scores = head.node("Softmax", [logits], "decode.softmax", axis=1)
    limits = [head.constant("most", [5], np.int64), head.constant("iou", [0.5]), head.constant("score", [0.1])]
    kept = head.node("NonMaxSuppression", [boxes, scores, *limits], "kept")
    which = head.node("Gather", [kept, head.constant("box.column", 2, np.int64)], "which", axis=1)
    head.node("Gather", [boxes, which], "y", axis=1)
    return head.model({"y": [1, "n", 4]})


def two_stage() -> CanonicalModel:
    """Proposals cut regions out of the features, and a second head classifies them."""
    head = Head()
    offsets = head.node("Transpose", [head.conv(head.features, "rpn", 4, 32)], "rpn.last", perm=[0, 2, 3, 1])
    offsets = head.reshape(offsets, "rpn.rows", [CELLS, 4])
    anchors = head.constant("anchors", np.concatenate([grid()[0], grid()[0] + 2], 1) * 4)
    moved = head.node("Mul", [offsets, head.constant("gain", 0.25)], "decode.mul")
    boxes = head.node("Add", [moved, anchors], "decode.boxes")
    which = head.constant("which", np.zeros(CELLS), np.int64)
    regions = head.node(
        "RoiAlign", [head.features, boxes, which], "regions", output_height=2, output_width=2, spatial_scale=0.5
    )
    flat = head.reshape(regions, "flat", [CELLS, 32 * 4])
    head.constant("fc.weight", np.random.default_rng(6).standard_normal((32 * 4, CLASSES)) * 0.1)
    head.node("MatMul", [flat, "fc.weight"], "y")
    return head.model({"y": [CELLS, CLASSES]})


def refined() -> CanonicalModel:
    """Boxes that are delivered, and that another layer reads as well."""
    head = Head()
    pooled = head.node("GlobalAveragePool", [head.features], "pooled")
    rows = head.reshape(head.conv(pooled, "delta", 2 * 4, 32), "delta.rows", [1, 2, 4])
    boxes = head.node("Add", [rows, head.constant("reference", np.full((1, 2, 4), 0.5))], "decode.add")
    head.node("Sigmoid", [boxes], "boxes")
    head.constant("embed.weight", np.random.default_rng(6).standard_normal((4, 32)))
    head.node("MatMul", ["boxes", "embed.weight"], "y")
    return head.model({"boxes": [1, 2, 4], "y": [1, 2, 32]})


def one_convolution(box_gain: float) -> CanonicalModel:
    """Boxes and class scores from one convolution, the first four channels with `box_gain`."""
    head = Head()
    gain = np.array([box_gain] * 4 + [1.0] * CLASSES)
    head.conv(head.features, "y", 4 + CLASSES, 32, gain=gain)
    return head.model({"y": [1, 4 + CLASSES, SIDE, SIDE]})
