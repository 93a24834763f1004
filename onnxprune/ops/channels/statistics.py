"""Channels through normalization, pooling, reductions and other operators that work along some axes.

Along the axes an operator works on, a removed channel would change what is left (a mean over fewer channels): those
channels are frozen. Only sums are exact, because a removed channel counts as a zero to them. All other axes pass.
"""

from __future__ import annotations

from collections.abc import Iterable

from onnxprune.ops.channels.flow import CHANNELS, Flow, Role
from onnxprune.ops.channels.labels import LabelArray
from onnxprune.ops.layout import LAYOUT

__all__: list[str] = []


# --- normalization --------------------------------------------------------------------------------------------


@CHANNELS.register("BatchNormalization", "InstanceNormalization")
def _per_channel_normalization(flow: Flow) -> None:
    """One row of parameters per channel; statistics are stored, or taken within the channel."""
    layout, labels = LAYOUT.get(flow.node), flow.labels(0)
    channels = flow.axis_labels(0, 1)
    if layout is None:
        return
    if flow.node.op_type == "InstanceNormalization":
        flow.freeze_input(0, f"is averaged over by {flow.where}", axes=range(2, len(labels)))
    if flow.node.attributes.get_int("training_mode", 0):
        for position in range(flow.num_inputs):
            flow.freeze_input(position, f"goes through {flow.where} in training mode")
        return
    for position in layout.per_channel_inputs:
        if channels is not None:
            flow.bind(position, 0, channels, Role.PARAMETER)
        else:
            flow.freeze_input(position, f"scales fixed channels in {flow.where}")
    flow.give(labels)


@CHANNELS.register("LRN")
def _local_response(flow: Flow) -> None:
    """Every channel is divided by a sum over its neighbours, which are others when channels go."""
    labels = flow.labels(0)
    flow.freeze_input(0, f"is normalized with its neighbours by {flow.where}", axes=[1])
    flow.give([None if axis == 1 else axis_labels for axis, axis_labels in enumerate(labels)])


@CHANNELS.register("LayerNormalization", "RMSNormalization")
def _trailing_normalization(flow: Flow) -> None:
    """Statistics over all axes from `axis` on."""
    labels = flow.labels(0)
    first = flow.node.attributes.get_int("axis", -1) % max(len(labels), 1)
    _work_along(flow, range(first, len(labels)), "is averaged over")
    # Mean and inverse deviation, when asked for, keep the leading axes.
    for index in range(1, len(flow.node.outputs)):
        flow.give([on_axis if axis < first else None for axis, on_axis in enumerate(labels)], index)


@CHANNELS.register("GroupNormalization")
def _group_normalization(flow: Flow) -> None:
    _work_along(flow, range(1, len(flow.labels(0))), "is averaged over")


@CHANNELS.register("MeanVarianceNormalization")
def _mean_variance(flow: Flow) -> None:
    _work_along(flow, flow.node.attributes.get_ints("axes") or (0, 2, 3), "is averaged over")


# --- operators along one axis ---------------------------------------------------------------------------------


@CHANNELS.register("Softmax", "LogSoftmax", "Hardmax", "LpNormalization")
def _along_axis(flow: Flow) -> None:
    _work_along(flow, [flow.node.attributes.get_int("axis", -1)], "is compared with others")


@CHANNELS.register("CumSum")
def _cumulative_sum(flow: Flow) -> None:
    axis = flow.integers(1)
    if axis is None:
        flow.freeze_input(0, f"may be summed up by {flow.where}")
        return
    _work_along(flow, axis, "is summed up")


@CHANNELS.register("TopK")
def _top_k(flow: Flow) -> None:
    _work_along(flow, [flow.node.attributes.get_int("axis", -1)], "is sorted")
    labels = flow.labels(0)
    axis = flow.node.attributes.get_int("axis", -1) % max(len(labels), 1)
    flow.give([None if a == axis else on_axis for a, on_axis in enumerate(labels)], 1)


@CHANNELS.register("ArgMax", "ArgMin")
def _arg(flow: Flow) -> None:
    _reduce(flow, [flow.node.attributes.get_int("axis", 0)], is_sum=False)


def _work_along(flow: Flow, axes: Iterable[int], what: str) -> None:
    """Freeze the channels on `axes`, pass the others on."""
    labels = flow.labels(0)
    if not labels:
        return
    worked = {axis % len(labels) for axis in axes}
    flow.freeze_input(0, f"{what} by {flow.where}", axes=worked)
    flow.give([None if axis in worked else on_axis for axis, on_axis in enumerate(labels)])


# --- pooling and reductions -----------------------------------------------------------------------------------


@CHANNELS.register("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _pool(flow: Flow) -> None:
    labels = flow.labels(0)
    flow.freeze_input(0, f"is a spatial axis of {flow.where}", axes=range(2, len(labels)))
    flow.give([*labels[:2], *(None for _ in labels[2:])])
    if len(flow.node.outputs) > 1 and labels and labels[1] is not None:
        # MaxPool's indices count positions over all channels.
        flow.freeze(labels[1], f"has its place counted in the indices of {flow.where}")


@CHANNELS.register("GridSample", "RoiAlign", "MaxRoiPool")
def _sample(flow: Flow) -> None:
    """Values are read at places that hold for all channels; the batch axis of the result is another one."""
    labels = flow.labels(0)
    flow.freeze_input(0, f"is a batch or spatial axis of {flow.where}", axes=[0, *range(2, len(labels))])
    flow.give([on_axis if axis == 1 else None for axis, on_axis in enumerate(labels)])


@CHANNELS.register("ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2")
def _reduce_sum(flow: Flow) -> None:
    """A removed channel counts as zero, which leaves these as they are."""
    _reduce(flow, _axes(flow), is_sum=True)


@CHANNELS.register("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp")
def _reduce_other(flow: Flow) -> None:
    _reduce(flow, _axes(flow), is_sum=False)


def _axes(flow: Flow) -> list[int] | None:
    """The axes that are reduced; None: chosen at run time."""
    if not flow.has(1):
        keeps_all = flow.node.attributes.get_int("noop_with_empty_axes", 0)
        return [] if keeps_all else list(range(len(flow.labels(0))))
    axes = flow.integers(1)
    if axes == [] and not flow.node.attributes.get_int("noop_with_empty_axes", 0):
        return list(range(len(flow.labels(0))))
    return axes


def _reduce(flow: Flow, axes: list[int] | None, *, is_sum: bool) -> None:
    labels = flow.labels(0)
    if not labels:
        return
    if axes is None:
        flow.freeze_input(0, f"may be reduced by {flow.where}")
        return
    reduced = {axis % len(labels) for axis in axes}
    for axis in sorted(reduced):
        if is_sum:
            flow.contract(0, axis)
        else:
            flow.freeze(labels[axis], f"is reduced over by {flow.where}")
    keeps_axis = flow.node.attributes.get_int("keepdims", 1)
    produced: list[LabelArray | None] = []
    for axis, on_axis in enumerate(labels):
        if axis not in reduced:
            produced.append(on_axis)
        elif keeps_axis:
            produced.append(None)
    flow.give(produced)
