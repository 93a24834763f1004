"""A runner for any number of samples in front of a model that takes a fixed number of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.contracts import Batch, TensorSpec
from onnxprune.errors import BadDataError
from onnxprune.runtime.litert import LitertRunner

__all__ = ["FixedBatchRunner"]


class FixedBatchRunner:
    """Feeds samples in groups of `batch`; the last group is filled up with its last sample, and its results are cut.

    Axis 0 of every input is the batch. Outputs whose axis 0 has `batch` entries have one for each sample.
    """

    def __init__(self, runner: LitertRunner, batch: int) -> None:
        self._runner = runner
        self.batch = batch

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The model's inputs, with an open batch."""
        return tuple(_opened(spec) for spec in self._runner.inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The model's outputs, with an open batch."""
        return tuple(_opened(spec) if self._is_batched(spec) else spec for spec in self._runner.outputs)

    @property
    def threads(self) -> int:
        """Threads that one operator may use."""
        return self._runner.threads

    @property
    def metadata(self) -> dict[str, str]:
        """The file's own metadata."""
        return self._runner.metadata

    def run(self, feeds: Batch) -> dict[str, npt.NDArray[Any]]:
        """All outputs by name; those without a batch are of the last group.

        Raises:
            BadDataError: Inputs have different numbers of samples, or none; or as the model's own runner.
        """
        count = _num_samples(feeds)
        groups = []
        for start in range(0, count, self.batch):
            part = {name: array[start : start + self.batch] for name, array in feeds.items()}
            groups.append(self._runner.run(self.whole(part)))
        return {
            spec.name: np.concatenate([group[spec.name] for group in groups])[:count]
            if self._is_batched(spec)
            else groups[-1][spec.name]
            for spec in self._runner.outputs
        }

    def prepare(self, feeds: Batch) -> Callable[[], object]:
        """A call that runs one whole group of `feeds` (for timing)."""
        return self._runner.prepare(self.whole(feeds))

    def whole(self, feeds: Batch) -> dict[str, npt.NDArray[Any]]:
        """One whole group: the first samples of `feeds`, filled up with the last of them."""
        count = _num_samples(feeds)
        places = np.minimum(np.arange(self.batch), count - 1)
        return {name: np.asarray(array)[places] for name, array in feeds.items()}

    def _is_batched(self, spec: TensorSpec) -> bool:
        return bool(spec.shape) and spec.shape is not None and spec.shape[0] == self.batch


def _opened(spec: TensorSpec) -> TensorSpec:
    return replace(spec, shape=(None, *spec.shape[1:])) if spec.shape else spec


def _num_samples(feeds: Batch) -> int:
    counts: Sequence[int] = sorted({np.shape(array)[0] if np.ndim(array) else 0 for array in feeds.values()})
    if len(counts) != 1 or counts[0] == 0:
        raise BadDataError(f"Inputs of one batch must have the same number of samples, at least 1, not {counts}.")
    return counts[0]
