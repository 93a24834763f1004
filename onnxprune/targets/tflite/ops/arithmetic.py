"""Sums, products, quotients, remainders, extremes and signs, of floats and of integers.

Integers wrap around as ONNX's do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np

from onnxprune.targets.tflite.build import Builder
from onnxprune.targets.tflite.graph import Tensor, TensorType
from onnxprune.targets.tflite.ops.carriers import (
    EXTREME_TYPES,
    INTEGERS,
    UNSIGNED,
    WORDS,
    carried,
    computed_in,
    returned,
)
from onnxprune.targets.tflite.ops.casting import cast_to
from onnxprune.targets.tflite.ops.formulas import Term
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

_BINARY = {"Add": "ADD", "Sub": "SUB", "Mul": "MUL"}
_EXTREMES = {"Max": "MAXIMUM", "Min": "MINIMUM"}
_DIV_TYPES: frozenset[TensorType] = frozenset({"FLOAT32", "INT32"})
# Float32 divides to 2^-22, and a quotient has at most 63 bits.
_QUOTIENT_ROUNDS = 3
_LEAST = int(np.iinfo(np.int64).min)


@TFLITE.register(*_BINARY)
def sum_difference_or_product(node: NodeView, build: Builder) -> Tensor:
    """ADD, SUB or MUL."""
    kind = _BINARY[node.op_type]
    return computed_in(build, WORDS, [node.input(0), node.input(1)], lambda pair: build.binary(kind, *pair))


@TFLITE.register("Div")
def quotient(node: NodeView, build: Builder) -> Tensor:
    """DIV; of wide integers, which it lacks, FLOOR_MOD and long division in FLOAT32 (exact)."""
    dividend, divisor = node.input(0), node.input(1)
    type_ = dividend.type
    if type_ not in ("INT64", "UINT32", "UINT64"):
        return computed_in(build, _DIV_TYPES, [dividend, divisor], lambda pair: build.binary("DIV", *pair))
    a, b = (Term(build, carried(build, tensor, WORDS)) for tensor in (dividend, divisor))
    if type_ == "UINT64":
        return returned(build, _division_of_64_bits(a, b).tensor, type_)
    return returned(build, _long_division(a, b, is_signed=type_ == "INT64").tensor, type_)


def _long_division(a: Term, b: Term, *, is_signed: bool) -> Term:
    """The INT64 quotient, rounded towards zero.

    Without its remainder, `a` is a multiple of `b`; each round divides what is left of it, to a 2^-22nd part.
    """
    remainder = a % b
    if is_signed:
        # FLOOR_MOD's has the sign of b; rounding towards zero needs that of a.
        differ = (a < 0).binary("NOT_EQUAL", b < 0).binary("LOGICAL_AND", remainder.compared("NOT_EQUAL", 0))
        remainder = remainder - differ.cast("INT64") * b
    left, divisor = a - remainder, b.cast("FLOAT32")
    parts: list[Term] = []
    for _ in range(_QUOTIENT_ROUNDS):
        parts.append((left.cast("FLOAT32") / divisor).unary("ROUND").cast("INT64"))
        left = left - parts[-1] * b
    return reduce(Term.__add__, parts)


def _division_of_64_bits(a: Term, b: Term) -> Term:
    """The quotient of UINT64 numbers, whose bits INT64 holds: from 2^63 on they look negative.

    Half the dividend looks positive, and twice its quotient is at most one too small. By a divisor from 2^63 on, the
    quotient is 0 or 1.
    """
    half = _long_division(a, a.number(2), is_signed=False) + (a < 0).cast("INT64") * _LEAST
    twice = _long_division(half, b, is_signed=False) * 2
    nearly = twice + _is_no_smaller(a - twice * b, b).cast("INT64")
    return (b < 0).selecting(_is_no_smaller(a, b).cast("INT64"), nearly)


def _is_no_smaller(a: Term, b: Term) -> Term:
    return (a + _LEAST).compared("GREATER_EQUAL", b + _LEAST)


@TFLITE.register("Mod")
def remainder(node: NodeView, build: Builder) -> Tensor:
    """FLOOR_MOD, which has the divisor's sign; with `fmod`, of the magnitudes, and the dividend's sign then."""
    dividend, divisor = node.input(0), node.input(1)
    type_ = dividend.type
    a, b = (Term(build, carried(build, tensor, WORDS)) for tensor in (dividend, divisor))
    if type_ == "UINT64":
        return returned(build, (a - _division_of_64_bits(a, b) * b).tensor, type_)
    if not node.integer("fmod") or type_ in UNSIGNED:
        return returned(build, (a % b).tensor, type_)
    size = a.magnitude() % b.magnitude()
    return returned(build, (a < 0).selecting(-size, size).tensor, type_)


@TFLITE.register(*_EXTREMES)
def extreme(node: NodeView, build: Builder) -> Tensor:
    """MAXIMUM or MINIMUM, one less than there are inputs."""
    kind = _EXTREMES[node.op_type]
    return _folded(node, build, EXTREME_TYPES, lambda one, other: build.binary(kind, one, other), is_ordered=True)


@TFLITE.register("Sum")
def sum_of_inputs(node: NodeView, build: Builder) -> Tensor:
    """ADD, one less than there are inputs."""
    return _sum(node, build)


def _sum(node: NodeView, build: Builder) -> Tensor:
    return _folded(node, build, WORDS, lambda one, other: build.binary("ADD", one, other))


@TFLITE.register("Mean")
def mean_of_inputs(node: NodeView, build: Builder) -> Tensor:
    """ADD, one less than there are inputs, and MUL."""
    total = _sum(node, build)
    return total if len(node.inputs) == 1 else (Term(build, total) * (1 / len(node.inputs))).tensor


def _folded(
    node: NodeView,
    build: Builder,
    kernel: frozenset[TensorType],
    combine: Callable[[Tensor, Tensor], Tensor],
    *,
    is_ordered: bool = False,
) -> Tensor:
    inputs = [node.input(position) for position in range(len(node.inputs))]
    if len(inputs) == 1:
        return inputs[0]
    return computed_in(build, kernel, inputs, lambda given: reduce(combine, given), is_ordered=is_ordered)


@TFLITE.register("Neg")
def negative(node: NodeView, build: Builder) -> Tensor:
    """NEG."""
    return computed_in(build, WORDS, [node.input(0)], lambda one: build.op("NEG", one))


@TFLITE.register("Abs")
def magnitude(node: NodeView, build: Builder) -> Tensor:
    """ABS; of INT64, which it lacks, MAXIMUM of the number and its negative."""
    x = node.input(0)
    return (
        x if x.type in UNSIGNED else computed_in(build, WORDS, [x], lambda one: Term(build, one[0]).magnitude().tensor)
    )


@TFLITE.register("Sign")
def sign(node: NodeView, build: Builder) -> Tensor:
    """SIGN; of integers the number, limited to -1 and 1."""
    x = node.input(0)
    if x.type not in INTEGERS:
        return build.op("SIGN", [x])
    if x.type in UNSIGNED:
        nonzero = Term(build, carried(build, x, WORDS)).compared("NOT_EQUAL", 0)
        return cast_to(build, nonzero.tensor, x.type)
    return computed_in(build, WORDS, [x], lambda one: Term(build, one[0]).at_least(-1).at_most(1).tensor)
