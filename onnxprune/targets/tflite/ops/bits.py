"""Bits of integers. TFLite knows exclusive or and shifts to the right; the rest follows from sums."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import NUMPY_TYPES, Tensor, TensorType
from onnxprune.targets.tflite.ops.carriers import INTEGERS, bitcast, computed_in
from onnxprune.targets.tflite.ops.formulas import Term
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

_XOR_TYPES = INTEGERS - {"INT64", "UINT64"}


@TFLITE.register("BitwiseNot")
def bitwise_not(node: NodeView, build: Builder) -> Tensor:
    """BITWISE_XOR with ones everywhere."""

    def inverted(given: list[Tensor]) -> Tensor:
        (x,) = given
        ones = build.constant(np.invert(np.zeros((1,) * x.rank, NUMPY_TYPES[x.type])))
        return build.binary("BITWISE_XOR", x, ones)

    return _on_words(build, _XOR_TYPES, [node.input(0)], inverted)


@TFLITE.register("BitwiseXor")
def bitwise_xor(node: NodeView, build: Builder) -> Tensor:
    """BITWISE_XOR; of 64 bits, as pairs of INT32."""
    inputs = [node.input(0), node.input(1)]
    return _on_words(build, _XOR_TYPES, inputs, lambda pair: build.binary("BITWISE_XOR", *pair))


@TFLITE.register("BitwiseAnd")
def bitwise_and(node: NodeView, build: Builder) -> Tensor:
    """A + b - (a xor b), which counts the common bits twice, of all bits but the last; the product of the last ones."""
    inputs = [node.input(0), node.input(1)]
    return _on_words(build, {"INT32"}, inputs, lambda pair: _common(*(Term(build, one) for one in pair)).tensor)


@TFLITE.register("BitwiseOr")
def bitwise_or(node: NodeView, build: Builder) -> Tensor:
    """A + b - (a and b)."""

    def either(pair: list[Tensor]) -> Tensor:
        a, b = (Term(build, one) for one in pair)
        return (a + b - _common(a, b)).tensor

    return _on_words(build, {"INT32"}, [node.input(0), node.input(1)], either)


def _common(a: Term, b: Term) -> Term:
    # Halves, so that no sum has more than 32 bits.
    high_a, high_b = a.binary("RIGHT_SHIFT", 1), b.binary("RIGHT_SHIFT", 1)
    twice_high = high_a + high_b - high_a.binary("BITWISE_XOR", high_b)
    return twice_high + (a - high_a * 2) * (b - high_b * 2)


def _on_words(
    build: Builder,
    kernel: Collection[TensorType],
    tensors: Sequence[Tensor],
    compute: Callable[[list[Tensor]], Tensor],
) -> Tensor:
    """`compute`, which treats every bit alike or in words of 32, in a type of `kernel`, INT32 among them."""
    type_ = tensors[0].type
    if type_ in kernel:
        return compute(list(tensors))
    if type_ not in ("UINT32", "INT64", "UINT64"):
        return computed_in(build, kernel, tensors, compute)
    rank = max(tensor.rank for tensor in tensors)
    inner = () if type_ == "UINT32" else (2,)
    aligned = [build.with_rank(tensor, rank) for tensor in tensors]
    result = compute([bitcast(build, tensor, "INT32", (*tensor.shape, *inner)) for tensor in aligned])
    return bitcast(build, result, type_, result.shape[: result.rank - len(inner)])


@TFLITE.register("BitShift")
def shift(node: NodeView, build: Builder) -> Tensor:
    """RIGHT_SHIFT; to the left, MUL by a power of two, which is 2^31 shifted to the right."""
    x, count = node.input(0), node.input(1)
    if x.type == "UINT64":
        raise UnsupportedError("RIGHT_SHIFT has no UINT64")
    if node.text("direction") == "RIGHT":
        return build.binary("RIGHT_SHIFT", x, count)
    # 31 - count; UINT32 has no SUB, and XOR does the same below 32.
    places = Term(build, build.cast(count, "UINT32")).binary("BITWISE_XOR", 31)
    factor = places.number(2**31).binary("RIGHT_SHIFT", places)
    return build.cast((Term(build, build.cast(x, "UINT32")) * factor).tensor, x.type)
