"""One sample as it is fed: how raw arrays become that, how it is hashed, and how samples become batches.

A raw array for one sample has either one axis less than the input (the batch axis is added here) or all of its axes
(it is fed as it is, alone). Raw arrays are taken as they are, with two exceptions:

    uint8 arrays that are pictures, for an input that takes pictures    the steps of `onnxprune.data.preprocess`
    other integers for a float input, where preprocess.scale is given   (number * scale - mean) / std
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.contracts import Batch, TensorSpec, numpy_dtype
from onnxprune.data.fit import fit_array, is_float
from onnxprune.data.preprocess import (
    ImageInput,
    Preprocess,
    numbers_to_sample,
    pixels_to_sample,
    resolve_image_input,
)
from onnxprune.errors import BadDataError

__all__ = ["CountedBatch", "Sample", "SampleBinder", "batches_of", "rows_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample, ready to feed. `where` names it in messages.

    `batch` is how many samples the model takes at once: None for any number, and then each array has 1 on axis 0.
    A sample with all axes of its own has 1.
    """

    where: str
    feeds: Batch
    batch: int | None

    def digest(self) -> str:
        """sha256 (hex) of names, types, shapes and values as fed."""
        digest = hashlib.sha256()
        for name in sorted(self.feeds):
            array = self.feeds[name]
            digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
            if array.dtype.kind == "O":
                digest.update("\0".join(map(repr, array.ravel())).encode())
            else:
                digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.ndim else array.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedBatch:
    """Feeds for one run; only the first `num_samples` rows are samples, the rest repeats the last one."""

    feeds: Batch
    num_samples: int


class SampleBinder:
    """Turns raw arrays into samples for the inputs of one model."""

    def __init__(self, inputs: Sequence[TensorSpec], preprocess: Preprocess) -> None:
        self.inputs = {spec.name: spec for spec in inputs}
        self.preprocess = preprocess
        self._image_inputs: dict[str, ImageInput] = {}

    def bind(self, arrays: Mapping[str, npt.NDArray[Any]], *, where: str) -> Sample:
        """The sample made of one raw array for each input.

        Raises:
            BadDataError: An array does not fit its input, or holds NaN or infinite values.
            UsageError: The preprocessing does not fit the input.
        """
        prepared = {name: self._prepared(np.asarray(arrays[name]), spec, where) for name, spec in self.inputs.items()}
        return self.bind_prepared(prepared, where=where)

    def bind_prepared(self, arrays: Mapping[str, npt.NDArray[Any]], *, where: str) -> Sample:
        """As `bind`, for arrays that went through the preprocessing already."""
        feeds: dict[str, npt.NDArray[Any]] = {}
        sizes: dict[str, int] = {}
        can_grow = True
        for name, spec in self.inputs.items():
            array = arrays[name]
            is_row = array.ndim > 0 if spec.shape is None else array.ndim != len(spec.shape)
            if is_row:
                array = array[np.newaxis]
                first = spec.shape[0] if spec.shape else None
                if isinstance(first, int):
                    sizes[name] = first
            elif not (array.ndim and array.shape[0] == 1 and spec.shape and not isinstance(spec.shape[0], int)):
                can_grow = False
            feeds[name] = fit_array(array, spec, has_batch_axis=is_row, where=where)
        if len(set(sizes.values())) > 1 or (not can_grow and any(size > 1 for size in sizes.values())):
            described = ", ".join(f"'{name}' takes {size}" for name, size in sizes.items())
            raise BadDataError(
                f"{where}: the inputs take different numbers of samples at once ({described}).",
                "Give arrays with all axes of the inputs, so that each is fed as it is.",
            )
        batch = next(iter(sizes.values()), None if can_grow else 1)
        return Sample(where=where, feeds=feeds, batch=batch)

    def _prepared(self, array: npt.NDArray[Any], spec: TensorSpec, where: str) -> npt.NDArray[Any]:
        if array.dtype == np.uint8 and spec.shape is not None and len(spec.shape) in (3, 4) and _is_picture(array):
            return pixels_to_sample(array, self.preprocess, self.image_input(spec.name), where=where)
        scaled = self.preprocess.scale is not None
        if scaled and array.dtype.kind in "iu" and is_float(numpy_dtype(spec.dtype)):
            if max(len(self.preprocess.mean or ()), len(self.preprocess.std or ())) > 1:
                raise BadDataError(
                    f"{where}: input '{spec.name}' got {array.dtype} numbers that are no picture, so that "
                    "preprocess.mean and .std with a value for each channel can't be applied.",
                    "Give one value, or data in the element type of the input.",
                )
            return numbers_to_sample(array, self.preprocess, spec.dtype)
        return array

    def image_input(self, name: str) -> ImageInput:
        """How pictures are given to the input called `name`.

        Raises:
            UsageError: It does not take pictures, or the preprocessing contradicts it.
        """
        if name not in self._image_inputs:
            self._image_inputs[name] = resolve_image_input(self.inputs[name], self.preprocess)
        return self._image_inputs[name]


def _is_picture(array: npt.NDArray[Any]) -> bool:
    return array.ndim == 2 or (array.ndim == 3 and (array.shape[0] in (1, 3) or array.shape[2] in (1, 3)))


def rows_of(
    arrays: Mapping[str, npt.NDArray[Any]], inputs: Mapping[str, TensorSpec]
) -> list[dict[str, npt.NDArray[Any]]]:
    """Cut arrays that are one sample or one batch into the raw arrays of single samples.

    Axis 0 counts samples where every array has all axes of its input, the input takes 1 or any number of samples,
    and all arrays agree on the number. Otherwise the arrays are one sample.
    """
    counts = set()
    for name, array in arrays.items():
        shape = inputs[name].shape
        if not shape or array.ndim != len(shape) or (isinstance(shape[0], int) and shape[0] != 1):
            return [dict(arrays)]
        counts.add(array.shape[0])
    if len(counts) != 1:
        return [dict(arrays)]
    return [{name: array[index] for name, array in arrays.items()} for index in range(counts.pop())]


def batches_of(samples: Iterable[Sample], batch_size: int) -> Iterator[CountedBatch]:
    """Join consecutive samples: up to `batch_size` where the model takes any number, else the number it takes.

    Samples of other lengths than the one before begin a new batch. The last batch for a model that takes a fixed
    number is filled up by repeating its last sample.
    """
    waiting: list[Sample] = []
    for sample in samples:
        if waiting and (len(waiting) >= (sample.batch or batch_size) or not _fit_together(waiting[-1], sample)):
            yield _joined(waiting)
            waiting = []
        waiting.append(sample)
    if waiting:
        yield _joined(waiting)


def _fit_together(one: Sample, other: Sample) -> bool:
    return one.batch == other.batch and all(one.feeds[name].shape == other.feeds[name].shape for name in one.feeds)


def _joined(samples: Sequence[Sample]) -> CountedBatch:
    wanted = max(samples[0].batch or 1, len(samples))
    if wanted == 1:
        return CountedBatch(feeds=samples[0].feeds, num_samples=1)
    filled = [*samples, *[samples[-1]] * (wanted - len(samples))]
    feeds = {name: np.concatenate([sample.feeds[name] for sample in filled]) for name in samples[0].feeds}
    return CountedBatch(feeds=feeds, num_samples=len(samples))
