"""If, Loop and Scan as IF and WHILE."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import pytest

from onnxprune.errors import TargetError

pytest.importorskip("ai_edge_litert")

from tests.tflite_runs import assert_same_as_ort, emitted

X = np.array([0.5, -1.0, 2.0], np.float32)
GOING = np.ones((), np.bool_)


def parsed(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 23]>\n' + text)


def same(text: str, **feeds: Any) -> list[str]:
    # Bodies add and multiply a few numbers: both runtimes round alike up to the last bits.
    model = assert_same_as_ort(parsed(text), feeds, relative=1e-6, absolute=1e-6)
    return [operator.kind for operator in model.main.operators]


@pytest.mark.parametrize("condition", [True, False])
def test_branches_read_captured_values_and_constants(condition: bool) -> None:
    text = """g (bool c, float[N] x) => (float[N] y) <float[3] w={1,2,3}> {
        y = If(c)<then_branch = a () => (float[N] p) { p = Mul(x, w) },
                  else_branch = b () => (float[N] q) { q = Identity(x) }>
    }"""
    assert same(text, c=np.array(condition), x=X) == ["IF"]


@pytest.mark.parametrize("condition", [True, False])
def test_branches_of_other_lengths_and_constant_results(condition: bool) -> None:
    text = """g (bool[1] c, float[3] x) => (float[M] y, int64 k) <int64[1] zero={0}, int64[1] two={2}> {
        y, k = If(c)<
            then_branch = a () => (float[2] p, int64 i) { p = Slice(x, zero, two) i = Constant<value_int=1>() },
            else_branch = b () => (float[3] q, int64 j) { q = Add(x, x) j = Constant<value_int=2>() }>
    }"""
    same(text, c=np.array([condition]), x=X)


def test_nested_branches_capture_through_both() -> None:
    text = """g (bool c, bool d, float[3] x) => (float[3] y) {
        y = If(c)<
            then_branch = a () => (float[3] p) {
                p = If(d)<then_branch = e () => (float[3] s) { s = Add(x, x) },
                          else_branch = f () => (float[3] t) { t = Neg(x) }>
            },
            else_branch = b () => (float[3] q) { q = Mul(x, x) }>
    }"""
    same(text, c=GOING, d=GOING, x=X)


LOOP = """g (float[3] x%s) => (float[3] y, float[K,3] rows) <int64 four={4}, bool going={1}> {
    y, rows = Loop(%s, x)<body = b (int64 i, bool c, float[3] v) => (bool still, float[3] next, float[3] row) {
        still = Identity(c)
        step = Cast<to=1>(i)
        moved = Add(v, x)
        next = Add(moved, step)
        row = Mul(next, next)
    }>
}"""


def test_loop_of_known_length_writes_its_rows_in_place() -> None:
    text = LOOP % ("", "four, going")
    assert same(text, x=X) == ["WHILE"]
    assert emitted(parsed(text)).main.tensors["rows"].shape == (4, 3)


def test_loop_of_computed_length_grows_its_rows() -> None:
    same(LOOP % (", int64 n", "n,"), x=X, n=np.array(3))


def test_loop_with_a_fed_condition() -> None:
    same(LOOP % (", bool c0", "four, c0"), x=X, c0=GOING)


def test_loop_that_ends_itself() -> None:
    text = """g (float[1] x) => (float[1] y, float[K,1] rows) <bool going={1}, float most={10.0}> {
        y, rows = Loop(, going, x)<body = b (int64 i, bool c, float[1] v) => (bool still, float[1] next, float[1] row) {
            next = Add(v, v)
            number = Squeeze(next)
            still = Less(number, most)
            row = Identity(next)
        }>
    }"""
    same(text, x=np.array([1.0], np.float32))


def test_carried_value_may_grow() -> None:
    text = """g (float[1,2] x) => (float[K,2] y) <int64 three={3}, bool going={1}> {
        y = Loop(three, going, x)<body = b (int64 i, bool c, float[J,2] v) => (bool still, float[Q,2] next) {
            still = Identity(c)
            next = Concat<axis=0>(v, x)
        }>
    }"""
    same(text, x=np.array([[1.0, 2.0]], np.float32))


def test_carried_values_may_change_places() -> None:
    text = """g (float[3] x, float[3] z) => (float[3] y, float[3] w) <int64 three={3}, bool going={1}> {
        y, w = Loop(three, going, x, z)<body = b (int64 i, bool c, float[3] v, float[3] u)
            => (bool still, float[3] next, float[3] other) {
            still = Identity(c)
            next = Identity(u)
            other = Identity(v)
        }>
    }"""
    same(text, x=X, z=X + 1)


def test_loop_without_an_end_is_refused() -> None:
    text = LOOP % ("", ", going")
    with pytest.raises(TargetError, match="it has no end"):
        emitted(parsed(text))


def test_what_a_body_can_not_express_is_named() -> None:
    text = """g (bool c, float[3] x) => (float[3] y) {
        y = If(c)<then_branch = a () => (float[3] p) { [culprit] u = Cast<to=13>(x) p = Cast<to=1>(u) },
                  else_branch = b () => (float[3] q) { q = Add(x, x) }>
    }"""
    with pytest.raises(TargetError, match="culprit"):
        emitted(parsed(text))


SCAN = """g (float[2] h, float[%s] x) => (float[2] y, float[%s] rows) {
    y, rows = Scan<num_scan_inputs=1%s, body = b (float[2] v, float[2] e) => (float[2] next, float[2] row) {
        next = Add(v, e)
        row = Mul(next, next)
    }>(h, x)
}"""


@pytest.mark.parametrize("length", ["5", "T"])
@pytest.mark.parametrize(
    ("attributes", "shapes"),
    [
        ("", ("%s,2", "Q,2")),
        (", scan_input_directions=[1], scan_output_directions=[1]", ("%s,2", "Q,2")),
        (", scan_input_axes=[1], scan_output_axes=[1]", ("2,%s", "2,Q")),
    ],
)
def test_scan_along_and_against_any_axis(length: str, attributes: str, shapes: tuple[str, str]) -> None:
    x = np.arange(10, dtype=np.float32).reshape((2, 5) if shapes[0].startswith("2") else (5, 2))
    same(SCAN % (shapes[0] % length, shapes[1], attributes), h=np.array([1.0, -1.0], np.float32), x=x)
