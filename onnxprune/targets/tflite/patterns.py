"""Formulas that exporters spell out, and that are one operator in TFLite.

    GELU         x * 1/2 * (1 + erf(x / sqrt(2))), and with tanh(sqrt(2 / pi) * (x + 0.044715 x^3)) in the place of erf
    HARD_SWISH   x * HardSigmoid(x) with slope 1/6, and x * clip(x + 3, 0, 6) / 6

The factors come in any order. The operator takes the place of the last multiplication; what led to it goes away if
nothing else reads it.

SiLU stays LOGISTIC and MUL, which is all that TFLite has for it. L2_NORMALIZATION is not used: its epsilon is fixed at
1e-6, and that of exporters is another one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxprune.graph.weights import constant_array
from onnxprune.targets.qdq.gelu import find_gelu
from onnxprune.targets.tflite.graph import OptionValue

__all__ = ["Fused", "find_fused"]

# Exporters write the constants in float16 as well: 0.798 for the square root of 2 / pi.
_TOLERANCE = 1e-3
# Multiplications between the last one and the factor that gives a formula away.
_DEPTH = 3
# Levels of products that a formula can have; a model may have thousands behind each other.
_LEVELS = _DEPTH + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """One TFLite operator of `data` that gives what a node gives."""

    kind: str
    data: ir.Value
    options: Mapping[str, OptionValue] = field(default_factory=dict)


def find_fused(node: ir.Node) -> Fused | None:
    """The operator that can stand for `node` and what leads to it; None where there is none."""
    if node.op_type not in ("Mul", "Div") or node.domain not in ("", "ai.onnx"):
        return None
    for factor in dict.fromkeys(_factors(node.outputs[0], _DEPTH)):
        maker = factor.producer()
        if maker is None:
            continue
        found = _of_erf(maker, node) or _of_tanh(maker, node) or _of_hard_sigmoid(maker, node)
        if found is not None and _has_shape_of(node.outputs[0], found.data):
            return found
    return None


def _of_erf(maker: ir.Node, last: ir.Node) -> Fused | None:
    """`maker` adds 1 to an error function."""
    erf = _plus(maker, 1.0)
    node = None if erf is None else erf.producer()
    pattern = find_gelu(node) if node is not None and node.op_type == "Erf" else None
    if pattern is None or pattern.output is not last.outputs[0]:
        return None
    return Fused(kind="GELU", data=pattern.data, options={"approximate": False})


def _of_tanh(maker: ir.Node, last: ir.Node) -> Fused | None:
    """`maker` adds 1 to a hyperbolic tangent."""
    tanh = _plus(maker, 1.0)
    node = None if tanh is None else tanh.producer()
    inner = None if node is None or node.op_type != "Tanh" else node.inputs[0]
    if inner is None:
        return None
    # sqrt(2 / pi) * (x + 0.044715 x^3): the sum is a factor, and x one of its terms.
    for factor in _factors(inner, 1):
        total = factor.producer()
        if total is None or total.op_type != "Add" or not _is_product(inner, math.sqrt(2 / math.pi), [factor]):
            continue
        for x, cubic in (total.inputs, reversed(total.inputs)):
            if x is None or cubic is None or not _is_product(cubic, 0.044715, [x, x, x]):
                continue
            if _is_product(last.outputs[0], 0.5, [x, maker.outputs[0]]):
                return Fused(kind="GELU", data=x, options={"approximate": True})
    return None


def _of_hard_sigmoid(maker: ir.Node, last: ir.Node) -> Fused | None:
    """`maker` is HardSigmoid, or clips x + 3 to 0 ... 6."""
    if maker.op_type == "HardSigmoid":
        slope, offset = maker.attributes.get_float("alpha", 0.2), maker.attributes.get_float("beta", 0.5)
        x, factor = maker.inputs[0], 1.0
        fits = math.isclose(slope, 1 / 6, rel_tol=_TOLERANCE) and math.isclose(offset, 0.5, rel_tol=_TOLERANCE)
    elif maker.op_type == "Clip" and len(maker.inputs) == 3:
        shifted = None if maker.inputs[0] is None else maker.inputs[0].producer()
        x, factor = None if shifted is None else _plus(shifted, 3.0), 1 / 6
        fits = _number(maker.inputs[1]) == 0.0 and _number(maker.inputs[2]) == 6.0
    else:
        return None
    if x is None or not fits or not _is_product(last.outputs[0], factor, [x, maker.outputs[0]]):
        return None
    return Fused(kind="HARD_SWISH", data=x)


def _factors(value: ir.Value, depth: int) -> Iterator[ir.Value]:
    """What `value` is a product of, at every level down to `depth`."""
    node = value.producer()
    if depth and node is not None and node.op_type in ("Mul", "Div"):
        for operand in node.inputs[: 2 if node.op_type == "Mul" else 1]:
            if operand is not None:
                yield operand
                yield from _factors(operand, depth - 1)


def _is_product(value: ir.Value, number: float, factors: list[ir.Value]) -> bool:
    """Is `value` the product of `number` and exactly these `factors`?"""
    missing = list(factors)
    found = _number_within(value, missing, _LEVELS)
    return found is not None and not missing and math.isclose(found, number, rel_tol=_TOLERANCE)


def _number_within(value: ir.Value | None, missing: list[ir.Value], levels: int) -> float | None:
    """The constant factor of `value`; what else it is made of is taken out of `missing`.

    None: it is made of something else, or in more than so many `levels`.
    """
    if value is None:
        return None
    place = next((index for index, one in enumerate(missing) if one is value), None)
    if place is not None:
        del missing[place]
        return 1.0
    number = _number(value)
    node = value.producer()
    if number is not None or node is None or not levels:
        return number
    if node.op_type == "Mul":
        left = _number_within(node.inputs[0], missing, levels - 1)
        right = None if left is None else _number_within(node.inputs[1], missing, levels - 1)
        return None if left is None or right is None else left * right
    second = _number(node.inputs[1]) if len(node.inputs) == 2 else None
    if node.op_type == "Div" and second:
        left = _number_within(node.inputs[0], missing, levels - 1)
        return None if left is None else left / second
    if node.op_type == "Pow" and second in (2.0, 3.0):
        powers = [_number_within(node.inputs[0], missing, levels - 1) for _ in range(int(second))]
        return None if None in powers else math.prod(power for power in powers if power is not None)
    return None


def _plus(node: ir.Node, number: float) -> ir.Value | None:
    """What `node` adds `number` to."""
    if node.op_type != "Add":
        return None
    first, second = node.inputs
    if _number(second) == number:
        return first
    return second if _number(first) == number else None


def _number(value: ir.Value | None) -> float | None:
    """The number of a constant with one element."""
    array = constant_array(value) if value is not None and _is_single(value) else None
    return None if array is None else float(array.reshape(-1)[0])


def _is_single(value: ir.Value) -> bool:
    """Looks at the shape first: big weights are not loaded to be found out."""
    shape = value.shape
    return shape is not None and all(dim == 1 for dim in shape)


def _has_shape_of(value: ir.Value, other: ir.Value) -> bool:
    """A constant of shape (1, 1) gives a vector an axis."""
    return value.shape is not None and other.shape is not None and value.shape.rank() == other.shape.rank()
