"""Operators that choose: by condition, by size, by index."""

from __future__ import annotations

import numpy as np

from onnxprune.targets.tflite.build import Builder
from onnxprune.targets.tflite.graph import Tensor, TensorType, inverse
from onnxprune.targets.tflite.ops.carriers import WORDS, carried, computed_in, returned
from onnxprune.targets.tflite.ops.casting import cast_to
from onnxprune.targets.tflite.ops.formulas import Term
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

_ARG = {"ArgMax": "ARG_MAX", "ArgMin": "ARG_MIN"}
_ARG_TYPES: frozenset[TensorType] = frozenset({"FLOAT32", "INT8", "UINT8", "INT32", "BOOL"})
_ONE_HOT_TYPES: frozenset[TensorType] = frozenset({"FLOAT32", "INT32", "INT64", "BOOL", "INT8", "UINT8"})


@TFLITE.register("Where")
def where(node: NodeView, build: Builder) -> Tensor:
    """SELECT_V2."""
    condition, chosen, other = (Term(build, node.input(position)) for position in range(3))
    return condition.selecting(chosen, other).tensor


@TFLITE.register(*_ARG)
def index_of_extreme(node: NodeView, build: Builder) -> Tensor:
    """ARG_MAX or ARG_MIN; for the last index of several, of the reversed axis. INT64 through TOPK_V2."""
    x = node.input(0)
    if x.rank == 0:
        return build.constant(np.array(0, np.int64))
    axis, is_last = node.axis(x.rank), bool(node.integer("select_last_index"))
    if is_last:
        along = build.constant(np.array([axis], np.int32))
        x = build.op("REVERSE_V2", [x, along], shape=x.shape, type_=x.type)
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    if x.type in ("INT64", "UINT32", "UINT64"):
        words, one = carried(build, x, WORDS, is_ordered=True), build.constant(np.array(1, np.int32))
        index = build.reshaped(top(build, words, axis, one, largest=node.op_type == "ArgMax")[1], shape)
    else:
        place = build.constant(np.array(axis, np.int32))
        inputs = [carried(build, x, _ARG_TYPES), place]
        index = build.op(_ARG[node.op_type], inputs, shape=shape, type_="INT32", outputType="INT32")
    if is_last:
        index = (_last_index(build, x, axis) - Term(build, index)).tensor
    if node.integer("keepdims", 1):
        index = build.reshaped(index, (*x.shape[:axis], 1, *x.shape[axis + 1 :]))
    return build.cast(index, "INT64")


def _last_index(build: Builder, x: Tensor, axis: int) -> Term:
    """The length of an axis less 1, as an INT32 scalar."""
    if x.shape[axis] >= 0:
        return Term(build, build.constant(np.array(x.shape[axis] - 1, np.int32)))
    return Term(build, dimension(build, x, axis)) - 1


def dimension(build: Builder, x: Tensor, axis: int) -> Tensor:
    """The length of an axis as an INT32 scalar: a constant where it is known."""
    if x.shape[axis] >= 0:
        return build.constant(np.array(x.shape[axis], np.int32))
    place = build.constant(np.array(axis, np.int32))
    return build.op("GATHER", [build.shape_of(x), place], shape=(), type_="INT32")


@TFLITE.register("TopK")
def top_k(node: NodeView, build: Builder) -> list[Tensor | None]:
    """TOPK_V2 along the last axis; of negatives for the smallest."""
    x = node.input(0)
    words = carried(build, x, WORDS, is_ordered=True)
    count = build.reshaped(build.cast(node.input(1), "INT32"), ())
    largest = bool(node.integer("largest", 1))
    values, indices = top(build, words, node.axis(x.rank, -1), count, largest=largest)
    return [returned(build, values, x.type, is_ordered=True), build.cast(indices, "INT64")]


def top(build: Builder, x: Tensor, axis: int, count: Tensor, *, largest: bool) -> tuple[Tensor, Tensor]:
    """The `count` largest or smallest numbers along an axis, in order, and their INT32 indices."""
    order = (*(place for place in range(x.rank) if place != axis), axis)
    last = build.transposed(x, order)
    if not largest:
        last = _turned(build, last)
    known = count.array()
    shape = (*last.shape[:-1], -1 if known is None else int(known))
    values, indices = build.ops("TOPK_V2", [last, count], outputs=[(shape, x.type), (shape, "INT32")])
    if not largest:
        values = _turned(build, values)
    return build.transposed(values, inverse(order)), build.transposed(indices, inverse(order))


def _turned(build: Builder, x: Tensor) -> Tensor:
    """Numbers in the opposite order. The negative of the least integer is itself, so integers go to -1 - x."""
    term = Term(build, x)
    return (-term if x.type == "FLOAT32" else -1 - term).tensor


@TFLITE.register("Hardmax")
def hardmax(node: NodeView, build: Builder) -> Tensor:
    """ARG_MAX and ONE_HOT."""
    x = node.input(0)
    axis = node.axis(x.rank, -1)
    place = build.constant(np.array(axis, np.int32))
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    index = build.op("ARG_MAX", [x, place], shape=shape, type_="INT32", outputType="INT32")
    inputs = [index, dimension(build, x, axis), build.constant(1.0), build.constant(0.0)]
    return build.op("ONE_HOT", inputs, shape=x.shape, type_="FLOAT32", axis=axis)


@TFLITE.register("OneHot")
def one_hot(node: NodeView, build: Builder) -> Tensor:
    """ONE_HOT, with `depth` added to negative indices (LESS, ADD, SELECT_V2)."""
    depth = build.reshaped(cast_to(build, node.input(1), "INT32"), ())
    index = cast_to(build, node.input(0), "INT32")
    given = Term(build, index)
    index = (given < 0).selecting(given + Term(build, depth), given).tensor
    off_and_on = node.input(2)
    type_ = off_and_on.type
    values = carried(build, off_and_on, _ONE_HOT_TYPES)
    off, on = _elements(build, values)
    axis = node.integer("axis", -1)
    axis = axis + index.rank + 1 if axis < 0 else axis
    known = depth.array()
    shape = (*index.shape[:axis], -1 if known is None else int(known), *index.shape[axis:])
    made = build.op("ONE_HOT", [index, depth, on, off], shape=shape, type_=values.type, axis=axis)
    return returned(build, made, type_)


def _elements(build: Builder, pair: Tensor) -> tuple[Tensor, Tensor]:
    """Both numbers of a vector of two, as scalars."""
    if pair.constant is not None:
        one, other = pair.constant.array()
        return build.constant(one), build.constant(other)
    places = (build.constant(np.array(place, np.int32)) for place in (0, 1))
    one, other = (build.op("GATHER", [pair, place], shape=(), type_=pair.type) for place in places)
    return one, other


@TFLITE.register("CumSum")
def cumulative_sum(node: NodeView, build: Builder) -> Tensor:
    """CUMSUM."""
    axis = build.reshaped(build.cast(node.input(1), "INT32"), ())
    is_exclusive, is_reversed = bool(node.integer("exclusive")), bool(node.integer("reverse"))

    def summed(given: list[Tensor]) -> Tensor:
        (x,) = given
        return build.op("CUMSUM", [x, axis], shape=x.shape, exclusive=is_exclusive, reverse=is_reversed)

    return computed_in(build, WORDS, [node.input(0)], summed)
