"""Reductions over axes.

Axes are kept, and dropped by a RESHAPE behind: the reduction itself can be permuted then. Without any axis nothing is
reduced, but squares, roots and logarithms are taken all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import NUMPY_TYPES, Shape, Tensor, TensorType
from onnxprune.targets.tflite.ops.carriers import EXTREME_TYPES, FLOATS, WORDS, computed_in
from onnxprune.targets.tflite.ops.formulas import Term
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

_PLAIN = {"ReduceSum": "SUM", "ReduceMean": "MEAN", "ReduceProd": "REDUCE_PROD"}
_EXTREMES = {"ReduceMax": "REDUCE_MAX", "ReduceMin": "REDUCE_MIN"}
_OF_BOOLEANS = {"ReduceMax": "REDUCE_ANY", "ReduceMin": "REDUCE_ALL"}
# Close to the largest float32.
_FINITE = 3.4e38


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axes:
    """What a node reduces over; `numbers` is None where `tensor` is computed."""

    tensor: Tensor
    numbers: tuple[int, ...] | None
    is_kept: bool
    declared: Shape | None
    """What shape inference found for the result."""

    def of(self, x: Term, kind: str) -> Term:
        """A reduction that keeps the axes."""
        if self.numbers == ():
            return x
        dims = x.tensor.shape
        numbers = range(len(dims)) if self.numbers is None else self.numbers
        known = 1 if self.numbers is not None else -1
        shape = tuple(known if axis in numbers else dim for axis, dim in enumerate(dims))
        return Term(x.build, x.build.op(kind, [x.tensor, self.tensor], shape=shape, type_=x.tensor.type, keepDims=True))

    def finished(self, build: Builder, reduced: Tensor) -> Tensor:
        """Without the axes, where they are not kept."""
        if self.is_kept:
            return reduced
        if self.numbers is not None:
            return build.squeezed(reduced, self.numbers)
        if self.declared is not None and self.declared.count(-1) <= 1:
            return build.reshaped(reduced, self.declared)
        # Over axes of length 1, any reduction only drops them.
        rank = reduced.rank - self.tensor.shape[0]
        kind = "REDUCE_ANY" if reduced.type == "BOOL" else "REDUCE_MAX"
        return build.op(kind, [reduced, self.tensor], shape=(-1,) * rank, type_=reduced.type)


def _axes(node: NodeView, build: Builder) -> _Axes:
    rank, given = node.input(0).rank, node.optional(1)
    numbers: tuple[int, ...] | None
    if given is None or given.shape == (0,):
        numbers = () if node.integer("noop_with_empty_axes") else tuple(range(rank))
    elif given.constant is not None:
        numbers = tuple(sorted({int(axis) % rank for axis in given.constant.array()}))
    elif -1 in given.shape:
        raise UnsupportedError("only the run knows how many axes it reduces, and none may mean all")
    else:
        numbers = None
    return _Axes(
        tensor=build.cast(given, "INT32")
        if given is not None and numbers is None
        else build.constant(np.array(numbers, np.int32)),
        numbers=numbers,
        is_kept=bool(node.integer("keepdims", 1)),
        declared=node.output_shape(),
    )


def _reduction(
    node: NodeView,
    build: Builder,
    kernel: Collection[TensorType],
    compute: Callable[[Term, _Axes], Term],
    *,
    is_ordered: bool = False,
) -> Tensor:
    axes = _axes(node, build)

    def reduced(given: list[Tensor]) -> Tensor:
        return axes.finished(build, compute(Term(build, given[0]), axes).tensor)

    return computed_in(build, kernel, [node.input(0)], reduced, is_ordered=is_ordered)


@TFLITE.register(*_PLAIN)
def sum_mean_or_product(node: NodeView, build: Builder) -> Tensor:
    """SUM, MEAN or REDUCE_PROD. MEAN adds integers as INT64, and cuts the quotient off."""
    if node.op_type == "ReduceMean" and node.input(0).type == "UINT64":
        raise UnsupportedError("MEAN has no UINT64, and no other type holds its numbers")
    return _reduction(node, build, WORDS, lambda x, axes: axes.of(x, _PLAIN[node.op_type]))


@TFLITE.register(*_EXTREMES)
def extreme(node: NodeView, build: Builder) -> Tensor:
    """REDUCE_MAX or REDUCE_MIN; of BOOL, REDUCE_ANY or REDUCE_ALL."""
    if node.input(0).type == "BOOL":
        return _reduction(node, build, {"BOOL"}, lambda x, axes: axes.of(x, _OF_BOOLEANS[node.op_type]))
    kind = _EXTREMES[node.op_type]
    if 0 in node.input(0).shape:
        return build.constant(_extremes_of_none(node, kind), node.input(0).type)
    return _reduction(node, build, EXTREME_TYPES, lambda x, axes: axes.of(x, kind), is_ordered=True)


def _extremes_of_none(node: NodeView, kind: str) -> npt.NDArray[Any]:
    """The result for a tensor without elements; the kernels take the largest finite number for infinity."""
    shape, type_ = node.output_shape(), node.input(0).type
    if shape is None or -1 in shape:
        raise UnsupportedError("its input has no elements, and what shape its result has is not known")
    is_largest = kind == "REDUCE_MAX"
    if type_ == "FLOAT32":
        return np.full(shape, -np.inf if is_largest else np.inf)
    limits = np.iinfo(NUMPY_TYPES[type_])
    return np.full(shape, limits.min if is_largest else limits.max, NUMPY_TYPES[type_])


@TFLITE.register("ReduceL1")
def sum_of_magnitudes(node: NodeView, build: Builder) -> Tensor:
    """ABS and SUM."""
    return _reduction(node, build, WORDS, lambda x, axes: axes.of(x.magnitude(), "SUM"))


@TFLITE.register("ReduceSumSquare")
def sum_of_squares(node: NodeView, build: Builder) -> Tensor:
    """SQUARE (MUL of integers) and SUM."""
    return _reduction(node, build, WORDS, lambda x, axes: axes.of(_square(x), "SUM"))


@TFLITE.register("ReduceL2")
def euclidean_norm(node: NodeView, build: Builder) -> Tensor:
    """SQUARE, SUM and SQRT."""
    return _reduction(node, build, FLOATS, lambda x, axes: axes.of(_square(x), "SUM").unary("SQRT"))


@TFLITE.register("ReduceLogSum")
def logarithm_of_sum(node: NodeView, build: Builder) -> Tensor:
    """SUM and LOG."""
    return _reduction(node, build, FLOATS, lambda x, axes: axes.of(x, "SUM").unary("LOG"))


@TFLITE.register("ReduceLogSumExp")
def logarithm_of_sum_of_powers(node: NodeView, build: Builder) -> Tensor:
    """REDUCE_MAX, and SUB, EXP, SUM, LOG and ADD: the largest number is taken out, so that nothing overflows."""

    def compute(x: Term, axes: _Axes) -> Term:
        # An infinite maximum would give infinity less infinity.
        largest = axes.of(x, "REDUCE_MAX").at_least(-_FINITE).at_most(_FINITE)
        return axes.of((x - largest).unary("EXP"), "SUM").unary("LOG") + largest

    return _reduction(node, build, FLOATS, compute)


def _square(x: Term) -> Term:
    return x.unary("SQUARE") if x.tensor.type == "FLOAT32" else x * x
