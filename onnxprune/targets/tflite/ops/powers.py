"""Powers. Those of integers are products of integers, which wrap around: no float holds all their digits.

TFLite's POW takes FLOAT32 and INT32. It suits integers where base and result have 32 bits; beyond, or where exponents
are not integers, the power is put together from the squares x, x^2, x^4 ... that the bits of the exponent name.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Tensor, TensorType
from onnxprune.targets.tflite.ops.carriers import WORDS, carried
from onnxprune.targets.tflite.ops.casting import cast_to
from onnxprune.targets.tflite.ops.formulas import Term
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

# Beyond 63, all powers in 64 bits but those of 0, 1 and -1 are too large; of these only the parity matters.
_EXPONENT_BITS = 6
_LARGEST_EVEN_EXPONENT = 62

_SHORT: frozenset[TensorType] = frozenset({"INT8", "UINT8", "INT16", "UINT16", "INT32"})


@TFLITE.register("Pow")
def power(node: NodeView, build: Builder) -> Tensor:
    """POW; SQUARE, SQRT, MUL or DIV for the usual constant exponents; of INT64, MULs.

    An integer to a computed float is exact where that is whole, else FLOAT32's power, cut off.
    """
    base, exponent = node.input(0), node.input(1)
    single = _only_number(exponent, base.rank)
    if base.type == "FLOAT32":
        short = None if single is None else _short_power(Term(build, base), single)
        return build.binary("POW", base, cast_to(build, exponent, "FLOAT32")) if short is None else short.tensor
    x = Term(build, carried(build, base, WORDS))
    if single is not None and single.is_integer() and 0 <= single <= _LARGEST_EVEN_EXPONENT:
        return _product(x, int(single)).tensor
    return build.cast(_whole_power(x, Term(build, _integers_if_constant(build, exponent))).tensor, base.type)


def _only_number(exponent: Tensor, rank: int) -> float | None:
    if exponent.constant is None or exponent.num_elements != 1 or exponent.rank > rank:
        return None
    return float(exponent.constant.array().reshape(()))


def _short_power(x: Term, exponent: float) -> Term | None:
    powers: dict[float, Callable[[], Term]] = {
        1.0: lambda: x,
        2.0: lambda: x.unary("SQUARE"),
        3.0: lambda: x.unary("SQUARE") * x,
        0.5: lambda: x.unary("SQRT"),
        -1.0: lambda: 1 / x,
    }
    made = powers.get(exponent)
    return None if made is None else made()


def _product(x: Term, count: int) -> Term:
    """`count` times `x`, with MULs of squares."""
    if count <= 1:
        return x if count else x * 0 + 1
    half = _product(x * x, count // 2)
    return half * x if count % 2 else half


def _integers_if_constant(build: Builder, exponent: Tensor) -> Tensor:
    """Constant exponents as INT64."""
    if exponent.type == "UINT64":
        raise UnsupportedError("its exponents are UINT64, for which LiteRT has no comparisons")
    if exponent.type != "FLOAT32" or exponent.constant is None:
        return exponent
    numbers = exponent.constant.array()
    if not np.all(np.isfinite(numbers)) or np.any(numbers != np.floor(numbers)):
        raise UnsupportedError(
            "an integer to a power that is not whole is cut off at a whole number, of which FLOAT32 may fall short; "
            "cast its base to float"
        )
    # Whatever is larger is even as well.
    return build.constant(np.clip(numbers, -(2.0**62), 2.0**62).astype(np.int64))


def _whole_power(x: Term, exponent: Term) -> Term:
    if x.tensor.type == "INT32" and exponent.tensor.type in _SHORT and exponent.tensor.constant is None:
        return x.binary("POW", exponent.cast("INT32"))
    wide = x.cast("INT64")
    if exponent.tensor.type != "FLOAT32":
        return _power_by_bits(wide, _short_exponent(exponent.cast("INT64")))
    is_whole = exponent.unary("FLOOR").compared("EQUAL", exponent)
    exact = _power_by_bits(wide, _short_exponent(exponent))
    return is_whole.selecting(exact, x.cast("FLOAT32").binary("POW", exponent).cast("INT64"))


def _short_exponent(exponent: Term) -> Term:
    """As INT32, with the sign and the parity that it has, and no more than 63 either way."""
    parity = exponent % 2
    limited = exponent.at_most(parity + _LARGEST_EVEN_EXPONENT).at_least(parity - _LARGEST_EVEN_EXPONENT)
    return limited.cast("INT32")


def _power_by_bits(x: Term, exponent: Term) -> Term:
    """To a negative power, 1 and -1 are what they are to the positive one, and all others 0."""
    inverse = x.magnitude().compared("EQUAL", 1).selecting(x, 0)
    square = (exponent < 0).selecting(inverse, x)
    size, result = abs(exponent), None
    for bit in range(_EXPONENT_BITS):
        is_set = (size.binary("FLOOR_DIV", 2**bit) % 2).compared("NOT_EQUAL", 0)
        factor = is_set.selecting(square, 1)
        result = factor if result is None else result * factor
        if bit < _EXPONENT_BITS - 1:
            square = square * square
    assert result is not None  # noqa: S101 - there are bits
    return result
