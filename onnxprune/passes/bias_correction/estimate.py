"""The mean error of each output channel of each layer: from data, or from what is known about the layer's input.

With W the float weight, Q its rounded twin and x the input:

    from data       E[y - ^y], y the float layer's output, ^y the integer one's
    analytic        (W - Q) E[x]                                       Nagel et al. 2019, arXiv:1906.04721, section 4.2

A mean over n samples is itself uncertain by s = std / sqrt(n); correcting by a number that is mostly chance adds
noise. So a mean m is shrunk by max(0, 1 - s^2 / m^2), the positive-part estimator of James and Stein for each channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.graph.weights import constant_array
from onnxprune.ops.quant import clip_bounds
from onnxprune.passes.layerwise.matrices import LayerMatrix

__all__ = ["MeanError", "analytic_error", "mean_after_batchnorm", "rms"]

Vector = npt.NDArray[np.float64]


class MeanError:
    """Accumulates the mean of (float - integer) of each channel; a sample counts once, however many positions."""

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._sum = np.zeros(channels)
        self._squares = np.zeros(channels)

    def add(self, reference: npt.NDArray[np.float32], actual: npt.NDArray[np.float32], channel_axis: int) -> None:
        """Count one batch, batch first."""
        error = np.moveaxis(reference - actual, channel_axis, -1)
        means = error.reshape(error.shape[0], -1, error.shape[-1]).mean(axis=1, dtype=np.float64)
        self._count += len(means)
        self._sum += means.sum(axis=0)
        self._squares += np.square(means).sum(axis=0)

    @property
    def mean(self) -> Vector:
        """Of each channel."""
        return self._sum / max(self._count, 1)

    @property
    def correction(self) -> Vector:
        """The mean, shrunk as far as it may be chance; with one sample there is no telling, and it counts as it is."""
        mean = self.mean
        if self._count < 2:
            return mean
        variance = np.maximum(self._squares - self._count * mean * mean, 0.0) / (self._count - 1)
        uncertainty = variance / self._count
        squared = mean * mean
        kept = np.where(squared > 0, 1.0 - uncertainty / np.where(squared > 0, squared, 1.0), 0.0)
        return mean * np.maximum(kept, 0.0)


def analytic_error(
    matrix: LayerMatrix, weight: npt.NDArray[np.float32], rounded: npt.NDArray[np.float32], input_means: Vector
) -> Vector:
    """(W - Q) E[x] for each output channel; windows that reach into the padding count like all others.

    Args:
        matrix: The layer.
        weight: As stored.
        rounded: Its twin on the grid.
        input_means: One for each input channel.
    """
    error = matrix.to_matrix(weight).astype(np.float64) - matrix.to_matrix(rounded)
    channels_each = input_means.size // matrix.groups
    positions = matrix.inputs // channels_each
    # (groups, in/group) -> (groups, in/group * kernel positions)
    means = np.repeat(input_means.reshape(matrix.groups, channels_each), positions, axis=1)
    found: Vector = np.einsum("gok,gk->go", error, means).reshape(-1) * matrix.input_scale
    return found


def mean_after_batchnorm(value: ir.Value | None) -> Vector | None:
    """E[x] of each channel where `value` comes from a BatchNormalization, with a Relu or Clip between or not.

    Its output is taken as normal with mean beta and deviation |gamma|; clipping to [a, b] makes that, with
    phi and Phi the normal density and distribution, u = (a - beta) / gamma and v = (b - beta) / gamma,

        E = gamma (phi(u) - phi(v)) + beta (Phi(v) - Phi(u)) + a Phi(u) + b (1 - Phi(v))
    """
    node = value.producer() if value is not None else None
    bounds = clip_bounds(node) if node is not None else None
    if node is not None and bounds is not None:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type != "BatchNormalization":
        return None
    gamma, beta = (constant_array(node.inputs[position]) for position in (1, 2))
    if gamma is None or beta is None:
        return None
    mean, std = beta.astype(np.float64).reshape(-1), np.abs(gamma.astype(np.float64).reshape(-1))
    if bounds is None:
        return mean
    return np.array([_clipped_mean(m, s, *bounds) for m, s in zip(mean, std, strict=True)])


def _clipped_mean(mean: float, std: float, low: float, high: float) -> float:
    if std == 0.0:
        return min(max(mean, low), high)
    below, above = (low - mean) / std, (high - mean) / std
    inside = _distribution(above) - _distribution(below)
    return (
        std * (_density(below) - _density(above))
        + mean * inside
        + _times(low, _distribution(below))
        + _times(high, 1.0 - _distribution(above))
    )


def _times(bound: float, probability: float) -> float:
    """An open end is never reached: infinity times zero counts nothing."""
    return bound * probability if math.isfinite(bound) else 0.0


def _density(x: float) -> float:
    return math.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi) if math.isfinite(x) else 0.0


def _distribution(x: float) -> float:
    return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


def rms(numbers: Iterable[float]) -> float:
    """Root mean square; 0 of nothing."""
    array = np.asarray(list(numbers), dtype=np.float64)
    return float(np.sqrt(np.mean(array * array))) if array.size else 0.0
