"""What is known of shape vectors before the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx.parser
import onnx_ir as ir
import pytest

from onnxprune.targets.tflite.elements import Element, Elements, evaluate


def known(text: str, *given: Sequence[Element] | None) -> tuple[Element, ...] | None:
    """The elements of the one node of `text`, whose inputs have these."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]>\ng {text}')
    node = next(iter(ir.from_proto(onnx.shape_inference.infer_shapes(proto)).graph))
    inputs = [None if elements is None else Elements.of(elements) for elements in given]
    found = evaluate(node, inputs, lengths)
    return None if found is None else found.flat


def lengths(value: ir.Value) -> tuple[Any, ...]:
    assert value.shape is not None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def test_shape_gives_numbers_and_names() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 23]>\ng (float[N,3,4] x) => (int64[2] y) { y = Shape<end=-1>(x) }'
    )
    node = next(iter(ir.from_proto(proto).graph))
    found = evaluate(node, [None], lengths)
    assert found is not None
    assert found.flat == ("N", 3)


BINARY = "(int64[2] a, int64[2] b) => (int64[2] y) { y = %s(a, b) }"


@pytest.mark.parametrize(
    ("op_type", "left", "right", "expected"),
    [
        ("Add", [1, "N"], [2, 0], (3, "N")),
        ("Sub", [5, "N"], [2, "N"], (3, 0)),
        ("Mul", ["N", "S"], [1, "N"], ("N", "N*S")),
        ("Mul", ["N", "N"], [0, -1], (0, None)),
        ("Div", [-7, 7], [2, -2], (-3, -3)),
        ("Div", ["N", 7], [1, 0], ("N", None)),
        ("Max", [3, None], [4, 1], (4, None)),
        ("Add", [2**62, 1], [2**62, 1], (None, 2)),
    ],
)
def test_arithmetic_keeps_to_what_is_certain(
    op_type: str, left: list[Element], right: list[Element], expected: tuple[Element, ...]
) -> None:
    assert known(BINARY % op_type, left, right) == expected


def test_a_length_is_never_minus_one() -> None:
    text = "(int64[4] a, int64[4] b) => (bool[4] y) { y = Equal(a, b) }"
    assert known(text, ["N", "N", "N", None], [-1, "N", 3, -1]) == (0, 1, None, None)


def test_where_takes_what_both_sides_agree_on() -> None:
    text = "(bool[3] c, int64[3] a, int64[3] b) => (int64[3] y) { y = Where(c, a, b) }"
    assert known(text, [1, 0, None], [1, 2, "N"], [3, 4, "N"]) == (1, 4, "N")


def test_concat_with_a_vector_of_which_nothing_is_known() -> None:
    text = "(int64[2] a, int64[2] b) => (int64[4] y) { y = Concat<axis=0>(a, b) }"
    assert known(text, ["N", 3], None) == ("N", 3, None, None)


@pytest.mark.parametrize(
    ("start", "end", "step", "expected"),
    [(1, 2**63 - 1, 1, (2, "N")), (-1, -(2**63) + 1, -1, ("N", 2, 1)), (0, 2, 2, (1,))],
)
def test_slice_of_a_vector(start: int, end: int, step: int, expected: tuple[Element, ...]) -> None:
    text = "(int64[3] x, int64[1] s, int64[1] e, int64[1] a, int64[1] t) => (int64[K] y) { y = Slice(x, s, e, a, t) }"
    assert known(text, [1, 2, "N"], [start], [end], [0], [step]) == expected


def test_index_outside_of_the_vector_is_not_guessed() -> None:
    text = "(int64[2] x, int64[1] i) => (int64[1] y) { y = Gather(x, i) }"
    assert known(text, [1, 2], [2]) is None
    assert known(text, [1, "N"], [-1]) == ("N",)


def test_floating_point_numbers_are_left_alone() -> None:
    assert known("(int64[1] x) => (float[1] y) { y = Cast<to=1>(x) }", [1]) is None
