"""What a handful of rounds may say: how often a verdict on equal models is wrong, and what is seen all the same."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from onnxprune.runtime.round_statistics import MIN_ROUNDS, is_settled, mean_and_error


def settle(true: float, noise: float, max_rounds: int, rng: np.random.Generator) -> tuple[float, float, int]:
    ratios: list[float] = []
    for number in count(1):
        ratios.append(true * float(np.exp(rng.normal(0, noise))))
        if number < MIN_ROUNDS:
            continue
        ratio, error = mean_and_error(ratios)
        if number >= max_rounds or is_settled(ratio, error, tolerance=0.005):
            return ratio, error, number
    raise AssertionError("unreachable")


def share_called_slower(true: float, noise: float, max_rounds: int = 8, margin: float = 0.005) -> float:
    rng = np.random.default_rng(0)
    settled = [settle(true, noise, max_rounds, rng) for _ in range(600)]
    return float(np.mean([ratio + max(2 * error, margin) < 1 for ratio, error, _ in settled]))


@pytest.mark.parametrize("noise", [0.005, 0.02, 0.04, 0.08])
def test_equal_models_are_rarely_called_slower(noise: float) -> None:
    assert share_called_slower(1.0, noise) < 0.03


def test_what_is_clearly_slower_is_called_so() -> None:
    assert share_called_slower(0.9, 0.02) > 0.99
    assert share_called_slower(0.8, 0.04) > 0.99


def test_clear_differences_take_the_fewest_rounds() -> None:
    assert settle(2.0, 0.01, 8, np.random.default_rng(0))[2] == MIN_ROUNDS
    assert settle(0.5, 0.01, 8, np.random.default_rng(0))[2] == MIN_ROUNDS


def test_one_round_that_something_disturbed_hardly_counts() -> None:
    quiet, _ = mean_and_error([1.0, 1.01, 0.99, 1.0, 1.01, 0.99])
    ratio, error = mean_and_error([1.0, 1.01, 0.99, 1.0, 1.01, 3.0])
    assert abs(ratio - quiet) < 0.01
    assert error < 0.02


def test_rounds_that_agree_by_chance_leave_an_error() -> None:
    assert mean_and_error([0.96] * 5) == (pytest.approx(0.96, rel=1e-12), pytest.approx(0.00192, rel=1e-12))


def test_a_slower_second_takes_more_to_end_the_rounds_than_a_faster_one() -> None:
    assert is_settled(1.04, 0.01, tolerance=0.001)
    assert not is_settled(0.96, 0.01, tolerance=0.001)
    assert is_settled(0.93, 0.01, tolerance=0.001)


def test_a_known_ratio_ends_the_rounds_unless_it_would_be_called_slower() -> None:
    assert is_settled(1.0, 0.004, tolerance=0.005)
    assert not is_settled(0.985, 0.004, tolerance=0.005)


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="4 rounds"):
        mean_and_error([1.0] * 4)
