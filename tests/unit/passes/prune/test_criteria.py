"""Criteria and scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.passes.prune.criteria import CRITERIA, channel_scores, geometric_median, l1, l2

ROWS = np.array([[1.0, -2.0], [0.0, 0.0], [3.0, 4.0]], dtype=np.float32)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_l1_is_the_sum_of_absolute_weights() -> None:
    assert l1(ROWS, rng()).tolist() == [3.0, 0.0, 7.0]


def test_l2_is_the_euclidean_norm() -> None:
    assert l2(ROWS, rng()).tolist() == pytest.approx([5**0.5, 0.0, 5.0])


def test_geometric_median_is_the_sum_of_distances_to_all_others() -> None:
    expected = [sum(float(np.linalg.norm(a - b)) for b in ROWS) for a in ROWS]
    # Distances by |a|^2 - 2ab + |b|^2 lose half the digits of single precision.
    assert geometric_median(ROWS, rng()).tolist() == pytest.approx(expected, rel=1e-5)


def test_geometric_median_gives_twins_the_lowest_score_whatever_their_norm() -> None:
    rows = np.array([[5.0, 5.0], [5.0, 5.0], [0.0, 9.0], [9.0, 0.0]], dtype=np.float32)
    scores = geometric_median(rows, rng())
    assert scores[0] == scores[1] < min(scores[2], scores[3])


def test_geometric_median_of_more_rows_than_one_block_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(1).standard_normal((50, 4)).astype(np.float32)
    whole = geometric_median(rows, rng())
    monkeypatch.setattr("onnxprune.passes.prune.criteria._DISTANCE_ROWS", 7)
    np.testing.assert_allclose(geometric_median(rows, rng()), whole, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(CRITERIA))
@given(scale=st.floats(0.001, 1000.0), seed=st.integers(0, 100))
def test_scores_of_a_group_don_t_depend_on_the_scale_of_its_weights(name: str, scale: float, seed: int) -> None:
    tables = [np.random.default_rng(seed).standard_normal((6, 3)).astype(np.float32) for _ in range(2)]
    plain = channel_scores(tables, CRITERIA[name], rng())  # type: ignore[index]
    scaled = channel_scores([tables[0] * np.float32(scale), tables[1]], CRITERIA[name], rng())  # type: ignore[index]
    # Single precision, and distances lose half of its digits.
    np.testing.assert_allclose(scaled, plain, rtol=1e-3)
    assert plain.mean() == pytest.approx(1.0)


def test_a_group_of_zeros_scores_evenly() -> None:
    assert channel_scores([np.zeros((4, 2), np.float32)], l1, rng()).tolist() == [1.0] * 4
