"""Channels through normalization, pooling, reductions and other operators that work along some axes.

Sums are exact: a removed channel counts as a zero to them. Statistics over channels (LayerNorm, a mean or maximum over
channels, Softmax) are those of the channels that are left: approximate, said in the report, and frozen where the policy
wants exact results. Where the place of a channel among the others is what counts (sorting, running sums), channels are
frozen. All other axes pass.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from onnxprune.ops.channels.flow import CHANNELS, Flow
from onnxprune.ops.channels.labelling import Role
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
    if flow.node.attributes.get_int("training_mode", 0):
        for position in range(flow.num_inputs):
            flow.freeze_input(position, f"goes through {flow.where} in training mode")
        return
    for position in layout.per_channel_inputs:
        if channels is not None:
            flow.bind(position, 0, channels, Role.PARAMETER)
        else:
            flow.freeze_input(position, f"scales fixed channels in {flow.where}")
    # InstanceNormalization averages over the places; stored statistics average over nothing here.
    places = range(2, len(labels)) if flow.node.op_type == "InstanceNormalization" else ()
    _measure_along(flow, places, "is averaged over")


@CHANNELS.register("LRN")
def _local_response(flow: Flow) -> None:
    """Every channel is divided by a sum over its neighbours."""
    _measure_along(flow, [1], "is normalized with its neighbours")


@CHANNELS.register("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
@CHANNELS.register("LayerNormalization", "SimplifiedLayerNormalization", domain="com.microsoft")
def _trailing_normalization(flow: Flow) -> None:
    """Statistics over all axes from `axis` on; scale and shift have these axes, or broadcast to them."""
    labels = flow.labels(0)
    if not labels:
        return
    first = flow.node.attributes.get_int("axis", -1) % len(labels)
    produced = _measure_along(flow, range(first, len(labels)), "is averaged over")
    for position in range(1, flow.num_inputs):
        _bind_trailing(flow, position, produced)
    # Mean and inverse deviation, when asked for, keep the leading axes.
    for index in range(1, len(flow.node.outputs)):
        flow.give([on_axis if axis < first else None for axis, on_axis in enumerate(labels)], index)


def _bind_trailing(flow: Flow, position: int, labels: list[LabelArray | None]) -> None:
    """Bind an operand that is aligned with the last axes."""
    dims = flow.dims(position)
    if dims is None:
        for on_axis in labels:
            flow.freeze(on_axis, f"meets a tensor of unknown rank in {flow.where}")
        return
    for axis in range(-min(len(dims), len(labels)), 0):
        on_axis = labels[axis]
        if on_axis is None:
            flow.freeze(flow.axis_labels(position, axis), f"scales fixed channels in {flow.where}")
        elif dims[axis] != 1:
            flow.bind(position, axis, on_axis, Role.PARAMETER)


@CHANNELS.register("GroupNormalization")
def _group_normalization(flow: Flow) -> None:
    """Channels on a grid (groups, channels of a group): whole groups go exactly, parts of groups approximately.

    Up to opset 20, scale and shift have one entry per group, then one per channel.
    """
    labels, groups = flow.labels(0), flow.node.attributes.get_int("num_groups", 1)
    channels = flow.axis_labels(0, 1)
    flow.freeze_input(0, f"is averaged over by {flow.where}", axes=range(2, len(labels)))
    if channels is None or len(channels) % groups:
        for position in range(flow.num_inputs):
            flow.freeze_input(position, f"is normalized in uneven or fixed groups by {flow.where}")
        return
    by_group, in_group = flow.grid(channels, (groups, len(channels) // groups))
    if by_group is not None:
        flow.count_in_attribute("num_groups", by_group)
    may_go = flow.measure(in_group, "is averaged over with its group")
    for position in (1, 2):
        per_group = flow.dims(position) == (groups,) and groups != len(channels)
        parameters = by_group if per_group else channels
        if parameters is not None:
            flow.bind(position, 0, parameters, Role.PARAMETER)
        else:
            flow.labels(position)
    flow.give([labels[0], channels if may_go or by_group is not None else None, *(None for _ in labels[2:])])


@CHANNELS.register("MeanVarianceNormalization")
def _mean_variance(flow: Flow) -> None:
    _measure_along(flow, flow.node.attributes.get_ints("axes") or (0, 2, 3), "is averaged over")


# --- operators along one axis ---------------------------------------------------------------------------------


@CHANNELS.register("Softmax", "LogSoftmax")
def _softmax(flow: Flow) -> None:
    _measure_along(flow, [flow.node.attributes.get_int("axis", -1)], "is compared with others")


@CHANNELS.register("LpNormalization")
def _lp_normalization(flow: Flow) -> None:
    """The norm is a sum, to which a removed channel adds nothing."""
    labels = flow.labels(0)
    if labels:
        flow.contract(0, flow.node.attributes.get_int("axis", -1))
        flow.give(labels)


@CHANNELS.register("Hardmax")
def _hardmax(flow: Flow) -> None:
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
    _reduce(flow, [flow.node.attributes.get_int("axis", 0)], _Reduction.PLACE)


def _measure_along(flow: Flow, axes: Iterable[int], what: str) -> list[LabelArray | None]:
    """Pass all channels on; those on `axes` have statistics taken over them, and may be frozen for that."""
    labels = flow.labels(0)
    worked = {axis % len(labels) for axis in axes} if labels else set()
    produced = [
        on_axis if axis not in worked or flow.measure(on_axis, what) else None for axis, on_axis in enumerate(labels)
    ]
    flow.give(produced)
    return produced


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
    if len(flow.node.outputs) > 1 and flow.node.outputs[1].name:
        # MaxPool's indices count positions over the whole tensor.
        flow.freeze_input(0, f"has its place counted in the indices of {flow.where}", axes=range(min(2, len(labels))))


@CHANNELS.register("RoiAlign", "MaxRoiPool")
def _sample(flow: Flow) -> None:
    """Values are read at places that hold for all channels; the batch axis of the result is another one."""
    labels = flow.labels(0)
    flow.freeze_input(0, f"is a batch or spatial axis of {flow.where}", axes=[0, *range(2, len(labels))])
    flow.give([on_axis if axis == 1 else None for axis, on_axis in enumerate(labels)])


class _Reduction(enum.Enum):
    """What a removed channel is to a reduction over channels."""

    SUM = enum.auto()
    """A zero, which changes nothing."""
    STATISTIC = enum.auto()
    """Left out: the statistic is that of the others."""
    PLACE = enum.auto()
    """The result is a place among the channels, which must not change."""


@CHANNELS.register("ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum")
def _reduce_sum(flow: Flow) -> None:
    _reduce(flow, _axes(flow), _Reduction.SUM)


@CHANNELS.register("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp")
def _reduce_other(flow: Flow) -> None:
    _reduce(flow, _axes(flow), _Reduction.STATISTIC)


def _axes(flow: Flow) -> list[int] | None:
    """The axes that are reduced; None: chosen at run time."""
    if not flow.has(1):
        keeps_all = flow.node.attributes.get_int("noop_with_empty_axes", 0)
        return [] if keeps_all else list(range(len(flow.labels(0))))
    axes = flow.integers(1)
    if axes == [] and not flow.node.attributes.get_int("noop_with_empty_axes", 0):
        return list(range(len(flow.labels(0))))
    return axes


def _reduce(flow: Flow, axes: list[int] | None, kind: _Reduction) -> None:
    labels = flow.labels(0)
    if not labels:
        return
    if axes is None:
        flow.freeze_input(0, f"may be reduced by {flow.where}")
        return
    reduced = {axis % len(labels) for axis in axes}
    for axis in sorted(reduced):
        if kind is _Reduction.SUM:
            flow.contract(0, axis)
        elif kind is _Reduction.STATISTIC:
            flow.measure(labels[axis], "is reduced over")
        else:
            flow.freeze(labels[axis], f"has its place found by {flow.where}")
    keeps_axis = flow.node.attributes.get_int("keepdims", 1)
    produced: list[LabelArray | None] = []
    for axis, on_axis in enumerate(labels):
        if axis not in reduced:
            produced.append(on_axis)
        elif keeps_axis:
            produced.append(None)
    flow.give(produced)
