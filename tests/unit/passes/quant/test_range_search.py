"""Ranges from histograms, held against brute force over the numbers themselves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onnxprune.ops.affine import affine_parameters, representable_range
from onnxprune.passes.quant.histogram import MAX_COUNTED, Bins, StreamingHistogram
from onnxprune.passes.quant.range_search import entropy_range, least_squares_range, squared_errors

RNG = np.random.default_rng(7)
NORMAL = RNG.standard_normal(20_000).astype(np.float32)
SHAPES = {
    "symmetric": NORMAL,
    "behind a Relu": np.maximum(NORMAL, 0),
    "lopsided (SiLU)": (NORMAL * 4 / (1 + np.exp(-NORMAL * 4))).astype(np.float32),
    "one outlier": np.append(NORMAL, np.float32(60.0)),
    "exponential": RNG.exponential(1.0, 20_000).astype(np.float32),
}
Search = Callable[[Bins, float, float, int], tuple[float, float]]


def bins_of(numbers: np.ndarray) -> Bins:
    histogram = StreamingHistogram()
    histogram.add(numbers, float(numbers.min()), float(numbers.max()))
    return histogram.bins()


def true_error(numbers: np.ndarray, low: float, high: float, num_bits: int = 8) -> float:
    """The summed squared error of quantizing the numbers themselves."""
    scale, zero_point = affine_parameters(low, high, num_bits)
    smallest, largest = representable_range(scale, zero_point, num_bits)
    rounded = np.clip(np.rint(numbers.astype(np.float64) / scale) * scale, smallest, largest)
    return float(np.square(rounded - numbers).sum())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("num_bits", [4, 8])
def test_least_squares_range_comes_within_three_percent_of_the_best_that_brute_force_finds(
    name: str, num_bits: int
) -> None:
    numbers = SHAPES[name]
    low, high = min(float(numbers.min()), 0.0), float(numbers.max())

    found = least_squares_range(bins_of(numbers), low, high, num_bits)

    shares = np.geomspace(1, 1 / 40, 30)
    candidates = [(low * a, high * b) for a in (shares if low < 0 else [1.0]) for b in shares]
    best = min(true_error(numbers, *ends, num_bits) for ends in candidates)
    assert true_error(numbers, *found, num_bits) <= 1.03 * best
    assert true_error(numbers, *found, num_bits) <= 1.001 * true_error(numbers, low, high, num_bits)


def test_squared_error_from_bins_is_that_of_the_numbers() -> None:
    ends = [(-4.0, 4.0), (-1.0, 3.0), (-0.5, 0.5)]

    found = squared_errors(bins_of(NORMAL), np.array([low for low, _ in ends]), np.array([high for _, high in ends]), 8)

    # Numbers are spread over bins of a tenth of a step; rounding of the zero point costs as much again.
    np.testing.assert_allclose(found, [true_error(NORMAL, low, high) for low, high in ends], rtol=0.02)


@pytest.mark.parametrize("search", [least_squares_range, entropy_range])
def test_an_outlier_is_cut_and_a_uniform_tensor_is_not(search: Search) -> None:
    with_outlier = SHAPES["one outlier"]
    uniform = RNG.uniform(-1, 2, 20_000).astype(np.float32)

    low, high = search(bins_of(with_outlier), float(with_outlier.min()), 60.0, 4)
    uniform_low, uniform_high = search(bins_of(uniform), float(uniform.min()), float(uniform.max()), 4)

    assert high < 12
    assert low < -1.5
    assert uniform_high > 1.8
    assert uniform_low < -0.85


@pytest.mark.parametrize("search", [least_squares_range, entropy_range])
def test_one_sided_tensor_keeps_zero_as_its_lower_end(search: Search) -> None:
    numbers = SHAPES["behind a Relu"]

    low, high = search(bins_of(numbers), 0.0, float(numbers.max()), 8)

    assert low == 0.0
    assert 2.5 < high <= numbers.max()


def test_both_ends_of_a_lopsided_tensor_are_chosen_apart() -> None:
    numbers = np.concatenate([-RNG.exponential(0.05, 20_000), RNG.exponential(1.0, 20_000), [-3.0]]).astype(np.float32)

    low, high = least_squares_range(bins_of(numbers), float(numbers.min()), float(numbers.max()), 8)

    assert low > -2.7
    assert high > 0.6 * numbers.max()


def test_entropy_is_not_chased_into_a_tiny_range_by_a_flat_background() -> None:
    # Most of a picture is one colour, so most of a feature map is one of a few numbers.
    flat = np.repeat(np.float32([0.11, 0.23, 0.37]), 100_000)
    numbers = np.concatenate([flat, np.abs(NORMAL)])

    _, high = entropy_range(bins_of(numbers), 0.0, float(numbers.max()), 8)

    assert high > 2.5


@pytest.mark.parametrize("search", [least_squares_range, entropy_range])
def test_with_sixteen_bits_nothing_worth_mentioning_is_cut(search: Search) -> None:
    numbers = SHAPES["exponential"]

    low, high = search(bins_of(numbers), 0.0, float(numbers.max()), 16)

    assert low == 0.0
    assert high > 0.9 * numbers.max()


def test_exact_zeros_do_not_count_among_the_bins() -> None:
    numbers = np.concatenate([np.zeros(10_000, np.float32), np.linspace(0.1, 1.0, 4096, dtype=np.float32)])

    bins = bins_of(numbers)

    assert bins.counts.sum() <= 4097
    assert bins.edges[0] == 0.0


def test_only_zeros_have_no_bins() -> None:
    with pytest.raises(ValueError, match="no number but zero"):
        bins_of(np.zeros(4, np.float32))


def test_of_a_large_tensor_every_kth_number_is_counted_from_all_columns() -> None:
    columns = 64
    array = np.tile(np.arange(columns, dtype=np.float32) - columns / 2 + 0.5, 4 * MAX_COUNTED // columns)
    histogram = StreamingHistogram()

    histogram.add(array, float(array.min()), float(array.max()), max_counted=MAX_COUNTED)

    assert 0.7 * MAX_COUNTED <= histogram.count <= MAX_COUNTED
    counts = histogram.bins().counts
    assert np.count_nonzero(counts) == columns
    assert counts[counts > 0].min() > 0.9 * counts.max()
    assert (histogram.low, histogram.high) == (-31.5, 31.5)
