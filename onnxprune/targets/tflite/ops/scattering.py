"""Operators that write numbers at indices.

Both forms become one: rows of `data` (its indexed axes taken together, or all of them) and, for each update, the index
of its row. TFLite's SCATTER_ND writes into zeros and adds up what meets; so

    none     SELECT_V2(is hit, SCATTER_ND(updates), data); CONCATENATION and GATHER where the indices are constant
    add      ADD(data, SCATTER_ND(updates))
    mul      MUL(data, UNSORTED_SEGMENT_PROD(updates)); max and min likewise, where hit
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Shape, Tensor, TensorType
from onnxprune.targets.tflite.ops.carriers import carried, returned
from onnxprune.targets.tflite.ops.indexing import flat_indices, from_front, gathered
from onnxprune.targets.tflite.ops.shaping import concatenated
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

_SCATTERED: tuple[TensorType, ...] = ("FLOAT32", "INT8", "UINT8", "INT32", "INT64", "BOOL")
_ADDED: tuple[TensorType, ...] = ("FLOAT32", "INT32", "INT64")
_NARROW: tuple[TensorType, ...] = ("INT8", "UINT8", "INT16", "UINT16")

_SEGMENTS = {
    "mul": ("UNSORTED_SEGMENT_PROD", "MUL"),
    "max": ("UNSORTED_SEGMENT_MAX", "MAXIMUM"),
    "min": ("UNSORTED_SEGMENT_MIN", "MINIMUM"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """`data` (rows, row), `updates` (count, row) and the row of each update, INT32 (count,)."""

    data: Tensor
    updates: Tensor
    rows: Tensor

    @property
    def numbers(self) -> npt.NDArray[Any] | None:
        """The rows, where they are constant."""
        return self.rows.array()


@TFLITE.register("ScatterND")
def scatter_nd(node: NodeView, build: Builder) -> Tensor:
    """DYNAMIC_UPDATE_SLICE where the indices are a constant box, else as at the top of this file."""
    data, indices, updates = node.input(0), node.input(1), node.input(2)
    reduction = node.text("reduction", "none")
    depth = indices.shape[-1]
    constant = node.array(1)
    if constant is not None and reduction == "none":
        begin = _box(constant, data.shape)
        if begin is not None:
            return _box_replaced(build, data, updates, begin, constant.shape[:-1])
    flat = flat_indices(build, indices, data, range(depth))
    row = data.shape[depth:]
    found = _Rows(
        data=build.reshaped(data, (_together(data.shape[:depth]), *row)),
        updates=build.reshaped(updates, (_together(updates.shape[: indices.rank - 1]), *row)),
        rows=build.reshaped(flat, (_together(flat.shape),)),
    )
    return build.reshaped(_scattered(build, found, reduction), data.shape)


@TFLITE.register("ScatterElements", "Scatter")
def scatter_elements(node: NodeView, build: Builder) -> Tensor:
    """As ScatterND over all axes, by flat indices."""
    data, indices, updates = node.input(0), node.input(1), node.input(2)
    if not data.is_static or not indices.is_static:
        raise UnsupportedError("flat indices need all lengths, and one is known only when the model runs")
    axis = node.axis(data.rank)
    strides = [math.prod(data.shape[position + 1 :]) for position in range(data.rank)]
    # Where each update would land with index 0.
    places = np.zeros(indices.shape, np.int64)
    for position, coordinates in enumerate(np.indices(indices.shape, sparse=True)):
        if position != axis:
            places = places + coordinates * strides[position]
    picks = from_front(build, indices, data, axis)
    if picks.constant is not None:
        rows = build.constant((places + picks.constant.array().astype(np.int64) * strides[axis]).astype(np.int32))
    else:
        scaled = picks if strides[axis] == 1 else build.binary("MUL", picks, build.constant([strides[axis]]))
        rows = build.binary("ADD", scaled, build.constant(places.astype(np.int32)))
    found = _Rows(
        data=build.reshaped(data, (data.num_elements,)),
        updates=build.reshaped(updates, (updates.num_elements,)),
        rows=build.reshaped(rows, (indices.num_elements,)),
    )
    return build.reshaped(_scattered(build, found, node.text("reduction", "none")), data.shape)


def _together(shape: Shape) -> int:
    return -1 if -1 in shape else math.prod(shape)


def _box(indices: npt.NDArray[Any], shape: Shape) -> tuple[int, ...] | None:
    """The first index of the box that constant `indices` (..., depth) are, in order; None where they are none."""
    depth = indices.shape[-1]
    if indices.size == 0 or indices.ndim - 1 not in (1, depth) or any(dim < 0 for dim in shape[:depth]):
        return None
    if indices.ndim - 1 != depth and depth != 1:
        return None
    placed = np.where(indices < 0, indices + np.array(shape[:depth]), indices)
    begin = placed.reshape(-1, depth)[0]
    expected = np.moveaxis(np.indices(indices.shape[:-1]), 0, -1) + begin
    return tuple(int(first) for first in begin) if np.array_equal(placed, expected) else None


def _box_replaced(build: Builder, data: Tensor, updates: Tensor, begin: Sequence[int], box: Shape) -> Tensor:
    if tuple(box) == data.shape[: len(box)]:
        return updates
    start = build.constant([*begin, *[0] * (data.rank - len(begin))])
    return build.op("DYNAMIC_UPDATE_SLICE", [data, updates, start], shape=data.shape, type_=data.type)


def _scattered(build: Builder, rows: _Rows, reduction: str) -> Tensor:
    if reduction == "none":
        return _replaced(build, rows) if rows.numbers is None else _replaced_at_constants(build, rows)
    type_ = rows.data.type
    if type_ in ("BOOL", "UINT32", "UINT64") or (type_ == "INT64" and reduction != "add"):
        raise UnsupportedError(f"TFLite has no kernel that scatters {type_} with reduction '{reduction}'")
    # Narrow integers wrap around in ONNX, and do so again when they are brought back.
    wide = "INT32" if type_ in _NARROW else type_
    found = _Rows(data=build.cast(rows.data, wide), updates=build.cast(rows.updates, wide), rows=rows.rows)
    return build.cast(_added(build, found) if reduction == "add" else _reduced(build, found, reduction), type_)


def _replaced_at_constants(build: Builder, rows: _Rows) -> Tensor:
    """Each row from where it is: `data`, or the last update that hits it."""
    numbers = rows.numbers
    count = rows.data.shape[0]
    if numbers is None or count < 0:
        return _replaced(build, rows)
    source = np.arange(count, dtype=np.int32)
    source[numbers] = count + np.arange(len(numbers), dtype=np.int32)
    if np.array_equal(source, np.arange(count)):
        return rows.data
    return gathered(build, concatenated(build, [rows.data, rows.updates], 0), build.constant(source), axis=0)


def _replaced(build: Builder, rows: _Rows) -> Tensor:
    type_ = rows.data.type
    data, updates = (carried(build, tensor, _SCATTERED) for tensor in (rows.data, rows.updates))
    written = _scatter_nd(build, rows.rows, updates, data)
    return returned(
        build, build.op("SELECT_V2", [_is_hit(build, rows), written, data], shape=data.shape, type_=data.type), type_
    )


def _added(build: Builder, rows: _Rows) -> Tensor:
    return build.binary("ADD", rows.data, _scatter_nd(build, rows.rows, rows.updates, rows.data))


def _reduced(build: Builder, rows: _Rows, reduction: str) -> Tensor:
    segment, combine = _SEGMENTS[reduction]
    count = build.length(rows.data, 0)
    number = build.constant(np.array(count, np.int32)) if isinstance(count, int) else build.reshaped(count, ())
    # UNSORTED_SEGMENT_MAX gives rows without updates the lowest finite number, which is more than minus infinity.
    found = build.op(segment, [rows.updates, rows.rows, number], shape=rows.data.shape, type_=rows.data.type)
    combined = build.binary(combine, rows.data, found)
    if reduction == "mul":
        return combined
    return build.op(
        "SELECT_V2", [_is_hit(build, rows), combined, rows.data], shape=rows.data.shape, type_=rows.data.type
    )


def _scatter_nd(build: Builder, rows: Tensor, updates: Tensor, like: Tensor) -> Tensor:
    """SCATTER_ND of rows into zeros."""
    return build.op(
        "SCATTER_ND",
        [build.unsqueezed(rows, [1]), updates, build.shape_of(like)],
        shape=like.shape,
        type_=updates.type,
    )


def _is_hit(build: Builder, rows: _Rows) -> Tensor:
    """BOOL (rows, 1, ...): where an update lands."""
    count, rank = rows.data.shape[0], rows.data.rank
    ones = (1,) * (rank - 1)
    numbers = rows.numbers
    if numbers is not None and count >= 0:
        hit = np.zeros(count, np.bool_)
        hit[numbers] = True
        return build.constant(hit.reshape(count, *ones))
    updates = rows.rows.shape[0]
    if updates >= 0:
        flags = build.constant(np.ones(updates, np.int32))
    else:
        flags = build.op(
            "FILL", [build.shape_of(rows.rows), build.constant(np.array(1, np.int32))], shape=(-1,), type_="INT32"
        )
    size = build.vector([build.length(rows.data, 0)])
    hits = build.op("SCATTER_ND", [build.unsqueezed(rows.rows, [1]), flags, size], shape=(count,), type_="INT32")
    return build.reshaped(build.cast(hits, "BOOL"), (count, *ones))


@TFLITE.register("TensorScatter")
def tensor_scatter(node: NodeView, build: Builder) -> Tensor:
    """DYNAMIC_UPDATE_SLICE for one sequence, else a GATHER of the updates and SELECT_V2."""
    cache, update, starts = node.input(0), node.input(1), node.optional(2)
    axis = node.integer("axis", -2) % cache.rank
    is_circular = node.text("mode", "linear") == "circular"
    length, written = cache.shape[axis], update.shape[axis]
    if starts is None:
        starts = build.constant([0])
    starts = build.cast(starts, "INT32")
    if starts.shape[0] == 1 and not is_circular:
        parts: list[int | Tensor] = [starts if position == axis else 0 for position in range(cache.rank)]
        return build.op(
            "DYNAMIC_UPDATE_SLICE", [cache, update, build.vector(parts)], shape=cache.shape, type_=cache.type
        )
    if length < 0 or written < 0 or cache.shape[0] < 0:
        raise UnsupportedError(
            "the length of the cache, its batch or that of the update is known only when the model runs"
        )
    # For each place of the cache, how far behind the start it lies: (batch, length).
    distance = build.binary("SUB", build.constant(np.arange(length, dtype=np.int32)), build.reshaped(starts, (-1, 1)))
    if is_circular:
        distance = build.binary("FLOOR_MOD", distance, build.constant([length]))
    last = build.constant([written - 1])
    source = build.binary("MINIMUM", build.binary("MAXIMUM", distance, build.constant([0])), last)
    is_hit = build.binary("EQUAL", source, distance, type_="BOOL")
    batch = cache.shape[0]
    if source.shape[0] != batch:
        source = build.op(
            "BROADCAST_TO", [source, build.constant([batch, length])], shape=(batch, length), type_="INT32"
        )
    to_second = (0, axis, *(other for other in range(1, cache.rank) if other != axis))
    found = gathered(build, build.transposed(update, to_second), source, axis=1, batch_dims=1)
    found = build.transposed(found, tuple(to_second.index(position) for position in range(cache.rank)))
    mask = tuple({0: is_hit.shape[0], axis: length}.get(position, 1) for position in range(cache.rank))
    return build.op("SELECT_V2", [build.reshaped(is_hit, mask), found, cache], shape=cache.shape, type_=cache.type)
