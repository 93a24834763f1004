"""Differences of tensors inside two models: the figures by hand, their edges, and sweeps over the samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest

from onnxprune.contracts import Batch, TensorSpec
from onnxprune.errors import BadDataError
from onnxprune.evaluate.tensor_diff import ComparedTensors, TensorPair, compare_tensors, noise_ratio
from onnxprune.evaluate.value_counts import NUM_BINS, PairedHistogram

Arrays = Mapping[str, npt.NDArray[np.generic]]


@dataclass
class Tensors:
    """A model without a runtime: what it gives for the n-th sample is written down."""

    samples: Sequence[Arrays]
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def runner(self, names: Sequence[str]) -> Written:
        self.asked.append(tuple(names))
        return Written(self.samples, tuple(names))


@dataclass
class Written:
    samples: Sequence[Arrays]
    names: tuple[str, ...]
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def run(self, feeds: Batch) -> dict[str, npt.NDArray[np.generic]]:
        sample = self.samples[int(feeds["number"])]
        return {name: sample[name] for name in self.names}


@dataclass
class Numbers:
    """Batches that hold nothing but their number."""

    count: int
    times_iterated: int = 0

    def __iter__(self) -> Iterator[Batch]:
        self.times_iterated += 1
        return iter([{"number": np.array(number)} for number in range(self.count)])


def compare(reference: Sequence[Arrays], actual: Sequence[Arrays], *names: str) -> ComparedTensors:
    pairs = [TensorPair(reference=name, actual=name) for name in names]
    return compare_tensors(Tensors(reference), Tensors(actual), pairs, Numbers(len(reference)))


def floats(*values: float) -> npt.NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def test_figures_take_all_samples_of_a_tensor_as_one_vector() -> None:
    found = compare(
        [{"t": floats(3.0, 4.0)}, {"t": floats(0.0, 12.0)}], [{"t": floats(3.0, 5.0)}, {"t": floats(0, 9)}], "t"
    )
    (one,) = found.tensors
    # r = (3, 4, 0, 12), a = (3, 5, 0, 9): |r| = 13, sum (a - r)^2 = 10.
    assert one.snr_db == pytest.approx(10 * math.log10(169 / 10), rel=1e-12)
    assert one.cosine == pytest.approx((9 + 20 + 108) / (13 * math.sqrt(9 + 25 + 81)), rel=1e-12)
    assert (one.max_abs, one.max_reference, one.num_values) == (3.0, 12.0, 4)
    assert found.num_batches == 2


def test_equal_tensors_have_no_noise_and_no_divergence() -> None:
    (one,) = compare([{"t": floats(1.0, -2.0)}], [{"t": floats(1.0, -2.0)}], "t").tensors
    assert (one.snr_db, one.cosine, one.kl_nats, one.max_abs) == (math.inf, 1.0, 0.0, 0.0)


def test_infinities_at_the_same_place_are_equal_and_a_new_nan_breaks_the_tensor() -> None:
    reference = [{"same": floats(math.inf, 1.0), "broken": floats(1.0, 1.0)}]
    actual = [{"same": floats(math.inf, 1.0), "broken": floats(math.nan, 1.0)}]
    same, broken = compare(reference, actual, "same", "broken").tensors
    assert same.snr_db == math.inf
    assert (broken.snr_db, broken.cosine, broken.max_abs, broken.kl_nats) == (-math.inf, 0.0, math.inf, math.inf)


def test_large_tensors_are_summed_in_pieces_to_the_same_figures() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((3, 70_000)).astype(np.float32)
    actual = reference + 0.01 * rng.standard_normal(reference.shape).astype(np.float32)
    (one,) = compare([{"t": reference}], [{"t": actual}], "t").tensors
    r, a = reference.astype(np.float64).ravel(), actual.astype(np.float64).ravel()
    assert one.snr_db == pytest.approx(10 * math.log10((r @ r) / ((a - r) @ (a - r))), rel=1e-9)
    assert one.num_values == 210_000


def test_tensors_of_other_shapes_or_of_integers_are_named_with_the_reason() -> None:
    reference = [{"short": floats(1.0), "count": np.array([1]), "fine": floats(1.0)}]
    actual = [{"short": floats(1.0, 2.0), "count": np.array([1]), "fine": floats(1.0)}]
    found = compare(reference, actual, "short", "count", "fine")
    assert [one.name for one in found.tensors] == ["fine"]
    assert "shape is 1 here and 2 there" in found.not_compared["short"]
    assert "int64" in found.not_compared["count"]


def test_what_does_not_fit_into_memory_together_is_taken_in_further_sweeps() -> None:
    sample = {"a": floats(1.0), "b": floats(2.0), "c": floats(3.0)}
    reference, actual, batches = Tensors([sample]), Tensors([sample]), Numbers(1)
    pairs = [TensorPair(reference=name, actual=name, size_bytes=60) for name in sample]
    found = compare_tensors(reference, actual, pairs, batches, max_bytes=120)
    assert reference.asked == [("a", "b"), ("c",)]
    assert batches.times_iterated == found.num_sweeps == 2
    assert [one.name for one in found.tensors] == ["a", "b", "c"]


def test_both_sides_in_one_model_take_one_run() -> None:
    model = Tensors([{"t": floats(2.0), "twin": floats(1.0)}])
    found = compare_tensors(model, model, [TensorPair(reference="t", actual="twin")], Numbers(1))
    assert model.asked == [("t", "twin")]
    assert found.tensors[0].snr_db == pytest.approx(10 * math.log10(4), rel=1e-12)


def test_no_samples_are_an_error() -> None:
    with pytest.raises(BadDataError, match="no samples"):
        compare([], [], "t")


@pytest.mark.parametrize(("snr_db", "ratio"), [(20.0, 0.01), (math.inf, 0.0), (-math.inf, math.inf), (0.0, 1.0)])
def test_noise_ratio_is_the_inverse_of_decibels(snr_db: float, ratio: float) -> None:
    assert noise_ratio(snr_db) == pytest.approx(ratio, rel=1e-12)


# --- histograms -------------------------------------------------------------------------------------------------


def kl_by_hand(n: Sequence[int], m: Sequence[int]) -> float:
    p = (np.array(n) + 0.5) / (sum(n) + NUM_BINS / 2)
    q = (np.array(m) + 0.5) / (sum(m) + NUM_BINS / 2)
    return float(np.sum(p * np.log(p / q)))


def test_divergence_is_that_of_smoothed_counts() -> None:
    histogram = PairedHistogram()
    histogram.add(np.array([0.0, 1.0, 1.0]), np.array([0.0, 0.0, 1.0]))
    counts = ([1, *[0] * (NUM_BINS - 2), 2], [2, *[0] * (NUM_BINS - 2), 1])
    assert histogram.kl_nats() == pytest.approx(kl_by_hand(*counts), rel=1e-12)


def test_divergence_hardly_depends_on_the_order_in_which_ranges_grow() -> None:
    rng = np.random.default_rng(3)
    pieces = [(rng.standard_normal(500) * width, rng.standard_normal(500) * width + 0.3) for width in (1, 30, 4, 60)]
    found = []
    for order in (pieces, pieces[::-1]):
        histogram = PairedHistogram()
        for reference, actual in order:
            histogram.add(reference, actual)
        found.append(histogram.kl_nats())
    # Bins are placed otherwise, so a few numbers fall into another one.
    assert found[0] == pytest.approx(found[1], abs=0.05)


def test_shifted_numbers_diverge_more_than_rounded_ones() -> None:
    numbers = np.random.default_rng(1).standard_normal(20_000)
    rounded, shifted = PairedHistogram(), PairedHistogram()
    rounded.add(numbers, np.round(numbers * 32) / 32)
    shifted.add(numbers, numbers + 0.5)
    assert rounded.kl_nats() < 0.02 < 0.1 < shifted.kl_nats()


def test_a_tensor_that_was_constant_at_first_is_counted_on() -> None:
    histogram, at_once = PairedHistogram(), PairedHistogram()
    for reference, actual in (([5.0, 5.0], [5.0, 5.0]), ([5.0, 0.0], [4.0, 9.0])):
        histogram.add(np.array(reference), np.array(actual))
    at_once.add(np.array([5.0, 5.0, 5.0, 0.0]), np.array([5.0, 5.0, 4.0, 9.0]))
    assert histogram.kl_nats() == pytest.approx(at_once.kl_nats(), rel=1e-12)
