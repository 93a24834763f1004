"""Element by element: what the official cases don't cover, in LiteRT against ONNX Runtime or NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune.errors import TargetError

pytest.importorskip("ai_edge_litert")

from tests.tflite_runs import assert_same_as_ort, emitted, kinds, litert_outputs, one_node

Array = npt.NDArray[Any]

FLOAT_ROUNDINGS = 2e-6
"""A dozen roundings of float32."""


def spread(seed: int = 0, shape: Sequence[int] = (3, 4, 50), scale: float = 3.0) -> Array:
    return (np.random.default_rng(seed).normal(size=tuple(shape)) * scale).astype(np.float32)


def integers(dtype: npt.DTypeLike, seed: int, shape: Sequence[int] = (2, 3, 40)) -> Array:
    """Numbers over the whole range of the type, its ends among them."""
    limits = np.iinfo(dtype)
    numbers = np.random.default_rng(seed).integers(limits.min, limits.max, tuple(shape), dtype, endpoint=True)
    numbers.flat[:2] = limits.min, limits.max
    return numbers


def computed(op_type: str, feeds: dict[str, Array], output_type: int, **attributes: Any) -> Array:
    model = emitted(one_node(op_type, feeds, output_type=output_type, **attributes))
    return litert_outputs(model, feeds)["y"]


WRAPPING = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}
INTEGER_TYPES = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]


@pytest.mark.parametrize("dtype", INTEGER_TYPES)
@pytest.mark.parametrize("op_type", WRAPPING)
def test_integer_sums_and_products_wrap_around(op_type: str, dtype: type[np.generic]) -> None:
    a, b = integers(dtype, 1), integers(dtype, 2, (3, 1))
    with np.errstate(over="ignore"):
        expected = WRAPPING[op_type](a, b)
    made = computed(op_type, {"a": a, "b": b}, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    np.testing.assert_array_equal(made, expected)


ORDERED = {"Max": np.maximum, "Min": np.minimum, "Less": np.less, "GreaterOrEqual": np.greater_equal, "Equal": np.equal}


@pytest.mark.parametrize("dtype", INTEGER_TYPES)
@pytest.mark.parametrize("op_type", ORDERED)
def test_integers_compare_over_the_whole_range_of_their_type(op_type: str, dtype: type[np.generic]) -> None:
    a, b = integers(dtype, 1), integers(dtype, 2)
    b[0] = a[0]
    expected = ORDERED[op_type](a, b)
    made = computed(op_type, {"a": a, "b": b}, helper.np_dtype_to_tensor_dtype(expected.dtype))
    np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize("op_type", ["Div", "Mod"])
def test_quotients_and_remainders_of_64_bits_are_exact_over_the_whole_range(op_type: str) -> None:
    rng, largest = np.random.default_rng(4), 2**64 - 1
    edges = [0, 1, 2, 3, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**63 + 1, largest - 1, largest]
    numbers = [*edges, *(int(2.0**exponent) for exponent in rng.uniform(0, 63.9, 60))]
    pairs = [(a, b) for a in numbers for b in numbers if b]
    a, b = (np.array(column, np.uint64) for column in zip(*pairs, strict=True))
    expected = [one // other if op_type == "Div" else one % other for one, other in pairs]
    made = computed(op_type, {"a": a, "b": b}, TensorProto.UINT64)
    np.testing.assert_array_equal(made, np.array(expected, np.uint64))


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
def test_integer_quotients_are_rounded_towards_zero(dtype: type[np.generic]) -> None:
    shape = (40, 50)
    rng = np.random.default_rng(3)
    # All magnitudes alike; halves of the range, since the most negative number has no negative.
    bits = np.iinfo(dtype).bits - 1
    dividend = np.floor(2.0 ** rng.uniform(0, bits - 0.01, shape)).astype(dtype)
    divisor = np.floor(2.0 ** rng.uniform(0, bits - 0.01, shape)).astype(dtype)
    dividend[::3] = divisor[::3] * 2
    if np.iinfo(dtype).min < 0:
        dividend, divisor = dividend * rng.choice([-1, 1], shape), divisor * rng.choice([-1, 1], shape)
        dividend, divisor = dividend.astype(dtype), divisor.astype(dtype)
    whole = [int(a) // int(b) if (a < 0) == (b < 0) else -(abs(int(a)) // abs(int(b)))
             for a, b in zip(dividend.flat, divisor.flat, strict=True)]  # fmt: skip
    made = computed("Div", {"a": dividend, "b": divisor}, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    np.testing.assert_array_equal(made, np.array(whole, dtype).reshape(shape))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.float32])
@pytest.mark.parametrize("fmod", [0, 1])
def test_remainders_have_the_sign_of_the_divisor_and_with_fmod_of_the_dividend(
    fmod: int, dtype: type[np.generic]
) -> None:
    is_float = np.dtype(dtype).kind == "f"
    if is_float and not fmod:
        pytest.skip("ONNX has no such remainder of floats")
    a = spread(1) if is_float else integers(dtype, 1) // 2
    b = spread(2) if is_float else integers(dtype, 2)
    b = np.where(np.abs(b) < 1, 1, b).astype(dtype)
    made = computed("Mod", {"a": a, "b": b}, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), fmod=fmod)
    expected = (np.fmod if fmod else np.mod)(a, b)
    # A float remainder may lie on either side of a multiple: its error is that of the dividend.
    np.testing.assert_allclose(made, expected, rtol=0, atol=FLOAT_ROUNDINGS * 10 if is_float else 0)


BITS = {"BitwiseAnd": np.bitwise_and, "BitwiseOr": np.bitwise_or, "BitwiseXor": np.bitwise_xor}


@pytest.mark.parametrize("dtype", INTEGER_TYPES)
@pytest.mark.parametrize("op_type", BITS)
def test_bits_of_integers_of_every_width(op_type: str, dtype: type[np.generic]) -> None:
    a, b = integers(dtype, 1), integers(dtype, 2, (3, 1))
    made = computed(op_type, {"a": a, "b": b}, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    np.testing.assert_array_equal(made, BITS[op_type](a, b))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
def test_shifts_by_less_than_the_width(direction: str, dtype: type[np.generic]) -> None:
    x = integers(dtype, 1)
    count = np.random.default_rng(2).integers(0, np.iinfo(dtype).bits, x.shape).astype(dtype)
    made = computed(
        "BitShift", {"a": x, "b": count}, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), direction=direction
    )
    np.testing.assert_array_equal(made, (np.left_shift if direction == "LEFT" else np.right_shift)(x, count))


DOMAINS: dict[str, Array] = {
    "Erf": np.linspace(-6, 6, 2001),
    "Sinh": np.concatenate([np.linspace(-89, 89, 999), np.geomspace(1e-8, 1, 500)]),
    "Cosh": np.linspace(-89, 89, 2001),
    "Asinh": np.concatenate([np.geomspace(1e-8, 1e30, 1000), -np.geomspace(1e-8, 1e30, 1000), [0]]),
    "Acosh": np.concatenate([1 + np.geomspace(1e-5, 1, 500), np.geomspace(2, 1e30, 500), [1]]),
    "Atanh": np.concatenate([np.linspace(-0.999, 0.999, 999), np.geomspace(1e-8, 0.1, 500)]),
    "Asin": np.linspace(-1, 1, 2001),
    "Acos": np.linspace(-1, 1, 2001),
    "Atan": np.concatenate([np.linspace(-20, 20, 2001), [1e30, -1e30]]),
    "Tan": np.linspace(-1.5, 1.5, 2001),
    "Softplus": np.linspace(-60, 100, 2001),
    "Mish": np.linspace(-60, 100, 2001),
    "Softsign": np.linspace(-60, 100, 2001),
}
ABSOLUTE = {"Erf": 4e-7, "Acos": 3e-7, "Softplus": 2e-7, "Asinh": 2e-7, "Acosh": 2e-7, "Atanh": 2e-7}
"""Where the result cancels towards zero; the others keep their digits however small they are."""


@pytest.mark.parametrize("op_type", DOMAINS)
def test_composed_functions_are_those_of_onnx_runtime_to_float32(op_type: str) -> None:
    feeds = {"x": DOMAINS[op_type].astype(np.float32)}
    # XNNPACK's EXP is 2.5e-6 off at 44, of which the hyperbolic functions take the square.
    assert_same_as_ort(one_node(op_type, feeds), feeds, relative=6e-6, absolute=ABSOLUTE.get(op_type, 1e-30))


def test_erf_of_infinities_and_of_zero_is_exact() -> None:
    x = np.array([-np.inf, np.inf, 0, 5, -5], np.float32)
    np.testing.assert_array_equal(computed("Erf", {"x": x}, TensorProto.FLOAT), [-1, 1, 0, 1, -1])


ACTIVATIONS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("Elu", {"alpha": 1.0}, ["ELU"]),
    ("Elu", {"alpha": 0.3}, ["ELU", "LEAKY_RELU"]),
    ("Selu", {}, ["ELU", "LEAKY_RELU", "MUL"]),
    ("Celu", {"alpha": 2.5}, ["MUL", "ELU", "MUL"]),
    ("LeakyRelu", {"alpha": 0.2}, ["LEAKY_RELU"]),
    ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, ["ADD", "MUL"]),
    ("HardSigmoid", {}, ["MUL", "ADD", "MUL"]),
    ("HardSwish", {}, ["HARD_SWISH"]),
    ("Gelu", {}, ["GELU"]),
    ("Gelu", {"approximate": "tanh"}, ["GELU"]),
    ("Shrink", {"lambd": 1.0, "bias": 0.5}, ["LESS", "ADD", "SELECT_V2", "GREATER", "SUB", "SELECT_V2"]),
    ("ThresholdedRelu", {"alpha": 0.7}, ["GREATER", "SELECT_V2"]),
]


@pytest.mark.parametrize(("op_type", "attributes", "expected"), ACTIVATIONS)
def test_activation_is_that_of_onnx_runtime_in_few_operators(
    op_type: str, attributes: dict[str, Any], expected: list[str]
) -> None:
    feeds = {"x": spread()}
    model = one_node(op_type, feeds, dynamic={"x": (0,)}, **attributes)
    assert kinds(assert_same_as_ort(model, feeds, relative=FLOAT_ROUNDINGS, absolute=1e-6)) == expected


CLIPS: list[tuple[float | None, float | None, list[str]]] = [
    (0.0, 6.0, ["RELU6"]),
    (0.0, 1.0, ["RELU_0_TO_1"]),
    (-1.0, 1.0, ["RELU_N1_TO_1"]),
    (0.0, None, ["RELU"]),
    (None, 2.0, ["MINIMUM"]),
    (-2.0, 0.5, ["MAXIMUM", "MINIMUM"]),
]


@pytest.mark.parametrize(("low", "high", "expected"), CLIPS)
def test_constant_limits_that_an_activation_has_become_it(
    low: float | None, high: float | None, expected: list[str]
) -> None:
    limits = {name: np.array(limit, np.float32) for name, limit in (("l", low), ("h", high)) if limit is not None}
    inputs = ["x", "l" if low is not None else "", "h" if high is not None else ""]
    feeds = {"x": spread()}
    model = one_node("Clip", feeds, constants=limits, inputs=inputs)
    assert kinds(assert_same_as_ort(model, feeds, relative=0, absolute=0)) == expected


def test_the_largest_number_as_a_limit_makes_infinity_finite() -> None:
    feeds = {"x": np.array([-np.inf, 1], np.float32)}
    least = np.array(np.finfo(np.float32).min)
    assert_same_as_ort(one_node("Clip", feeds, constants={"l": least}), feeds, relative=0, absolute=0)


POWERS: list[tuple[float, list[str]]] = [
    (2.0, ["SQUARE"]),
    (3.0, ["SQUARE", "MUL"]),
    (0.5, ["SQRT"]),
    (-1.0, ["DIV"]),
    (1.7, ["POW"]),
]


@pytest.mark.parametrize(("exponent", "expected"), POWERS)
def test_powers_with_an_operator_of_their_own_use_it(exponent: float, expected: list[str]) -> None:
    feeds = {"x": np.abs(spread()) + 0.1}
    model = one_node("Pow", feeds, constants={"e": np.array(exponent, np.float32)})
    assert kinds(assert_same_as_ort(model, feeds, relative=FLOAT_ROUNDINGS, absolute=0)) == expected


# Their powers up to 63 wrap around, or stay below 2^63; beyond, only the parity counts.
BASES = [0, 1, -1, 2, -2, 3, -7, 10, 12345, -(2**40) - 1, 2**62 + 5]
EXPONENTS = [0, 1, 2, 3, 5, 7, 13, 31, 39, 62, 63, 2**20, 2**20 + 1]


def wrapped_powers(bases: Sequence[int], exponents: Sequence[int], bits: int) -> Array:
    half = 2 ** (bits - 1)
    rows = [[(pow(base, exponent, 2 * half) + half) % (2 * half) - half for exponent in exponents] for base in bases]
    return np.array(rows, f"int{bits}")


@pytest.mark.parametrize("exponent_type", [np.int32, np.int64, np.uint32, np.float32])
@pytest.mark.parametrize("is_constant", [False, True])
def test_powers_of_64_bits_keep_all_digits(is_constant: bool, exponent_type: type[np.generic]) -> None:
    bases, exponents = [base for base in BASES if abs(base) < 2], EXPONENTS
    x, e = np.array(BASES).reshape(-1, 1), np.array(EXPONENTS[:11], exponent_type)
    expected = wrapped_powers(BASES, EXPONENTS[:11], 64)
    for given, exponent, wanted in (
        (x, e, expected),
        (np.array(bases).reshape(-1, 1), np.array(exponents, exponent_type), wrapped_powers(bases, exponents, 64)),
    ):
        fed = {"x": given} if is_constant else {"x": given, "e": exponent}
        constants = {"e": exponent} if is_constant else {}
        model = emitted(one_node("Pow", fed, constants=constants, output_type=TensorProto.INT64))
        np.testing.assert_array_equal(litert_outputs(model, fed)["y"], wanted)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 6, 21])
def test_constant_whole_powers_of_integers_are_products(exponent: int, dtype: type[np.generic]) -> None:
    x = np.array([0, 1, -1, 3, -5, 46340, 2**31 - 1], dtype)
    fed, constants = {"x": x}, {"e": np.array(exponent, np.float32)}
    type_ = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = emitted(one_node("Pow", fed, constants=constants, output_type=type_))
    expected = wrapped_powers(x.tolist(), [exponent], np.iinfo(dtype).bits)[:, 0]
    np.testing.assert_array_equal(litert_outputs(model, fed)["y"], expected)
    assert set(kinds(model)) <= {"MUL", "ADD", "RESHAPE"}


def test_negative_powers_of_integers_are_cut_off_at_zero() -> None:
    x, e = np.array([1, -1, -1, 2, -3]), np.array([-4, -4, -3, -1, -60])
    made = computed("Pow", {"x": x, "e": e}, TensorProto.INT64)
    np.testing.assert_array_equal(made, [1, 1, -1, 0, 0])


def test_computed_powers_that_are_not_whole_are_those_of_float32() -> None:
    x, e = np.array([2, 10, 1000, 5]), np.array([0.5, 2.5, 1.25, 2.0], np.float32)
    made = computed("Pow", {"x": x, "e": e}, TensorProto.INT64)
    np.testing.assert_array_equal(made, [1, 316, 5623, 25])


def test_slopes_by_channel_stay_one_operator() -> None:
    feeds = {"x": spread(shape=(2, 5, 4, 3))}
    slopes = spread(1, (5, 1, 1))
    model = one_node("PRelu", feeds, constants={"s": slopes}, dynamic={"x": (0,)})
    assert kinds(assert_same_as_ort(model, feeds, relative=0, absolute=0)) == ["PRELU"]


CASTS: list[tuple[npt.DTypeLike, npt.DTypeLike]] = [
    (np.float32, np.int8),
    (np.float32, np.bool_),
    (np.float32, np.float16),
    (np.float64, np.int64),
    (np.int64, np.uint8),
    (np.uint64, np.float32),
    (np.uint64, np.int32),
    (np.int32, np.uint64),
    (np.uint64, np.bool_),
    (np.bool_, np.float32),
]


@pytest.mark.parametrize(("source", "wanted"), CASTS)
def test_casts_are_those_of_onnx_runtime(source: npt.DTypeLike, wanted: npt.DTypeLike) -> None:
    if np.dtype(source).kind == "f":
        x = (spread() * 9).astype(source)
    else:
        x = (spread() > 0) if source is np.bool_ else integers(source, 1)
    feeds = {"x": np.asarray(x)}
    type_ = helper.np_dtype_to_tensor_dtype(np.dtype(wanted))
    # 64 bits become the nearest float32 by way of two words: one rounding more.
    assert_same_as_ort(one_node("Cast", feeds, output_type=type_, to=type_), feeds, relative=2e-7, absolute=0)


REFUSED: list[tuple[str, dict[str, Array], int, dict[str, Any], str]] = [
    ("Cast", {"x": np.ones(2, np.float32)}, TensorProto.UINT64, {"to": TensorProto.UINT64}, "CAST has no UINT64"),
    ("Cast", {"x": np.ones(2, np.float32)}, TensorProto.INT4, {"to": TensorProto.INT4}, "does not write"),
    (
        "Pow",
        {"x": np.ones(2, np.int64), "e": np.ones(2, np.uint64)},
        TensorProto.INT64,
        {},
        "exponents are UINT64",
    ),
    ("Shrink", {"x": np.ones(2, np.int32)}, TensorProto.INT32, {}, "no kernel for INT32"),
]


@pytest.mark.parametrize(("op_type", "feeds", "output_type", "attributes", "reason"), REFUSED)
def test_what_no_kernel_computes_is_refused_with_the_reason(
    op_type: str, feeds: dict[str, Array], output_type: int, attributes: dict[str, Any], reason: str
) -> None:
    model = one_node(op_type, feeds, output_type=output_type, **attributes)
    with pytest.raises(TargetError, match=reason):
        emitted(model)


def string_model(nodes: str, initializers: str = "") -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 23]> g (string[2] a, string[2] b) => (y) {initializers} {{ {nodes} }}'
    )


@pytest.mark.parametrize(
    ("nodes", "initializers", "reason"),
    [
        ("t = Transpose(a) y = Equal(t, b)", "", "Transpose.*: its input is a tensor of strings"),
        ("y = Equal(a, c)", '<string[1] c = {"x"}>', "'c' is a constant of strings"),
    ],
)
def test_strings_that_are_not_just_compared_are_refused(nodes: str, initializers: str, reason: str) -> None:
    with pytest.raises(TargetError, match=reason):
        emitted(string_model(nodes, initializers))


def test_an_integer_to_a_constant_broken_power_is_refused() -> None:
    constants = {"e": np.array([2.0, 0.5], np.float32)}
    model = one_node("Pow", {"x": np.ones(2, np.int64)}, constants=constants, output_type=TensorProto.INT64)
    with pytest.raises(TargetError, match="cast its base to float"):
        emitted(model)


def test_dropout_in_training_drops_its_ratio_and_scales_the_rest() -> None:
    x = np.abs(spread(shape=(100, 200))) + 1
    constants = {"ratio": np.array(0.25, np.float32), "training": np.array(True)}
    model = one_node("Dropout", {"x": x}, constants=constants, outputs=["y", "mask"], dynamic={"x": (0,)}, seed=3)
    model.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.BOOL
    made = litert_outputs(emitted(model), {"x": x})
    np.testing.assert_allclose(made["y"], np.where(made["mask"], x / 0.75, 0), rtol=FLOAT_ROUNDINGS)
    # Six deviations of the share of 20000 draws.
    assert abs(made["mask"].mean() - 0.75) < 6 * (0.25 * 0.75 / x.size) ** 0.5


def test_the_mask_of_a_dropout_with_open_batch_is_true() -> None:
    x = spread()
    model = one_node("Dropout", {"x": x}, outputs=["y", "mask"], dynamic={"x": (0,)})
    model.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.BOOL
    made = litert_outputs(emitted(model), {"x": x})
    np.testing.assert_array_equal(made["y"], x)
    assert made["mask"].shape == x.shape
    assert made["mask"].all()
