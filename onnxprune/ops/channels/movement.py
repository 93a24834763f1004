"""Channels through operators that move data: cut, put together, permute, repeat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.ops.channels.elements import Dimension, Literal, move_elements
from onnxprune.ops.channels.flow import CHANNELS, Flow
from onnxprune.ops.channels.indexing import in_common
from onnxprune.ops.channels.labels import LabelArray
from onnxprune.ops.channels.removal import Removal

__all__: list[str] = []


def _is_labelled(labels: Sequence[LabelArray | None]) -> bool:
    return any(axis is not None for axis in labels)


def _positive(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


# --- whole axes -----------------------------------------------------------------------------------------------


@CHANNELS.register("Transpose")
def _transpose(flow: Flow) -> None:
    labels = flow.labels(0)
    order = flow.node.attributes.get_ints("perm") or tuple(reversed(range(len(labels))))
    flow.give([labels[axis] for axis in order] if labels else [])


@CHANNELS.register("Squeeze")
def _squeeze(flow: Flow) -> None:
    labels, dims = flow.labels(0), flow.dims(0)
    if dims is None or not _is_labelled(labels):
        return
    axes = flow.integers(1) if flow.has(1) else [axis for axis, dim in enumerate(dims) if dim == 1]
    if axes is None:
        flow.freeze_input(0, f"loses an axis that is chosen at run time in {flow.where}")
        return
    gone = {_positive(axis, len(dims)) for axis in axes}
    flow.freeze_input(0, f"is the only channel of an axis that {flow.where} takes away", axes=gone)
    flow.give([axis_labels for axis, axis_labels in enumerate(labels) if axis not in gone])


@CHANNELS.register("Unsqueeze")
def _unsqueeze(flow: Flow) -> None:
    labels, axes = flow.labels(0), flow.integers(1)
    if not _is_labelled(labels):
        return
    if axes is None:
        flow.freeze_input(0, f"gets an axis that is chosen at run time in {flow.where}")
        return
    rank = len(labels) + len(axes)
    new = {_positive(axis, rank) for axis in axes}
    old = iter(labels)
    flow.give([None if axis in new else next(old) for axis in range(rank)])


# --- parts of axes --------------------------------------------------------------------------------------------


@CHANNELS.register("Concat")
def _concat(flow: Flow) -> None:
    all_dims = [flow.dims(position) for position in range(flow.num_inputs)]
    all_labels = [flow.labels(position) for position in range(flow.num_inputs)]
    if not any(_is_labelled(labels) for labels in all_labels):
        return
    if any(dims is None for dims in all_dims):
        for position in range(flow.num_inputs):
            flow.freeze_input(position, f"is put together with a tensor of unknown rank by {flow.where}")
        return
    rank = len(all_dims[0] or ())
    cut = _positive(flow.node.attributes.get_int("axis", 1), rank)
    together = {
        axis: in_common(flow, [(position, axis) for position in range(flow.num_inputs)])
        for axis in range(rank)
        if axis != cut
    }
    flow.give([_concatenated(flow, cut) if axis == cut else together[axis] for axis in range(rank)])


def _concatenated(flow: Flow, axis: int) -> LabelArray | None:
    parts: list[LabelArray] = []
    positions = range(flow.num_inputs)
    if all(flow.axis_labels(position, axis) is None for position in positions):
        return None
    for position in positions:
        labels = flow.axis_labels(position, axis)
        if labels is None and flow.is_trainable(position):
            labels = flow.own(position, axis)
        if labels is None:
            size = (flow.dims(position) or ())[axis]
            if not isinstance(size, int):
                for other in positions:
                    flow.freeze_input(other, f"is put beside an axis of unknown size by {flow.where}", axes=[axis])
                return None
            value = flow.value(position)
            labels = flow.fresh(size)
            flow.freeze(labels, f"meets '{value.name if value else ''}', whose channels are fixed, in {flow.where}")
        parts.append(labels)
    return np.concatenate(parts)


@CHANNELS.register("Split")
def _split(flow: Flow) -> None:
    """Parts of the labelled axis; equal parts become explicit sizes when channels go."""
    labels = flow.labels(0)
    if not _is_labelled(labels):
        return
    axis = _positive(flow.node.attributes.get_int("axis", 0), len(labels))
    on_axis = labels[axis]
    outputs = len(flow.node.outputs)
    if on_axis is None:
        for index in range(outputs):
            flow.give(labels, index)
        return
    sizes = flow.integers(1)
    if flow.has(1) and sizes is None:
        flow.freeze(on_axis, f"is split at places that are computed at run time by {flow.where}")
        sizes = None
    elif not flow.has(1):
        chunk = -(-len(on_axis) // outputs)
        sizes = [min(chunk, len(on_axis) - index * chunk) for index in range(outputs)]
    if sizes is None or len(sizes) != outputs or sum(sizes) != len(on_axis):
        flow.freeze(on_axis, f"is split at places that are not known by {flow.where}")
        for index in range(outputs):
            flow.give([None if a == axis else other for a, other in enumerate(labels)], index)
        return
    parts = np.split(on_axis, np.cumsum(sizes)[:-1])
    for index, part in enumerate(parts):
        flow.give([part if a == axis else other for a, other in enumerate(labels)], index)
    node = flow.node

    def shrink(removal: Removal) -> None:
        new_sizes = np.array([removal.count(part) for part in parts], dtype=np.int64)
        if flow.has(1):
            removal.rewrite(node, 1, new_sizes)
            return
        node.attributes.pop("num_outputs", None)
        node.resize_inputs(2)
        node.replace_input_with(1, removal.new_constant(node, f"{node.name}_sizes", new_sizes))

    flow.shrink(on_axis, shrink)


@CHANNELS.register("Slice")
def _slice(flow: Flow) -> None:
    labels = flow.labels(0)
    if not _is_labelled(labels):
        return
    starts, ends = flow.elements(1), flow.elements(2)
    if starts is None:
        axes: list[int] | None = None
    else:
        axes = flow.integers(3) if flow.has(3) else list(range(len(starts)))
    steps = flow.integers(4) if flow.has(4) else [1] * len(axes or ())
    if starts is None or ends is None or axes is None or steps is None:
        flow.freeze_input(0, f"is cut at places that are computed at run time by {flow.where}")
        for position in (1, 2):
            flow.freeze_elements(position, f"is the place of a cut in {flow.where}")
        return
    produced = list(labels)
    if any(labels[axis] is not None and step != 1 for axis, step in zip(axes, steps, strict=True)):
        flow.give(_picked_by_slice(flow, list(labels), axes, steps))
        return
    for index, axis in enumerate(axes):
        on_axis = labels[axis]
        if on_axis is not None:
            produced[axis] = _cut(flow, index, on_axis)
        for position, elements in ((1, starts), (2, ends)):
            element = elements[index]
            if isinstance(element, Dimension):
                flow.freeze(element.labels, f"is the place of a cut in {flow.where} (input {position})")
    flow.give(produced)


def _cut(flow: Flow, index: int, labels: LabelArray) -> LabelArray | None:
    """The part of an axis that a Slice takes; start and end are ranks among the kept channels afterwards."""
    start, end = (flow.elements(1) or ())[index], (flow.elements(2) or ())[index]
    if not isinstance(start, Literal) or not isinstance(end, Literal):
        flow.freeze(labels, f"is cut at places that are computed at run time by {flow.where}")
        return None
    first, last, _ = slice(start.number, end.number).indices(len(labels))
    last = max(first, last)
    before, taken = labels[:first], labels[:last]
    flow.rewrite_literal(1, start, lambda removal: removal.count(before), labels)
    flow.rewrite_literal(2, end, lambda removal: removal.count(taken), labels)
    return labels[first:last]


def _picked_by_slice(
    flow: Flow, labels: list[LabelArray | None], axes: Sequence[int], steps: Sequence[int]
) -> list[LabelArray | None]:
    """Labels after a Slice with steps along channels; a Gather of the kept positions takes its place.

    Which channels a step meets changes with every channel that goes, so that no other Slice does the same.
    """
    starts, ends = flow.integers(1), flow.integers(2)
    cut = [(_positive(axis, len(labels)), index) for index, axis in enumerate(axes)]
    produced = list(labels)
    if starts is None or ends is None or len(cut) > 1:
        for axis, _ in cut:
            why = "at places that are computed at run time" if len(cut) == 1 else "with a step, and on other axes, too,"
            flow.freeze(labels[axis], f"is cut {why} by {flow.where}")
            produced[axis] = None
        for position in (1, 2):
            flow.freeze_elements(position, f"is the place of a cut in {flow.where}")
        return produced
    axis, index = cut[0]
    on_axis = labels[axis]
    if on_axis is None:
        return produced
    picked = slice(starts[index], ends[index], steps[index])
    positions = np.arange(len(on_axis), dtype=np.int64)[_clamped(picked, len(on_axis))]
    node = flow.node

    def shrink(removal: Removal) -> None:
        stays = removal.kept(on_axis)
        rank_among_kept = np.cumsum(stays) - 1
        indices = rank_among_kept[positions[stays[positions]]].astype(np.int64)
        become_gather(removal, node, indices, axis)

    flow.shrink(on_axis, shrink)
    produced[axis] = on_axis[positions]
    return produced


def _clamped(cut: slice, size: int) -> slice:
    """`cut` for an axis of `size`, with Slice's meaning of ends that lie outside."""
    first, last, step = cut.indices(size)
    # Going down to and including index 0 has no number for its end: -1 would be the last index.
    return slice(first, None if last < 0 else last, step)


def become_gather(removal: Removal, node: ir.Node, indices: npt.NDArray[np.int64], axis: int) -> None:
    """Turn `node` in place into a Gather of `indices` from its first input."""
    constant = removal.new_constant(node, f"{node.name}_indices", indices)
    node.op_type, node.domain, node.version = "Gather", "", None
    node.attributes.clear()
    node.attributes["axis"] = ir.AttrInt64("axis", axis)
    node.resize_inputs(2)
    node.replace_input_with(1, constant)


# --- growing and repeating ------------------------------------------------------------------------------------


@CHANNELS.register("Pad")
def _pad(flow: Flow) -> None:
    """Constant padding of a labelled axis makes channels, too: removing one is padding by one less."""
    labels = flow.labels(0)
    if not _is_labelled(labels):
        return
    axes = flow.integers(3) if flow.has(3) else list(range(len(labels)))
    pads = flow.elements(1)
    if axes is None or pads is None or len(pads) != 2 * len(axes):
        flow.freeze_input(0, f"is padded by amounts that are computed at run time by {flow.where}")
        return
    produced = list(labels)
    for index, axis in enumerate(axes):
        on_axis = labels[axis]
        before, after = pads[index], pads[index + len(axes)]
        if on_axis is None:
            continue
        mode = flow.node.attributes.get_string("mode", "constant")
        amounts = [end.number if isinstance(end, Literal) else None for end in (before, after)]
        if amounts == [0, 0]:
            continue
        if mode != "constant" or None in amounts or min(amount or 0 for amount in amounts) < 0:
            flow.freeze(on_axis, f"is padded in a way that has no rule by {flow.where}")
            produced[axis] = None
            continue
        sides: list[LabelArray] = []
        for end in (before, after):
            if isinstance(end, Literal):
                side = flow.fresh(end.number)
                flow.rewrite_literal(1, end, lambda removal, side=side: removal.count(side), side)  # type: ignore[misc]
                sides.append(side)
        produced[axis] = np.concatenate([sides[0], on_axis, sides[1]])
    flow.give(produced)


@CHANNELS.register("Tile")
def _tile(flow: Flow) -> None:
    labels, repeats = flow.labels(0), flow.integers(1)
    if not _is_labelled(labels):
        return
    if repeats is None:
        flow.freeze_input(0, f"is repeated a number of times that is computed at run time by {flow.where}")
        return
    flow.give([None if axis is None else np.tile(axis, count) for axis, count in zip(labels, repeats, strict=True)])


@CHANNELS.register("Expand")
def _expand(flow: Flow) -> None:
    """An axis of size 1 is repeated: as often as another axis is long, or a number of times that may follow."""
    labels, dims, target = flow.labels(0), flow.dims(0), flow.elements(1)
    if target is None or dims is None:
        flow.freeze_input(0, f"is expanded to a shape that is computed at run time by {flow.where}")
        return
    rank = max(len(dims), len(target))
    ahead = rank - len(dims)
    produced: list[LabelArray | None] = [*([None] * ahead), *(labels or [None] * len(dims))]
    sizes = [*([1] * ahead), *dims]
    for index, element in enumerate(target):
        axis = rank - len(target) + index
        on_axis = produced[axis]
        if sizes[axis] == 1:
            flow.freeze(on_axis, f"is the one channel that {flow.where} repeats")
            produced[axis] = flow.sized_by(1, element)
        elif on_axis is None:
            if isinstance(element, Dimension):
                flow.freeze(element.labels, f"is the size of an axis without channels in {flow.where}")
        elif not (isinstance(element, Literal) and element.number == 1):
            flow.follow(1, element, on_axis)
    flow.give(produced)


@CHANNELS.register("ConstantOfShape")
def _constant_of_shape(flow: Flow) -> None:
    """A state of zeros is as wide as what it meets."""
    target, dtype = flow.elements(0), flow.node.outputs[0].dtype
    if target is None:
        return
    if dtype is None or not dtype.is_floating_point():
        # Shapes and masks are made of these: their numbers are no channels.
        flow.freeze_elements(0, f"is counted in the shape of fixed data in {flow.where}")
        return
    flow.give([flow.sized_by(0, element) for element in target])


@CHANNELS.register("DepthToSpace")
def _depth_to_space(flow: Flow) -> None:
    """(N, C*b*b, H, W) -> (N, C, H*b, W*b). DCR orders channels as (b, b, C), CRD as (C, b, b)."""
    labels = flow.labels(0)
    if not _is_labelled(labels):
        return
    block = flow.node.attributes.get_int("blocksize", 1) ** 2
    flow.freeze_input(0, f"is a spatial axis of {flow.where}", axes=range(2, len(labels)))
    channels = labels[1]
    if channels is None:
        flow.give([labels[0], None, None, None])
        return
    is_crd = flow.node.attributes.get_string("mode", "DCR") == "CRD"
    blocks = channels.reshape(-1, block).T if is_crd else channels.reshape(block, -1)
    for other in blocks[1:]:
        flow.join(np.ascontiguousarray(blocks[0]), np.ascontiguousarray(other))
    flow.give([labels[0], np.ascontiguousarray(blocks[0]), None, None])


@CHANNELS.register("SpaceToDepth")
def _space_to_depth(flow: Flow) -> None:
    """(N, C, H, W) -> (N, b*b*C, H/b, W/b)."""
    labels = flow.labels(0)
    if not _is_labelled(labels):
        return
    flow.freeze_input(0, f"is a spatial axis of {flow.where}", axes=range(2, len(labels)))
    block = flow.node.attributes.get_int("blocksize", 1) ** 2
    channels = labels[1]
    flow.give([labels[0], None if channels is None else np.tile(channels, block), None, None])


@CHANNELS.register("Resize")
def _resize(flow: Flow) -> None:
    """X, roi, scales, sizes: channels pass when their axis keeps its size."""
    labels = flow.labels(0)
    if not _is_labelled(labels):
        return
    attributes = flow.node.attributes
    axes = [_positive(axis, len(labels)) for axis in attributes.get_ints("axes") or range(len(labels))]
    sizes = flow.elements(3) if flow.has(3) else None
    scales = flow.array(2)
    has_policy = attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch"
    crops = attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    produced = list(labels)
    for index, axis in enumerate(axes):
        on_axis = labels[axis]
        size = sizes[index] if sizes is not None else None
        if on_axis is None:
            if isinstance(size, Dimension):
                flow.freeze(size.labels, f"is the size of an axis without channels in {flow.where}")
            continue
        keeps_scale = scales is not None and scales.size == len(axes) and float(scales.reshape(-1)[index]) == 1.0
        keeps_size = (isinstance(size, Literal) and size.number == len(on_axis)) or (
            isinstance(size, Dimension) and size.labels is not None and len(size.labels) == len(on_axis)
        )
        if crops or not (keeps_scale or (keeps_size and not has_policy)):
            flow.freeze(on_axis, f"is resized along the channels by {flow.where}")
            produced[axis] = None
        elif keeps_size:
            flow.follow(3, size, on_axis)
    flow.give(produced)


# --- shapes as data -------------------------------------------------------------------------------------------


@CHANNELS.register("Shape")
def _shape(flow: Flow) -> None:
    dims, labels = flow.dims(0), flow.labels(0)
    if dims is None:
        return
    start, end = flow.node.attributes.get_int("start", 0), flow.node.attributes.get_int("end", len(dims))
    axes = range(*slice(start, end).indices(len(dims)))
    flow.give_elements(tuple(Dimension(labels[axis] if labels else None, dims[axis]) for axis in axes))


def move_shape_elements(flow: Flow) -> bool:
    """Follow shape elements through a node; False where the node does something else with them."""
    inputs = [flow.peek_elements(position) for position in range(flow.num_inputs)]
    moved = move_elements(flow.node, inputs)
    if moved is None:
        return False
    for position in range(flow.num_inputs):
        flow.elements(position)
    flow.give_elements(moved)
    return True
