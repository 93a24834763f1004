"""The streaming histogram against one that sees all numbers at once."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.passes.quant.histogram import NUM_BINS, StreamingHistogram


def filled(*arrays: np.ndarray) -> StreamingHistogram:
    histogram = StreamingHistogram()
    for array in arrays:
        array = array.astype(np.float32)
        histogram.add(array, float(array.min()), float(array.max()))
    return histogram


def test_order_of_the_batches_does_not_matter_although_the_range_grows() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal(500) * scale for scale in (0.01, 1.0, 300.0, 0.5)]

    forwards, backwards = filled(*batches), filled(*reversed(batches))

    assert forwards.bin_width == backwards.bin_width
    np.testing.assert_array_equal(forwards._counts, backwards._counts)
    assert forwards.count == 2000


def test_grown_histogram_equals_the_one_made_at_once() -> None:
    rng = np.random.default_rng(1)
    numbers = (rng.standard_normal(3000) * 3).astype(np.float32)
    numbers[-1] = 1000.0

    grown = filled(numbers[:10], numbers[10:-1], numbers[-1:])

    edges = (np.arange(NUM_BINS + 1) - NUM_BINS // 2) * grown.bin_width
    expected, _ = np.histogram(numbers.astype(np.float64), bins=edges)
    np.testing.assert_array_equal(grown._counts, expected)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_range_is_exact_up_to_one_bin(percentile: float) -> None:
    rng = np.random.default_rng(2)
    numbers = np.concatenate([rng.standard_normal(100_000), rng.standard_normal(20) * 30]).astype(np.float32)

    histogram = filled(*np.array_split(numbers, 7))
    low, high = histogram.percentile_range(percentile)

    cut = (100.0 - percentile) / 2
    exact_low, exact_high = np.percentile(numbers, [cut, 100.0 - cut])
    assert abs(low - exact_low) <= histogram.bin_width
    assert abs(high - exact_high) <= histogram.bin_width
    assert high < numbers.max() / 5


def test_full_percentile_is_the_range_of_the_numbers() -> None:
    assert filled(np.array([-3.0, 0.25, 7.0])).percentile_range(100.0) == (-3.0, 7.0)


def test_zeros_before_anything_else_are_counted_in_the_middle_bin() -> None:
    histogram = filled(np.zeros(5), np.array([1.0, -1.0]))

    assert histogram._counts[NUM_BINS // 2] == 5
    assert histogram.count == 7


def test_only_zeros_and_denormals_have_a_range() -> None:
    assert filled(np.zeros(3)).percentile_range(99.0) == (0.0, 0.0)
    assert filled(np.array([1e-42, 0.0])).percentile_range(100.0) == (0.0, pytest.approx(1e-42, rel=0.01))


def test_empty_histogram_has_no_range() -> None:
    with pytest.raises(ValueError, match="empty"):
        StreamingHistogram().percentile_range(99.0)
