"""Symmetric scales of weights that make the squared error of rounding and saturation smallest."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxprune.ops.affine import largest_symmetric_integer, symmetric_scales

__all__ = ["least_squares_scales"]

# Shares of a channel's largest magnitude that are tried. At 8 bits the best is near 1, at 4 bits about 0.6.
_COARSE = np.geomspace(1.0, 0.4, 11)
_FINE = np.linspace(0.93, 1.07, 8)

# Numbers of a block, which stays in the processor's cache while all shares are tried on it.
_BLOCK = 1 << 16


def least_squares_scales(
    array: npt.NDArray[np.float32], largest_magnitudes: npt.NDArray[np.float32], axis: int | None, num_bits: int
) -> npt.NDArray[np.float32]:
    """One scale for each index of `axis` (None: one in all), each with the smallest squared error that a search finds.

    No channel's error is larger than with its largest magnitude as the end of the range: that is where the search
    starts, and only what is smaller replaces it.

    Args:
        array: The weight; finite.
        largest_magnitudes: One for each index of `axis`, or one.
        axis: The axis that has a scale for each index.
        num_bits: Of the integers.
    """
    rows = array.reshape(1, -1) if axis is None else np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    widest = symmetric_scales(largest_magnitudes, num_bits)
    shares = np.ones(len(rows))
    if rows.shape[1] == 0:
        return widest
    errors = _errors(rows, widest, num_bits)
    for steps in (_COARSE[1:], _FINE):
        # The fine steps go around what the coarse ones found.
        centres = np.ones(len(rows)) if steps is not _FINE else shares.copy()
        for step in steps:
            tried = np.minimum(centres * step, 1.0)
            found = _errors(rows, (widest * tried).astype(np.float32), num_bits)
            is_better = found < errors
            shares[is_better], errors[is_better] = tried[is_better], found[is_better]
    # The scale that was measured, in the very float32 number that will be used.
    return np.asarray((widest * shares).astype(np.float32))


def _errors(rows: npt.NDArray[np.float32], scales: npt.NDArray[np.float32], num_bits: int) -> npt.NDArray[np.float64]:
    """The summed squared error of each row."""
    largest = np.float32(largest_symmetric_integer(num_bits))
    errors = np.zeros(len(rows))
    height = max(1, _BLOCK // rows.shape[1])
    for top in range(0, len(rows), height):
        scale = scales[top : top + height, np.newaxis]
        for left in range(0, rows.shape[1], _BLOCK):
            block = rows[top : top + height, left : left + _BLOCK]
            steps = block / scale
            rounded = np.rint(steps)
            np.clip(rounded, -largest, largest, out=rounded)
            steps -= rounded
            # In steps, and back to real numbers once for each row.
            errors[top : top + height] += np.einsum("ij,ij->i", steps, steps)
    return errors * np.square(scales.astype(np.float64))
