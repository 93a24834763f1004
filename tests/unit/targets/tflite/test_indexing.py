"""Gather, Slice, Pad, scatters and masks. Numbers are only moved, or combined once: no tolerance but for sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest

from onnxprune.errors import TargetError

pytest.importorskip("ai_edge_litert")

from tests.tflite_runs import assert_same_as_ort, emitted, kinds, one_node

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
TO_THE_END = np.iinfo(np.int64).max


def same(
    op_type: str,
    feeds: Mapping[str, npt.NDArray[Any]],
    constants: Mapping[str, npt.NDArray[Any]] | None = None,
    *,
    relative: float = 0,
    **given: Any,
) -> list[str]:
    element = onnx.helper.np_dtype_to_tensor_dtype(next(iter(feeds.values())).dtype)
    proto = one_node(op_type, feeds, constants=constants, **{"output_type": element, **given})
    return kinds(assert_same_as_ort(proto, feeds, relative=relative, absolute=relative))


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([1, 2, 3], ["SLICE"]),
        ([-2], ["SLICE"]),
        (-1, ["SLICE", "RESHAPE"]),
        ([0, 2], ["STRIDED_SLICE"]),
        ([3, 2, 1], ["STRIDED_SLICE"]),
        ([3, 2, 1, 0], ["STRIDED_SLICE"]),
        ([-2, 0], ["STRIDED_SLICE"]),
        ([3, 0, 2], ["GATHER"]),
        ([[0, -1], [1, 1]], ["GATHER"]),
    ],
)
def test_gather_by_constants_is_a_slice_where_they_are_an_even_row(indices: Any, expected: list[str]) -> None:
    assert same("Gather", {"x": X}, {"i": np.array(indices)}, axis=2, dynamic={"x": [0]}) == expected


@pytest.mark.parametrize("indices", [-1, [-2], [0, 2], [2, 1, 0], [3, 0, -1]])
def test_gather_by_constants_from_an_axis_of_open_length(indices: Any) -> None:
    same("Gather", {"x": X.T.copy()}, {"i": np.array(indices)}, axis=0, dynamic={"x": [0]})


def test_gather_by_computed_indices_counts_negative_ones_from_the_end() -> None:
    same("Gather", {"x": X, "i": np.array([[1, -1], [-3, 0]])}, axis=1, dynamic={"x": [0, 1], "i": [0]})


def test_gather_by_indices_that_are_never_negative_needs_no_correction() -> None:
    graph = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 23]>
        g (float[N,4] x, float[4,3] table) => (float[N,3] y) {
            best = ArgMax<axis=1, keepdims=0>(x)
            y = Gather(table, best)
        }"""
    )
    feeds = {"x": X[0], "table": X.reshape(-1)[:12].reshape(4, 3)}
    model = assert_same_as_ort(graph, feeds, relative=0, absolute=0)
    assert "SELECT_V2" not in kinds(model)


def test_constant_index_outside_of_the_axis_is_refused() -> None:
    with pytest.raises(TargetError, match="an index is outside of axis 2, whose length is 4"):
        emitted(one_node("Gather", {"x": X}, constants={"i": np.array([4])}, axis=2))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gather_elements_with_fewer_indices_than_elements(axis: int) -> None:
    indices = np.random.default_rng(axis).integers(-X.shape[axis], X.shape[axis], (2, 2, 3))
    same("GatherElements", {"x": X, "i": indices}, axis=axis)


@pytest.mark.parametrize(
    ("indices", "batch_dims"),
    [([[0, -1], [1, 2]], 0), ([[1], [0]], 0), ([[[0, -1]], [[2, 3]]], 1), ([[[0]], [[-1]]], 1)],
)
@pytest.mark.parametrize("is_fed", [True, False])
def test_gather_nd(indices: Any, batch_dims: int, is_fed: bool) -> None:
    given = {"i": np.array(indices)}
    feeds = {"x": X, **given} if is_fed else {"x": X}
    open_axes = {"x": [0], "i": [0]} if is_fed else {}
    same("GatherND", feeds, {} if is_fed else given, batch_dims=batch_dims, dynamic=open_axes)


@pytest.mark.parametrize("open_axes", [[], [0, 1, 2]])
@pytest.mark.parametrize(
    ("start", "end", "step"),
    [
        (1, TO_THE_END, 1),
        (-2, TO_THE_END, 1),
        (0, -1, 1),
        (-1, -TO_THE_END, -1),
        (-1, -TO_THE_END - 1, -2),
        (3, 0, -2),
        (1, 3, 2),
    ],
)
def test_slice(start: int, end: int, step: int, open_axes: list[int]) -> None:
    bounds = {"s": start, "e": end, "a": 2, "t": step}
    same("Slice", {"x": X}, {name: np.array([bound]) for name, bound in bounds.items()}, dynamic={"x": open_axes})


def test_slice_to_the_largest_number_when_it_is_computed() -> None:
    bounds = {"s": np.array([0, -2]), "e": np.array([1, TO_THE_END])}
    same("Slice", {"x": X, **bounds})


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "wrap"])
@pytest.mark.parametrize(
    ("pads", "open_axes"),
    [([1, 0, 2, 0, 1, 2], []), ([0, 1, 2, 0, 2, 1], [0]), ([-1, 0, 0, 0, 0, -2], []), ([-1, 1, 0, 0, 0, 2], [])],
)
def test_pad(mode: str, pads: list[int], open_axes: list[int]) -> None:
    if mode == "reflect":
        pads = [min(width, 1) for width in pads]
    same("Pad", {"x": X}, {"p": np.array(pads)}, mode=mode, dynamic={"x": open_axes})


def test_edge_of_an_axis_of_open_length() -> None:
    same("Pad", {"x": X}, {"p": np.array([2, 0, 0, 1, 0, 0])}, mode="edge", dynamic={"x": [0]})


@pytest.mark.parametrize("value", [2.5, -np.inf])
def test_pad_of_six_axes_with_a_number(value: float) -> None:
    pads = np.array([0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 1])
    same("Pad", {"x": X.reshape(2, 1, 3, 1, 2, 2)}, {"p": pads, "v": np.array(value, np.float32)})


def test_pad_by_computed_widths_of_one_axis_and_a_computed_number() -> None:
    feeds = {"x": X, "p": np.array([1, 2]), "v": np.array(3, np.float32)}
    same("Pad", feeds, {"a": np.array([1])}, inputs=["x", "p", "v", "a"])


def test_wrap_of_an_axis_of_open_length_is_refused() -> None:
    pads = np.array([1, 0, 0, 0, 0, 0])
    with pytest.raises(TargetError, match="has a length that only the run knows"):
        emitted(one_node("Pad", {"x": X}, constants={"p": pads}, mode="wrap", dynamic={"x": [0]}))


@pytest.mark.parametrize("is_fed", [True, False])
@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_scatter_nd(dtype: str, reduction: str, is_fed: bool) -> None:
    rng = np.random.default_rng(0)
    x, updates = (rng.integers(-4, 5, shape).astype(dtype) for shape in ((4, 3), (3, 3)))
    # Twice the same row, where that is defined.
    indices = np.array([[1], [-1], [0 if reduction == "none" else 1]])
    fed = {"x": x, "i": indices, "u": updates} if is_fed else {"x": x, "u": updates}
    constants = {} if is_fed else {"i": indices}
    same("ScatterND", fed, constants, inputs=["x", "i", "u"], reduction=reduction, relative=1e-6)


def test_scattered_maximum_leaves_minus_infinity_where_nothing_lands() -> None:
    x = np.array([[-np.inf], [1], [np.inf]], np.float32)
    feeds = {"x": x, "i": np.array([[1], [1]]), "u": np.array([[3], [2]], np.float32)}
    same("ScatterND", feeds, reduction="max")
    same("ScatterND", feeds, reduction="min")


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([[1], [2]], ["DYNAMIC_UPDATE_SLICE"]),
        ([[-3], [-2]], ["DYNAMIC_UPDATE_SLICE"]),
        ([[0], [2]], ["CONCATENATION", "GATHER"]),
        ([[[1, 1], [1, 2]], [[2, 1], [2, 2]]], ["DYNAMIC_UPDATE_SLICE"]),
    ],
)
def test_assignment_to_a_constant_slice(indices: Any, expected: list[str]) -> None:
    places = np.array(indices)
    updates = np.full((*places.shape[:-1], *(4, 3, 2)[places.shape[-1] :]), -1, np.float32)
    feeds = {"x": X.reshape(4, 3, 2), "u": updates}
    assert same("ScatterND", feeds, {"i": places}, inputs=["x", "i", "u"]) == expected


def test_scatter_nd_into_rows_of_an_open_number() -> None:
    feeds = {"x": X[0], "i": np.array([[2], [0]]), "u": -X[0, :2]}
    same("ScatterND", feeds, dynamic={"x": [0], "i": [0], "u": [0]})


@pytest.mark.parametrize("is_fed", [True, False])
@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scatter_elements(reduction: str, is_fed: bool) -> None:
    indices = np.array([[0, -1, 1], [2, 0, -4]])
    fed = {"x": X.reshape(2, 12)[:, :4], "u": np.full((2, 3), 2, np.float32)}
    fed = {"x": fed["x"].T.copy(), **({"i": indices} if is_fed else {}), "u": fed["u"]}
    constants = {} if is_fed else {"i": indices}
    fed["x"] = np.repeat(fed["x"], 2, axis=1)[:, :3].copy()
    same("ScatterElements", fed, constants, inputs=["x", "i", "u"], reduction=reduction, axis=0, relative=1e-6)


def test_product_of_scattered_int64_is_refused() -> None:
    feeds = {"x": np.ones((2, 2), np.int64), "i": np.array([[0]]), "u": np.ones((1, 2), np.int64)}
    with pytest.raises(TargetError, match="no kernel that scatters INT64 with reduction 'mul'"):
        emitted(one_node("ScatterND", feeds, reduction="mul", output_type=7))


@pytest.mark.parametrize("open_axes", [[], [1, 2]])
@pytest.mark.parametrize("diagonal", [None, -1, 2])
@pytest.mark.parametrize("upper", [0, 1])
def test_triangles_keep_infinities_out(upper: int, diagonal: int | None, open_axes: Sequence[int]) -> None:
    constants = {} if diagonal is None else {"k": np.array(diagonal)}
    same("Trilu", {"x": np.full((2, 3, 4), -np.inf, np.float32)}, constants, upper=upper, dynamic={"x": open_axes})


@pytest.mark.parametrize("op_type", ["HannWindow", "HammingWindow", "BlackmanWindow"])
@pytest.mark.parametrize("periodic", [0, 1])
def test_window_of_a_computed_length(op_type: str, periodic: int) -> None:
    # Cosines of float32 angles differ in the last bits.
    same(op_type, {"size": np.array(9)}, periodic=periodic, output_type=onnx.TensorProto.FLOAT, relative=2e-6)


def test_identity_matrix_of_open_lengths() -> None:
    same("EyeLike", {"x": X[0]}, k=1, dynamic={"x": [0, 1]})


def test_random_numbers_have_the_distribution() -> None:
    from tests.tflite_runs import litert_outputs

    normal = litert_outputs(emitted(one_node("RandomNormal", {}, shape=[4000], mean=2.0, scale=3.0)), {})["y"]
    uniform = litert_outputs(emitted(one_node("RandomUniform", {}, shape=[4000], low=-1.0, high=5.0)), {})["y"]
    # Six standard errors of the mean of 4000 numbers.
    assert abs(normal.mean() - 2) < 0.3
    assert abs(normal.std() - 3) < 0.3
    assert abs(uniform.mean() - 2) < 0.2
    assert -1 <= uniform.min() < uniform.max() <= 5


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_drawn_classes_are_as_frequent_as_their_chances(dtype: type[np.generic]) -> None:
    from tests.tflite_runs import litert_outputs

    chances = np.array([[0.1, 0.2, 0.7], [0.5, 0.5, 1e-9]], np.float32)
    type_ = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    attributes = {"dtype": type_, "sample_size": 4000, "seed": 2.0}
    feeds = {"x": np.log(chances)}
    made = litert_outputs(
        emitted(one_node("Multinomial", feeds, output_type=type_, dynamic={"x": [0]}, **attributes)), feeds
    )["y"]
    assert made.dtype == dtype
    assert made.shape == (2, 4000)
    shares = [np.bincount(row, minlength=3) / 4000 for row in made]
    # Six standard errors of a share of 4000 draws.
    np.testing.assert_allclose(shares, chances, atol=0.05)
