"""Where an operator keeps its weights and channels: facts that several tables need, written down once.

An axis of a weight is called `out` when it enumerates what the node produces (filters, units), `in` when it is summed
over against the channels of the node's data input. Axes are given for the attributes of the node at hand: ask
`weight_axes(node)`, because Gemm's axes swap with transA and transB and MatMul's weight may stand on either side.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxprune.ops.table import OpTable

__all__ = ["LAYOUT", "OpLayout", "WeightAxes", "weight_axes", "weight_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightAxes:
    """Axes of the weight at `weight_input`. None: the weight has no such axis."""

    weight_input: int
    out_axis: int | None
    in_axis: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpLayout:
    """Inputs and axes of one operator, by input index.

    Attributes:
        data_input: The activation whose channels the node reads.
        weight_input: The main weight, or None where the node has per-channel parameters only.
        bias_input: Added per output channel, or None.
        out_axis: Axis of the weight that enumerates outputs (for a grouped ConvTranspose: of one group).
        in_axis: Axis of the weight that is summed over (for grouped convolutions: of one group).
        channel_axis: The channel axis of data input and output.
        group_attribute: Name of the attribute that holds the number of groups, or "".
        per_channel_inputs: 1-D inputs with one entry per channel of the data input (BatchNormalization's four).
        swap_attribute: Integer attribute that swaps `out_axis` and `in_axis` where it is not zero, or "".
    """

    data_input: int = 0
    weight_input: int | None = None
    bias_input: int | None = None
    out_axis: int | None = None
    in_axis: int | None = None
    channel_axis: int = 1
    group_attribute: str = ""
    per_channel_inputs: tuple[int, ...] = ()
    swap_attribute: str = ""


LAYOUT: OpTable[OpLayout] = OpTable("layout")

# Conv stores (out, in/group, kH, kW).
_CONV = OpLayout(weight_input=1, bias_input=2, out_axis=0, in_axis=1, group_attribute="group")
LAYOUT.add(_CONV, "Conv", "ConvInteger")
LAYOUT.add(_CONV, "FusedConv", "NhwcFusedConv", domain="com.microsoft")
# x, x_scale, x_zero_point, w, w_scale, w_zero_point, y_scale, y_zero_point, B
LAYOUT.add(OpLayout(weight_input=3, bias_input=8, out_axis=0, in_axis=1, group_attribute="group"), "QLinearConv")
# ConvTranspose stores (in, out/group, kH, kW): the axes are swapped against Conv.
LAYOUT.add(OpLayout(weight_input=1, bias_input=2, out_axis=1, in_axis=0, group_attribute="group"), "ConvTranspose")
# X, W, offset, B, mask
LAYOUT.add(OpLayout(weight_input=1, bias_input=3, out_axis=0, in_axis=1, group_attribute="group"), "DeformConv")

# B is (K, N), or (N, K) with transB.
_GEMM = OpLayout(weight_input=1, bias_input=2, out_axis=-1, in_axis=-2, channel_axis=-1, swap_attribute="transB")
LAYOUT.add(_GEMM, "Gemm")
LAYOUT.add(_GEMM, "FusedGemm", domain="com.microsoft")
_MATMUL = OpLayout(weight_input=1, out_axis=-1, in_axis=-2, channel_axis=-1)
LAYOUT.add(_MATMUL, "MatMul", "MatMulInteger")
LAYOUT.add(
    OpLayout(weight_input=1, out_axis=-1, in_axis=-2, channel_axis=-1, swap_attribute="transB"),
    "FusedMatMul",
    domain="com.microsoft",
)
# a, a_scale, a_zero_point, b, ...
LAYOUT.add(OpLayout(weight_input=3, out_axis=-1, in_axis=-2, channel_axis=-1), "QLinearMatMul")
LAYOUT.add(
    OpLayout(weight_input=3, bias_input=6, out_axis=-1, in_axis=-2, channel_axis=-1, swap_attribute="transB"),
    "QGemm",
    domain="com.microsoft",
)
# W is (directions, gates * hidden, input); R (input 2) is (directions, gates * hidden, hidden).
LAYOUT.add(OpLayout(weight_input=1, bias_input=3, out_axis=1, in_axis=2, channel_axis=-1), "RNN", "GRU", "LSTM")
# An embedding: (rows, width), rows are picked by index.
LAYOUT.add(OpLayout(data_input=1, weight_input=0, out_axis=-1, channel_axis=-1), "Gather")

LAYOUT.add(OpLayout(per_channel_inputs=(1, 2, 3, 4)), "BatchNormalization")
LAYOUT.add(OpLayout(per_channel_inputs=(1, 2)), "InstanceNormalization", "GroupNormalization")
LAYOUT.add(OpLayout(per_channel_inputs=(1, 2), channel_axis=-1), "LayerNormalization")
LAYOUT.add(OpLayout(per_channel_inputs=(1,), channel_axis=-1), "RMSNormalization")
LAYOUT.add(OpLayout(channel_axis=1), "PRelu")


def weight_axes(node: ir.Node) -> WeightAxes | None:
    """The main weight of `node` and its axes (not negative where its rank is known), or None where it has none.

    A constant on the left of a MatMul is the weight there, with (out, in) = (-2, -1). A Gather counts only when it
    reads a constant table.
    """
    layout = LAYOUT.get(node)
    if layout is None or layout.weight_input is None:
        return None
    position, out_axis, in_axis = layout.weight_input, layout.out_axis, layout.in_axis
    is_swapped = node.attributes.get_int(layout.swap_attribute, 0) != 0 if layout.swap_attribute else False
    if is_swapped:
        out_axis, in_axis = in_axis, out_axis
    if layout is _MATMUL and not _is_constant(node, position) and _is_constant(node, 0):
        position, out_axis, in_axis = 0, -2, -1
    if node.op_type == "Gather" and not _is_constant(node, position):
        return None
    value = node.inputs[position] if position < len(node.inputs) else None
    rank = None if value is None or value.shape is None else value.shape.rank()
    if rank == 1 and in_axis is not None:
        # A vector on one side of a MatMul is summed over completely.
        return WeightAxes(weight_input=position, out_axis=None, in_axis=0)
    return WeightAxes(weight_input=position, out_axis=_from_front(out_axis, rank), in_axis=_from_front(in_axis, rank))


def weight_of(node: ir.Node) -> ir.Value | None:
    """The main weight of `node` when it is a constant, else None."""
    axes = weight_axes(node)
    if axes is None or not _is_constant(node, axes.weight_input):
        return None
    return node.inputs[axes.weight_input]


def _is_constant(node: ir.Node, position: int) -> bool:
    value = node.inputs[position] if position < len(node.inputs) else None
    return value is not None and value.const_value is not None


def _from_front(axis: int | None, rank: int | None) -> int | None:
    return axis + rank if axis is not None and axis < 0 and rank is not None else axis
