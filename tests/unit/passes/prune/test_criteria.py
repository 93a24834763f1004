"""Criteria on tables that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.passes.prune.channel_slices import ChannelSlices, SlicedArray
from onnxprune.passes.prune.criteria import CRITERIA, fisher, geometric_median, l1, l2, taylor, wanda
from tests.channel_places import activation, group, place

ROWS = np.array([[1.0, -2.0], [0.0, 0.0], [3.0, 4.0]], dtype=np.float32)


def scores(name: str, slices: ChannelSlices) -> npt.NDArray[np.float64]:
    return CRITERIA[name].score(slices, np.random.default_rng(0))


# --- weights --------------------------------------------------------------------------------------------------


def test_l1_is_the_sum_of_absolute_weights() -> None:
    assert l1(place(ROWS)).tolist() == [3.0, 0.0, 7.0]


def test_l2_is_the_euclidean_norm() -> None:
    assert l2(place(ROWS)).tolist() == pytest.approx([5**0.5, 0.0, 5.0], rel=1e-12)


def test_a_channel_owns_all_its_positions_on_an_axis_that_is_not_the_first() -> None:
    # Two channels of two columns each, as behind a Flatten, and not side by side.
    weight = [[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]]
    found = l1(place(weight, axis=1, positions=[[0, 3], [2, 1]]))
    assert found.tolist() == [1 + 8 + 16 + 128, 2 + 4 + 32 + 64]


def test_geometric_median_is_the_sum_of_distances_to_all_others() -> None:
    expected = [sum(float(np.linalg.norm(a - b)) for b in ROWS) for a in ROWS]
    # Distances by |a|^2 - 2ab + |b|^2 lose half the digits of single precision.
    assert geometric_median(ROWS).tolist() == pytest.approx(expected, rel=1e-5)


def test_geometric_median_gives_twins_the_lowest_score_whatever_their_norm() -> None:
    rows = np.array([[5.0, 5.0], [5.0, 5.0], [0.0, 9.0], [9.0, 0.0]], dtype=np.float32)
    found = geometric_median(rows)
    assert found[0] == found[1] < min(found[2], found[3])


def test_geometric_median_of_more_rows_than_one_block_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(1).standard_normal((50, 4)).astype(np.float32)
    whole = geometric_median(rows)
    monkeypatch.setattr("onnxprune.passes.prune.criteria._DISTANCE_ROWS", 7)
    np.testing.assert_allclose(geometric_median(rows), whole, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_sums_over_blocks_are_those_over_rows(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(2).standard_normal((6, 8, 10)).astype(np.float32)
    positions = np.random.default_rng(3).permutation(array.shape[axis]).reshape(-1, 2)
    table = SlicedArray(array=array, axis=axis, positions=positions)
    monkeypatch.setattr("onnxprune.passes.prune.channel_slices._BLOCK_BYTES", 700)
    by_rows = np.abs(table.rows().astype(np.float64)).sum(axis=1)
    # The same numbers in another order, added up in double precision.
    np.testing.assert_allclose(table.sums(np.abs).sum(axis=1), by_rows, rtol=1e-12)
    blocks = [table.rows(start, stop) for start, stop in table.row_blocks()]
    assert len(blocks) > 1
    np.testing.assert_array_equal(np.concatenate(blocks), table.rows())


def test_bn_scale_is_the_size_of_gamma_and_nothing_else() -> None:
    slices = group(place(ROWS), place([-3.0, 1.0, 2.0], role="parameter", is_normalization_scale=True))
    assert scores("bn-scale", slices).tolist() == [1.5, 0.5, 1.0]


def test_bn_scale_says_that_a_group_has_no_scale() -> None:
    lacks = CRITERIA["bn-scale"].lacks
    assert lacks is not None
    assert lacks(group(place(ROWS))) == "no normalization scales it"


def test_random_scores_follow_the_seed_alone() -> None:
    row = CRITERIA["random"]
    first, again = (row.score(group(place(ROWS)), np.random.default_rng(7)) for _ in range(2))
    assert first.tolist() == again.tolist()
    assert first.tolist() != row.score(group(place(ROWS)), np.random.default_rng(8)).tolist()


# --- calibration data -----------------------------------------------------------------------------------------


def test_activation_is_the_mean_over_the_tensors_that_are_read() -> None:
    # Means to one: (0.5, 1.5) and (1.5, 0.5, ...); a tensor that two nodes read counts once.
    seen = [activation([1, 3]), activation([1, 3], node="other"), activation([30, 10], tensor="z")]
    assert scores("activation", group(activations=seen)).tolist() == [1.0, 1.0]


def test_wanda_weighs_each_weight_by_what_it_is_multiplied_with() -> None:
    reader = place([[1.0, -2.0, 0.0, 1.0]], axis=1, role="input", positions=[[0, 1], [2, 3]])
    assert wanda(reader, np.array([[10.0, 1.0], [5.0, 3.0]])).tolist() == [12.0, 3.0]


def test_wanda_looks_at_readers_and_not_at_filters() -> None:
    filters = place([[100.0], [1.0]])
    reader = place([[1.0, 3.0]], axis=1, role="input", input_rms=[[1.0], [1.0]])
    assert scores("wanda", group(filters, reader, activations=[activation([1, 1])])).tolist() == [0.5, 1.5]


def test_wanda_of_queries_and_keys_is_the_product_of_their_sizes() -> None:
    queries = activation([1, 2], tensor="q", node="scores", has_weight=False)
    keys = activation([1, 3], tensor="k", node="scores", has_weight=False)
    assert scores("wanda", group(place(np.ones((2, 1))), activations=[queries, keys])).tolist() == [2 / 7, 12 / 7]


# --- gradients ------------------------------------------------------------------------------------------------


def test_taylor_squares_the_sum_of_weight_times_gradient_for_each_minibatch() -> None:
    gradients = np.array([[[1.0, 1.0], [9.0, 9.0], [1.0, -0.5]], [[-1.0, 0.0], [9.0, 9.0], [0.0, 0.0]]], np.float32)
    # Channel 0: (1 - 2)^2 and (-1)^2; channel 2: (3 - 2)^2 and 0.
    assert taylor([place(ROWS, gradients=gradients)]).tolist() == [1.0, 0.0, 0.5]


def test_taylor_adds_up_all_that_reads_a_channel_before_it_squares() -> None:
    ones = np.ones((1, 1, 2))
    readers = [place([row], axis=1, role="input", gradients=ones) for row in ([1.0, 2.0], [-1.0, 3.0])]
    filters = place([[100.0], [1.0]], gradients=np.ones((1, 2, 1)))
    assert scores("taylor", group(filters, *readers)).tolist() == [0.0, 25.0]


def test_taylor_looks_at_filters_where_no_weight_reads_the_channel() -> None:
    filters = place([[2.0], [1.0]], gradients=np.ones((1, 2, 1)))
    bias = place([7.0, 7.0], role="parameter", gradients=np.ones((1, 2)))
    assert scores("taylor", group(filters, bias)).tolist() == [4.0, 1.0]


def test_fisher_weighs_squared_weights_by_the_mean_squared_gradient() -> None:
    gradients = np.array([[[1.0, 1.0], [9.0, 9.0], [1.0, -0.5]], [[-1.0, 0.0], [9.0, 9.0], [0.0, 0.0]]], np.float32)
    # Channel 0: 1 * (1 + 1)/2 + 4 * (1 + 0)/2; channel 2: 9 * (1 + 0)/2 + 16 * (0.25 + 0)/2.
    assert fisher(ROWS, gradients).tolist() == [3.0, 0.0, 6.5]


def test_gradients_that_cancel_over_minibatches_still_count() -> None:
    one = np.ones((1, 2, 2), np.float32)
    assert taylor([place(np.ones((2, 2)), gradients=np.concatenate([one, -one]))]).tolist() == [4.0, 4.0]


@pytest.mark.parametrize("name", ["taylor", "fisher"])
def test_places_without_a_gradient_are_left_out(name: str) -> None:
    known = place([[1.0], [3.0]], gradients=np.ones((1, 2, 1)))
    with_both = scores(name, group(known, place([[100.0], [1.0]])))
    assert with_both.tolist() == scores(name, group(known)).tolist()


# --- normalization --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["l1", "l2", "geometric-median", "fisher"])
@given(scale=st.floats(0.001, 1000.0), seed=st.integers(0, 100))
def test_scores_of_a_group_don_t_depend_on_the_scale_of_its_weights(name: str, scale: float, seed: int) -> None:
    tables = [np.random.default_rng(seed).standard_normal((6, 3)) for _ in range(2)]
    gradients = np.random.default_rng(seed + 1).standard_normal((2, 6, 3))
    plain = scores(name, group(*(place(table, gradients=gradients) for table in tables)))
    first, second = place(tables[0] * scale, gradients=gradients), place(tables[1], gradients=gradients)
    # Single precision, and distances lose half of its digits.
    np.testing.assert_allclose(scores(name, group(first, second)), plain, rtol=1e-3)
    assert plain.mean() == pytest.approx(1.0, rel=1e-9)


def test_all_places_of_a_group_count_alike() -> None:
    found = scores("l1", group(place([[1.0], [3.0]]), place([[500.0, 100.0]], axis=1, role="input")))
    # (0.5, 1.5) and (5/3, 1/3), averaged.
    assert found.tolist() == pytest.approx([(0.5 + 5 / 3) / 2, (1.5 + 1 / 3) / 2], rel=1e-12)


def test_a_group_of_zeros_scores_evenly() -> None:
    assert scores("l1", group(place(np.zeros((4, 2))))).tolist() == [1.0] * 4
