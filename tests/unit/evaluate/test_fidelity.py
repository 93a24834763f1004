"""Differences of outputs: the four figures by hand, and their edges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from onnxprune.contracts import Batch, OutputDifference, TensorSpec
from onnxprune.errors import BadDataError, VerificationError
from onnxprune.evaluate.fidelity import compare_outputs, fidelity, worst_of

EQUAL = OutputDifference(max_abs=0.0, max_rel=0.0, cosine=1.0, snr_db=math.inf)


def difference(reference: Any, actual: Any, *, varying: Sequence[str] = ()) -> OutputDifference:
    found = compare_outputs({"y": np.asarray(reference)}, {"y": np.asarray(actual)}, varying=varying)
    return found.per_output["y"]


def test_figures_are_those_of_their_definitions() -> None:
    found = difference([3.0, 4.0], [3.0, 5.0])
    assert found.max_abs == 1.0
    assert found.max_rel == 0.25
    # <r, a> = 9 + 20, |r| = 5, |a| = sqrt(34); float64 rounds a few times.
    assert found.cosine == pytest.approx(29 / (5 * math.sqrt(34)), rel=1e-12)
    assert found.snr_db == pytest.approx(10 * math.log10(25 / 1), rel=1e-12)


def test_overall_is_the_worst_of_all_outputs() -> None:
    reference = {"a": np.array([1.0, 0.0]), "b": np.array([100.0, 0.0])}
    actual = {"a": np.array([0.0, 1.0]), "b": np.array([90.0, 0.0])}
    found = compare_outputs(reference, actual)
    assert (found.max_abs, found.max_rel, found.cosine) == (10.0, 1.0, 0.0)
    assert found.snr_db == pytest.approx(10 * math.log10(1 / 2), rel=1e-12)
    assert found.per_output["b"].max_rel == 0.1
    assert found.per_output["b"].cosine == 1.0


@pytest.mark.parametrize(
    ("reference", "actual"),
    [
        ([1.0, 2.0], [1.0, 2.0]),
        ([0.0, 0.0], [0.0, -0.0]),
        ([], []),
        ([math.nan, math.inf, -math.inf, 1.0], [math.nan, math.inf, -math.inf, 1.0]),
        ([1, 2], [1, 2]),
        ([True, False], [True, False]),
        (["a", "b"], ["a", "b"]),
    ],
    ids=["same", "zeros", "empty", "not finite", "integers", "booleans", "text"],
)
def test_equal_outputs_have_no_difference(reference: Any, actual: Any) -> None:
    assert difference(reference, actual) == EQUAL


@pytest.mark.parametrize(
    ("reference", "actual"),
    [([math.nan, 1.0], [0.0, 1.0]), ([0.0, 1.0], [math.nan, 1.0]), ([math.inf], [-math.inf]), ([1.0], [math.inf])],
)
def test_value_that_is_not_finite_on_one_side_is_the_worst_there_is(reference: Any, actual: Any) -> None:
    worst = OutputDifference(max_abs=math.inf, max_rel=math.inf, cosine=0.0, snr_db=-math.inf)
    assert difference(reference, actual) == worst


@pytest.mark.parametrize("values", [[math.nan, math.nan], [math.inf, -math.inf]])
def test_outputs_without_a_finite_number_are_not_compared(values: list[float]) -> None:
    assert not difference(values, values).is_compared
    found = compare_outputs(
        {"odd": np.array(values), "y": np.ones(2)}, {"odd": np.array(values), "y": np.array([1.0, 1.5])}
    )
    assert (found.is_compared, found.per_output["y"].is_compared) == (False, True)
    assert found.snr_db < 10.0


def test_equal_infinities_leave_the_rest_to_compare() -> None:
    assert difference([-math.inf, 2.0], [-math.inf, 1.0]).max_abs == 1.0


def test_zero_reference_has_infinite_relative_error() -> None:
    found = difference([0.0, 0.0], [0.0, 0.5])
    assert (found.max_abs, found.max_rel, found.cosine, found.snr_db) == (0.5, math.inf, 0.0, -math.inf)


def test_large_and_tiny_values_neither_overflow_nor_vanish() -> None:
    for size in (1e300, 1e-300):
        found = difference([3 * size, 4 * size], [3 * size, 5 * size])
        assert found.max_rel == pytest.approx(0.25, rel=1e-12)
        assert found.snr_db == pytest.approx(10 * math.log10(25), rel=1e-12)


def test_float_widths_are_compared_and_integers_do_not_wrap() -> None:
    assert difference(np.float32([1, 2]), np.array([1, 2.5], np.float16)).max_abs == 0.5
    assert difference(np.float32([1, 2]), np.array([1, 3], ml_dtypes.bfloat16)).max_abs == 1.0
    assert difference(np.uint8([0]), np.uint8([255])).max_abs == 255.0
    assert difference([True, True], [True, False]).max_abs == 1.0


def test_text_differs_wholly_or_not() -> None:
    found = difference(np.array(["a", "b", "c", "d"], object), np.array(["a", "x", "c", "d"], object))
    assert found.max_abs == 1.0
    assert found.snr_db == pytest.approx(10 * math.log10(4), rel=1e-12)


def test_other_shapes_kinds_and_missing_outputs_are_errors() -> None:
    with pytest.raises(VerificationError, match="Output 'y' has the shape 1x3, but had 1x2"):
        difference(np.zeros((1, 2)), np.zeros((1, 3)))
    with pytest.raises(VerificationError, match="Output 'y' is int64, but was float64"):
        difference([1.0], [1])
    with pytest.raises(VerificationError, match="no output 'y' any more"):
        compare_outputs({"y": np.zeros(1)}, {"z": np.zeros(1)})


def test_missing_detections_count_with_their_full_size() -> None:
    found = difference(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 2.0]]), varying=["y"])
    assert (found.max_abs, found.max_rel) == (4.0, 1.0)
    assert difference(np.zeros((0, 4)), np.zeros((0, 4)), varying=["y"]) == EQUAL
    with pytest.raises(VerificationError, match="has the shape 2, but had 1x2"):
        difference(np.zeros((1, 2)), np.zeros(2), varying=["y"])


def test_worst_of_nothing_is_no_difference() -> None:
    assert worst_of([]) == EQUAL


# --- runners --------------------------------------------------------------------------------------------------


class Scaled:
    """y = factor * x, and `rows` of it."""

    def __init__(self, factor: float, *, dtype: str = "float32", rows: int | None = None) -> None:
        self.inputs = (TensorSpec(name="x", dtype=dtype, shape=("batch", 2)),)
        self.outputs = (TensorSpec(name="y", dtype=dtype, shape=("found", 2)),)
        self._factor, self._rows = factor, rows

    def run(self, feeds: Batch) -> dict[str, npt.NDArray[Any]]:
        assert feeds["x"].dtype == self.inputs[0].dtype
        return {"y": (feeds["x"] * self._factor)[: self._rows]}


def batches(*values: Sequence[float]) -> list[Mapping[str, npt.NDArray[Any]]]:
    return [{"x": np.array([row], np.float32)} for row in values]


def test_fidelity_is_the_worst_over_all_batches() -> None:
    found = fidelity(Scaled(1.0), Scaled(1.5), batches([1, 0], [4, 0], [2, 0]))
    assert (found.max_abs, found.max_rel, found.cosine) == (2.0, 0.5, 1.0)
    assert found.per_output["y"].max_abs == 2.0


def test_half_precision_artifact_is_fed_its_own_type() -> None:
    found = fidelity(Scaled(1.0), Scaled(1.0, dtype="float16"), batches([1, 0.1]))
    # 0.1 in float16 is 0.09998: half precision keeps 11 bits.
    assert 0 < found.max_abs < 1e-4


def test_outputs_of_dynamic_length_may_differ_in_length() -> None:
    two_rows = [{"x": np.array([[1, 1], [2, 3]], np.float32)}]
    assert fidelity(Scaled(1.0), Scaled(1.0, rows=1), two_rows).max_abs == 3.0


def test_fidelity_without_samples_is_refused() -> None:
    with pytest.raises(BadDataError, match="no samples to compare"):
        fidelity(Scaled(1.0), Scaled(1.0), [])
