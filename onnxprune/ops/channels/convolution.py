"""Channels through convolutions.

Symbols: C input channels, M output channels, g groups; a group reads C/g and writes M/g channels.
    g = 1   W's input axis is indexed by the channels that come in; the M filters are new channels
    g > 1   the channels stand on grids, (g, C/g) on the way in and (g, M/g) on the way out, which share their rows:
            either groups go as a whole (the group count shrinks; a depthwise convolution is the case C/g = 1),
            or the same position goes from every group, so that the groups stay equal in size
"""

from __future__ import annotations

import numpy as np

from onnxprune.ops.channels.flow import CHANNELS, Flow
from onnxprune.ops.channels.labelling import Role
from onnxprune.ops.channels.labels import LabelArray
from onnxprune.ops.layout import LAYOUT

__all__: list[str] = []


@CHANNELS.register("Conv", "ConvTranspose")
@CHANNELS.register("FusedConv", domain="com.microsoft")
def _convolution(flow: Flow) -> None:
    layout = LAYOUT.get(flow.node)
    weight_dims = flow.dims(1)
    if layout is None or layout.out_axis is None or layout.in_axis is None or weight_dims is None:
        flow.freeze_input(0, f"meets a weight of unknown rank in {flow.where}")
        return
    rank = len(weight_dims)
    # A kernel of size 1 works on every place alone, so that places may go.
    passed = [axis for axis in range(2, rank) if weight_dims[axis] == 1 and _moves_by_one(flow, axis - 2, rank - 2)]
    flow.freeze_input(0, f"is a spatial axis of {flow.where}", axes=[a for a in range(2, rank) if a not in passed])
    for axis in range(2, rank):
        flow.freeze(flow.axis_labels(1, axis), f"is a kernel axis of {flow.where}")
    groups = flow.node.attributes.get_int(layout.group_attribute, 1)
    if groups == 1:
        incoming, produced = _ungrouped(flow, layout.out_axis, layout.in_axis)
    elif flow.node.op_type != "ConvTranspose":
        incoming, produced = _grouped_conv(flow, groups)
    else:
        incoming, produced = _grouped_conv_transpose(flow, groups)
    if incoming is not None:
        flow.contract(0, 1)
    if produced is not None and flow.has(2):
        flow.bind(2, 0, produced, Role.PARAMETER)
    if flow.has(3):
        _add(flow, produced)
    places = [flow.axis_labels(0, axis) if axis in passed else None for axis in range(2, rank)]
    # MACs are proportional to the elements of the weight, and to the places.
    flow.macs_follow(flow.axis_labels(1, 0), flow.axis_labels(1, 1), *places)
    batch = flow.axis_labels(0, 0)
    flow.give((batch, produced, *places))


def _add(flow: Flow, produced: LabelArray | None) -> None:
    """FusedConv adds another feature map before its activation."""
    flow.freeze_input(3, f"is a batch or spatial axis of {flow.where}", axes=[0, *range(2, len(flow.labels(3)))])
    if produced is not None:
        flow.bind(3, 1, produced)
    else:
        flow.freeze_input(3, f"is added to fixed channels by {flow.where}", axes=[1])


def _moves_by_one(flow: Flow, axis: int, num_axes: int) -> bool:
    """True where a spatial axis has stride 1 and no padding."""
    attributes = flow.node.attributes
    stride = (attributes.get_ints("strides") or [1] * num_axes)[axis]
    pads = attributes.get_ints("pads") or [0] * 2 * num_axes
    grows = any(attributes.get_ints("output_padding") or ()) or "output_shape" in attributes
    is_padded = pads[axis] != 0 or pads[axis + num_axes] != 0
    # With stride 1 and a kernel of 1, SAME pads nothing.
    return stride == 1 and not is_padded and not grows


def _ungrouped(flow: Flow, out_axis: int, in_axis: int) -> tuple[LabelArray | None, LabelArray | None]:
    incoming = flow.axis_labels(0, 1)
    if incoming is not None:
        flow.bind(1, in_axis, incoming, Role.INPUT)
    else:
        flow.freeze(flow.axis_labels(1, in_axis), f"meets fixed input channels in {flow.where}")
    return incoming, flow.own(1, out_axis)


def _grouped_conv(flow: Flow, groups: int) -> tuple[LabelArray | None, LabelArray | None]:
    """W is (M, C/g, ...)."""
    by_group, by_position = _incoming_groups(flow, groups)
    filters = _filter_count(flow, 0)
    if filters is None:
        flow.freeze_input(0, f"meets a weight of unknown size in {flow.where}", axes=[1])
        return None, None
    if by_position is not None:
        flow.bind(1, 1, by_position, Role.INPUT)
    incoming = flow.axis_labels(0, 1)
    if by_group is not None and filters == groups:
        flow.bind(1, 0, by_group, Role.FILTER)
        flow.count_in_attribute("group", by_group)
        return incoming, by_group
    own = flow.own(1, 0)
    if own is not None:
        produced_by_group = flow.grid(own, (groups, filters // groups))[0]
        _share_groups(flow, by_group, produced_by_group)
    return incoming, own


def _grouped_conv_transpose(flow: Flow, groups: int) -> tuple[LabelArray | None, LabelArray | None]:
    """W is (C, M/g, ...)."""
    by_group, by_position = _incoming_groups(flow, groups)
    incoming = flow.axis_labels(0, 1)
    if incoming is not None:
        flow.bind(1, 0, incoming, Role.INPUT if by_position is not None else Role.FILTER)
    own = flow.own(1, 1) if (flow.dims(1) or (1, 1))[1] != 1 else None
    if by_group is None:
        return incoming, None if own is None else np.tile(own, groups)
    flow.count_in_attribute("group", by_group)
    if own is not None:
        return incoming, flow.merged([by_group, own])
    per_group = _filter_count(flow, 1)
    return incoming, None if per_group is None else np.repeat(by_group, per_group)


def _share_groups(flow: Flow, incoming: LabelArray | None, produced: LabelArray | None) -> None:
    """The groups on the way in are those on the way out."""
    if incoming is not None and produced is not None:
        flow.join(incoming, produced)
        flow.count_in_attribute("group", incoming)
        return
    for by_group in (incoming, produced):
        flow.freeze(by_group, f"is a group of {flow.where}, whose groups can't go on its other side")


def _incoming_groups(flow: Flow, groups: int) -> tuple[LabelArray | None, LabelArray | None]:
    """Labels of the groups that come in, and of the positions in a group; None where they can't go."""
    incoming = flow.axis_labels(0, 1)
    if incoming is None or len(incoming) % groups:
        flow.freeze(incoming, f"is not divided evenly by the groups of {flow.where}")
        return None, None
    by_group, by_position = flow.grid(incoming, (groups, len(incoming) // groups))
    return by_group, by_position


def _filter_count(flow: Flow, axis: int) -> int | None:
    size = (flow.dims(1) or (None, None))[axis]
    return size if isinstance(size, int) else None


@CHANNELS.register("DeformConv")
def _deformable(flow: Flow) -> None:
    """X, W, offsets, bias, mask: places are read at offsets, which hold for all channels of an offset group."""
    attributes, weight_dims = flow.node.attributes, flow.dims(1)
    for position in (2, 4):
        flow.freeze_input(position, f"is an offset of {flow.where}")
    if weight_dims is None or attributes.get_int("group", 1) != 1:
        flow.freeze_input(0, f"is read in groups, or by a weight of unknown rank, in {flow.where}")
        flow.freeze_input(1, f"stands in groups of {flow.where}")
        return
    flow.freeze_input(0, f"is a batch or spatial axis of {flow.where}", axes=[0, *range(2, len(weight_dims))])
    flow.freeze_input(1, f"is a kernel axis of {flow.where}", axes=range(2, len(weight_dims)))
    if attributes.get_int("offset_group", 1) != 1:
        flow.freeze_input(0, f"is read at offsets of its group by {flow.where}", axes=[1])
    incoming, produced = _ungrouped(flow, 0, 1)
    if incoming is not None:
        flow.contract(0, 1)
    if produced is not None and flow.has(3):
        flow.bind(3, 0, produced, Role.PARAMETER)
    flow.macs_follow(produced, incoming)
    flow.give((None, produced, *(None for _ in weight_dims[2:])))
