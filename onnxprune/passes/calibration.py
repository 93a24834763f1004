"""Running a model on calibration data, for all passes that look at its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import Batch, CalibrationSource, Runner
from onnxprune.errors import BadDataError, ModelError

__all__ = ["batch_size", "first_batches", "num_batches", "run_samples"]


def batch_size(batch: Batch) -> int:
    """Samples in `batch`."""
    sizes = [array.shape[0] for array in batch.values() if array.ndim > 0]
    return sizes[0] if sizes else 1


def first_batches(source: CalibrationSource, max_samples: int | None) -> Iterator[Batch]:
    """The batches of `source` up to the one that reaches `max_samples` samples; None: all."""
    seen = 0
    for batch in source:
        if max_samples is not None and seen >= max_samples:
            return
        yield batch
        seen += batch_size(batch)


def num_batches(model: ir.Model, source: CalibrationSource, max_samples: int | None) -> int:
    """How many batches will come, as far as the model's first input says how large one is; else one for a sample."""
    shape = model.graph.inputs[0].shape if model.graph.inputs else None
    size = shape[0] if shape is not None and len(shape) > 0 and isinstance(shape[0], int) else 1
    num_samples = source.num_samples if max_samples is None else min(source.num_samples, max_samples)
    return math.ceil(num_samples / max(size, 1))


def run_samples(runner: Runner, batch: Batch, first_sample: int) -> dict[str, npt.NDArray[Any]]:
    """The outputs for one batch; values that the model can't take are a fault of the data.

    Raises:
        BadDataError: The model fails on it.
    """
    try:
        return runner.run(batch)
    except ModelError as error:
        raise BadDataError(
            f"The model fails on calibration sample {first_sample}: {error.message}",
            "Look for values that it can't take, such as indices beyond its tables.",
        ) from error
