"""Nodes that give back what they get."""

from __future__ import annotations

import numpy as np
import pytest

ONE = np.ones((), np.float32)
ZERO = np.zeros((), np.float32)

GONE = {
    "Reshape to the same shape": ("Reshape(r, k)", {"k": np.array([1, 4, 6], np.int64)}),
    "Transpose in order": ("Transpose<perm=[0,1,2]>(r)", {}),
    "Cast to the same type": ("Cast<to=1>(r)", {}),
    "Pad by nothing": ("Pad(r, k)", {"k": np.zeros(6, np.int64)}),
    "Slice of everything": (
        "Slice(r, s, e)",
        {"s": np.zeros(3, np.int64), "e": np.array([1, 4, 2**40], np.int64)},
    ),
    "Concat of one": ("Concat<axis=1>(r)", {}),
    "Expand to the same shape": ("Expand(r, k)", {"k": np.array([1, 1, 6], np.int64)}),
    "Tile once": ("Tile(r, k)", {"k": np.ones(3, np.int64)}),
    "Mul by 1": ("Mul(r, k)", {"k": ONE}),
    "Mul by 1 from the left": ("Mul(k, r)", {"k": np.ones((4, 1), np.float32)}),
    "Div by 1": ("Div(r, k)", {"k": ONE}),
    "Add of 0": ("Add(k, r)", {"k": np.zeros((1, 1, 6), np.float32)}),
    "Sub of 0": ("Sub(r, k)", {"k": ZERO}),
    "Pow to 1": ("Pow(r, k)", {"k": ONE}),
}
STAYS = {
    "Slice backwards": (
        "Slice(r, s, e, a, p)",
        {
            "s": np.array([-1], np.int64),
            "e": np.array([-(2**40)], np.int64),
            "a": np.array([2], np.int64),
            "p": np.array([-1], np.int64),
        },
        "float[1,4,6]",
    ),
    "Mul by 1 that broadcasts": ("Mul(r, k)", {"k": np.ones((2, 1, 1, 1), np.float32)}, "float[2,1,4,6]"),
    "Div of 1": ("Div(k, r)", {"k": ONE}, "float[1,4,6]"),
    "Sub from 0": ("Sub(k, r)", {"k": ZERO}, "float[1,4,6]"),
    "Transpose": ("Transpose<perm=[0,2,1]>(r)", {}, "float[1,6,4]"),
}


@pytest.mark.parametrize("name", GONE)
def test_what_does_nothing_is_gone(make_model, simplified, op_types, name):
    expression, constants = GONE[name]
    model = make_model(
        f"g (float[1,4,6] x) => (float[1,4,6] y) {{ r = Exp(x)  d = {expression}  y = Tanh(d) }}", constants
    )
    assert op_types(simplified(model, "no-ops")) == ["Exp", "Tanh"]


@pytest.mark.parametrize("name", STAYS)
def test_what_does_something_stays(make_model, simplified, op_types, name):
    expression, constants, output = STAYS[name]
    model = make_model(f"g (float[1,4,6] x) => ({output} y) {{ r = Exp(x)  d = {expression}  y = Tanh(d) }}", constants)
    assert len(op_types(simplified(model, "no-ops"))) == 3


def test_a_no_op_that_makes_an_output_goes_and_the_output_keeps_its_name(make_model, simplified, op_types):
    model = make_model("g (float[1,4] x) => (float[1,4] y) { r = Exp(x)  y = Mul(r, k) }", {"k": ONE})
    outcome = simplified(model, "no-ops")
    assert op_types(outcome) == ["Exp"]
    assert [value.name for value in outcome.state.model.graph.outputs] == ["y"]


def test_a_no_op_between_two_outputs_stays(make_model, simplified, op_types):
    model = make_model("g (float[1,4] x) => (float[1,4] y, float[1,4] r) { r = Exp(x)  y = Mul(r, k) }", {"k": ONE})
    assert op_types(simplified(model, "no-ops")) == ["Exp", "Mul"]


def test_a_no_op_from_input_to_output_stays(make_model, simplified, op_types):
    model = make_model("g (float[1,4] x) => (float[1,4] y) { y = Mul(x, k) }", {"k": ONE})
    assert op_types(simplified(model, "no-ops")) == ["Mul"]


def test_unknown_shapes_decide_nothing(make_model, simplified, op_types):
    # k may broadcast r: [N,4] against [M,1] has unknown size where N is 1.
    model = make_model(
        "g (float[N,4] x, float[M,1] k) => (float[A,4] y) { o = Sub(k, k)  z = Mul(o, z0)  r = Exp(x)  y = Add(r, z) }",
        {"z0": ZERO},
    )
    assert "Add" in op_types(simplified(model, "no-ops"))


def test_symbolic_dimensions_of_one_name_are_equal(make_model, simplified, op_types):
    model = make_model(
        "g (float[N,4] x) => (float[N,4] y) { r = Exp(x)  a = Add(r, k)  y = Tanh(a) }", {"k": np.zeros(4, np.float32)}
    )
    assert op_types(simplified(model, "no-ops", batch=3)) == ["Exp", "Tanh"]


def test_the_first_of_two_reshapes_is_gone(make_model, simplified, op_types):
    model = make_model(
        "g (float[1,8,4] x) => (float[2,16] y) { a = Reshape(x, s)  y = Reshape(a, t) }",
        {"s": np.array([1, 32], np.int64), "t": np.array([2, -1], np.int64)},
    )
    assert op_types(simplified(model, "no-ops")) == ["Reshape"]


def test_a_reshape_that_copies_a_dimension_keeps_the_reshape_before_it(make_model, simplified, op_types):
    model = make_model(
        "g (float[1,8,4] x) => (float[4,8] y) { a = Reshape(x, s)  y = Reshape(a, t) }",
        {"s": np.array([4, 2, 4], np.int64), "t": np.array([0, -1], np.int64)},
    )
    assert op_types(simplified(model, "no-ops")) == ["Reshape", "Reshape"]


def test_a_no_op_inside_an_if_body_is_gone(make_model, simplified):
    model = make_model(
        """g (float[1,4] x, bool c) => (float[1,4] y) {
            y = If(c) <
                then_branch = t () => (float[1,4] a) { e = Exp(x)  m = Mul(e, k)  a = Tanh(m) },
                else_branch = e () => (float[1,4] b) { b = Neg(x) }
            >
        }""",
        {"k": ONE},
    )
    outcome = simplified(model, "no-ops")
    assert "Mul" not in {node.op_type for node in outcome.state.model.graph.all_nodes()}
