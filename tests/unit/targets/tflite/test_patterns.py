"""Formulas that are one operator in TFLite: GELU and HARD_SWISH, in every spelling that exporters have."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest

pytest.importorskip("ai_edge_litert")

from tests.tflite_runs import assert_same_as_ort, kinds

# Kernels approximate tanh and erf; 2e-6 of values up to 4 was seen.
TOLERANCES = {"relative": 1e-4, "absolute": 5e-6}

CONSTANTS = {
    "half": 0.5,
    "one": 1.0,
    "two": 2.0,
    "three": 3.0,
    "six": 6.0,
    "zero": 0.0,
    "root": math.sqrt(2),
    "inverse_root": math.sqrt(0.5),
    "cubic": 0.044715,
    "factor": math.sqrt(2 / math.pi),
    "seven": 7.0,
}


def model(body: str) -> onnx.ModelProto:
    """`x` (2, 3, 40) -> `y`; the numbers of `CONSTANTS` are initializers."""
    declared = ", ".join(f"float {name} = {{{value!r}}}" for name, value in CONSTANTS.items())
    signature = "g (float[N,3,40] x) => (float[N,3,40] y)"
    text = f'<ir_version: 10, opset_import: ["": 20]> {signature} <{declared}> {{{body}}}'
    return onnx.parser.parse_model(text)


def assert_kinds(body: str, expected: list[str]) -> None:
    feeds = {"x": np.linspace(-5, 5, 240, dtype=np.float32).reshape(2, 3, 40)}
    assert kinds(assert_same_as_ort(model(body), feeds, **TOLERANCES)) == expected


@pytest.mark.parametrize(
    "body",
    [
        "s = Div(x, root) e = Erf(s) p = Add(e, one) m = Mul(x, p) y = Mul(m, half)",
        "s = Mul(x, inverse_root) e = Erf(s) p = Add(one, e) h = Mul(half, x) y = Mul(h, p)",
        "s = Div(x, root) e = Erf(s) p = Add(e, one) h = Mul(half, p) y = Mul(x, h)",
    ],
)
def test_gelu_of_the_error_function(body: str) -> None:
    assert_kinds(body, ["GELU"])


@pytest.mark.parametrize(
    "body",
    [
        (
            "c = Pow(x, three) k = Mul(c, cubic) i = Add(x, k) s = Mul(i, factor) t = Tanh(s) p = Add(t, one)"
            "h = Mul(x, half) y = Mul(h, p)"
        ),
        (
            "q = Mul(x, x) c = Mul(q, x) k = Mul(cubic, c) i = Add(k, x) s = Mul(factor, i) t = Tanh(s) p = Add(one, t)"
            "h = Mul(half, p) y = Mul(x, h)"
        ),
        (
            "c = Pow(x, three) k = Mul(c, cubic) i = Add(x, k) s = Mul(i, factor) t = Tanh(s) p = Add(t, one)"
            "m = Mul(x, p) y = Div(m, two)"
        ),
    ],
)
def test_gelu_of_the_hyperbolic_tangent(body: str) -> None:
    assert_kinds(body, ["GELU"])


@pytest.mark.parametrize(
    "body",
    [
        "h = HardSigmoid<alpha = 0.1666667, beta = 0.5>(x) y = Mul(x, h)",
        "s = Add(x, three) c = Clip(s, zero, six) m = Mul(x, c) y = Div(m, six)",
        "s = Add(three, x) c = Clip(s, zero, six) d = Div(c, six) y = Mul(d, x)",
    ],
)
def test_hard_swish(body: str) -> None:
    assert_kinds(body, ["HARD_SWISH"])


def test_data_that_are_a_product_themselves_are_found() -> None:
    body = "x2 = Mul(x, seven) h = HardSigmoid<alpha = 0.1666667, beta = 0.5>(x2) y = Mul(x2, h)"
    assert_kinds(body, ["MUL", "HARD_SWISH"])


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("h = HardSigmoid<alpha = 0.2, beta = 0.5>(x) y = Mul(x, h)", id="slope"),
        pytest.param("n = Neg(x) h = HardSigmoid<alpha = 0.1666667, beta = 0.5>(n) y = Mul(x, h)", id="data"),
        pytest.param("s = Add(x, three) c = Clip(s, zero, seven) m = Mul(x, c) y = Div(m, six)", id="clip"),
        pytest.param("s = Add(x, three) c = Clip(s, zero, six) m = Mul(x, c) y = Div(m, seven)", id="factor"),
        pytest.param(
            "s = Div(x, root) e = Erf(s) p = Add(e, one) q = Mul(x, x) m = Mul(q, p) y = Mul(m, half)", id="square"
        ),
        pytest.param("s = Div(x, two) e = Erf(s) p = Add(e, one) m = Mul(x, p) y = Mul(m, half)", id="scale"),
        pytest.param(
            "c = Pow(x, two) k = Mul(c, cubic) i = Add(x, k) s = Mul(i, factor) t = Tanh(s) p = Add(t, one)"
            "h = Mul(x, half) y = Mul(h, p)",
            id="power",
        ),
    ],
)
def test_formula_that_only_looks_alike_stays_as_it_is(body: str) -> None:
    feeds = {"x": np.linspace(-5, 5, 240, dtype=np.float32).reshape(2, 3, 40)}
    found = kinds(assert_same_as_ort(model(body), feeds, **TOLERANCES))
    assert "HARD_SWISH" not in found
    assert found != ["GELU"]


def test_inner_value_that_leaves_the_graph_is_computed_beside_the_operator() -> None:
    proto = model("h = HardSigmoid<alpha = 0.1666667, beta = 0.5>(x) y = Mul(x, h)")
    proto.graph.output.append(onnx.helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT, ["N", 3, 40]))
    feeds = {"x": np.linspace(-5, 5, 240, dtype=np.float32).reshape(2, 3, 40)}
    assert "HARD_SWISH" in kinds(assert_same_as_ort(proto, feeds, **TOLERANCES))
