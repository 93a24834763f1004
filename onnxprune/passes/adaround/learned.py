"""AdaRound: whether each weight is rounded up or down, learned by gradient descent on the layer's output.

Nagel et al. 2020, arXiv:2004.10568. With V one variable for each weight, h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1),
f the activation function behind the layer, X the integer layer's inputs and Y what the float layer gives:

    W~ = s clip(floor(W / s) + h(V), -n, n)
    minimise |f(Y) - f(X W~^T)|^2 / E0 + lambda mean(1 - |2 h(V) - 1|^beta)

E0 is the error of rounding to nearest, so that lambda means the same for every layer. beta falls from 20 to 2,
which drives h to 0 or 1; the regularizer is left out for the first fifth of the steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["learn_rounding"]

Array = npt.NDArray[Any]

_STRETCH, _SHIFT = 1.2, -0.1
_LEARNING_RATE = 1e-2
_REGULARIZATION = 1.0
_WARM_UP = 0.2
_FIRST_BETA, _LAST_BETA = 20.0, 2.0
_BATCH_ROWS = 256


def learn_rounding(
    weight: Array,
    scales: Array,
    largest: int,
    rows: Array,
    wanted: Array,
    bias: Array,
    bounds: tuple[float, float] | None,
    *,
    iterations: int,
    rng: np.random.Generator,
) -> Array:
    """Integers for `weight` [G, O, K].

    Args:
        weight: What is rounded.
        scales: The grid, [G, O].
        largest: Integers stay within +-largest.
        rows: Inputs, [G, n, K].
        wanted: Outputs before the activation function, [G, n, O], without `bias`.
        bias: [G, O]; where the activation function clips depends on it.
        bounds: What the activation function clips to; None: there is none.
        iterations: Steps of Adam.
        rng: Draws the rows of each step.
    """
    weight, scales = weight.astype(np.float32), scales.astype(np.float32)[:, :, np.newaxis]
    low = np.floor(weight / scales)
    # h(V) = the fraction: learning starts from the float weight.
    fraction = np.clip((weight / scales - low - _SHIFT) / _STRETCH, 1e-3, 1 - 1e-3)
    variables = np.log(fraction / (1 - fraction)).astype(np.float32)
    first, second = np.zeros_like(variables), np.zeros_like(variables)
    offset = bias.astype(np.float32)[:, np.newaxis]
    target = _activated(wanted.astype(np.float32) + offset, bounds)
    error0 = _nearest_error(weight, scales, largest, rows, target, offset, bounds)
    for step in range(iterations):
        chosen = rng.integers(rows.shape[1], size=min(_BATCH_ROWS, rows.shape[1]))
        sigmoid = 1.0 / (1.0 + np.exp(-variables))
        rounded = np.clip(_STRETCH * sigmoid + _SHIFT, 0.0, 1.0)
        integers = low + rounded
        inside = (np.abs(integers) <= largest) & (rounded > 0.0) & (rounded < 1.0)
        x = rows[:, chosen]
        raw = x @ (np.clip(integers, -largest, largest) * scales).transpose(0, 2, 1) + offset
        error = _activated(raw, bounds) - target[:, chosen]
        if bounds is not None:
            error = error * ((raw > bounds[0]) & (raw < bounds[1]))
        gradient = 2.0 * (error.transpose(0, 2, 1) @ x) * scales / (len(chosen) * error0)
        gradient += _regularizer_gradient(rounded, step / iterations) / rounded.size
        gradient *= np.where(inside, _STRETCH * sigmoid * (1.0 - sigmoid), 0.0)
        first += 0.1 * (gradient - first)
        second += 0.001 * (np.square(gradient) - second)
        rate = _LEARNING_RATE * np.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        variables -= (rate * first / (np.sqrt(second) + 1e-12)).astype(np.float32)
    chosen_up = (1.0 / (1.0 + np.exp(-variables))) >= 0.5
    found: Array = np.clip(low + chosen_up, -largest, largest)
    return found


def _activated(outputs: Array, bounds: tuple[float, float] | None) -> Array:
    return outputs if bounds is None else np.clip(outputs, bounds[0], bounds[1])


def _nearest_error(
    weight: Array,
    scales: Array,
    largest: int,
    rows: Array,
    target: Array,
    offset: Array,
    bounds: tuple[float, float] | None,
) -> float:
    rounded: Array = np.clip(np.rint(weight / scales), -largest, largest) * scales
    error = _activated(rows @ rounded.transpose(0, 2, 1) + offset, bounds) - target
    total = float(np.square(error).sum())
    return max(total / int(rows.shape[1]), 1e-20)


def _regularizer_gradient(rounded: Array, progress: float) -> Array | float:
    """The derivative by h of lambda (1 - |2h - 1|^beta)."""
    if progress < _WARM_UP:
        return 0.0
    beta = _LAST_BETA + (_FIRST_BETA - _LAST_BETA) * (1.0 - (progress - _WARM_UP) / (1.0 - _WARM_UP))
    centred = 2.0 * rounded - 1.0
    gradient: Array = -_REGULARIZATION * 2.0 * beta * np.sign(centred) * np.abs(centred) ** (beta - 1.0)
    return gradient
