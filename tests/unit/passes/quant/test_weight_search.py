"""Scales of weights with the smallest squared error: never worse than the largest magnitude, channel by channel."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.ops.affine import symmetric_scales
from onnxprune.passes.quant.weight_search import least_squares_scales

RNG = np.random.default_rng(3)


def channel_errors(array: np.ndarray, scales: np.ndarray, axis: int | None, num_bits: int) -> np.ndarray:
    largest = 2 ** (num_bits - 1) - 1
    rows = array.reshape(1, -1) if axis is None else np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    scale = scales.astype(np.float64)[:, None]
    rounded = np.clip(np.rint(rows / scale), -largest, largest) * scale
    return np.square(rows - rounded).sum(axis=1)


def magnitudes(array: np.ndarray, axis: int | None) -> np.ndarray:
    others = None if axis is None else tuple(dim for dim in range(array.ndim) if dim != axis)
    return np.atleast_1d(np.abs(array).max(axis=others))


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("axis", [0, 1, None])
def test_no_channel_is_worse_than_by_its_largest_magnitude(axis: int | None, num_bits: int) -> None:
    array = RNG.standard_t(4, (24, 40, 3, 3)).astype(np.float32)

    found = least_squares_scales(array, magnitudes(array, axis), axis, num_bits)

    widest = symmetric_scales(magnitudes(array, axis), num_bits)
    errors = channel_errors(array, found, axis, num_bits)
    # Rounding of sums in float32.
    assert np.all(errors <= channel_errors(array, widest, axis, num_bits) * (1 + 1e-5))
    assert np.all(found <= widest)


def test_four_bits_gain_a_fifth_of_the_error() -> None:
    array = RNG.standard_t(4, (24, 360)).astype(np.float32)

    found = least_squares_scales(array, magnitudes(array, 0), 0, 4)

    widest = symmetric_scales(magnitudes(array, 0), 4)
    assert channel_errors(array, found, 0, 4).sum() < 0.8 * channel_errors(array, widest, 0, 4).sum()


def test_search_comes_near_the_best_share_of_a_fine_grid() -> None:
    array = RNG.standard_normal((8, 2000)).astype(np.float32)

    found = least_squares_scales(array, magnitudes(array, 0), 0, 4)

    widest = symmetric_scales(magnitudes(array, 0), 4)
    grid = [channel_errors(array, widest * share, 0, 4) for share in np.linspace(0.2, 1.0, 400)]
    assert np.all(channel_errors(array, found, 0, 4) <= 1.02 * np.min(grid, axis=0))


def test_rows_longer_and_shorter_than_a_block_are_measured_alike() -> None:
    long = RNG.standard_t(3, (2, 70_000)).astype(np.float32)

    together = least_squares_scales(long, magnitudes(long, 0), 0, 4)
    alone = [least_squares_scales(row[None], magnitudes(row[None], 0), 0, 4)[0] for row in long]

    np.testing.assert_array_equal(together, alone)


def test_channel_of_zeros_keeps_the_scale_one() -> None:
    array = np.zeros((2, 5), np.float32)
    array[1] = 0.5

    assert least_squares_scales(array, magnitudes(array, 0), 0, 8)[0] == 1.0
