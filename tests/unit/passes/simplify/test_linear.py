"""Scales and shifts as part of the linear operator next to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from onnxprune.graph.metadata import module_path


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def batchnorm(channels, seed=1):
    rng = np.random.default_rng(seed)
    return {
        "gamma": rng.uniform(0.5, 2, channels).astype(np.float32),
        "beta": normal(channels, seed=2),
        "mean": normal(channels, seed=3),
        "var": rng.uniform(0.5, 2, channels).astype(np.float32),
    }


BN = "BatchNormalization<epsilon=0.001>({0}, gamma, beta, mean, var)"


@dataclass(frozen=True)
class Case:
    id: str
    graph: str
    weights: dict
    channels: int
    left: list


AFTER = [
    Case(
        "conv",
        "g (float[1,4,6,6] x) => (float[1,8,6,6] y) { c = Conv<pads=[1,1,1,1]>(x, w, b)  y = " + BN.format("c") + " }",
        {"w": normal(8, 4, 3, 3), "b": normal(8)},
        8,
        ["Conv"],
    ),
    Case(
        "conv without bias",
        "g (float[1,4,6,6] x) => (float[1,8,4,4] y) { c = Conv(x, w)  y = " + BN.format("c") + " }",
        {"w": normal(8, 4, 3, 3)},
        8,
        ["Conv"],
    ),
    Case(
        "grouped conv",
        "g (float[1,4,6,6] x) => (float[1,8,4,4] y) { c = Conv<group=2>(x, w)  y = " + BN.format("c") + " }",
        {"w": normal(8, 2, 3, 3)},
        8,
        ["Conv"],
    ),
    Case(
        "conv of one dimension",
        "g (float[1,4,9] x) => (float[1,8,7] y) { c = Conv(x, w)  y = " + BN.format("c") + " }",
        {"w": normal(8, 4, 3)},
        8,
        ["Conv"],
    ),
    Case(
        "transposed conv",
        "g (float[1,4,6,6] x) => (float[1,8,8,8] y) { c = ConvTranspose(x, w)  y = " + BN.format("c") + " }",
        {"w": normal(4, 8, 3, 3)},
        8,
        ["ConvTranspose"],
    ),
    Case(
        "grouped transposed conv",
        "g (float[1,4,6,6] x) => (float[1,6,8,8] y) { c = ConvTranspose<group=2>(x, w, b)  y = "
        + BN.format("c")
        + " }",
        {"w": normal(4, 3, 3, 3), "b": normal(6)},
        6,
        ["ConvTranspose"],
    ),
    Case(
        "gemm with alpha, beta and transB",
        "g (float[3,4] x) => (float[3,8] y) { c = Gemm<alpha=0.5, beta=2.0, transB=1>(x, w, b)  y = "
        + BN.format("c")
        + " }",
        {"w": normal(8, 4), "b": normal(8)},
        8,
        ["Gemm"],
    ),
    Case(
        "gemm without bias",
        "g (float[3,4] x) => (float[3,8] y) { c = Gemm(x, w)  y = " + BN.format("c") + " }",
        {"w": normal(4, 8)},
        8,
        ["Gemm"],
    ),
]

BEFORE = [
    Case(
        "conv without padding",
        "g (float[1,4,6,6] x) => (float[1,8,4,4] y) { n = " + BN.format("x") + "  y = Conv(n, w, b) }",
        {"w": normal(8, 4, 3, 3), "b": normal(8)},
        4,
        ["Conv"],
    ),
    Case(
        "grouped conv without bias",
        "g (float[1,4,6,6] x) => (float[1,6,4,4] y) { n = " + BN.format("x") + "  y = Conv<group=2>(n, w) }",
        {"w": normal(6, 2, 3, 3)},
        4,
        ["Conv"],
    ),
    Case(
        "gemm",
        "g (float[3,4] x) => (float[3,8] y) { n = " + BN.format("x") + "  y = Gemm(n, w, b) }",
        {"w": normal(4, 8), "b": normal(8)},
        4,
        ["Gemm"],
    ),
    Case(
        "not into a padded conv",
        "g (float[1,4,6,6] x) => (float[1,8,6,6] y) { n = " + BN.format("x") + "  y = Conv<pads=[1,1,1,1]>(n, w) }",
        {"w": normal(8, 4, 3, 3)},
        4,
        ["BatchNormalization", "Conv"],
    ),
    Case(
        "not into a transposed conv",
        "g (float[1,4,6,6] x) => (float[1,8,8,8] y) { n = " + BN.format("x") + "  y = ConvTranspose(n, w) }",
        {"w": normal(4, 8, 3, 3)},
        4,
        ["BatchNormalization", "ConvTranspose"],
    ),
]

NOT = [
    Case(
        "another reader of the conv",
        "g (float[1,4,6,6] x) => (float[1,8,4,4] y, float[1,8,4,4] r) { c = Conv(x, w)  y = "
        + BN.format("c")
        + "  r = Relu(c) }",
        {"w": normal(8, 4, 3, 3)},
        8,
        ["Conv", "BatchNormalization", "Relu"],
    ),
    Case(
        "the conv's result is an output",
        "g (float[1,4,6,6] x) => (float[1,8,4,4] y, float[1,8,4,4] c) { c = Conv(x, w)  y = " + BN.format("c") + " }",
        {"w": normal(8, 4, 3, 3)},
        8,
        ["Conv", "BatchNormalization"],
    ),
    Case(
        "a computed weight",
        "g (float[1,4,6,6] x, float[8,4,3,3] w) => (float[1,8,4,4] y) { c = Conv(x, w)  y = " + BN.format("c") + " }",
        {},
        8,
        ["Conv", "BatchNormalization"],
    ),
    Case(
        "a quantized weight",
        "g (float[1,4,6,6] x) => (float[1,8,4,4] y) { f = DequantizeLinear(q, s)  c = Conv(x, f)  y = "
        + BN.format("c")
        + " }",
        {"q": np.arange(288, dtype=np.int8).reshape(8, 4, 3, 3), "s": np.array(0.01, np.float32)},
        8,
        ["DequantizeLinear", "Conv", "BatchNormalization"],
    ),
]


@pytest.mark.parametrize("case", [*AFTER, *BEFORE, *NOT], ids=lambda case: case.id)
def test_batchnorm(make_model, simplified, op_types, case):
    model = make_model(case.graph, {**case.weights, **batchnorm(case.channels)})
    assert op_types(simplified(model, "batchnorm")) == case.left


def test_a_weight_that_two_convs_share_is_folded_into_a_copy(make_model, simplified, op_types):
    model = make_model(
        "g (float[1,4,4,4] x) => (float[1,4,4,4] y, float[1,4,4,4] z) { c = Conv(x, w)  z = Conv(x, w)  y = "
        + BN.format("c")
        + " }",
        {"w": normal(4, 4, 1, 1), **batchnorm(4)},
    )
    assert op_types(simplified(model, "batchnorm")) == ["Conv", "Conv"]


def test_batchnorm_inside_an_if_body_is_folded(make_model, simplified):
    model = make_model(
        """g (float[1,4,6,6] x, bool c) => (float[1,8,4,4] y) {
            y = If(c) <
                then_branch = t () => (float[1,8,4,4] a) { k = Conv(x, w)
                    a = BatchNormalization<epsilon=0.001>(k, gamma, beta, mean, var) },
                else_branch = e () => (float[1,8,4,4] b) { b = Conv(x, w) }
            >
        }""",
        {"w": normal(8, 4, 3, 3), **batchnorm(8)},
    )
    outcome = simplified(model, "batchnorm")
    assert sorted(node.op_type for node in outcome.state.model.graph.all_nodes()) == ["Conv", "Conv", "If"]


ARITHMETIC = {
    "multiplied by one value for each channel": ("Mul(c, k)", (8, 1, 1)),
    "a constant on the left": ("Mul(k, c)", (1, 8, 1, 1)),
    "divided by a scalar": ("Div(c, k)", ()),
    "added": ("Add(c, k)", (8, 1, 1)),
    "subtracted": ("Sub(c, k)", (1, 8, 1, 1)),
    "subtracted from": ("Sub(k, c)", (8, 1, 1)),
}
NOT_ARITHMETIC = {
    "dividing a constant": ("Div(k, c)", (8, 1, 1)),
    "another value for each column": ("Mul(c, k)", (4,)),
    "a constant that adds a dimension": ("Mul(c, k)", (2, 1, 8, 1, 1)),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_with_a_constant_becomes_part_of_the_conv(make_model, simplified, op_types, name):
    expression, shape = ARITHMETIC[name]
    model = make_model(
        f"g (float[1,4,6,6] x) => (float[1,8,4,4] y) {{ c = Conv(x, w, b)  y = {expression} }}",
        {"w": normal(8, 4, 3, 3), "b": normal(8), "k": normal(*shape, seed=4) + 3},
    )
    assert op_types(simplified(model, "affine")) == ["Conv"]


@pytest.mark.parametrize("name", NOT_ARITHMETIC)
def test_other_arithmetic_stays(make_model, simplified, op_types, name):
    expression, shape = NOT_ARITHMETIC[name]
    output = "float[2,1,8,4,4]" if len(shape) == 5 else "float[1,8,4,4]"
    model = make_model(
        f"g (float[1,4,6,6] x) => ({output} y) {{ c = Conv(x, w, b)  y = {expression} }}",
        {"w": normal(8, 4, 3, 3), "b": normal(8), "k": normal(*shape, seed=4) + 3},
    )
    assert len(op_types(simplified(model, "affine"))) == 2


def test_arithmetic_after_a_batchnorm_that_stays_becomes_part_of_its_parameters(make_model, simplified, op_types):
    model = make_model(
        "g (float[1,8,4,4] x) => (float[1,8,4,4] y) { n = " + BN.format("x") + "  m = Mul(n, k)  y = Sub(s, m) }",
        {**batchnorm(8), "k": normal(8, 1, 1), "s": normal(1, 8, 1, 1)},
    )
    assert op_types(simplified(model, "affine")) == ["BatchNormalization"]


def test_matmul_and_add_become_a_gemm_that_keeps_name_and_module_path(make_model, simplified, op_types):
    model = make_model(
        "g (float[N,4] x) => (float[N,3] y) { fc = MatMul(x, w)  y = Add(b, fc) }",
        {"w": normal(4, 3), "b": normal(3)},
        modules={"fc": "head.fc"},
    )
    outcome = simplified(model, "matmul-add", batch=3)
    (gemm,) = outcome.state.model.graph
    assert (gemm.op_type, gemm.name, module_path(gemm)) == ("Gemm", "fc", "head.fc")


def test_matmul_of_higher_rank_stays_because_a_gemm_would_need_reshapes(make_model, simplified, op_types):
    model = make_model(
        "g (float[2,5,4] x) => (float[2,5,3] y) { c = MatMul(x, w)  y = Add(c, b) }",
        {"w": normal(4, 3), "b": normal(3)},
    )
    assert op_types(simplified(model, "matmul-add")) == ["MatMul", "Add"]


def test_a_scale_that_leaves_float16s_range_is_not_folded(make_model, run_verified):
    from onnxprune.passes.simplify import SimplifyConfig, SimplifyPass

    model = make_model(
        "g (float16[1,1,4,4] x) => (float16[1,1,4,4] y) { c = Conv(x, w)  y = Mul(c, k) }",
        {"w": np.full((1, 1, 1, 1), 2000, np.float16), "k": np.full((1, 1, 1), 100, np.float16)},
    )
    assert run_verified(SimplifyPass(SimplifyConfig(stages=("affine",))), model).state.model is model
