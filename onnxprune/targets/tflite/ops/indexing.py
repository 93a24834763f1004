"""Operators that pick numbers by index.

ONNX counts negative indices from the end, TFLite's kernels refuse to run on them: constant ones are counted from the
front at conversion, computed ones when the model runs, unless what computes them never gives a negative number.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Shape, Tensor, TensorType
from onnxprune.targets.tflite.ops.carriers import carried, returned
from onnxprune.targets.tflite.ops.sizes import slice_of
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

_GATHERED: tuple[TensorType, ...] = ("FLOAT32", "INT8", "UINT8", "INT16", "INT32", "INT64", "BOOL")

_NEVER_NEGATIVE = frozenset({"ABS", "ARG_MAX", "ARG_MIN", "RELU", "SHAPE", "WHERE"})
_KEEP_THE_SIGN = frozenset(
    {"CAST", "EXPAND_DIMS", "GATHER", "RESHAPE", "SLICE", "SQUEEZE", "STRIDED_SLICE", "TRANSPOSE"}
)
_UNSIGNED: tuple[TensorType, ...] = ("BOOL", "UINT8", "UINT16", "UINT32")

_INT32_MAX = int(np.iinfo(np.int32).max)


@TFLITE.register("Gather")
def gather(node: NodeView, build: Builder) -> Tensor:
    """SLICE or STRIDED_SLICE where the indices are an even row of constants, else GATHER."""
    x, indices = node.input(0), node.input(1)
    axis = node.axis(x.rank)
    picked = node.array(1)
    if picked is not None:
        evenly = _sliced_evenly(build, x, axis, picked)
        if evenly is not None:
            return evenly
    return gathered(build, x, from_front(build, indices, x, axis), axis=axis)


def gathered(build: Builder, x: Tensor, indices: Tensor, *, axis: int, batch_dims: int = 0) -> Tensor:
    """GATHER along `axis`, by indices that are not negative; the first `batch_dims` axes of both go together."""
    given = carried(build, x, _GATHERED)
    shape = (*x.shape[:axis], *indices.shape[batch_dims:], *x.shape[axis + 1 :])
    picked = build.op("GATHER", [given, indices], shape=shape, type_=given.type, axis=axis, batchDims=batch_dims)
    return returned(build, picked, x.type)


def from_front(build: Builder, indices: Tensor, data: Tensor, axis: int) -> Tensor:
    """Indices of an axis of `data` as INT32, none of which is negative."""
    length = data.shape[axis]
    if indices.constant is not None:
        numbers = indices.constant.array().astype(np.int64)
        if length >= 0:
            if numbers.size and not (-length <= numbers.min() and numbers.max() < length):
                raise UnsupportedError(f"an index is outside of axis {axis}, whose length is {length}")
            return build.constant(np.where(numbers < 0, numbers + length, numbers).astype(np.int32))
        if not numbers.size or numbers.min() >= 0:
            return build.constant(numbers.astype(np.int32))
    narrow = build.cast(indices, "INT32")
    if is_never_negative(build, indices):
        return narrow
    count = build.length(data, axis)
    end = build.constant(np.array(count, np.int32)) if isinstance(count, int) else build.reshaped(count, ())
    moved = build.binary("ADD", narrow, end)
    is_negative = build.binary("LESS", narrow, build.constant(np.array(0, np.int32)), type_="BOOL")
    return build.op("SELECT_V2", [is_negative, moved, narrow], shape=narrow.shape, type_="INT32")


def is_never_negative(build: Builder, tensor: Tensor) -> bool:
    """True where the operators that compute `tensor` can give no negative number."""
    known = build.known_elements(tensor)
    if known is not None and all(isinstance(one, str) or (isinstance(one, int) and one >= 0) for one in known.flat):
        return True
    while tensor.type not in _UNSIGNED:
        producer = build.producer(tensor)
        if producer is None:
            return False
        if producer.kind in _NEVER_NEGATIVE or (producer.kind == "TOPK_V2" and producer.outputs[1] == tensor.name):
            return True
        if producer.kind not in _KEEP_THE_SIGN:
            return False
        tensor = build.tensors[producer.inputs[0]]
    return True


def _sliced_evenly(build: Builder, x: Tensor, axis: int, indices: npt.NDArray[Any]) -> Tensor | None:
    """The slice that picks these constant indices; None where none does."""
    numbers = [int(number) for number in indices.reshape(-1)]
    length = x.shape[axis]
    if indices.ndim > 1 or not numbers or x.constant is not None or (length < 0 and min(numbers) < 0):
        return None
    numbers = [number + length if number < 0 else number for number in numbers]
    if length >= 0 and not all(0 <= number < length for number in numbers):
        raise UnsupportedError(f"an index is outside of axis {axis}, whose length is {length}")
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if step == 0 or numbers != list(range(numbers[0], numbers[0] + step * len(numbers), step)):
        return None
    if step == 1:
        found = x if (numbers[0], len(numbers)) == (0, length) else slice_of(build, x, axis, numbers[0], len(numbers))
    else:
        # Backwards to index 0, the end is in front of it, where -1 would be the last index.
        end = numbers[-1] + (1 if step > 0 else -1)
        found = sliced(build, x, {axis: (numbers[0], end if end >= 0 else -_INT32_MAX, step)})
    return build.squeezed(found, [axis]) if indices.ndim == 0 else found


@TFLITE.register("GatherElements")
def gather_elements(node: NodeView, build: Builder) -> Tensor:
    """GATHER with all axes but one as batch axes."""
    x, indices = node.input(0), node.input(1)
    axis = node.axis(x.rank)
    for other in range(x.rank):
        length = indices.shape[other]
        if other != axis and length != x.shape[other]:
            if length < 0:
                raise UnsupportedError(f"the length of axis {other} of its indices is known only when the model runs")
            x = slice_of(build, x, other, 0, length)
    picks = from_front(build, indices, x, axis)
    to_last = (*(other for other in range(x.rank) if other != axis), axis)
    x, picks = build.transposed(x, to_last), build.transposed(picks, to_last)
    picked = gathered(build, x, picks, axis=x.rank - 1, batch_dims=x.rank - 1)
    return build.transposed(picked, tuple(to_last.index(other) for other in range(x.rank)))


@TFLITE.register("GatherND")
def gather_nd(node: NodeView, build: Builder) -> Tensor:
    """GATHER over the indexed axes taken together, by their indices made one."""
    x, indices = node.input(0), node.input(1)
    batch = node.integer("batch_dims")
    depth = indices.shape[-1]
    flat = flat_indices(build, indices, x, range(batch, batch + depth))
    merged = _merged_axes(build, x, batch, depth)
    return gathered(build, merged, flat, axis=batch, batch_dims=batch)


def flat_indices(build: Builder, indices: Tensor, data: Tensor, axes: range) -> Tensor:
    """One INT32 index into `axes` of `data` taken together, for each vector of indices."""
    if indices.shape[-1] < 0:
        raise UnsupportedError("the length of its index vectors is known only when the model runs")
    lengths = [data.shape[axis] for axis in axes]
    if any(length < 0 for length in lengths[1:]):
        raise UnsupportedError("it indexes an axis, behind another one, whose length is known only when the model runs")
    strides = np.array([math.prod(lengths[position + 1 :]) for position in range(len(lengths))], np.int64)
    last = indices.rank - 1
    if indices.constant is not None and min(lengths) >= 0:
        numbers = indices.constant.array().astype(np.int64)
        if numbers.size and not bool(((-np.array(lengths) <= numbers) & (numbers < np.array(lengths))).all()):
            raise UnsupportedError(f"an index is outside of the axes, whose lengths are {lengths}")
        numbers = np.where(numbers < 0, numbers + np.array(lengths), numbers)
        return build.constant((numbers * strides).sum(-1).astype(np.int32))
    columns = []
    for position, axis in enumerate(axes):
        column = slice_of(build, indices, last, position, 1) if len(lengths) > 1 else indices
        column = from_front(build, build.squeezed(column, [last]), data, axis)
        if strides[position] != 1:
            column = build.binary("MUL", column, build.constant(np.array(strides[position], np.int32)))
        columns.append(column)
    flat = columns[0]
    for column in columns[1:]:
        flat = build.binary("ADD", flat, column)
    return flat


def _merged_axes(build: Builder, x: Tensor, first: int, count: int) -> Tensor:
    if count == 1:
        return x
    dims = x.shape[first : first + count]
    merged = -1 if -1 in dims else math.prod(dims)
    return build.reshaped(x, (*x.shape[:first], merged, *x.shape[first + count :]))


@TFLITE.register("Slice")
def slice_(node: NodeView, build: Builder) -> Tensor:
    """SLICE, or STRIDED_SLICE where steps, negative bounds or computed ones need it."""
    x = node.input(0)
    count = node.input(1).shape[0]
    if count < 0:
        raise UnsupportedError("the number of its bounds is known only when the model runs")
    axes = node.required_array(3, "axes") if node.has(3) else np.arange(count)
    steps = node.required_array(4, "steps") if node.has(4) else np.ones(count, np.int64)
    bounds = {
        int(axis) % x.rank: (_bound(node, build, 1, index), _bound(node, build, 2, index), int(steps[index]))
        for index, axis in enumerate(axes)
    }
    return sliced(build, x, bounds, inferred=node.output_shape())


def _bound(node: NodeView, build: Builder, position: int, index: int) -> int | Tensor:
    known, bounds = node.elements(position), node.input(position)
    element = None if known is None else known.flat[index]
    if isinstance(element, int):
        return element
    begin, end, step = (build.constant([number]) for number in (index, index + 1, 1))
    bound = build.op("STRIDED_SLICE", [bounds, begin, end, step], shape=(1,), type_=bounds.type)
    if element is None and bounds.type == "INT64":
        # Such as the largest INT64 for "to the end": as an INT32 it would be -1.
        bound = build.op("MINIMUM", [bound, build.constant([_INT32_MAX], "INT64")])
        bound = build.op("MAXIMUM", [bound, build.constant([-_INT32_MAX], "INT64")])
    return build.cast(bound, "INT32")


_Bounds = tuple["int | Tensor", "int | Tensor", int]


def sliced(build: Builder, x: Tensor, bounds: dict[int, _Bounds], *, inferred: Shape | None = None) -> Tensor:
    """x[start:end:step] on some axes, by the rules of NumPy, with numbers or with vectors of one element."""
    shape = list(x.shape)
    plain: dict[int, tuple[int, int]] = {}
    for axis, (start, end, step) in bounds.items():
        if isinstance(start, int) and isinstance(end, int):
            shape[axis] = _sliced_length(x.shape[axis], start, end, step)
            first = _first_index(x.shape[axis], start)
            if step == 1 and first is not None and (shape[axis] >= 0 or end >= _INT32_MAX):
                plain[axis] = (first, shape[axis])
        else:
            shape[axis] = -1 if inferred is None else inferred[axis]
    changed = [axis for axis in bounds if plain.get(axis) != (0, x.shape[axis])]
    if not changed:
        return x
    if all(axis in plain for axis in changed):
        begin, size = [0] * x.rank, [-1] * x.rank
        for axis in changed:
            begin[axis], size[axis] = plain[axis]
        return build.op("SLICE", [x, build.constant(begin), build.constant(size)], shape=tuple(shape), type_=x.type)
    return _strided(build, x, {axis: bounds[axis] for axis in changed}, tuple(shape))


def _strided(build: Builder, x: Tensor, bounds: dict[int, _Bounds], shape: Shape) -> Tensor:
    starts: list[int | Tensor] = [0] * x.rank
    ends: list[int | Tensor] = [0] * x.rank
    steps = [1] * x.rank
    start_mask = end_mask = 0
    for axis in range(x.rank):
        start, end, steps[axis] = bounds.get(axis, (0, _INT32_MAX, 1))
        if axis not in bounds:
            start_mask |= 1 << axis
        if isinstance(end, int) and (end >= _INT32_MAX or end <= -_INT32_MAX):
            end_mask |= 1 << axis
            end = 0
        starts[axis] = max(-_INT32_MAX, min(_INT32_MAX, start)) if isinstance(start, int) else start
        ends[axis] = end
    return build.op(
        "STRIDED_SLICE",
        [x, build.vector(starts), build.vector(ends), build.constant(steps)],
        shape=shape,
        type_=x.type,
        beginMask=start_mask,
        endMask=end_mask,
    )


def _sliced_length(length: int, start: int, end: int, step: int) -> int:
    """Elements of length[start:end:step]; -1 where that depends on a length that is not known."""
    if length >= 0:
        # Before the first element, for a slice that runs backwards, is None for Python.
        stop = None if step < 0 and end < -length else end
        return len(range(*slice(start, stop, step).indices(length)))
    return -1


def _first_index(length: int, start: int) -> int | None:
    """Where a slice with step 1 begins; None where that is not known."""
    if length >= 0:
        return slice(start, None).indices(length)[0]
    return 0 if start == 0 else None


@TFLITE.register("Compress")
def compress(node: NodeView, build: Builder) -> Tensor:
    """GATHER by constant indices, or by those that WHERE finds."""
    x, condition = node.input(0), node.input(1)
    if "axis" in node.node.attributes:
        axis = node.axis(x.rank)
    else:
        axis = 0
        x = build.reshaped(x, (-1 if -1 in x.shape else x.num_elements,))
    chosen = node.array(1)
    if chosen is not None:
        return gathered(build, x, build.constant(np.flatnonzero(chosen).astype(np.int32)), axis=axis)
    places = build.op("WHERE", [condition], shape=(-1, 1), type_="INT64")
    return gathered(build, x, build.cast(build.reshaped(places, (-1,)), "INT32"), axis=axis)
