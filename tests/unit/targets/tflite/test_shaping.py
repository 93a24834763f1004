"""Operators that reshape, join and split, with open axes and computed shapes. Numbers are only moved: no tolerance."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import pytest

from onnxprune.errors import TargetError

pytest.importorskip("ai_edge_litert")

from tests.tflite_runs import assert_same_as_ort, emitted, kinds, one_node

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def same(proto: onnx.ModelProto, **feeds: Any) -> list[str]:
    return kinds(assert_same_as_ort(proto, feeds, relative=0, absolute=0))


def parsed(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 23]>\n' + text)


def test_view_computed_from_an_open_batch_becomes_one_reshape_to_a_constant_shape() -> None:
    proto = parsed(
        """g (float[N,3,4] x) => (float[N,12] y) <int64[1] first={0}, int64[1] rest={12}, int64 zero={0}> {
            shape = Shape(x)
            batch = Gather<axis=0>(shape, zero)
            vector = Unsqueeze(batch, first)
            wanted = Concat<axis=0>(vector, rest)
            y = Reshape(x, wanted)
        }"""
    )
    assert same(proto, x=X) == ["RESHAPE"]


def test_view_that_multiplies_two_open_lengths_becomes_one_reshape() -> None:
    proto = parsed(
        """g (float[N,S,4] x) => (float[M,4] y) <int64[1] first={0}, int64[1] rest={4}, int64 zero={0}, int64 one={1}> {
            shape = Shape(x)
            batch = Gather<axis=0>(shape, zero)
            length = Gather<axis=0>(shape, one)
            rows = Mul(batch, length)
            vector = Unsqueeze(rows, first)
            wanted = Concat<axis=0>(vector, rest)
            y = Reshape(x, wanted)
        }"""
    )
    assert same(proto, x=X) == ["RESHAPE"]


def test_view_with_two_open_lengths_takes_both_from_the_input_at_once() -> None:
    proto = one_node("Reshape", {"x": X}, constants={"s": np.array([0, 0, 2, 2])}, dynamic={"x": [0, 1]})
    assert same(proto, x=X) == ["SHAPE", "STRIDED_SLICE", "CONCATENATION", "RESHAPE"]


@pytest.mark.parametrize("shape", [[0, 12], [6, -1], [2, 3, 4, 1]])
def test_reshape_to_a_fed_shape_copies_zeros_when_it_runs(shape: list[int]) -> None:
    wanted = np.array(shape)
    same(one_node("Reshape", {"x": X, "s": wanted}, dynamic={"x": [0]}), x=X, s=wanted)


def test_class_token_expands_to_an_open_batch() -> None:
    proto = parsed(
        """g (float[N,3,4] x) => (float[N,4,4] y)
        <int64[1] first={0}, int64[2] kept={-1,-1}, int64 zero={0}, int64[3] minus={-1,-1,-1}, int64[3] ones={1,1,1},
         float[1,1,4] token={1,2,3,4}> {
            shape = Shape(x)
            batch = Gather<axis=0>(shape, zero)
            vector = Unsqueeze(batch, first)
            asked = Concat<axis=0>(vector, kept)
            is_kept = Equal(asked, minus)
            wanted = Where(is_kept, ones, asked)
            tokens = Expand(token, wanted)
            y = Concat<axis=1>(tokens, x)
        }"""
    )
    assert same(proto, x=X).count("BROADCAST_TO") == 1


def test_expand_to_the_same_open_shape_is_nothing() -> None:
    proto = one_node("Expand", {"x": X}, constants={"s": np.array([1, 1])}, dynamic={"x": [0, 1]})
    assert "BROADCAST_TO" not in same(proto, x=X)


@pytest.mark.parametrize("axes", [[0], [0, 1], [0, 1, 2]])
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_flatten_with_open_axes(axis: int, axes: list[int]) -> None:
    same(one_node("Flatten", {"x": X}, dynamic={"x": axes}, axis=axis), x=X)


def test_squeeze_without_axes_of_an_open_shape_is_refused() -> None:
    proto = one_node("Squeeze", {"x": X[:, :1]}, dynamic={"x": [0]})
    with pytest.raises(TargetError, match="which axes have length 1 is known only when the model runs"):
        emitted(proto)


def test_unsqueeze_with_two_open_axes() -> None:
    same(one_node("Unsqueeze", {"x": X}, constants={"a": np.array([-1, 0])}, dynamic={"x": [0, 2]}), x=X)


@pytest.mark.parametrize("rank", [6, 7, 8])
def test_transpose_of_many_axes(rank: int) -> None:
    x = np.arange(3 * 2 ** (rank - 1), dtype=np.float32).reshape(3, *(2,) * (rank - 1))
    order = np.random.default_rng(rank).permutation(rank)
    same(one_node("Transpose", {"x": x}, perm=[int(axis) for axis in order]), x=x)


@pytest.mark.parametrize("dtype", ["bool", "int16", "uint16", "uint32", "uint64", "float64"])
def test_concat_of_types_without_a_kernel_keeps_the_numbers(dtype: str) -> None:
    left, right = np.array([[0, 1]]).astype(dtype), np.array([[-1, 5]]).astype(dtype)
    element = onnx.helper.np_dtype_to_tensor_dtype(left.dtype)
    same(one_node("Concat", {"x": left, "z": right}, axis=1, output_type=element), x=left, z=right)


def test_concat_of_seven_axes_is_kept_from_xnnpack() -> None:
    x = np.arange(12, dtype=np.float32).reshape(1, 2, 1, 2, 1, 1, 3)
    same(one_node("Concat", {"x": x, "z": x}, axis=3), x=x, z=x)


@pytest.mark.parametrize(
    ("constants", "attributes", "expected"),
    [
        ({}, {"num_outputs": 2}, ["SPLIT"]),
        ({"s": np.array([1, 3])}, {}, ["SLICE", "SLICE"]),
        ({"s": np.array([4, 0])}, {}, None),
    ],
)
def test_split_into_equal_and_other_parts(
    constants: dict[str, Any], attributes: dict[str, Any], expected: list[str] | None
) -> None:
    proto = one_node(
        "Split", {"x": X}, constants=constants, outputs=["a", "b"], axis=-1, dynamic={"x": [0]}, **attributes
    )
    if expected is None:
        with pytest.raises(TargetError, match="has no elements"):
            emitted(proto)
    else:
        assert same(proto, x=X) == expected


def test_split_by_computed_lengths() -> None:
    lengths = np.array([1, 3])
    proto = one_node("Split", {"x": X, "s": lengths}, outputs=["a", "b"], axis=2)
    assert same(proto, x=X, s=lengths) == ["CAST", "SPLIT_V"]


def test_split_of_an_open_axis_into_a_number_of_parts_is_refused() -> None:
    with pytest.raises(TargetError, match="has a length that only the run knows"):
        emitted(one_node("Split", {"x": X}, outputs=["a", "b"], num_outputs=2, dynamic={"x": [0]}))


@pytest.mark.parametrize("open_axes", [[], [0], [0, 1, 2]])
def test_shape_and_size(open_axes: list[int]) -> None:
    same(one_node("Shape", {"x": X}, output_type=7, dynamic={"x": open_axes}, start=-2), x=X)
    same(one_node("Size", {"x": X}, output_type=7, dynamic={"x": open_axes}), x=X)


def test_constants_of_an_unknown_number_of_axes_are_refused() -> None:
    shape = np.array([2, 3])
    proto = one_node("ConstantOfShape", {"s": shape}, dynamic={"s": [0]})
    with pytest.raises(TargetError, match="number of axes of its result"):
        emitted(proto)
