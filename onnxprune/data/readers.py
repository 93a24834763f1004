"""Where samples come from: pictures, array files, a user's function. Each reader gives `Sample`s in a fixed order."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from onnxprune.contracts import TensorSpec
from onnxprune.data.arrays import ArrayFile
from onnxprune.data.images import open_image
from onnxprune.data.preprocess import image_to_sample
from onnxprune.data.samples import Sample, SampleBinder, rows_of
from onnxprune.data.user_code import call_user_code, iterate_user_code
from onnxprune.errors import BadDataError, PluginError, did_you_mean, quoted_list

__all__ = ["LABEL_KEYS", "ArrayReader", "FunctionReader", "PictureReader", "SampleReader", "match_arrays"]

LABEL_KEYS = ("label", "labels", "y", "target", "targets", "class_index")


class SampleReader(Protocol):
    """A set of samples that can be read again and again."""

    @property
    def count(self) -> int | None:
        """How many samples there are; None where only reading them tells."""
        ...

    def read(self, indices: Sequence[int] | None) -> Iterator[Sample]:
        """The samples at the rising `indices` (None: all)."""
        ...

    def file_digests(self, indices: Sequence[int]) -> tuple[str, ...] | None:
        """sha256 of the file of each sample; None where a sample is not a file."""
        ...


class PictureReader:
    """One picture file for each sample."""

    def __init__(self, files: Sequence[Path], folder: Path, binder: SampleBinder, input_name: str) -> None:
        self._files = tuple(files)
        self._folder = folder
        self._binder = binder
        self._name = input_name

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(self._files)

    def read(self, indices: Sequence[int] | None) -> Iterator[Sample]:
        """The samples at the rising `indices` (None: all)."""
        target = self._binder.image_input(self._name)
        for index in range(len(self._files)) if indices is None else indices:
            path = self._files[index]
            where = f"'{path}'"
            array = image_to_sample(open_image(path, where=where), self._binder.preprocess, target, where=where)
            yield self._binder.bind_prepared({self._name: array}, where=where)

    def file_digests(self, indices: Sequence[int]) -> tuple[str, ...]:
        """sha256 of the file of each sample."""
        return tuple(_file_digest(self._files[index]) for index in indices)


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadDataError(f"'{path}' can't be read: {error.strerror}.", "Leave it out, or copy it again.") from error


class ArrayReader:
    """Rows of the arrays in one `.npz` or `.npy` file, or in a folder of them."""

    def __init__(
        self,
        files: Sequence[ArrayFile],
        members: Sequence[Mapping[str, str]],
        binder: SampleBinder,
        *,
        is_folder: bool,
    ) -> None:
        self._files = tuple(files)
        self._members = tuple(members)
        self._binder = binder
        self._is_folder = is_folder
        self._rows = tuple(
            self._count_rows(file, names) for file, names in zip(self._files, self._members, strict=True)
        )

    @property
    def count(self) -> int:
        """How many samples there are."""
        return sum(1 if rows is None else rows for rows in self._rows)

    def read(self, indices: Sequence[int] | None) -> Iterator[Sample]:
        """The samples at the rising `indices` (None: all)."""
        wanted = range(self.count) if indices is None else indices
        start = 0
        for file, members, rows in zip(self._files, self._members, self._rows, strict=True):
            end = start + (1 if rows is None else rows)
            local = _between(wanted, start, end)
            start = end
            if rows is None:
                if local:
                    arrays = {name: file.whole(member) for name, member in members.items()}
                    yield self._binder.bind(arrays, where=f"'{file.path}'")
                continue
            for index, row in zip(local, file.rows(list(members.values()), local), strict=True):
                arrays = {name: row[member] for name, member in members.items()}
                yield self._binder.bind(arrays, where=f"'{file.path}', sample {index}")

    def file_digests(self, indices: Sequence[int]) -> None:
        """None: samples are not files."""
        del indices

    def _count_rows(self, file: ArrayFile, members: Mapping[str, str]) -> int | None:
        """How many samples axis 0 counts; None where the whole file is one sample."""
        counts: dict[str, int] = {}
        for name, member in members.items():
            header, declared = file.arrays[member], self._binder.inputs[name].shape
            if self._is_folder:
                rank = len(header.shape)
                if declared is None or rank < len(declared) or rank == 0:
                    return None
                if rank == len(declared) and isinstance(declared[0], int) and declared[0] != 1:
                    return None
            if not header.shape:
                raise BadDataError(
                    f"'{file.path}': the array for input '{name}' is a single number.", "Axis 0 must count the samples."
                )
            counts[name] = header.shape[0]
        if len(set(counts.values())) > 1:
            described = ", ".join(f"'{name}' has {count}" for name, count in counts.items())
            raise BadDataError(
                f"'{file.path}': the inputs have different numbers of samples: {described}.",
                "Axis 0 of every array must count the same samples.",
            )
        return next(iter(counts.values()))


def _between(indices: Sequence[int], start: int, end: int) -> Sequence[int]:
    """Those of the rising `indices` from `start` to below `end`, counted from `start`; a range stays a range."""
    chosen = indices[bisect.bisect_left(indices, start) : bisect.bisect_left(indices, end)]
    if isinstance(chosen, range):
        return range(chosen.start - start, chosen.stop - start, chosen.step)
    return [index - start for index in chosen]


def match_arrays(file: ArrayFile, inputs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Which array of `file` feeds which input: by name, or the only one that can for a model with one input.

    Labels (`LABEL_KEYS`) and single numbers that describe the set are left out unless they are named as an input.

    Raises:
        BadDataError: An input has no array, or an array is of no use.
    """
    members = {name: header for name, header in file.arrays.items() if name in inputs}
    others = [
        name for name, header in file.arrays.items() if name not in inputs and name not in LABEL_KEYS and header.shape
    ]
    if not members and len(inputs) == 1 and len(others) == 1:
        return {next(iter(inputs)): others[0]}
    missing = [name for name in inputs if name not in members]
    if missing:
        raise BadDataError(
            f"'{file.path}' has no array for input {quoted_list(missing)}; it holds "
            f"{quoted_list(name or 'one array without a name' for name in file.arrays)}.",
            "Keys must be the names of the model's inputs. "
            + did_you_mean(missing[0], others).replace("Known:", "The file's keys:"),
        )
    if others:
        raise BadDataError(
            f"'{file.path}' holds {quoted_list(others)}, which no input of the model is called.",
            did_you_mean(others[0], list(inputs)).replace("Known:", "Inputs:"),
        )
    return {name: name for name in members}


class FunctionReader:
    """What a user's function gives. It is called anew for each reading and must give the same each time.

    An item is an array (models with one input) or a mapping from input names to arrays; either one sample or, with
    all axes of the input, a batch, which is cut into samples.
    """

    count = None

    def __init__(self, function: Callable[..., Any], spec: str, binder: SampleBinder) -> None:
        self._function = function
        self._spec = spec
        self._binder = binder
        self._first_digest: str | None = None

    def read(self, indices: Sequence[int] | None) -> Iterator[Sample]:
        """The samples at the rising `indices` (None: all)."""
        samples = self._samples()
        first = next(samples, None)
        if first is None:
            return
        digest = first.digest()
        if self._first_digest is not None and digest != self._first_digest:
            raise PluginError(
                f"Data function '{self._spec}' gave other samples than when it was called before.",
                "It must give the same samples in the same order each time: seed its random numbers inside.",
            )
        self._first_digest = digest
        everything = itertools.chain([first], samples)
        yield from everything if indices is None else itertools.islice(everything, len(indices))

    def file_digests(self, indices: Sequence[int]) -> None:
        """None: samples are not files."""
        del indices

    def _samples(self) -> Iterator[Sample]:
        items = call_user_code(self._function, spec=self._spec, what="Data function")
        if isinstance(items, Mapping | str | bytes) or not hasattr(items, "__iter__"):
            raise PluginError(
                f"Data function '{self._spec}' must return an iterable of samples, got {type(items).__name__}.",
                "Yield one array or one mapping {input name: array} for each sample.",
            )
        for number, item in enumerate(iterate_user_code(items, spec=self._spec, what="Data function")):
            where = f"Item {number} of '{self._spec}'"
            rows = rows_of(self._arrays(item, where), self._binder.inputs)
            for index, row in enumerate(rows):
                yield self._binder.bind(row, where=where if len(rows) == 1 else f"{where}, sample {index}")

    def _arrays(self, item: Any, where: str) -> dict[str, Any]:
        names = list(self._binder.inputs)
        if not isinstance(item, Mapping):
            if len(names) > 1:
                raise BadDataError(
                    f"{where} is of type {type(item).__name__}, but the model has {len(names)} inputs: "
                    f"{quoted_list(names)}.",
                    "Yield mappings {input name: array}.",
                )
            item = {names[0]: item}
        missing = [name for name in names if name not in item]
        unknown = [str(name) for name in item if name not in names]
        if missing or unknown:
            problem = f"has no array for input {quoted_list(missing)}" if missing else f"has {quoted_list(unknown)}"
            raise BadDataError(
                f"{where} {problem}.", did_you_mean((unknown or missing)[0], names).replace("Known:", "Inputs:")
            )
        arrays = {}
        for name in names:
            # A copy: generators like to reuse their buffer.
            arrays[name] = np.array(call_user_code(np.asarray, item[name], spec=self._spec, what="Data function"))
            if arrays[name].dtype.kind == "O" and self._binder.inputs[name].dtype != "object":
                raise BadDataError(
                    f"{where}: input '{name}' got {type(item[name]).__name__}, which is no array of numbers.",
                    "Yield NumPy arrays.",
                )
        return arrays
