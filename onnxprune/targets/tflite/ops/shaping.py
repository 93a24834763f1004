"""Operators that keep the numbers and change the shape, and those that put tensors together and take them apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError, broadcast_shape
from onnxprune.targets.tflite.elements import Element
from onnxprune.targets.tflite.graph import Shape, Tensor, TensorType
from onnxprune.targets.tflite.ops.carriers import carried, returned
from onnxprune.targets.tflite.ops.sizes import slice_of
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

_COPIED = "copied"
"""Element of a shape: the length of the same axis of the input."""

_MAX_DELEGATED_RANK = 6
"""XNNPACK takes CONCATENATION and SPLIT without looking at the rank, and fails to load with more axes than this."""

_JOINED: tuple[TensorType, ...] = ("FLOAT32", "INT8", "UINT8", "INT16", "INT32", "UINT32", "INT64", "BOOL")
_SPLIT: tuple[TensorType, ...] = ("FLOAT32", "INT8", "UINT8", "INT16", "INT32", "INT64")
_REVERSED: tuple[TensorType, ...] = ("FLOAT32", "UINT8", "INT16", "INT32", "INT64")


@TFLITE.register("Reshape")
def reshape(node: NodeView, build: Builder) -> Tensor:
    """RESHAPE, to a constant shape wherever at most one axis is open."""
    x = node.input(0)
    target = _reshape_target(node, x)
    wanted = _merged([element if isinstance(element, int) else -1 for element in target], node.output_shape())
    if x.is_static and wanted.count(-1) == 1:
        known = math.prod(dim for dim in wanted if dim >= 0)
        if known:
            wanted = tuple(x.num_elements // known if dim < 0 else dim for dim in wanted)
    if wanted.count(-1) <= 1:
        return build.reshaped(x, wanted)
    return build.op("RESHAPE", [x, _computed_target(node, build, target)], shape=wanted, type_=x.type)


def _reshape_target(node: NodeView, x: Tensor) -> tuple[Element, ...]:
    """The elements of the shape, with those that are copied from `x` (0) in their places where they are known."""
    shape, known = node.input(1), node.elements(1)
    if shape.shape[0] < 0:
        raise UnsupportedError("the number of axes of its result is known only when the model runs")
    target: list[Element] = [None] * shape.shape[0] if known is None else list(known.flat)
    if node.integer("allowzero"):
        return tuple(target)
    for axis, element in enumerate(target):
        if element == 0:
            target[axis] = x.shape[axis] if x.shape[axis] >= 0 else _COPIED
    return tuple(target)


def _computed_target(node: NodeView, build: Builder, target: Sequence[Element]) -> Tensor:
    """The shape as an INT32 vector, from its numbers, from lengths of the input, and from what is computed."""
    x, value = node.input(0), node.node.inputs[0]
    lengths = (value is not None and node.scope.lengths(value)) or ()
    parts: list[int | Tensor] = []
    axis = 0
    while axis < len(target):
        element = target[axis]
        # Axes that stay where they are, up to the first that does not.
        kept = axis
        while kept < min(len(target), x.rank) and (target[kept] == _COPIED or _is_same(target[kept], lengths[kept])):
            kept += 1
        if kept > axis:
            parts.append(
                build.op("STRIDED_SLICE", [build.shape_of(x), *_bounds(build, axis, kept)], shape=(kept - axis,))
            )
            axis = kept
            continue
        if isinstance(element, int):
            parts.append(element)
        elif element is not None and element in lengths:
            parts.append(build.length(x, lengths.index(element)))
        else:
            parts.append(_copied_where_zero(node, build, axis, is_length=element is not None))
        axis += 1
    return build.vector(parts)


def _is_same(element: Element, length: Element) -> bool:
    return isinstance(element, str) and element == length


def _copied_where_zero(node: NodeView, build: Builder, axis: int, *, is_length: bool) -> Tensor:
    x, shape = node.input(0), build.cast(node.input(1), "INT32")
    element = build.op("STRIDED_SLICE", [shape, *_bounds(build, axis, axis + 1)], shape=(1,))
    if is_length or node.integer("allowzero") or axis >= x.rank:
        return element
    is_zero = build.op("EQUAL", [element, build.constant([0])], shape=(1,), type_="BOOL")
    copied = build.vector([build.length(x, axis)])
    return build.op("SELECT_V2", [is_zero, copied, element], shape=(1,), type_="INT32")


def _merged(shape: Sequence[int], inferred: Shape | None) -> Shape:
    """With what shape inference knows besides."""
    if inferred is None or len(inferred) != len(shape):
        return tuple(shape)
    return tuple(other if dim < 0 else dim for dim, other in zip(shape, inferred, strict=True))


@TFLITE.register("Flatten")
def flatten(node: NodeView, build: Builder) -> Tensor:
    """RESHAPE to two axes."""
    x = node.input(0)
    axis = node.axis(x.rank, 1)
    rows, columns = (-1 if -1 in dims else math.prod(dims) for dims in (x.shape[:axis], x.shape[axis:]))
    if rows >= 0 or columns >= 0:
        return build.reshaped(x, (rows, columns))
    lengths = build.op("STRIDED_SLICE", [build.shape_of(x), *_bounds(build, 0, axis)], shape=(axis,), type_="INT32")
    product = build.op("REDUCE_PROD", [lengths, build.constant([0])], shape=(1,), type_="INT32", keepDims=True)
    return build.op("RESHAPE", [x, build.vector([product, -1])], shape=(-1, -1), type_=x.type)


def _bounds(build: Builder, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    return build.constant([begin]), build.constant([end]), build.constant([1])


@TFLITE.register("Squeeze")
def squeeze(node: NodeView, build: Builder) -> Tensor:
    """RESHAPE; SQUEEZE where several other axes are open."""
    x = node.input(0)
    axes = node.required_array(1, "axes") if node.has(1) else None
    if axes is None and not x.is_static:
        raise UnsupportedError("it has no axes, and which axes have length 1 is known only when the model runs")
    if axes is None:
        return build.squeezed(x, (axis for axis, dim in enumerate(x.shape) if dim == 1))
    return build.squeezed(x, (int(axis) % x.rank for axis in axes))


@TFLITE.register("Unsqueeze")
def unsqueeze(node: NodeView, build: Builder) -> Tensor:
    """RESHAPE; EXPAND_DIMS where several axes are open."""
    x, axes = node.input(0), node.required_array(1, "axes").reshape(-1)
    rank = x.rank + len(axes)
    return build.unsqueezed(x, (int(axis) % rank for axis in axes))


@TFLITE.register("Transpose")
def transpose(node: NodeView, build: Builder) -> Tensor:
    """TRANSPOSE."""
    x = node.input(0)
    return build.transposed(x, node.ints("perm") or tuple(reversed(range(x.rank))))


@TFLITE.register("Expand")
def expand(node: NodeView, build: Builder) -> Tensor:
    """BROADCAST_TO; nothing where the shape stays the same."""
    x, wanted = node.input(0), node.input(1)
    if wanted.shape[0] < 0:
        raise UnsupportedError("the number of axes of its result is known only when the model runs")
    known = node.elements(1)
    rank = max(x.rank, wanted.shape[0])
    target: list[Element] = [1] * (rank - wanted.shape[0])
    target += [None] * wanted.shape[0] if known is None else known.flat
    value = node.node.inputs[0]
    lengths = None if value is None else node.scope.lengths(value)
    given: list[Element] = [1] * (rank - x.rank)
    given += x.shape if lengths is None else lengths
    if all(element in (1, length) and element is not None for element, length in zip(target, given, strict=True)):
        return build.with_rank(x, rank)
    offset = rank - wanted.shape[0]
    parts: list[int | Tensor] = []
    for axis, (element, length) in enumerate(zip(target, given, strict=True)):
        parts.append(_expanded_length(node, build, axis - offset, axis - rank + x.rank, element, length))
    shape = tuple(part if isinstance(part, int) else -1 for part in parts)
    return build.op("BROADCAST_TO", [x, build.vector(parts)], shape=_merged(shape, node.output_shape()), type_=x.type)


def _expanded_length(
    node: NodeView, build: Builder, position: int, axis: int, element: Element, length: Element
) -> int | Tensor:
    """The length of one axis of Expand's result: the larger one, unless one is known to be that of both."""
    x = node.input(0)
    if isinstance(length, int) and length != 1:
        return length
    if isinstance(element, int) and (element != 1 or length == 1):
        return element
    if element == 1 or (element is not None and element == length):
        return build.length(x, axis)
    begin, end, step = _bounds(build, position, position + 1)
    wanted = build.op(
        "STRIDED_SLICE", [build.cast(node.input(1), "INT32"), begin, end, step], shape=(1,), type_="INT32"
    )
    if length == 1:
        return wanted
    return build.op("MAXIMUM", [wanted, build.vector([build.length(x, axis)])], shape=(1,), type_="INT32")


@TFLITE.register("Tile")
def tile(node: NodeView, build: Builder) -> Tensor:
    """TILE."""
    x, repeats, known = node.input(0), node.input(1), node.elements(1)
    times = [None] * x.rank if known is None else [one if isinstance(one, int) else None for one in known.flat]
    if all(time == 1 for time in times):
        return x
    shape = tuple(-1 if dim < 0 or time is None else dim * time for dim, time in zip(x.shape, times, strict=True))
    return build.op("TILE", [x, build.cast(repeats, "INT32")], shape=shape, type_=x.type)


@TFLITE.register("Concat")
def concat(node: NodeView, build: Builder) -> Tensor:
    """CONCATENATION; inputs without elements are left out."""
    given = [node.input(position) for position in range(len(node.inputs))]
    if len({tensor.rank for tensor in given}) > 1:
        # In a branch that is not for these shapes, and never runs with them.
        raise UnsupportedError(f"its inputs have {', '.join(str(tensor.rank) for tensor in given)} axes")
    return concatenated(build, given, node.axis(given[0].rank))


def concatenated(build: Builder, tensors: Sequence[Tensor], axis: int) -> Tensor:
    """Behind one another along `axis`."""
    given = [tensor for tensor in tensors if 0 not in tensor.shape] or [tensors[0]]
    if len(given) == 1:
        return given[0]
    type_ = given[0].type
    parts = [carried(build, tensor, _JOINED) for tensor in given]
    lengths = [part.shape[axis] for part in parts]
    others = broadcast_shape(*((*part.shape[:axis], 1, *part.shape[axis + 1 :]) for part in parts))
    shape = (*others[:axis], -1 if -1 in lengths else sum(lengths), *others[axis + 1 :])
    if len(shape) > _MAX_DELEGATED_RANK:
        merged = [build.reshaped(part, _around(part.shape, axis)) for part in parts]
        joined = build.op("CONCATENATION", merged, shape=_around(shape, axis), type_=merged[0].type, axis=1)
        return returned(build, build.reshaped(joined, shape), type_)
    return returned(build, build.op("CONCATENATION", parts, shape=shape, type_=parts[0].type, axis=axis), type_)


def _around(shape: Shape, axis: int) -> Shape:
    """The axes before and behind `axis` taken together."""
    before, behind = shape[:axis], shape[axis + 1 :]
    return tuple(-1 if -1 in dims else math.prod(dims) for dims in (before, (shape[axis],), behind))


@TFLITE.register("Split")
def split(node: NodeView, build: Builder) -> list[Tensor | None]:
    """SPLIT into equal parts, SPLIT_V where their lengths are computed, else one SLICE for each part."""
    x = node.input(0)
    axis = node.axis(x.rank)
    if node.has(1) and node.array(1) is None:
        return _split_as_computed(node, build, axis)
    lengths = _split_lengths(node, x, axis)
    is_equal = len(set(lengths)) == 1 and lengths[0] > 0 and sum(lengths) == x.shape[axis]
    if is_equal and len(lengths) == 1:
        return [x]
    if is_equal and x.type in _SPLIT and x.rank <= _MAX_DELEGATED_RANK:
        shape = (*x.shape[:axis], lengths[0], *x.shape[axis + 1 :])
        position = build.constant(np.array(axis, np.int32))
        outputs: list[tuple[Shape, TensorType]] = [(shape, x.type)] * len(lengths)
        return list(build.ops("SPLIT", [position, x], outputs=outputs, numSplits=len(lengths)))
    parts: list[Tensor | None] = []
    start = 0
    for output, length in enumerate(lengths):
        parts.append(slice_of(build, x, axis, start, length) if node.is_read(output) else None)
        start += length
    return parts


def _split_as_computed(node: NodeView, build: Builder, axis: int) -> list[Tensor | None]:
    x = node.input(0)
    given = carried(build, x, _SPLIT)
    shape = (*x.shape[:axis], -1, *x.shape[axis + 1 :])
    parts = build.ops(
        "SPLIT_V",
        [given, build.cast(node.input(1), "INT32"), build.constant(np.array(axis, np.int32))],
        outputs=[(shape, given.type)] * node.num_outputs,
        numSplits=node.num_outputs,
    )
    return [returned(build, one, x.type) for one in parts]


def _split_lengths(node: NodeView, x: Tensor, axis: int) -> tuple[int, ...]:
    if node.has(1):
        return tuple(int(length) for length in node.required_array(1, "lengths of the parts"))
    total, count = x.shape[axis], node.integer("num_outputs", node.num_outputs)
    if total < 0:
        raise UnsupportedError(f"axis {axis}, which it splits into {count}, has a length that only the run knows")
    # The last part is the smaller one.
    length = -(-total // count)
    return tuple(max(0, min(length, total - start)) for start in range(0, count * length, length))


@TFLITE.register("Shape")
def shape(node: NodeView, build: Builder) -> Tensor:
    """SHAPE, and a STRIDED_SLICE of it; a constant where all axes are known."""
    x = node.input(0)
    lengths = build.op("SHAPE", [x], shape=(x.rank,), type_="INT64", outType="INT64")
    begin, end, _ = slice(node.integer("start"), node.integer("end", x.rank)).indices(x.rank)
    if (begin, end) == (0, x.rank):
        return lengths
    return build.op(
        "STRIDED_SLICE", [lengths, *_bounds(build, begin, end)], shape=(max(0, end - begin),), type_="INT64"
    )


@TFLITE.register("Size")
def size(node: NodeView, build: Builder) -> Tensor:
    """REDUCE_PROD of SHAPE; a constant where all axes are known."""
    x = node.input(0)
    lengths = build.op("SHAPE", [x], shape=(x.rank,), type_="INT64", outType="INT64")
    return build.op("REDUCE_PROD", [lengths, build.constant([0])], shape=(), type_="INT64", keepDims=False)


@TFLITE.register("ReverseSequence")
def reverse_sequence(node: NodeView, build: Builder) -> Tensor:
    """REVERSE_SEQUENCE."""
    x, lengths = node.input(0), build.cast(node.input(1), "INT32")
    given = carried(build, x, _REVERSED)
    time, batch = node.integer("time_axis", 0), node.integer("batch_axis", 1)
    done = build.op("REVERSE_SEQUENCE", [given, lengths], shape=x.shape, type_=given.type, seqDim=time, batchDim=batch)
    return returned(build, done, x.type)
