"""Transposes that cancel, next to each other and across element-wise regions."""

from __future__ import annotations

import numpy as np

TO_NHWC = "Transpose<perm=[0,2,3,1]>"
TO_NCHW = "Transpose<perm=[0,3,1,2]>"


def normal(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def test_two_inverse_ones_are_gone(make_model, simplified, op_types):
    model = make_model(
        f"g (float[1,3,4,5] x) => (float[1,3,4,5] y) {{ e = Exp(x)  a = {TO_NHWC}(e)  b = {TO_NCHW}(a)  y = Tanh(b) }}",
        {},
    )
    assert op_types(simplified(model, "transposes")) == ["Exp", "Tanh"]


def test_two_others_become_one(make_model, simplified, op_types):
    model = make_model(f"g (float[1,3,4,5] x) => (float[1,5,3,4] y) {{ a = {TO_NHWC}(x)  y = {TO_NHWC}(a) }}", {})
    outcome = simplified(model, "transposes")
    assert op_types(outcome) == ["Transpose"]
    assert tuple(outcome.state.model.graph[0].attributes["perm"].as_ints()) == (0, 3, 1, 2)


def test_a_region_with_constants_between_inverse_ones_moves_to_the_other_layout(make_model, simplified, op_types):
    model = make_model(
        f"""g (float[1,3,4,5] x) => (float[1,3,4,5] y) {{
            t = {TO_NHWC}(x)
            a = Mul(t, per_channel)
            b = Add(full, a)
            c = Clip(b, low, high)
            d = Sub(c, one)
            y = {TO_NCHW}(d)
        }}""",
        {
            "per_channel": normal(3),
            "full": normal(1, 4, 5, 3),
            "low": np.array(-1, np.float32),
            "high": np.array(1, np.float32),
            "one": np.ones((1, 1), np.float32),
        },
    )
    assert op_types(simplified(model, "transposes")) == ["Mul", "Add", "Clip", "Sub"]


def test_a_residual_sum_of_two_transposed_branches_moves(make_model, simplified, op_types):
    model = make_model(
        f"""g (float[1,3,4,5] x, float[1,3,4,5] z) => (float[1,3,4,5] y) {{
            a = {TO_NHWC}(x)  b = {TO_NHWC}(z)  r = Relu(a)  s = Add(r, b)  y = {TO_NCHW}(s)
        }}""",
        {},
    )
    assert op_types(simplified(model, "transposes")) == ["Relu", "Add"]


def test_two_transposed_branches_become_one_transpose_after_their_sum(make_model, simplified, op_types):
    model = make_model(
        f"""g (float[1,3,4,5] x, float[1,3,4,5] z) => (float[1,4,5,3] y) {{
            a = {TO_NHWC}(x)  b = {TO_NHWC}(z)  y = Add(a, b)
        }}""",
        {},
    )
    outcome = simplified(model, "transposes")
    assert op_types(outcome) == ["Add", "Transpose"]
    assert outcome.state.model.graph.outputs[0].name == "y"


def test_a_region_that_also_leaves_in_its_own_layout_stays_when_nothing_is_won(make_model, simplified, op_types):
    model = make_model(
        f"""g (float[1,3,4,5] x) => (float[1,3,4,5] y, float[1,4,5,3] r) {{
            a = {TO_NHWC}(x)  r = Relu(a)  y = {TO_NCHW}(r)
        }}""",
        {},
    )
    # One Transpose is needed for r in any case: moving saves the other.
    assert sorted(op_types(simplified(model, "transposes"))) == ["Relu", "Transpose"]


def test_a_transpose_that_leads_nowhere_else_is_not_pushed_around(make_model, run_verified, op_types, simplified):
    model = make_model(
        f"g (float[1,3,4,5] x) => (float[1,4,5,6] y) {{ a = {TO_NHWC}(x)  r = Relu(a)  y = MatMul(r, w) }}",
        {"w": normal(3, 6)},
    )
    assert simplified(model, "transposes").state.model is model


def test_an_operator_that_names_axes_is_a_border(make_model, simplified, op_types):
    model = make_model(
        f"""g (float[1,3,4,5] x) => (float[1,3,4,5] y) {{
            a = {TO_NHWC}(x)  s = Softmax<axis=3>(a)  y = {TO_NCHW}(s)
        }}""",
        {},
    )
    assert op_types(simplified(model, "transposes")) == ["Transpose", "Softmax", "Transpose"]


def test_two_outputs_of_one_transposed_value_keep_their_names(make_model, simplified):
    model = make_model(
        f"""g (float[1,3,4,5] x) => (float[1,3,4,5] y, float[1,3,4,5] z) {{
            a = {TO_NHWC}(x)  r = Relu(a)  y = {TO_NCHW}(r)  z = {TO_NCHW}(r)
        }}""",
        {},
    )
    outcome = simplified(model, "transposes")
    assert [value.name for value in outcome.state.model.graph.outputs] == ["y", "z"]
