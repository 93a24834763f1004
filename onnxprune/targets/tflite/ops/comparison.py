"""Comparisons and logic."""

from __future__ import annotations

import math

from onnxprune.targets.tflite.build import Builder
from onnxprune.targets.tflite.graph import Tensor, TensorType
from onnxprune.targets.tflite.ops.carriers import WORDS, carried
from onnxprune.targets.tflite.ops.formulas import Term
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

_COMPARISONS = {
    "Equal": "EQUAL",
    "Greater": "GREATER",
    "GreaterOrEqual": "GREATER_EQUAL",
    "Less": "LESS",
    "LessOrEqual": "LESS_EQUAL",
}
_EQUAL_TYPES: frozenset[TensorType] = WORDS | frozenset[TensorType]({"BOOL", "STRING"})
_LOGIC = {"And": "LOGICAL_AND", "Or": "LOGICAL_OR", "Xor": "NOT_EQUAL"}


@TFLITE.register(*_COMPARISONS)
def comparison(node: NodeView, build: Builder) -> Tensor:
    """EQUAL, GREATER, GREATER_EQUAL, LESS or LESS_EQUAL."""
    kind = _COMPARISONS[node.op_type]
    kernel = _EQUAL_TYPES if kind == "EQUAL" else WORDS
    left, right = (carried(build, node.input(place), kernel, is_ordered=kind != "EQUAL") for place in (0, 1))
    return build.binary(kind, left, right, type_="BOOL")


@TFLITE.register(*_LOGIC)
def logic(node: NodeView, build: Builder) -> Tensor:
    """LOGICAL_AND, LOGICAL_OR or NOT_EQUAL."""
    return build.binary(_LOGIC[node.op_type], node.input(0), node.input(1))


@TFLITE.register("Not")
def negation(node: NodeView, build: Builder) -> Tensor:
    """LOGICAL_NOT."""
    return build.op("LOGICAL_NOT", [node.input(0)])


@TFLITE.register("IsNaN")
def is_nan(node: NodeView, build: Builder) -> Tensor:
    """NOT_EQUAL of a number and itself."""
    x = Term(build, node.input(0))
    return x.compared("NOT_EQUAL", x).tensor


@TFLITE.register("IsInf")
def is_infinite(node: NodeView, build: Builder) -> Tensor:
    """EQUAL to infinity, of the magnitude where both signs count."""
    x = Term(build, node.input(0))
    positive, negative = node.integer("detect_positive", 1), node.integer("detect_negative", 1)
    if positive and negative:
        return abs(x).compared("EQUAL", math.inf).tensor
    # NaN equals nothing.
    return x.compared("EQUAL", math.inf if positive else -math.inf if negative else math.nan).tensor
