"""Per-channel statistics of tensors over the calibration samples, streamed: memory does not grow with their number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import Batch
from onnxprune.passes.calibration import batch_size, run_samples
from onnxprune.runtime.sessions import ort_runner_from_model

__all__ = ["ChannelStatistics", "channel_statistics"]

MAX_SWEEP_BYTES = 512 << 20
_UNKNOWN_TENSOR_BYTES = 4 << 20

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelStatistics:
    """Of each channel: extremes, mean and standard deviation over all samples and positions."""

    low: Vector
    high: Vector
    mean: Vector
    std: Vector

    @property
    def magnitude(self) -> Vector:
        """The largest absolute value of each channel."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


class _Accumulator:
    def __init__(self) -> None:
        self._count = 0
        self._low: Vector | None = None
        self._high: Vector | None = None
        self._sum: Vector | None = None
        self._squares: Vector | None = None

    def add(self, array: npt.NDArray[np.float32], axis: int) -> None:
        rows = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
        if rows.shape[0] == 0:
            return
        low, high = rows.min(axis=0).astype(np.float64), rows.max(axis=0).astype(np.float64)
        total = rows.sum(axis=0, dtype=np.float64)
        squares = np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        self._count += rows.shape[0]
        self._low = low if self._low is None else np.minimum(self._low, low)
        self._high = high if self._high is None else np.maximum(self._high, high)
        self._sum = total if self._sum is None else self._sum + total
        self._squares = squares if self._squares is None else self._squares + squares

    def statistics(self) -> ChannelStatistics | None:
        if self._low is None or self._high is None or self._sum is None or self._squares is None:
            return None
        mean = self._sum / self._count
        variance = np.maximum(self._squares / self._count - mean * mean, 0.0)
        return ChannelStatistics(low=self._low, high=self._high, mean=mean, std=np.sqrt(variance))


def channel_statistics(
    model: ir.Model,
    tensors: Mapping[str, int],
    batches: Iterable[Batch],
    *,
    custom_op_libraries: Sequence[Path] = (),
) -> dict[str, ChannelStatistics]:
    """Statistics of each of `tensors`, which maps names to the axis that holds channels.

    A tensor that no batch computes is left out. The model runs once for each group of tensors that together take
    `MAX_SWEEP_BYTES`, so `batches` must be iterable more than once.
    """
    inputs = {value.name for value in model.graph.inputs}
    found = {name: _Accumulator() for name in tensors}
    for names in _sweeps(model, [name for name in tensors if name not in inputs]) or [[]]:
        runner = ort_runner_from_model(model, custom_op_libraries=custom_op_libraries, extra_outputs=names)
        num_samples = 0
        for batch in batches:
            arrays = run_samples(runner, batch, num_samples)
            num_samples += batch_size(batch)
            for name in names:
                found[name].add(arrays[name], tensors[name])
    for batch in batches:
        for given in (name for name in tensors if name in inputs):
            found[given].add(batch[given], tensors[given])
    known = {name: accumulator.statistics() for name, accumulator in found.items()}
    return {name: statistics for name, statistics in known.items() if statistics is not None}


def _sweeps(model: ir.Model, names: Sequence[str]) -> list[list[str]]:
    values = {value.name: value for node in model.graph for value in node.outputs}
    sweeps: list[list[str]] = []
    filled = 0
    for name in names:
        shape = values[name].shape
        is_known = shape is not None and shape.is_static()
        size = 4 * math.prod(shape.numpy()) if shape is not None and is_known else _UNKNOWN_TENSOR_BYTES
        if not sweeps or filled + size > MAX_SWEEP_BYTES:
            sweeps.append([])
            filled = 0
        sweeps[-1].append(name)
        filled += size
    return sweeps
