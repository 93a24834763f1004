"""Channels through convolutions.

Symbols: C input channels, M output channels, g groups; a group reads C/g and writes M/g channels.
    g = 1        W's input axis is indexed by the channels that come in; the M filters are new channels
    by group     one label per group on the way in (always so for a depthwise convolution, C/g = 1): a group goes as
                 a whole, with the M/g channels it writes, and the group count shrinks
    by position  else: the same position goes from every group, on the way in and on the way out, so that the groups
                 stay equal in size and the group count stays
"""

from __future__ import annotations

import numpy as np

from onnxprune.ops.channels.flow import CHANNELS, Flow, Role
from onnxprune.ops.channels.labels import LabelArray
from onnxprune.ops.layout import LAYOUT

__all__: list[str] = []


@CHANNELS.register("Conv", "ConvTranspose")
def _convolution(flow: Flow) -> None:
    layout = LAYOUT.get(flow.node)
    weight_dims = flow.dims(1)
    if layout is None or layout.out_axis is None or layout.in_axis is None or weight_dims is None:
        flow.freeze_input(0, f"meets a weight of unknown rank in {flow.where}")
        return
    rank = len(weight_dims)
    flow.freeze_input(0, f"is a spatial axis of {flow.where}", axes=range(2, rank))
    for axis in range(2, rank):
        flow.freeze(flow.axis_labels(1, axis), f"is a kernel axis of {flow.where}")
    groups = flow.node.attributes.get_int(layout.group_attribute, 1)
    if groups == 1:
        incoming, produced = _ungrouped(flow, layout.out_axis, layout.in_axis)
    elif flow.node.op_type == "Conv":
        incoming, produced = _grouped_conv(flow, groups)
    else:
        incoming, produced = _grouped_conv_transpose(flow, groups)
    if incoming is not None:
        flow.contract(0, 1)
    if produced is not None and flow.has(2):
        flow.bind(2, 0, produced, Role.PARAMETER)
    # MACs are proportional to the elements of the weight.
    flow.macs_follow(flow.axis_labels(1, 0), flow.axis_labels(1, 1))
    batch = flow.axis_labels(0, 0)
    flow.give((batch, produced, *(None for _ in range(2, rank))))


def _ungrouped(flow: Flow, out_axis: int, in_axis: int) -> tuple[LabelArray | None, LabelArray | None]:
    incoming = flow.axis_labels(0, 1)
    if incoming is not None:
        flow.bind(1, in_axis, incoming, Role.INPUT)
    else:
        flow.freeze(flow.axis_labels(1, in_axis), f"meets fixed input channels in {flow.where}")
    return incoming, flow.own(1, out_axis)


def _grouped_conv(flow: Flow, groups: int) -> tuple[LabelArray | None, LabelArray | None]:
    """W is (M, C/g, ...)."""
    by_group, by_position = _split_into_groups(flow, groups)
    filters = _filter_count(flow, 0)
    if filters is None:
        flow.freeze_input(0, f"meets a weight of unknown size in {flow.where}", axes=[1])
        return None, None
    if by_group is not None:
        produced = np.repeat(by_group, filters // groups)
        flow.bind(1, 0, produced, Role.FILTER)
        flow.count_in_attribute("group", by_group)
        return flow.axis_labels(0, 1), produced
    if by_position is not None:
        flow.bind(1, 1, by_position, Role.INPUT)
    elif (flow.dims(1) or ())[1] == 1:
        # One channel per group and none of them can go: nor can the groups.
        return None, None
    own = flow.own(1, 0)
    if own is not None:
        per_group = own.reshape(groups, -1)
        for group in per_group[1:]:
            flow.join(per_group[0], group)
    return flow.axis_labels(0, 1), own


def _grouped_conv_transpose(flow: Flow, groups: int) -> tuple[LabelArray | None, LabelArray | None]:
    """W is (C, M/g, ...)."""
    by_group, by_position = _split_into_groups(flow, groups)
    incoming = flow.axis_labels(0, 1)
    if by_group is not None and incoming is not None:
        per_group = _filter_count(flow, 1)
        if per_group is None:
            flow.freeze(incoming, f"meets a weight of unknown size in {flow.where}")
            return None, None
        flow.bind(1, 0, incoming, Role.FILTER)
        flow.count_in_attribute("group", by_group)
        return incoming, np.repeat(by_group, per_group)
    if by_position is not None and incoming is not None:
        flow.bind(1, 0, incoming, Role.INPUT)
    own = flow.own(1, 1)
    return incoming, None if own is None else np.tile(own, groups)


def _split_into_groups(flow: Flow, groups: int) -> tuple[LabelArray | None, LabelArray | None]:
    """(one label per group, None), or (None, one label per position in a group), or (None, None): fixed channels."""
    incoming = flow.axis_labels(0, 1)
    if incoming is None or len(incoming) % groups:
        return None, None
    per_group = incoming.reshape(groups, -1)
    roots = flow.find(per_group)
    if (roots == roots[:, :1]).all() and (roots.shape[1] == 1 or (roots[:, 0] != roots[0, 0]).any()):
        return per_group[:, 0], None
    for group in per_group[1:]:
        flow.join(per_group[0], group)
    return None, per_group[0]


def _filter_count(flow: Flow, axis: int) -> int | None:
    size = (flow.dims(1) or (None, None))[axis]
    return size if isinstance(size, int) else None
