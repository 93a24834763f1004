"""Rounding with the layer's second moments: GPTQ, and coordinate descent behind it.

With X [n, K] the layer's input, H = X^T X, a target weight W [O, K] and integers q on a grid of step s, the error of
the layer's output is

    |X (s q - W)^T|^2 = sum over outputs of d H d^T,    d = s q - W

GPTQ (Frantar et al. 2023, arXiv:2210.17323) rounds one column after the other and lets the columns that are still to
come make good what it broke, with U the upper Cholesky factor of H^-1:

    e = (w_j - s q_j) / U_jj,    w_k -= e U_jk for k > j

Columns of large second moment come first, while there are many others left to make good. Coordinate descent (QuantEase,
Behdin et al. 2023, arXiv:2309.01885) then moves one integer after the other to its optimum given all others,

    q_j = round((s q_j - (d H)_j / H_jj) / s)

which never makes the error larger. All arrays have the groups of a convolution as leading axis.

The target is not the float weight itself but what repeats the float layer's output from the *integer* layer's input,
as far as a ridge of strength r lets it (`fitted_target`):

    W' = W + (Y - X W^T)^T X (X^T X + r I)^-1
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["descend", "fitted_target", "gptq", "nearest", "second_moments"]

Array = npt.NDArray[Any]

_BLOCK = 64
# Share of the mean diagonal that keeps H invertible, as in the paper.
_DAMPING = 0.01
# Coordinate descent costs O K^2 for each sweep and group.
_MAX_DESCENT_PRODUCTS = 4_000_000_000


def nearest(weight: Array, scales: Array, largest: int) -> Array:
    """Integers by rounding to nearest. `weight` is [G, O, K], `scales` [G, O]."""
    return np.clip(np.rint(weight / scales[:, :, np.newaxis]), -largest, largest)


def second_moments(rows: Array) -> Array:
    """H = X^T X of rows [G, n, K], in float64: [G, K, K]."""
    exact = rows.astype(np.float64)
    found: Array = exact.transpose(0, 2, 1) @ exact
    return found


def fitted_target(weight: Array, rows: Array, wanted: Array, moments: Array, ridge: float) -> Array:
    """The weight whose outputs for `rows` come closest to `wanted` [G, n, O]; `ridge` is relative to H's diagonal."""
    missing = wanted - rows @ weight.transpose(0, 2, 1)
    correlation = missing.transpose(0, 2, 1).astype(np.float64) @ rows.astype(np.float64)
    step: Array = np.linalg.solve(_damped(moments, ridge), correlation.transpose(0, 2, 1)).transpose(0, 2, 1)
    return weight + step


def gptq(weight: Array, moments: Array, scales: Array, largest: int) -> Array:
    """Integers for `weight` [G, O, K], on the grid of `scales` [G, O]."""
    order = np.argsort(-np.diagonal(moments, axis1=1, axis2=2), axis=1, kind="stable")
    work = np.take_along_axis(weight.astype(np.float64), order[:, np.newaxis, :], axis=2)
    sorted_moments = np.take_along_axis(
        np.take_along_axis(moments, order[:, :, np.newaxis], axis=1), order[:, np.newaxis, :], axis=2
    )
    inverse = np.linalg.inv(_damped(sorted_moments, _DAMPING))
    factor = np.linalg.cholesky((inverse + inverse.transpose(0, 2, 1)) / 2).transpose(0, 2, 1)
    integers = np.empty_like(work)
    count = work.shape[2]
    for start in range(0, count, _BLOCK):
        end = min(start + _BLOCK, count)
        errors = np.empty((*work.shape[:2], end - start))
        for column in range(start, end):
            current = work[:, :, column]
            integers[:, :, column] = np.clip(np.rint(current / scales), -largest, largest)
            error = (current - integers[:, :, column] * scales) / factor[:, column, column, np.newaxis]
            work[:, :, column:end] -= error[:, :, np.newaxis] * factor[:, np.newaxis, column, column:end]
            errors[:, :, column - start] = error
        work[:, :, end:] -= errors @ factor[:, start:end, end:]
    result = np.empty_like(integers)
    np.put_along_axis(result, order[:, np.newaxis, :], integers, axis=2)
    return result


def descend(integers: Array, weight: Array, moments: Array, scales: Array, largest: int, *, sweeps: int = 3) -> Array:
    """`integers`, each moved in turn to where the error is least; left as they are where that would take too long."""
    groups, outputs, count = integers.shape
    if groups * outputs * count * count * sweeps > _MAX_DESCENT_PRODUCTS:
        return integers
    diagonal = np.diagonal(moments, axis1=1, axis2=2)
    result = integers.copy()
    pull = (result * scales[:, :, np.newaxis] - weight) @ moments
    for _ in range(sweeps):
        moved = False
        for column in range(count):
            curvature = diagonal[:, column, np.newaxis]
            old = result[:, :, column]
            shift = np.where(curvature > 0, pull[:, :, column] / np.where(curvature > 0, curvature, 1.0), 0.0)
            new = np.clip(np.rint(old - shift / scales), -largest, largest)
            step = (new - old) * scales
            # Ties in rounding must not make it wander.
            step[np.abs(shift) <= np.abs(shift + step) + 1e-12 * scales] = 0.0
            if not step.any():
                continue
            moved = True
            result[:, :, column] = np.rint(old + step / scales)
            pull += step[:, :, np.newaxis] * moments[:, np.newaxis, column, :]
        if not moved:
            break
    return result


def _damped(moments: Array, share: float) -> Array:
    """H with `share` of its mean diagonal added; inputs that are always zero get a diagonal of their own."""
    mean = np.trace(moments, axis1=1, axis2=2) / moments.shape[1]
    ridge = np.where(mean > 0, share * mean, 1.0)
    found: Array = moments + ridge[:, np.newaxis, np.newaxis] * np.eye(moments.shape[1])
    return found
