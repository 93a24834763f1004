"""Radix selection against sorting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from onnxprune.passes.sparsify.select import (
    INELIGIBLE,
    Chooser,
    NonFiniteScoreError,
    keys_of,
    select_smallest,
)

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Few different values, so that ties are the rule.
coarse = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 1.0000001, 3.0, 1e-45, 3e38])
tensors = st.lists(npst.arrays(np.float32, st.integers(0, 40), elements=finite | coarse), min_size=1, max_size=4)


def windows_of(array, size):
    def stream(share=1):
        for start in range(0, len(array), size):
            window = array[start : start + size]
            yield keys_of(window[: -(-len(window) // share)])

    return stream


def chosen_masks(arrays, selection, size):
    return [
        np.concatenate(
            [np.zeros(0, bool), *map(Chooser(threshold=selection.threshold, ties=s.ties), windows_of(a, size)())]
        )
        for a, s in zip(arrays, selection.streams, strict=True)
    ]


@given(tensors, st.floats(0, 1), st.integers(1, 16), st.sampled_from([1, 2, 8]))
def test_selection_equals_a_stable_sort_by_magnitude(arrays, ratio, window, share):
    selection = select_smallest([windows_of(a, window) for a in arrays], ratio, sampled_share=share)

    together = np.abs(np.concatenate(arrays))
    wanted = round(ratio * len(together))
    expected = np.zeros(len(together), bool)
    expected[np.argsort(together, kind="stable")[:wanted]] = True
    np.testing.assert_array_equal(np.concatenate(chosen_masks(arrays, selection, window)), expected)
    assert selection.chosen == wanted


@given(tensors, st.floats(0, 1), st.floats(0, 1))
def test_what_a_lower_level_chooses_a_higher_one_chooses_too(arrays, one, other):
    low, high = sorted((one, other))
    streams = [windows_of(a, 7) for a in arrays]
    few = chosen_masks(arrays, select_smallest(streams, low), 7)
    many = chosen_masks(arrays, select_smallest(streams, high), 7)
    for small, large in zip(few, many, strict=True):
        assert not (small & ~large).any()


def test_ineligible_units_count_as_units_but_are_never_chosen():
    keys = keys_of(np.array([1.0, 2.0, 3.0, 4.0], np.float32))
    keys[0] = INELIGIBLE
    selection = select_smallest([lambda share: iter([keys])], 1.0)
    (stream,) = selection.streams
    assert (stream.units, stream.eligible, stream.chosen) == (4, 3, 3)
    assert selection.threshold == 4.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_refused_with_its_stream(bad):
    good, broken = np.ones(3, np.float32), np.array([1.0, bad], np.float32)
    with pytest.raises(NonFiniteScoreError) as caught:
        select_smallest([windows_of(good, 2), windows_of(broken, 2)], 0.2)
    assert caught.value.stream == 1


def test_a_sample_that_misleads_is_found_out():
    # The sample sees the first of each window only, and those are all small.
    array = np.tile(np.array([1e-3] + [5.0] * 7, np.float32), 64) * np.linspace(1, 2, 512, dtype=np.float32)
    sampled = select_smallest([windows_of(array, 8)], 0.9, sampled_share=8)
    assert sampled == select_smallest([windows_of(array, 8)], 0.9)
