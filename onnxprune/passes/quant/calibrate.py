"""Streaming calibration: one range for each activation, in memory that does not depend on the number of samples.

The float model runs in ONNX Runtime with the wanted tensors as additional outputs; NumPy takes their extremes, which
also finds what is not finite. What that costs is the outputs themselves: ONNX Runtime brings them out of its blocked
layout and can't use their memory again. (Measured on a ResNet-50 with 72 tensors, one thread, interleaved: 1.16 times
the plain inference for the outputs and 1.20 with the extremes; buffers bound beforehand 1.15; ReduceMin and ReduceMax
nodes 1.17, global poolings inside the blocked layout 1.15, and both swallow a NaN.) Tensors that together need more
than `MAX_OUTPUT_BYTES` are taken in several sweeps over the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import Batch, CalibrationSource, NullProgress, Progress
from onnxprune.errors import BadDataError
from onnxprune.ops.quant import clip_bounds
from onnxprune.passes.calibration import batch_size, first_batches, num_batches, run_samples
from onnxprune.passes.quant.accumulate import (
    CalibrationMethod,
    ChannelExtremes,
    ChannelRanges,
    RangeAccumulator,
    RangeRule,
    TensorRange,
    accumulator_for,
)
from onnxprune.runtime.sessions import ort_runner_from_model

__all__ = ["MAX_OUTPUT_BYTES", "CalibratedRanges", "CalibrationMethod", "RangeRule", "TensorRange", "calibrate"]

MAX_OUTPUT_BYTES = 1 << 30
"""Tensors that ONNX Runtime hands out at once; more are taken in further sweeps over the data."""

# Assumed for a tensor whose shape is not known.
_UNKNOWN_TENSOR_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedRanges:
    """A range for each tensor that any sample computed, over `num_samples` samples in `num_sweeps` sweeps.

    `channels` has the extremes of each channel of the tensors that they were asked of.
    """

    ranges: Mapping[str, TensorRange]
    num_samples: int
    num_sweeps: int
    channels: Mapping[str, ChannelRanges] = field(default_factory=dict)


class _Ranges:
    """Everything that is kept of one tensor."""

    def __init__(self, value: ir.Value, rule: RangeRule, channel_axis: int | None) -> None:
        self.is_never_negative = _is_never_negative(value)
        # The largest numbers of a last layer are the very ones that count: they are not clipped.
        self.accumulator: RangeAccumulator = accumulator_for(rule if channel_axis is None else RangeRule())
        self.channels = None if channel_axis is None else ChannelExtremes(channel_axis)

    def extremes(self, array: npt.NDArray[np.float32]) -> tuple[float, float]:
        """The smallest and the largest number; NaN where there is one anywhere, 0 where there is nothing."""
        if not array.size:
            return 0.0, 0.0
        # Behind a Relu the smallest number is of no use: every quantized range contains zero.
        return 0.0 if self.is_never_negative else float(array.min()), float(array.max())

    def add(self, array: npt.NDArray[np.float32], extremes: tuple[float, float], num_samples: int) -> None:
        self.accumulator.add(array, *extremes, num_samples)
        if self.channels is not None:
            self.channels.add(array, num_samples)


def calibrate(
    model: ir.Model,
    tensors: Sequence[ir.Value],
    source: CalibrationSource,
    *,
    rule: RangeRule | None = None,
    channel_axes: Mapping[str, int] | None = None,
    max_samples: int | None = None,
    threads: int = 1,
    custom_op_libraries: Sequence[Path] = (),
    max_output_bytes: int = MAX_OUTPUT_BYTES,
    progress: Progress | None = None,
) -> CalibratedRanges:
    """The range of every one of `tensors` (each once) over the samples of `source`.

    A tensor that no sample computes (always empty) has no range.

    Args:
        model: The float model.
        tensors: Values of its main graph that hold float32: inputs, or outputs of nodes.
        source: The samples; iterated once for each sweep.
        rule: How ranges are chosen; None: the extremes.
        channel_axes: For names among `tensors`, which are the outputs of last layers: the axis whose indices get
            extremes of their own. The tensor itself gets its extremes too, whatever `rule` says.
        max_samples: Stop after the batch that reaches this many samples; None takes all.
        threads: Threads of the float model, and of what looks at its tensors.
        custom_op_libraries: For models with custom operators.
        max_output_bytes: See `MAX_OUTPUT_BYTES`.
        progress: Follows the samples.

    Raises:
        BadDataError: There is no sample, or a number in a tensor is not finite; the message names tensor and sample.
    """
    progress = progress or NullProgress()
    axes = channel_axes or {}
    kept = {value.name or "": _Ranges(value, rule or RangeRule(), axes.get(value.name or "")) for value in tensors}
    inputs = {value.name for value in model.graph.inputs}
    sweeps = _sweeps([value for value in tensors if value.name not in inputs], max_output_bytes) or [[]]
    num_samples = 0
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for number, names in enumerate(sweeps):
            runner = ort_runner_from_model(
                model, threads=threads, custom_op_libraries=custom_op_libraries, extra_outputs=names
            )
            # Inputs are taken once, with the first sweep. Graph order: the tensor where a NaN arose is named.
            wanted = [name for name in kept if name in names or (number == 0 and name in inputs)]
            description = "Calibrating" if len(sweeps) == 1 else f"Calibrating, sweep {number + 1} of {len(sweeps)}"
            batches = progress.track(
                first_batches(source, max_samples), description, num_batches(model, source, max_samples)
            )
            num_samples = 0
            for batch in batches:
                arrays = {**batch, **run_samples(runner, batch, num_samples)}
                _take_in(batch, {name: (kept[name], arrays[name]) for name in wanted}, num_samples, pool)
                num_samples += batch_size(batch)
    if num_samples == 0:
        raise BadDataError("The calibration data hold no sample.", "Give at least one; 32 to 512 are usual.")
    ranges = {name: item.accumulator.range() for name, item in kept.items()}
    channels = {name: item.channels.ranges() for name, item in kept.items() if item.channels is not None}
    return CalibratedRanges(
        ranges={name: found for name, found in ranges.items() if found is not None},
        channels={name: found for name, found in channels.items() if found is not None},
        # The last batch of a model with a fixed batch size may repeat samples to be full.
        num_samples=min(num_samples, source.num_samples),
        num_sweeps=len(sweeps),
    )


def _take_in(
    batch: Batch,
    found: Mapping[str, tuple[_Ranges, npt.NDArray[np.float32]]],
    first_sample: int,
    pool: ThreadPoolExecutor,
) -> None:
    # NumPy lets go of the interpreter's lock while it looks for extremes.
    extremes = pool.map(lambda pair: pair[0].extremes(pair[1]), found.values())
    for (name, (item, array)), (low, high) in zip(found.items(), extremes, strict=True):
        if not (math.isfinite(low) and math.isfinite(high)):
            raise _not_finite(name, array, batch, first_sample)
        if array.size:
            item.add(array, (low, high), batch_size(batch))


def _is_never_negative(value: ir.Value) -> bool:
    producer = value.producer()
    bounds = clip_bounds(producer) if producer is not None else None
    return bounds is not None and bounds[0] >= 0.0


def _not_finite(name: str, array: npt.NDArray[np.float32], batch: Batch, first_sample: int) -> BadDataError:
    bad = ~np.isfinite(array)
    sample = first_sample
    if array.ndim > 0 and array.shape[0] == batch_size(batch):
        sample += int(np.flatnonzero(bad.reshape(array.shape[0], -1).any(axis=1))[0])
    kind = "input" if name in batch else "tensor"
    example = array[bad][0]
    return BadDataError(
        f"Calibration sample {sample} makes {kind} '{name}' not finite: {int(bad.sum())} of its {array.size} numbers "
        f"are {'NaN' if np.isnan(example) else 'infinite'}.",
        "Remove the sample, or repair the preprocessing or the weights that lead to it.",
    )


def _sweeps(values: Sequence[ir.Value], max_bytes: int) -> list[list[str]]:
    """Names in groups that fit into `max_bytes`, in the order of the graph."""
    sweeps: list[list[str]] = []
    filled = 0
    for value in values:
        size = _size_bytes(value)
        if not sweeps or filled + size > max_bytes:
            sweeps.append([])
            filled = 0
        sweeps[-1].append(value.name or "")
        filled += size
    return sweeps


def _size_bytes(value: ir.Value) -> int:
    if value.shape is None or not value.shape.is_static():
        return _UNKNOWN_TENSOR_BYTES
    return 4 * math.prod(value.shape.numpy())
