"""Choosing by size, index and condition: ties, integers, open batches, results of a length that only the run knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune.errors import TargetError

pytest.importorskip("ai_edge_litert")

from tests.tflite_runs import assert_same_as_ort, emitted, kinds, litert_outputs, one_node
from tests.unit.targets.tflite.test_elementwise import integers, spread

TYPES = [np.int8, np.uint8, np.int32, np.int64, np.float32]


def few_values(dtype: npt.DTypeLike, shape: tuple[int, ...] = (3, 4, 9)) -> npt.NDArray[Any]:
    """Small numbers, most of them several times."""
    return np.random.default_rng(0).integers(0, 4, shape).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("is_last", [0, 1])
@pytest.mark.parametrize("op_type", ["ArgMax", "ArgMin"])
def test_the_first_or_the_last_index_of_equal_extremes(op_type: str, is_last: int, dtype: npt.DTypeLike) -> None:
    feeds = {"x": few_values(dtype)}
    model = one_node(
        op_type, feeds, output_type=TensorProto.INT64, dynamic={"x": (0,)}, axis=-1, select_last_index=is_last
    )
    assert_same_as_ort(model, feeds, relative=0, absolute=0)


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64, np.int16])
def test_the_index_of_extremes_of_rarer_integers(dtype: type[np.generic]) -> None:
    x = integers(dtype, 1)
    made = litert_outputs(emitted(one_node("ArgMax", {"x": x}, output_type=TensorProto.INT64, axis=2)), {"x": x})
    np.testing.assert_array_equal(made["y"], x.argmax(2)[..., None])


def test_the_last_index_along_an_axis_of_open_length() -> None:
    feeds = {"x": few_values(np.float32)}
    model = one_node(
        "ArgMax", feeds, output_type=TensorProto.INT64, dynamic={"x": (2,)}, axis=2, keepdims=0, select_last_index=1
    )
    assert_same_as_ort(model, feeds, relative=0, absolute=0)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int64, np.uint8])
@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_largest_and_smallest_of_any_axis(axis: int, largest: int, dtype: npt.DTypeLike) -> None:
    feeds = {"x": np.random.default_rng(1).permutation(60).reshape(3, 4, 5).astype(dtype)}
    model = one_node(
        "TopK", feeds, constants={"k": np.array([3])}, outputs=["y", "places"], axis=axis, largest=largest,
        output_type=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)),
    )  # fmt: skip
    model.graph.output[1].type.tensor_type.elem_type = TensorProto.INT64
    made = litert_outputs(emitted(model), feeds)
    order = np.argsort(feeds["x"].astype(np.int64) * (-1 if largest else 1), axis=axis, kind="stable")
    places = np.take(order, range(3), axis=axis)
    np.testing.assert_array_equal(made["places"], places)
    np.testing.assert_array_equal(made["y"], np.take_along_axis(feeds["x"], places, axis))


def test_the_smallest_integers_include_the_least_there_is() -> None:
    x = integers(np.int64, 3, (5, 7))
    model = one_node(
        "TopK",
        {"x": x},
        constants={"k": np.array([2])},
        outputs=["y", "places"],
        largest=0,
        output_type=TensorProto.INT64,
    )
    np.testing.assert_array_equal(litert_outputs(emitted(model), {"x": x})["y"], np.sort(x, axis=-1)[:, :2])


def test_how_many_is_computed_by_the_run() -> None:
    feeds = {"x": spread(), "k": np.array([4])}
    model = one_node("TopK", feeds, outputs=["y", "places"])
    model.graph.output[1].type.tensor_type.elem_type = TensorProto.INT64
    assert_same_as_ort(model, feeds, relative=0, absolute=0)


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_one_hot_counts_negative_indices_from_the_end_and_ignores_those_beyond(axis: int) -> None:
    feeds = {"i": np.array([[0, -1, 3], [-4, 4, -5]])}
    constants = {"depth": np.array(4), "values": np.array([2, 5], np.float32)}
    assert_same_as_ort(one_node("OneHot", feeds, constants=constants, axis=axis), feeds, relative=0, absolute=0)


def test_one_hot_with_depth_and_values_that_the_run_computes() -> None:
    feeds = {
        "i": np.array([1, 0, -1], np.int32),
        "depth": np.array([4], np.int32),
        "values": np.array([7, 9], np.float32),
    }
    expected = np.array([[7, 9, 7, 7], [9, 7, 7, 7], [7, 7, 7, 9]])
    np.testing.assert_array_equal(litert_outputs(emitted(one_node("OneHot", feeds)), feeds)["y"], expected)


@pytest.mark.parametrize("attributes", [{}, {"exclusive": 1}, {"reverse": 1}, {"exclusive": 1, "reverse": 1}])
def test_cumulative_sums_with_an_open_batch(attributes: dict[str, int]) -> None:
    feeds = {"x": spread()}
    model = one_node("CumSum", feeds, constants={"axis": np.array(-1)}, dynamic={"x": (0,)}, **attributes)
    # Sums of fifty numbers; kernels add in the same order.
    assert_same_as_ort(model, feeds, relative=1e-5, absolute=1e-5)


def test_a_choice_between_broadcast_tensors_is_one_operator() -> None:
    feeds = {"c": spread(shape=(4, 1)) > 0, "a": spread(1, (3, 1, 5)), "b": spread(2, (5,))}
    model = assert_same_as_ort(one_node("Where", feeds), feeds, relative=0, absolute=0)
    assert [kind for kind in kinds(model) if kind != "RESHAPE"] == ["SELECT_V2"]


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_hardmax_marks_the_first_of_equal_maxima(axis: int) -> None:
    feeds = {"x": few_values(np.float32)}
    model = one_node("Hardmax", feeds, dynamic={"x": (1,)}, axis=axis)
    assert_same_as_ort(model, feeds, relative=0, absolute=0)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_])
def test_places_of_what_is_not_zero(dtype: npt.DTypeLike) -> None:
    feeds = {"x": np.asarray(few_values(np.float32).clip(0, 2) // 2).astype(dtype)}
    model = one_node("NonZero", feeds, output_type=TensorProto.INT64, dynamic={"x": (0,)})
    assert_same_as_ort(model, feeds, relative=0, absolute=0)


@pytest.mark.parametrize("is_sorted", [0, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.int8])
def test_unique_numbers_with_their_places_and_counts(dtype: npt.DTypeLike, is_sorted: int) -> None:
    feeds = {"x": np.random.default_rng(5).integers(-3, 4, (4, 6)).astype(dtype)}
    type_ = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = one_node("Unique", feeds, outputs=["y", "first", "inverse", "counts"], sorted=is_sorted, output_type=type_)
    for value in model.graph.output[1:]:
        value.type.tensor_type.elem_type = TensorProto.INT64
    assert_same_as_ort(model, feeds, relative=0, absolute=0)


def test_unique_slices_are_refused() -> None:
    model = one_node("Unique", {"x": spread(shape=(3, 4))}, axis=0)
    with pytest.raises(TargetError, match="not slices"):
        emitted(model)


def suppression(
    feeds: dict[str, npt.NDArray[Any]], *, most: int = 5, overlap: float = 0.4, **attributes: Any
) -> onnx.ModelProto:
    constants = {
        "most": np.array([most]),
        "overlap": np.array([overlap], np.float32),
        "score": np.array([0.3], np.float32),
    }
    return one_node("NonMaxSuppression", feeds, constants=constants, output_type=TensorProto.INT64, **attributes)


def boxes_and_scores(images: int, classes: int, *, is_centered: bool) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(7)
    places, sizes = rng.random((2, images, 30, 2))
    second = sizes if is_centered else places + sizes
    boxes = np.concatenate([places, second], axis=2).astype(np.float32)
    return {"boxes": boxes, "scores": rng.random((images, classes, 30)).astype(np.float32)}


@pytest.mark.parametrize("is_centered", [False, True])
def test_boxes_of_every_class_of_every_image_are_suppressed_as_onnx_runtime_does(is_centered: bool) -> None:
    feeds = boxes_and_scores(2, 3, is_centered=is_centered)
    assert_same_as_ort(suppression(feeds, center_point_box=int(is_centered)), feeds, relative=0, absolute=0)


def test_suppression_keeps_no_more_boxes_than_there_are() -> None:
    feeds = boxes_and_scores(1, 1, is_centered=False)
    assert_same_as_ort(suppression(feeds, most=1 << 40), feeds, relative=0, absolute=0)


def test_suppression_without_limits_keeps_nothing() -> None:
    feeds = boxes_and_scores(1, 1, is_centered=False)
    model = one_node("NonMaxSuppression", feeds, output_type=TensorProto.INT64)
    assert litert_outputs(emitted(model), feeds)["y"].shape == (0, 3)


def test_suppression_of_an_open_batch_is_refused() -> None:
    feeds = boxes_and_scores(1, 1, is_centered=False)
    with pytest.raises(TargetError, match="must be known"):
        emitted(suppression(feeds, dynamic={"boxes": (0,), "scores": (0,)}))
