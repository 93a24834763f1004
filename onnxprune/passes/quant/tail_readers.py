"""Who reads the output of a last layer, and whether its channels are read one by one.

Boxes beside scores are: each channel means something of its own. Channels that are compared, averaged over a map, or
summed up with other features are not; there a channel of small numbers has small weight as well.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from onnxprune.graph.weights import constant_array
from onnxprune.ops.quant import pools_everything

__all__ = ["are_channels_read_one_by_one"]

# They work on each number by itself, or with a constant; made of several, they are SiLU, Gelu and their like.
_ELEMENTWISE = frozenset(
    {"Abs", "Add", "Cast", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity"}
    | {"LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid"}
    | {"Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tanh", "ThresholdedRelu"}
)
_MOVES = frozenset({"Concat", "Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})

# Each result depends on many numbers: on all places of a map, or on all channels.
_COMPARES = frozenset(
    {"GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool"}
    | {"ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"}
    | {"ReduceSumSquare", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization"}
    | {"MeanVarianceNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization"}
    | {"Conv", "Einsum", "Gemm", "MatMul"}
)
_COMPARES_ALONG_AXIS = frozenset({"ArgMax", "ArgMin", "Hardmax", "LogSoftmax", "Softmax"})
_WINDOWS = frozenset({"AveragePool", "LpPool", "MaxPool"})


def are_channels_read_one_by_one(output: ir.Value, channel_axis: int) -> bool:
    """True unless every path from `output` ends where its channels are compared, averaged or added to other features.

    Paths go on through activations, operators with constants, and operators that move whole tensors. They end

    1. at a pooling of the whole map, a reduction, a normalization, or a product of matrices,
    2. at a Softmax or ArgMax, unless it is known to go along another axis than the channels,
    3. at an operator that combines the tensor with one that does not come from `output` (a residual Add),
    4. at a Resize: maps that are interpolated are all of one kind, as those of a segmentation are. A box is not halfway
       between its neighbours.

    An output of the model reads channels one by one, and so does all else: a Slice, a Gather, a NonMaxSuppression.

    Args:
        output: What a last layer gives.
        channel_axis: Its axis of channels.
    """
    producer = output.producer()
    graph = producer.graph if producer is not None else None
    if graph is None:
        return True
    # Each tensor that holds these numbers, with its axis of channels, None where that is not known.
    followed: dict[ir.Value, int | None] = {output: _from_front(channel_axis, output)}
    members = set(graph)
    for node in graph:
        if not any(value in followed for value in node.inputs):
            continue
        axis = next(followed[value] for value in node.inputs if value is not None and value in followed)
        if _ends(node, followed, axis):
            continue
        if not _goes_on(node):
            return True
        followed.update(dict.fromkeys(node.outputs, _moved_axis(node, axis)))
    return any(value.is_graph_output() or not members.issuperset(value.consumers()) for value in followed)


def _ends(node: ir.Node, followed: Collection[ir.Value], axis: int | None) -> bool:
    if node.op_type in _COMPARES or node.op_type == "Resize":
        return True
    if node.op_type in _COMPARES_ALONG_AXIS:
        default = 0 if node.op_type.startswith("Arg") else -1
        along = _from_front(node.attributes.get_int("axis", default), node.inputs[0])
        return axis is None or along is None or along == axis
    if node.op_type in _WINDOWS:
        return pools_everything(node)
    combines = node.op_type in _ELEMENTWISE
    return combines and any(
        value not in followed and constant_array(value) is None for value in node.inputs if value is not None
    )


def _goes_on(node: ir.Node) -> bool:
    return node.op_type in _ELEMENTWISE | _MOVES | _WINDOWS | _COMPARES_ALONG_AXIS


def _moved_axis(node: ir.Node, axis: int | None) -> int | None:
    """Where the axis of channels is behind `node`."""
    if axis is None or node.op_type not in _MOVES or node.op_type == "Concat":
        return axis
    if node.op_type == "Transpose":
        perm = list(node.attributes.get_ints("perm", ()))
        return perm.index(axis) if axis in perm else None
    before, after = (_sizes(value) for value in (node.inputs[0], node.outputs[0]))
    if before is None or after is None:
        return None
    # The axis that has as many elements before and behind it as the channels had.
    whole = [np.prod([1, *before[:axis]]), before[axis], np.prod([1, *before[axis + 1 :]])]
    found = [
        position
        for position in range(len(after))
        if [np.prod([1, *after[:position]]), after[position], np.prod([1, *after[position + 1 :]])] == whole
    ]
    return found[0] if len(found) == 1 else None


def _sizes(value: ir.Value | None) -> Sequence[int] | None:
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return [int(size) for size in value.shape.numpy()]


def _from_front(axis: int, value: ir.Value | None) -> int | None:
    if axis >= 0:
        return axis
    return None if value is None or value.shape is None else axis + len(value.shape)
