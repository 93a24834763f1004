"""The arithmetic of affine quantization, over all ranges that float32 can hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.ops.affine import (
    SMALLEST_SCALE,
    affine_parameters,
    quantize_array,
    representable_range,
    symmetric_scales,
)

bounds = st.floats(min_value=-(2.0**127), max_value=2.0**127, allow_nan=False, width=32)


@given(bounds, bounds)
def test_every_range_is_covered_up_to_half_a_step_and_zero_is_exact(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)

    scale, zero_point = affine_parameters(low, high, 8)

    assert scale >= SMALLEST_SCALE
    assert scale == float(np.float32(scale))
    assert -128 <= zero_point <= 127
    covered_low, covered_high = representable_range(scale, zero_point, 8)
    # The zero point is rounded, which moves both ends by up to half a step; float32 rounds the scale itself.
    grace = scale * (0.5 + 255 * 2.0**-23)
    assert covered_low <= min(low, 0.0) + grace
    assert covered_high >= max(high, 0.0) - grace
    assert covered_low <= 0.0 <= covered_high


@pytest.mark.parametrize(("low", "high", "zero_point"), [(0.0, 6.0, -128), (1.0, 6.0, -128), (-6.0, 0.0, 127)])
def test_one_sided_ranges_begin_or_end_at_zero(low: float, high: float, zero_point: int) -> None:
    scale, found = affine_parameters(low, high, 8)

    assert found == zero_point
    assert scale == pytest.approx(6 / 255, rel=1e-6)


def test_tensor_that_is_always_zero_has_scale_one() -> None:
    assert affine_parameters(0.0, 0.0, 8) == (1.0, -128)


@pytest.mark.parametrize(("low", "high"), [(float("nan"), 1.0), (0.0, float("inf")), (2.0, 1.0), (-1e300, 1e300)])
def test_what_is_no_float32_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=r"is no range|too wide"):
        affine_parameters(low, high, 8)


def test_symmetric_scales_use_127_and_one_for_zero() -> None:
    assert symmetric_scales(np.array([127.0, 0.0, 1e-45]), 8).tolist() == [1.0, 1.0, SMALLEST_SCALE]
    assert symmetric_scales(np.array([63.0]), 7).tolist() == [1.0]


def test_quantize_array_rounds_half_to_even_shifts_and_saturates_along_the_axis() -> None:
    array = np.array([[0.5, 1.5, -300.0], [1.0, -1.0, 2.0]], dtype=np.float32)

    found = quantize_array(array, (1.0, 0.5), axis=0, zero_point=3, smallest=-128, largest=127, dtype=np.int8)

    assert found.dtype == np.int8
    assert found.tolist() == [[3, 5, -128], [5, 1, 7]]
