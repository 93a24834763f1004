"""Ranges that grow from batch to batch, and those of channels."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.passes.quant.accumulate import (
    CalibrationMethod,
    ChannelExtremes,
    RangeRule,
    TensorRange,
    accumulator_for,
)

METHODS: tuple[CalibrationMethod, ...] = ("minmax", "moving-average", "percentile", "entropy", "mse")


def after(rule: RangeRule, *arrays: np.ndarray) -> TensorRange | None:
    accumulator = accumulator_for(rule)
    for array in arrays:
        accumulator.add(array.astype(np.float32), float(array.min()), float(array.max()), 1)
    return accumulator.range()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_added_has_no_range(method: CalibrationMethod) -> None:
    assert after(RangeRule(method=method)) is None


@pytest.mark.parametrize("method", METHODS)
def test_tensor_of_zeros_has_the_range_zero(method: CalibrationMethod) -> None:
    assert after(RangeRule(method=method), np.zeros(8), np.zeros(8)) == TensorRange(low=0.0, high=0.0)


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_order_of_the_batches_does_not_matter(method: CalibrationMethod) -> None:
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal(2000) * scale for scale in (0.5, 3.0, 1.0)]

    assert after(RangeRule(method=method), *batches) == after(RangeRule(method=method), *reversed(batches))


@pytest.mark.parametrize("method", METHODS)
def test_range_lies_within_the_extremes(method: CalibrationMethod) -> None:
    numbers = np.random.default_rng(1).standard_normal(5000)

    found = after(RangeRule(method=method), *np.array_split(numbers, 5))

    assert found is not None
    assert numbers.astype(np.float32).min() <= found.low < -1
    assert 1 < found.high <= numbers.astype(np.float32).max()


def test_moving_average_of_few_batches_is_about_their_mean() -> None:
    batches = [np.array([-1.0, height]) for height in (2.0, 4.0, 6.0)]

    found = after(RangeRule(method="moving-average", momentum=0.99), *batches)

    weights = 0.99 ** np.array([2, 1, 0])
    assert found is not None
    assert found.high == pytest.approx(np.average([2.0, 4.0, 6.0], weights=weights), rel=1e-12)
    assert found.low == pytest.approx(-1.0, rel=1e-12)


def test_moving_average_without_momentum_is_the_last_batch() -> None:
    found = after(RangeRule(method="moving-average", momentum=0.0), np.array([-9.0, 9.0]), np.array([-1.0, 2.0]))

    assert found == TensorRange(low=-1.0, high=2.0)


@pytest.mark.parametrize("axis", [1, -1])
def test_channels_have_extremes_of_their_own(axis: int) -> None:
    arrays = np.random.default_rng(2).standard_normal((3, 2, 4, 5)).astype(np.float32)
    extremes = ChannelExtremes(axis)

    for array in arrays:
        extremes.add(array, 2)
    found = extremes.ranges()

    assert found is not None
    moved = np.moveaxis(arrays, axis + 1 if axis > 0 else axis, 0).reshape(arrays.shape[axis + (axis > 0)], -1)
    np.testing.assert_array_equal(found.lows, moved.min(axis=1))
    np.testing.assert_array_equal(found.highs, moved.max(axis=1))
    assert found.num_positions == moved.shape[1] // (3 * 2)


def test_channels_of_nothing_have_no_extremes() -> None:
    assert ChannelExtremes(1).ranges() is None
