"""What an operator is to XNNPACK's sparse inference: its beginning, its inside, its end, or what breaks it.

XNNPACK computes a cluster of operators channels first, with kernels that skip the zeros of 1x1 convolutions. It starts
at a stem that turns channels-last pictures into channels-first ones, and ends where a MEAN over height and width or a
DEPTH_TO_SPACE makes the order of axes unimportant, or turns it back. Its decision stands in `src/subgraph.c`
(`xnn_subgraph_rewrite_for_nchw` and `xnn_check_nchw_compatibility`). LiteRT asks for it once a partition of its
delegate holds a DENSIFY (`tflite/delegates/xnnpack/xnnpack_delegate.cc`, XNN_FLAG_HINT_SPARSE_INFERENCE). Paddings
count after PAD was fused into the convolution behind it, as XNNPACK does.

Allowed is what every version of XNNPACK since 2021 allows: an operator that one version takes for inside and another
for outside (TANH, GELU, EXP, SUM) would give wrong results on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from onnxprune.targets.tflite.graph import Graph, Operator, Tensor

__all__ = [
    "GraphView",
    "Role",
    "SparseProblem",
    "is_pointwise",
    "node_name",
    "role_of",
    "spatial_paddings",
    "stem_problem",
]

Role: TypeAlias = Literal["stem", "inside", "end"]

STEM = "the stem must be a 3x3 convolution with stride 2 and padding 1 on all four sides that reads 3 channels"
_FUSED = frozenset({"NONE", "RELU", "RELU6", "RELU_N1_TO_1"})
_UNARY = frozenset(
    {"ABS", "CEIL", "ELU", "FLOOR", "HARD_SWISH", "LEAKY_RELU", "LOGISTIC", "NEG", "RELU", "RELU6", "RELU_N1_TO_1",
     "ROUND", "SQUARE"}
)  # fmt: skip
_DEPTHWISE_KERNELS = (3, 5)
_RANK = 4
_STEM_CHANNELS = 3
_WEIGHT_TYPES = frozenset({"FLOAT32", "FLOAT16", "INT8"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseProblem:
    """One operator that keeps its cluster from sparse inference. `node` is the ONNX node's name."""

    node: str
    reason: str
    advice: str


class GraphView:
    """Look-ups in a graph that see through what XNNPACK's delegate resolves when it loads the model."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producers: Mapping[str, Operator] = graph.producers()
        self.readers: Mapping[str, list[Operator]] = graph.consumers()

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name."""
        return self.graph.tensors[name]

    def stored(self, name: str) -> Tensor | None:
        """The constant behind a weight: itself, or what is unpacked when the model is loaded; None for a computed one.

        Quantized constants count only through DEQUANTIZE, which makes them float for the operator.
        """
        producer = self.producers.get(name)
        if producer is not None and producer.kind in ("DEQUANTIZE", "DENSIFY"):
            return self.stored(producer.inputs[0])
        tensor = self.tensor(name)
        return tensor if tensor.constant is not None and tensor.type in _WEIGHT_TYPES else None

    def is_constant(self, name: str) -> bool:
        """True for what is known before the model runs."""
        return self.tensor(name).constant is not None or self.stored(name) is not None

    def fused_padding(self, operator: Operator) -> Operator | None:
        """The PAD that XNNPACK joins with the convolution behind it."""
        pad = self.producers.get(operator.inputs[0])
        if pad is None or pad.kind != "PAD" or operator.option("padding", "SAME") != "VALID":
            return None
        is_shared = len(self.readers[pad.outputs[0]]) > 1 or pad.outputs[0] in self.graph.outputs
        return None if is_shared or self.paddings(pad) is None else pad

    def paddings(self, pad: Operator) -> tuple[int, int, int, int] | None:
        """Those of a PAD; see `spatial_paddings`."""
        return spatial_paddings(self.tensor(pad.inputs[1]))

    def data_inputs(self, operator: Operator) -> list[str]:
        """Inputs that are computed or fed, with a fused PAD seen through."""
        pad = self.fused_padding(operator) if operator.kind in _SLIDING else None
        names = (pad.inputs[0], *operator.inputs[1:]) if pad is not None else operator.inputs
        return [name for name in names if name and not self.is_constant(name)]


_SLIDING = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D"})


def spatial_paddings(amounts: Tensor) -> tuple[int, int, int, int] | None:
    """Top, left, bottom and right, from PAD's constant second input; None where it pads anything else."""
    array = amounts.array()
    if array is None or array.shape != (_RANK, 2) or array[[0, 3]].any():
        return None
    (top, bottom), (left, right) = array[1:3].tolist()
    return top, left, bottom, right


def node_name(operator: Operator) -> str:
    """The ONNX node that the operator came from, or its output."""
    return operator.node or operator.outputs[0]


def is_pointwise(operator: Operator, view: GraphView) -> bool:
    """True for a 1x1 convolution, whose zeros are what is skipped."""
    return operator.kind == "CONV_2D" and view.tensor(operator.inputs[1]).shape[1:3] == (1, 1)


def role_of(operator: Operator, view: GraphView) -> Role | SparseProblem:
    """What `operator` is to a cluster that reaches it."""
    if view.tensor(operator.outputs[0]).type != "FLOAT32":
        return _problem(operator, _INTEGERS, _FLOAT)
    rule = _RULES.get(operator.kind)
    if rule is None:
        return _problem(
            operator,
            f"{operator.kind} has no place in sparse inference",
            "Replace it in the network, or exclude it from the cluster by ending that before",
        )
    if operator.option("fusedActivationFunction", "NONE") not in _FUSED:
        return _problem(operator, f"{operator.kind} has a fused activation that XNNPACK does not take", "Use RELU6")
    return rule(operator, view)


def stem_problem(operator: Operator, view: GraphView) -> SparseProblem:
    """Why this first convolution can't be a stem."""
    if view.tensor(operator.outputs[0]).type != "FLOAT32":
        return _problem(operator, _INTEGERS, _FLOAT)
    kernel_h, kernel_w, channels = view.tensor(operator.inputs[1]).shape[1:]
    padding = _paddings(operator, view)
    shown = "SAME" if padding is None else ", ".join(map(str, padding))
    return _problem(
        operator,
        f"{STEM}; this one is {kernel_h}x{kernel_w} with stride {_shown_pair(operator, 'stride')} and padding {shown}, "
        f"and reads {channels} channels",
        "A network from PyTorch with such a stem (padding=1) has it right at every even size; a SAME padding of "
        "TensorFlow is the same only at odd sizes",
    )


def _convolution(operator: Operator, view: GraphView) -> Role | SparseProblem:
    """1x1 inside, a 3x3 of stride 2 that reads three channels as the stem, no other."""
    filters = view.tensor(operator.inputs[1])
    if view.stored(operator.inputs[1]) is None or filters.type != "FLOAT32":
        return _problem(operator, "its weight is computed, or quantized in place", _FLOAT)
    if filters.shape[3] != view.tensor(operator.inputs[0]).shape[3] or _pair(operator, "dilation") != (1, 1):
        return _problem(operator, "a convolution in groups, or with dilation, has no sparse kernel", _REPLACE)
    if filters.shape[1:3] == (1, 1):
        if _pair(operator, "stride") != (1, 1) or _paddings(operator, view) not in ((0, 0, 0, 0), None):
            return _problem(operator, "a 1x1 convolution with stride or padding has no sparse kernel", _REPLACE)
        return "inside"
    is_stem = filters.shape[1:] == (3, 3, _STEM_CHANNELS) and _pair(operator, "stride") == (2, 2)
    if is_stem and _paddings(operator, view) == (1, 1, 1, 1):
        return "stem"
    kernel = f"{filters.shape[1]}x{filters.shape[2]}"
    return _problem(operator, f"a {kernel} convolution behind the stem has no sparse kernel", _REPLACE)


def _depthwise(operator: Operator, view: GraphView) -> Role | SparseProblem:
    kernel_h, kernel_w = view.tensor(operator.inputs[1]).shape[1:3]
    stride = _pair(operator, "stride")
    if (
        kernel_h != kernel_w
        or kernel_h not in _DEPTHWISE_KERNELS
        or operator.option("depthMultiplier", 1) != 1
        or _pair(operator, "dilation") != (1, 1)
        or stride not in ((1, 1), (2, 2))
    ):
        return _problem(
            operator, "a depthwise convolution must be 3x3 or 5x5, with stride 1 or 2 and multiplier 1", _REPLACE
        )
    padding = _paddings(operator, view)
    if padding != (kernel_h // 2,) * 4 and not (padding is None and stride == (1, 1)):
        return _problem(
            operator,
            "a depthwise convolution must be padded by half its kernel on all four sides",
            "A SAME padding of TensorFlow is that only where height and width are odd, or the stride is 1",
        )
    return "inside"


def _elementwise(operator: Operator, view: GraphView) -> Role | SparseProblem:
    if view.tensor(operator.inputs[0]).rank != _RANK:
        return _problem(operator, f"{operator.kind} must have 4 axes", _REPLACE)
    return "inside"


def _binary(operator: Operator, view: GraphView) -> Role | SparseProblem:
    """A constant must come first, with four axes of which only the channels are longer than 1."""
    first, second = (view.tensor(name) for name in operator.inputs)
    if first.rank != _RANK or second.rank != _RANK:
        return _problem(operator, f"both operands of {operator.kind} must have 4 axes", _REPLACE)
    if view.is_constant(second.name) or (view.is_constant(first.name) and first.shape[:3] != (1, 1, 1)):
        return _problem(operator, f"a constant of {operator.kind} must hold one number a channel", _REPLACE)
    return "inside"


def _resize(operator: Operator, view: GraphView) -> Role | SparseProblem:
    _, height, width, _ = view.tensor(operator.inputs[0]).shape
    if height <= 1 or width <= 1:
        return _problem(operator, "RESIZE_BILINEAR needs a height and width of 2 or more", _REPLACE)
    return "inside"


def _mean(operator: Operator, view: GraphView) -> Role | SparseProblem:
    """The end of a cluster where only RESHAPE and FULLY_CONNECTED read it, which see bytes and no axes."""
    axes = view.tensor(operator.inputs[1]).array()
    x, y = view.tensor(operator.inputs[0]), view.tensor(operator.outputs[0])
    if x.rank != _RANK or axes is None or sorted(np.ravel(axes) % _RANK) != [1, 2]:
        return _problem(operator, "MEAN must run over height and width", _REPLACE)
    if y.rank != _RANK:
        return "end"
    readers = view.readers.get(y.name, [])
    if y.name in view.graph.outputs or not readers:
        # Tried: a 4-D MEAN that leaves XNNPACK comes out as (N, C, 1, 1).
        return _problem(operator, "the MEAN is an output of the model, with 4 axes", "Flatten it")
    return "end" if all(_sees_bytes(reader, y.name, view) for reader in readers) else "inside"


def _sees_bytes(reader: Operator, name: str, view: GraphView) -> bool:
    if reader.kind == "RESHAPE":
        return len(reader.inputs) == 1 or view.is_constant(reader.inputs[1])
    return reader.kind == "FULLY_CONNECTED" and reader.inputs[0] == name


def _depth_to_space(operator: Operator, view: GraphView) -> Role:
    del operator, view
    return "end"


_RULES: Mapping[str, Callable[[Operator, GraphView], Role | SparseProblem]] = {
    "CONV_2D": _convolution,
    "DEPTHWISE_CONV_2D": _depthwise,
    "ADD": _binary,
    "MUL": _binary,
    "RESIZE_BILINEAR": _resize,
    "MEAN": _mean,
    "DEPTH_TO_SPACE": _depth_to_space,
    **dict.fromkeys(_UNARY, _elementwise),
}
_REPLACE = "Replace it in the network"
_INTEGERS = "there are no sparse kernels for integers"
_FLOAT = 'Set precision to "fp32" or "fp16"'


def _problem(operator: Operator, reason: str, advice: str) -> SparseProblem:
    return SparseProblem(node=node_name(operator), reason=reason, advice=advice)


def _pair(operator: Operator, what: Literal["stride", "dilation"]) -> tuple[int, int]:
    suffix = "Factor" if what == "dilation" else ""
    return operator.option(f"{what}H{suffix}", 1), operator.option(f"{what}W{suffix}", 1)


def _shown_pair(operator: Operator, what: Literal["stride", "dilation"]) -> str:
    height, width = _pair(operator, what)
    return str(height) if height == width else f"{height}x{width}"


def _paddings(operator: Operator, view: GraphView) -> tuple[int, int, int, int] | None:
    """Top, left, bottom, right; None for SAME, which XNNPACK resolves only where the stride is 1."""
    if operator.option("padding", "SAME") == "SAME":
        return None
    pad = view.fused_padding(operator)
    return (0, 0, 0, 0) if pad is None else view.paddings(pad)
