"""Channels through operators that work position by position, with broadcasting.

Axes are aligned from the last one. On each axis of the output:
    labelled inputs are joined: a channel must go from all of them or from none
    a constant of the same size is labelled like a weight; one of size 1 is broadcast and stays
    a computed input without labels is fine where its size is 1, and freezes the channels otherwise
"""

from __future__ import annotations

from collections.abc import Iterable

from onnxprune.ops.channels.flow import CHANNELS, Flow
from onnxprune.ops.channels.labelling import Role
from onnxprune.ops.channels.labels import LabelArray

__all__ = ["broadcast"]


def broadcast(flow: Flow, positions: Iterable[int]) -> tuple[LabelArray | None, ...]:
    """Labels of the result of broadcasting the inputs at `positions` together, () where a rank is unknown."""
    given = [position for position in positions if flow.has(position)]
    all_dims = {position: flow.dims(position) for position in given}
    if any(dims is None for dims in all_dims.values()):
        for position in given:
            flow.freeze_input(position, f"meets a tensor of unknown rank in {flow.where}")
        return ()
    rank = max((len(dims) for dims in all_dims.values() if dims is not None), default=0)
    return tuple(_axis(flow, given, axis - rank) for axis in range(rank))


def _axis(flow: Flow, positions: list[int], axis: int) -> LabelArray | None:
    """Labels on one axis, counted from the end (-1 is the last)."""
    labelled: list[LabelArray] = []
    one_channel: LabelArray | None = None
    fixed: list[int] = []
    constants: list[int] = []
    for position in positions:
        dims = flow.dims(position) or ()
        if len(dims) < -axis or (dims[axis] == 1 and flow.axis_labels(position, axis) is None):
            continue
        if flow.is_constant(position):
            constants.append(position)
            continue
        labels = flow.axis_labels(position, axis)
        if labels is None:
            fixed.append(position)
        elif len(labels) == 1:
            # One channel, broadcast along the others: its layer can't lose it, so it says nothing about them.
            one_channel = labels
        else:
            labelled.append(labels)
    if not labelled:
        # Constants keep their size against fixed axes, and one channel against several is one that broadcasts.
        return one_channel if not fixed and not constants else None
    first = labelled[0]
    for other in labelled[1:]:
        flow.join(first, other)
    for position in constants:
        if (flow.dims(position) or ())[axis] == 1:
            continue
        flow.bind(position, axis, first, Role.PARAMETER)
    for position in fixed:
        flow.bind(position, axis, first)  # freezes, with the name of what is fixed
    return first


@CHANNELS.register(
    *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Max", "Min", "Sum", "Mean", "PRelu", "Where"),
    *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor"),
    *("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor"),
)
@CHANNELS.register("FastGelu", "BiasGelu", "QuickGelu", "Gelu", "BiasAdd", domain="com.microsoft")
def _elementwise(flow: Flow) -> None:
    flow.give(broadcast(flow, range(flow.num_inputs)))


@CHANNELS.register(
    *("Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Softplus"),
    *("Softsign", "ThresholdedRelu", "Gelu", "Mish", "Swish", "Shrink", "Clip", "Neg", "Abs", "Sqrt", "Exp", "Log"),
    *("Erf", "Reciprocal", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh"),
    *("Cosh", "Asinh", "Acosh", "Atanh", "Not", "BitwiseNot", "IsNaN", "IsInf", "Identity", "Cast", "CastLike"),
)
def _same_positions(flow: Flow) -> None:
    """The first input decides; the others are scalars (Clip's bounds) or only give a type (CastLike)."""
    flow.give(flow.labels(0))


@CHANNELS.register("Dropout")
def _dropout(flow: Flow) -> None:
    for index in range(len(flow.node.outputs)):
        flow.give(flow.labels(0), index)


@CHANNELS.register("QuantizeLinear", "DequantizeLinear")
@CHANNELS.register("QuantizeLinear", "DequantizeLinear", domain="com.microsoft")
def _quantize(flow: Flow) -> None:
    """Scale and zero point are per tensor, one for each index of `axis`, or one for each block along it.

    A quantized weight is a constant here: its axes get labels for the layer behind it.
    """
    dims = flow.dims(0)
    if dims is None:
        flow.freeze_input(0, f"has no known rank in {flow.where}")
        return
    if flow.is_constant(0):
        labels = [flow.own_tentatively(0, axis) if size != 1 else None for axis, size in enumerate(dims)]
    else:
        labels = list(flow.labels(0)) or [None] * len(dims)
    axis = flow.node.attributes.get_int("axis", 1)
    if flow.node.attributes.get_int("block_size", 0):
        flow.give(_quantized_in_blocks(flow, labels, axis % len(dims)))
        return
    on_axis = labels[axis] if -len(labels) <= axis < len(labels) else None
    for position in (1, 2):
        if on_axis is not None and flow.dims(position) == (len(on_axis),):
            flow.bind(position, 0, on_axis, Role.PARAMETER)
    flow.give(labels)


def _quantized_in_blocks(flow: Flow, labels: list[LabelArray | None], axis: int) -> list[LabelArray | None]:
    """Scales have the axes of the tensor, the blocked one shorter: blocks would have to go as a whole."""
    flow.freeze(labels[axis], f"shares a scale with others of its block in {flow.where}")
    for position in (1, 2):
        flow.freeze_input(position, f"is the scale of a block in {flow.where}", axes=[axis])
    for other, on_axis in enumerate(labels):
        for position in (1, 2):
            if other != axis and on_axis is not None and flow.has(position):
                flow.bind(position, other, on_axis, Role.PARAMETER)
    return labels
