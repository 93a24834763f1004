"""What static int8 quantization needs to know about operators, whatever the runtime.

A row says which inputs and outputs carry quantizable activations, whether the operator multiplies by a weight (where
weight and bias are stands in the layout table), and how the scales of outputs depend on those of inputs. Which of
these operators a *runtime* computes in integers is the target's knowledge (`targets/qdq/kernels.py`). An operator
without a row stays float and is listed.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxprune.graph.metadata import SHARED_FROM_KEY
from onnxprune.graph.weights import constant_array
from onnxprune.ops.layout import LAYOUT, weight_axes
from onnxprune.ops.table import OpTable

__all__ = [
    "QUANT",
    "FixedQuantization",
    "QuantRow",
    "ScaleRule",
    "absorbed_activation",
    "activation_inputs",
    "activation_outputs",
    "bias_input",
    "clip_bounds",
    "fixed_quantization",
    "pooled_axes_are_spatial",
    "pools_everything",
    "scale_rule_of",
    "stored_constant",
    "weight_channel_axis",
    "weight_input",
]


class ScaleRule(enum.Enum):
    """How the scale of an operator's outputs depends on its inputs."""

    FREE = "free"
    """Every tensor has a scale of its own."""
    SAME = "same as input"
    """The operator moves or selects integers: all its activations share one scale, or it can't be integer at all."""
    SHARED_IF_HARMLESS = "shared where harmless"
    """The activations share one scale unless that would coarsen one of them; then the runtime rescales (Concat)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedQuantization:
    """The one quantization of an output with a known range; `zero_point` is signed."""

    scale: float
    zero_point: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantRow:
    """One operator. Positions are of inputs and outputs; None means all of them."""

    inputs: tuple[int, ...] | None = (0,)
    outputs: tuple[int, ...] | None = (0,)
    is_compute: bool = False
    """It multiplies by a weight (the layout table knows where that is): what int8 is there for."""
    scale_rule: ScaleRule = ScaleRule.FREE
    has_own_scale: Callable[[ir.Node], bool] = lambda _node: False
    """True for nodes whose rule is FREE after all."""
    fixed: FixedQuantization | None = None
    """For 8 bits; `fixed_quantization` knows the one for 16."""
    output_bounds: Callable[[ir.Node], tuple[float, float] | None] = lambda _node: None
    """What the outputs are known not to leave; None where nothing is known. A shared scale must respect it."""
    absorbs_activation: bool = False
    """A Relu or Clip behind it costs nothing: the saturation of the output's integers does its work."""
    refuses: Callable[[ir.Node], str | None] = lambda _node: None
    """Why this very node can't be integer in any runtime; None: it can."""


QUANT: OpTable[QuantRow] = OpTable("quant")

_REARRANGES = frozenset({"Cast", "CastLike", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})

# The outputs of Sigmoid, Softmax and Tanh in 16 bits, as TFLite has them.
_FIXED_16 = FixedQuantization(scale=1 / 32768, zero_point=0)


def activation_inputs(node: ir.Node, row: QuantRow) -> tuple[ir.Value, ...]:
    """The inputs of `node` that carry activations, constants among them."""
    positions = range(len(node.inputs)) if row.inputs is None else row.inputs
    values = (node.inputs[position] for position in positions if position < len(node.inputs))
    return tuple(value for value in values if value is not None)


def activation_outputs(node: ir.Node, row: QuantRow) -> tuple[ir.Value, ...]:
    """The outputs of `node` that carry activations."""
    positions = range(len(node.outputs)) if row.outputs is None else row.outputs
    return tuple(node.outputs[position] for position in positions if node.outputs[position].name)


def scale_rule_of(node: ir.Node, row: QuantRow) -> ScaleRule:
    """The rule that counts for this very node."""
    return ScaleRule.FREE if row.has_own_scale(node) else row.scale_rule


def fixed_quantization(row: QuantRow, num_bits: int) -> FixedQuantization | None:
    """The one quantization of the outputs of a node with that row, in 8 or 16 bits; None where samples decide."""
    return row.fixed if row.fixed is None or num_bits == 8 else _FIXED_16


def pools_everything(node: ir.Node) -> bool:
    """True when a pooling has one window, and it covers the whole input: a global pooling in disguise."""
    data = node.inputs[0]
    if data is None or data.shape is None or any(node.attributes.get_ints("pads", ())):
        return False
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return False  # SAME gives a result for each position, however large the window is
    return list(node.attributes.get_ints("kernel_shape", ())) == list(data.shape[2:])


def weight_input(node: ir.Node, row: QuantRow) -> ir.Value | None:
    """The weight that `node` multiplies by, constant or not; None for operators without one."""
    axes = weight_axes(node) if row.is_compute else None
    return node.inputs[axes.weight_input] if axes is not None else None


def stored_constant(value: ir.Value | None) -> ir.Value | None:
    """The initializer that `value` is, or is computed from by nodes that only turn, reshape or cast it; None: neither.

    Such nodes stay in a graph where folding them would store a weight twice: the table of a language model that its
    first and its last layer share, or a weight in half precision.
    """
    while value is not None and value.const_value is None:
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in _REARRANGES:
            return None
        if any(constant_array(other) is None for other in node.inputs[1:] if other is not None):
            return None
        value = node.inputs[0]
    return value


def bias_input(node: ir.Node, row: QuantRow) -> tuple[int, ir.Value] | None:
    """Position and value of the bias of `node`, where it has one."""
    layout = LAYOUT.get(node) if row.is_compute else None
    if layout is None or layout.bias_input is None or layout.bias_input >= len(node.inputs):
        return None
    bias = node.inputs[layout.bias_input]
    return (layout.bias_input, bias) if bias is not None else None


def weight_channel_axis(node: ir.Node, row: QuantRow) -> int | None:
    """The axis of the weight that enumerates output channels; None where no axis does, and one scale must do."""
    axes = weight_axes(node) if row.is_compute else None
    if axes is None:
        return None
    # Grouped ConvTranspose stores (in, out/group, kH, kW): an index of axis 1 is a channel of every group.
    if node.op_type == "ConvTranspose" and node.attributes.get_int("group", 1) != 1:
        return None
    weight = node.inputs[axes.weight_input]
    rank = _rank(weight)
    # A stack of matrices has columns of its own in each matrix, so only a plain matrix has channels.
    return axes.out_axis if node.op_type != "MatMul" or rank == 2 else None


def clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    """What a Relu or Clip clips to; None for other operators and for bounds that are computed at run time."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    if node.op_type != "Clip":
        return None
    bounds = [-math.inf, math.inf]
    for position in (1, 2):
        value = node.inputs[position] if position < len(node.inputs) else None
        if value is None:
            continue
        array = constant_array(value)
        if array is None or array.size != 1:
            return None
        bounds[position - 1] = float(array.reshape(-1)[0])
    return bounds[0], bounds[1]


def absorbed_activation(node: ir.Node, *, kept_apart: Collection[str] = ()) -> ir.Node | None:
    """The Relu or Clip that disappears into `node` when both are integer.

    It is the only consumer of the only output of `node`, that output is no model output, and zero lies within its
    bounds (a quantized range always contains zero, so saturation can't clip to [0.5, 1]).

    Args:
        node: The producer.
        kept_apart: Names of nodes that stay float, and so are not absorbed.
    """
    row = QUANT.get(node)
    if row is None or not row.absorbs_activation or len(node.outputs) != 1 or (node.name or "") in kept_apart:
        return None
    output = node.outputs[0]
    uses = output.uses()
    if len(uses) != 1 or output.is_graph_output():
        return None
    consumer, position = next(iter(uses))
    if consumer.graph is not node.graph or position != 0 or (consumer.name or "") in kept_apart:
        return None
    bounds = clip_bounds(consumer)
    return consumer if bounds is not None and bounds[0] <= 0.0 <= bounds[1] else None


def pooled_axes_are_spatial(node: ir.Node) -> bool:
    """True when a ReduceMean or ReduceMax takes all axes but batch and channel: what a global pooling does."""
    rank = _rank(node.inputs[0])
    axes = _constant_input(node, 1)
    if rank is None or rank < 3 or axes is None:
        return False
    return sorted(int(axis) % rank for axis in axes.reshape(-1)) == list(range(2, rank))


# --- rows -----------------------------------------------------------------------------------------------------


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _constant_input(node: ir.Node, position: int) -> np.ndarray | None:
    return constant_array(node.inputs[position]) if position < len(node.inputs) else None


def _refuse_gemm(node: ir.Node) -> str | None:
    bias = _constant_input(node, 2)
    if bias is None or bias.size == 1:
        return None
    # (N, 1) adds a number to each row: it is no bias of channels, although it may have as many numbers.
    return None if bias.shape[-1] == bias.size else "its bias differs from row to row"


def _refuse_matmul(node: ir.Node) -> str | None:
    if constant_array(node.inputs[0]) is not None:
        return "its first operand is the constant one"
    stored = stored_constant(node.inputs[1])
    if stored is not None and stored is not node.inputs[1]:
        return _computed_weight_reason(node.inputs[1], stored)
    if constant_array(node.inputs[1]) is None:
        return "it multiplies two activations (attention scores lose most in int8)"
    return None


def _computed_weight_reason(weight: ir.Value | None, stored: ir.Value) -> str:
    maker = weight.producer() if weight is not None else None
    origin = stored.metadata_props.get(SHARED_FROM_KEY)
    shared = "" if origin is None else f", a copy of '{origin}', which other nodes read as well"
    op_type = maker.op_type if maker is not None else "nodes"
    return f"its weight is computed at run time, by {op_type} from the constant '{stored.name}'{shared}"


def _refuse_computed_divisor(node: ir.Node) -> str | None:
    # A small divisor rounds to zero; no runtime divides int8 activations.
    return None if constant_array(node.inputs[1]) is not None else "its divisor is computed at run time"


def _refuse_pad(node: ir.Node) -> str | None:
    if node.attributes.get_string("mode", "constant") != "constant":
        return None
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return None
    value = constant_array(node.inputs[2])
    if value is None:
        return "its padding value is computed at run time"
    if value.size == 1 and float(value.reshape(-1)[0]) == 0.0:
        return None
    # A padding of -FLT_MAX would stretch the range until nothing else is left of it.
    return "its padding value is not zero"


def _refuse_resize(node: ir.Node) -> str | None:
    mode = node.attributes.get_string("mode", "nearest")
    if node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return "it fills what lies outside of the crop with a value of its own"
    return None if mode in ("nearest", "linear") else f"its interpolation '{mode}' leaves the range of its input"


def _refuse_second_output(node: ir.Node) -> str | None:
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return "its second output (indices) is used"
    return None


def _refuse_spatial_reduction(node: ir.Node) -> str | None:
    return None if pooled_axes_are_spatial(node) else "it does not reduce exactly the spatial axes"


def _refuse_training_mode(node: ir.Node) -> str | None:
    if any(constant_array(value) is None for value in node.inputs[1:]):
        return "its statistics are computed at run time"
    return "it is in training mode" if node.attributes.get_int("training_mode", 0) else None


def _refuse_moving_clip(node: ir.Node) -> str | None:
    bounds = clip_bounds(node)
    if bounds is None:
        return "its bounds are computed at run time"
    return None if bounds[0] <= 0.0 <= bounds[1] else "its bounds exclude zero"


def _register_rows() -> None:
    QUANT.add(QuantRow(is_compute=True, absorbs_activation=True), "Conv", "ConvTranspose")
    QUANT.add(QuantRow(is_compute=True, absorbs_activation=True, refuses=_refuse_gemm), "Gemm")
    QUANT.add(QuantRow(is_compute=True, absorbs_activation=True, refuses=_refuse_matmul), "MatMul")

    QUANT.add(QuantRow(inputs=(0, 1), absorbs_activation=True), "Add", "Sub", "Mul")
    QUANT.add(QuantRow(inputs=(0, 1), absorbs_activation=True, refuses=_refuse_computed_divisor), "Div")
    QUANT.add(QuantRow(inputs=None, absorbs_activation=True), "Sum")
    # A scale and a shift for each channel: its parameters are folded into two small constants by the spelling.
    QUANT.add(QuantRow(absorbs_activation=True, refuses=_refuse_training_mode), "BatchNormalization")
    QUANT.add(QuantRow(absorbs_activation=True), "GlobalAveragePool")
    QUANT.add(QuantRow(absorbs_activation=True, refuses=_refuse_spatial_reduction), "ReduceMean")

    QUANT.add(QuantRow(output_bounds=clip_bounds), "Relu")
    QUANT.add(QuantRow(output_bounds=clip_bounds, refuses=_refuse_moving_clip), "Clip")
    QUANT.add(QuantRow(output_bounds=lambda _node: (0.0, 1.0)), "HardSigmoid")
    QUANT.add(QuantRow(), "LeakyRelu", "HardSwish")
    # Their ranges are known without calibration. TFLite demands exactly these numbers (LOGISTIC, SOFTMAX, TANH).
    QUANT.add(QuantRow(fixed=FixedQuantization(scale=1 / 256, zero_point=-128)), "Sigmoid", "Softmax")
    QUANT.add(QuantRow(fixed=FixedQuantization(scale=1 / 128, zero_point=0)), "Tanh")

    moves = QuantRow(scale_rule=ScaleRule.SAME)
    QUANT.add(moves, "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Tile")
    QUANT.add(moves, "Slice", "Gather", "GatherElements", "DepthToSpace", "SpaceToDepth")
    QUANT.add(QuantRow(scale_rule=ScaleRule.SAME, outputs=None), "Split")
    QUANT.add(QuantRow(scale_rule=ScaleRule.SAME, refuses=_refuse_pad), "Pad")
    QUANT.add(QuantRow(scale_rule=ScaleRule.SAME, refuses=_refuse_resize), "Resize")
    QUANT.add(QuantRow(scale_rule=ScaleRule.SAME, refuses=_refuse_second_output), "MaxPool")
    # TFLite's AVERAGE_POOL_2D has no scale of its own; its MEAN, which averages whole maps, has.
    QUANT.add(QuantRow(scale_rule=ScaleRule.SAME, has_own_scale=pools_everything), "AveragePool")
    QUANT.add(moves, "GlobalMaxPool")
    QUANT.add(QuantRow(scale_rule=ScaleRule.SAME, refuses=_refuse_spatial_reduction), "ReduceMax")
    QUANT.add(QuantRow(inputs=None, scale_rule=ScaleRule.SHARED_IF_HARMLESS), "Concat")


_register_rows()
