"""Channels through operators that pick and place elements by index.

Data, indices and updates have axes in common, on which position i of one belongs to position i of the others: there
they lose the same channels. The axes that are indexed stay: what stands at an index would be something else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.ops.channels.flow import CHANNELS, Flow
from onnxprune.ops.channels.labels import LabelArray
from onnxprune.ops.channels.removal import Removal

__all__ = ["in_common"]


def in_common(flow: Flow, places: Sequence[tuple[int, int]]) -> LabelArray | None:
    """Labels of axes that hold the same positions, given as pairs of input and axis; no broadcasting."""
    labelled = [
        labels
        for position, axis in places
        if not flow.is_constant(position) and (labels := flow.axis_labels(position, axis)) is not None
    ]
    if not labelled:
        return None
    for position, axis in places:
        # Also joins the labelled ones, and freezes them all where one is computed and fixed.
        flow.bind(position, axis, labelled[0])
    return labelled[0]


def _freeze_axes(flow: Flow, position: int, axes: Sequence[int], what: str) -> None:
    flow.freeze_input(position, f"{what} by {flow.where}", axes=axes)


def _axis(flow: Flow, rank: int) -> int:
    return flow.node.attributes.get_int("axis", 0) % max(rank, 1)


def _freeze_unknown(flow: Flow) -> None:
    for position in range(flow.num_inputs):
        flow.freeze_input(position, f"is indexed together with a tensor of unknown rank in {flow.where}")


# --- picking --------------------------------------------------------------------------------------------------


@CHANNELS.register("Gather")
def _gather(flow: Flow) -> None:
    """Constant indices pick labels; an index that vanishes (a scalar) pins the channel that it picks."""
    index_dims, dims = flow.dims(1), flow.dims(0)
    if index_dims is None or dims is None:
        flow.freeze_input(0, f"is picked by indices of unknown rank in {flow.where}")
        return
    axis = _axis(flow, len(dims))
    if flow.is_trainable(0) and not flow.is_constant(1):
        labels: list[LabelArray | None] = [
            None if other == axis or size == 1 else flow.own(0, other) for other, size in enumerate(dims)
        ]
    else:
        labels = list(flow.labels(0))
    indices = flow.labels(1)
    if all(on_axis is None for on_axis in (*labels, *indices)):
        return
    labels = labels or [None] * len(dims)
    on_axis = labels[axis]
    picked: list[LabelArray | None] = list(indices) or [None] * len(index_dims)
    if on_axis is not None:
        picked = _picked(flow, on_axis, len(index_dims))
    flow.give([*labels[:axis], *picked, *labels[axis + 1 :]])


def _picked(flow: Flow, labels: LabelArray, index_rank: int) -> list[LabelArray | None]:
    """Labels of what constant indices pick; a table of indices is a grid."""
    array = flow.array(1)
    if array is None:
        flow.freeze(labels, f"is picked by indices that are computed in {flow.where}")
        flow.freeze_input(1, f"picks channels in {flow.where}")
        return [None] * index_rank
    indices = np.asarray(array, dtype=np.int64) % len(labels)
    if index_rank == 0:
        flow.freeze(labels[indices.reshape(1)], f"is the one channel that {flow.where} picks")
    sides = flow.grid(labels[indices].reshape(-1), indices.shape) if index_rank > 1 else (labels[indices],)
    node, dtype = flow.node, array.dtype

    def shrink(removal: Removal) -> None:
        rank_among_kept = np.cumsum(removal.kept(labels)) - 1
        still_there = indices
        for axis, side in enumerate(sides if index_rank else ()):
            if side is not None:
                still_there = np.compress(removal.kept(side), still_there, axis=axis)
        removal.rewrite(node, 1, np.asarray(rank_among_kept[still_there], dtype=dtype))

    flow.shrink(labels, shrink)
    return list(sides) if index_rank else []


@CHANNELS.register("GatherElements")
def _gather_elements(flow: Flow) -> None:
    """Element [i, j] is data[indices[i, j], j] for axis 0: the result has the shape of the indices."""
    dims, index_dims = flow.dims(0), flow.dims(1)
    if dims is None or index_dims is None:
        _freeze_unknown(flow)
        return
    axis = _axis(flow, len(dims))
    _freeze_axes(flow, 0, [axis], "is picked by its index")
    produced = [in_common(flow, [(0, other), (1, other)]) if other != axis else None for other in range(len(dims))]
    # Along the axis itself, an index can go as any other element can.
    produced[axis] = flow.axis_labels(1, axis)
    flow.give(produced)


@CHANNELS.register("GatherND")
def _gather_nd(flow: Flow) -> None:
    """Data (b..., indexed..., rest...), indices (b..., any..., depth) -> (b..., any..., rest...)."""
    dims, index_dims = flow.dims(0), flow.dims(1)
    depth = index_dims[-1] if index_dims else None
    if dims is None or index_dims is None or not isinstance(depth, int):
        _freeze_unknown(flow)
        return
    batch = flow.node.attributes.get_int("batch_dims", 0)
    _freeze_axes(flow, 0, range(batch, batch + depth), "is picked by its index")
    _freeze_axes(flow, 1, [-1], "is a coordinate that is read")
    shared = [in_common(flow, [(0, axis), (1, axis)]) for axis in range(batch)]
    chosen = [flow.axis_labels(1, axis) for axis in range(batch, len(index_dims) - 1)]
    rest = [flow.axis_labels(0, axis) for axis in range(batch + depth, len(dims))]
    flow.give([*shared, *chosen, *rest])


@CHANNELS.register("Compress")
def _compress(flow: Flow) -> None:
    labels = flow.labels(0)
    if "axis" not in flow.node.attributes:
        flow.freeze_input(0, f"is picked from the flattened tensor by {flow.where}")
        return
    axis = _axis(flow, len(labels))
    _freeze_axes(flow, 0, [axis], "is picked by a condition")
    flow.give([None if other == axis else on_axis for other, on_axis in enumerate(labels)])


# --- placing --------------------------------------------------------------------------------------------------


@CHANNELS.register("ScatterElements")
def _scatter_elements(flow: Flow) -> None:
    """The output is data, but out[indices[i, j], j] = updates[i, j] for axis 0. Indices and updates have one shape."""
    dims = flow.dims(0)
    if dims is None or flow.dims(1) is None or flow.dims(2) is None:
        _freeze_unknown(flow)
        return
    axis = _axis(flow, len(dims))
    _freeze_axes(flow, 0, [axis], "is overwritten by its index")
    for position in (1, 2):
        # An update that is left out would leave what it overwrites.
        _freeze_axes(flow, position, [axis], "is written to its place")
    others = [other for other in range(len(dims)) if other != axis]
    shared = {other: in_common(flow, [(position, other) for position in range(3)]) for other in others}
    flow.give([shared.get(other) for other in range(len(dims))])


@CHANNELS.register("ScatterND")
def _scatter_nd(flow: Flow) -> None:
    """Data (indexed..., rest...), indices (any..., depth), updates (any..., rest...) -> the shape of data."""
    dims, index_dims, update_dims = (flow.dims(position) for position in range(3))
    depth = index_dims[-1] if index_dims else None
    if dims is None or index_dims is None or update_dims is None or not isinstance(depth, int):
        _freeze_unknown(flow)
        return
    _freeze_axes(flow, 0, range(depth), "is overwritten by its index")
    flow.freeze_input(1, f"is a place that is written by {flow.where}")
    # An update that is left out would leave what it overwrites.
    _freeze_axes(flow, 2, range(len(index_dims) - 1), "is written to its place")
    rest = [in_common(flow, [(0, axis), (2, axis - len(dims))]) for axis in range(depth, len(dims))]
    flow.give([*([None] * depth), *rest])


@CHANNELS.register("TensorScatter")
def _tensor_scatter(flow: Flow) -> None:
    """Past (batch, ..., sequence, ...), update of the same shape but for the sequence axis, write indices (batch)."""
    dims = flow.dims(0)
    if dims is None or flow.dims(1) is None:
        _freeze_unknown(flow)
        return
    axis = flow.node.attributes.get_int("axis", -2) % len(dims)
    for position in (0, 1):
        _freeze_axes(flow, position, [0, axis], "is overwritten by its index")
    shared = {other: in_common(flow, [(0, other), (1, other)]) for other in range(1, len(dims)) if other != axis}
    flow.give([shared.get(other) for other in range(len(dims))])


# --- positions that mean something ----------------------------------------------------------------------------


@CHANNELS.register("NonZero", "Unique", "EyeLike")
def _places(flow: Flow) -> None:
    """The result says where elements stand, or has them in another order."""
    flow.freeze_input(0, f"has its place counted by {flow.where}")


@CHANNELS.register("OneHot")
def _one_hot(flow: Flow) -> None:
    """Indices keep their axes; the new one is as long as the depth says."""
    labels, dims = flow.labels(0), flow.dims(0)
    if dims is None:
        return
    axis = flow.node.attributes.get_int("axis", -1) % (len(dims) + 1)
    produced = list(labels) or [None] * len(dims)
    flow.give([*produced[:axis], None, *produced[axis:]])


@CHANNELS.register("Trilu")
def _triangle(flow: Flow) -> None:
    """Rows and columns of the last two axes are compared by their places."""
    labels = flow.labels(0)
    _freeze_axes(flow, 0, [-2, -1], "is a row or column of a triangle that is cut out")
    flow.give([*labels[:-2], *(None for _ in labels[-2:])])


@CHANNELS.register("ReverseSequence")
def _reverse_sequence(flow: Flow) -> None:
    labels, attributes = flow.labels(0), flow.node.attributes
    worked = {attributes.get_int("batch_axis", 1), attributes.get_int("time_axis", 0)}
    _freeze_axes(flow, 0, sorted(worked), "is a step or batch axis that is turned round")
    flow.give([None if axis in worked else on_axis for axis, on_axis in enumerate(labels)])


@CHANNELS.register("GridSample")
def _grid_sample(flow: Flow) -> None:
    """X (N, C, H, W), grid (N, H', W', 2) -> (N, C, H', W'): values are read at places that hold for all channels."""
    labels, places = flow.labels(0), flow.labels(1)
    if flow.dims(0) is None or flow.dims(1) is None:
        _freeze_unknown(flow)
        return
    _freeze_axes(flow, 0, range(2, len(labels)), "is a spatial axis that is read")
    _freeze_axes(flow, 1, [-1], "is a coordinate that is read")
    channels = labels[1] if labels else None
    flow.give([in_common(flow, [(0, 0), (1, 0)]), channels, *(places or [None] * len(flow.dims(0) or ()))[1:-1]])


@CHANNELS.register("Col2Im")
def _col2im(flow: Flow) -> None:
    """(N, C * block, places) -> (N, C, image...): a channel owns one row for each element of the block."""
    labels, block = flow.labels(0), flow.integers(2)
    if not labels or all(on_axis is None for on_axis in labels):
        return
    _freeze_axes(flow, 0, [2], "is a place of a block that is put together")
    rows, size = labels[1], int(np.prod(block)) if block is not None else None
    image = flow.dims(1)
    if rows is not None and (not size or len(rows) % size):
        flow.freeze(rows, f"is put together in blocks of unknown size by {flow.where}")
        rows = None
    if rows is not None and size:
        table = rows.reshape(-1, size)
        first = np.ascontiguousarray(table[:, 0])
        flow.join(np.repeat(first, size), rows)
        rows = first
    spatial = image[0] if image and isinstance(image[0], int) else 2
    flow.give([labels[0], rows, *([None] * spatial)])


@CHANNELS.register("DFT")
def _fourier(flow: Flow) -> None:
    """(batch, ..., real and imaginary part); the axis is input 2 from opset 20 on."""
    labels = flow.labels(0)
    axis = flow.integers(2) if flow.has(2) else [flow.node.attributes.get_int("axis", -2)]
    if not labels:
        return
    if axis is None:
        flow.freeze_input(0, f"may be transformed by {flow.where}")
        return
    worked = {axis[0] % len(labels), len(labels) - 1}
    _freeze_axes(flow, 0, sorted(worked), "is transformed")
    flow.give([None if other in worked else on_axis for other, on_axis in enumerate(labels)])
