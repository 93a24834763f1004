"""Functions of one number. TFLite has few of them; the others are composed, to the accuracy of float32.

Where a textbook formula overflows too early, another one stands here. What is composed of LOG has its absolute error,
1e-7 near 1: a more careful formula (Kahan's for log(1 + x)) gains nothing in XNNPACK, whose LOG loses digits there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from onnxprune.targets.tflite.build import Builder
from onnxprune.targets.tflite.graph import Tensor
from onnxprune.targets.tflite.ops.carriers import FLOATS, carried
from onnxprune.targets.tflite.ops.formulas import Term
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

_NAMESAKES = {
    "Ceil": "CEIL",
    "Cos": "COS",
    "Exp": "EXP",
    "Floor": "FLOOR",
    "Log": "LOG",
    "Round": "ROUND",
    "Sin": "SIN",
    "Sqrt": "SQRT",
    "Tanh": "TANH",
}

# No zero, and below the rounding of whatever it is added to.
_TINY = 1e-30
# Above it, 1 + x^2 is x^2 and soon overflows; a power of two, so that dividing by it is exact.
_LARGE = 2.0**60
# erf is 1 from here on, in float32; a power of two.
_ERF_END = 4.0


@TFLITE.register(*_NAMESAKES)
def function(node: NodeView, build: Builder) -> Tensor:
    """The operator of that name."""
    return build.op(_NAMESAKES[node.op_type], [node.input(0)])


def _formula(op_type: str) -> Callable[[Callable[[Term], Term]], Callable[[Term], Term]]:
    """Register a formula of one FLOAT32 term as the emitter of `op_type`."""

    def register(formula: Callable[[Term], Term]) -> Callable[[Term], Term]:
        def emitter(node: NodeView, build: Builder) -> Tensor:
            return formula(Term(build, carried(build, node.input(0), FLOATS))).tensor

        emitter.__doc__ = formula.__doc__
        TFLITE.add(emitter, op_type)
        return formula

    return register


@_formula("Reciprocal")
def reciprocal(x: Term) -> Term:
    """DIV."""
    return 1 / x


@_formula("Tan")
def tangent(x: Term) -> Term:
    """SIN, COS, DIV."""
    return x.unary("SIN") / x.unary("COS")


@_formula("Asin")
def arcsine(x: Term) -> Term:
    """ATAN2 of x and the root of (1 - x) (1 + x)."""
    return x.binary("ATAN2", _other_side(x))


@_formula("Acos")
def arccosine(x: Term) -> Term:
    """ATAN2 of the root of (1 - x) (1 + x) and x."""
    return _other_side(x).binary("ATAN2", x)


def _other_side(x: Term) -> Term:
    return ((1 - x) * (1 + x)).unary("SQRT")


@_formula("Atan")
def arctangent(x: Term) -> Term:
    """ATAN2 of x and as many ones, since it does not broadcast (and reads beyond a single one)."""
    shape = x.tensor.shape
    ones = x.build.op("FILL", [x.build.shape_of(x.tensor), x.build.constant(1.0)], shape=shape, type_="FLOAT32")
    return x.binary("ATAN2", Term(x.build, ones))


@_formula("Cosh")
def hyperbolic_cosine(x: Term) -> Term:
    """EXP of half the magnitude, squared: it overflows no earlier than the result."""
    half = (abs(x) * 0.5).unary("EXP")
    larger = half * 0.5 * half
    return larger + 0.25 / larger


@_formula("Sinh")
def hyperbolic_sine(x: Term) -> Term:
    """TANH times the hyperbolic cosine, which keeps all digits near zero."""
    return x.unary("TANH") * hyperbolic_cosine(x)


@_formula("Asinh")
def inverse_hyperbolic_sine(x: Term) -> Term:
    """The logarithm of |x| + sqrt(x^2 + 1), with the sign of x."""
    size = abs(x)
    near = size.at_most(_LARGE)
    # The logarithm of what is above the limit, 0 for all else.
    beyond = (size.at_least(_LARGE) * (1 / _LARGE)).unary("LOG")
    return x.unary("SIGN") * ((near + (near.unary("SQUARE") + 1).unary("SQRT")).unary("LOG") + beyond)


@_formula("Acosh")
def inverse_hyperbolic_cosine(x: Term) -> Term:
    """The logarithm of x + sqrt(x - 1) sqrt(x + 1), whose roots overflow no earlier than x."""
    return (x + (x - 1).unary("SQRT") * (x + 1).unary("SQRT")).unary("LOG")


@_formula("Atanh")
def inverse_hyperbolic_tangent(x: Term) -> Term:
    """Half the logarithm of (1 + x) / (1 - x)."""
    return ((1 + x) / (1 - x)).unary("LOG") * 0.5


@_formula("Erf")
def error_function(x: Term) -> Term:
    """From GELU, which is z (1 + erf(z / sqrt(2))) / 2, to an absolute error of 4e-7."""
    limited = (x * (1 / _ERF_END)).unary("RELU_N1_TO_1")
    z = limited * (_ERF_END * math.sqrt(2)) + _TINY
    return z.unary("GELU") / z * 2 - 1
