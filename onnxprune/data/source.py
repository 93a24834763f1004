"""`open_data`: calibration and evaluation samples from a folder, a file or a function.

    folder of pictures      one sample each, in sorted order of their paths, subfolders included
    folder of .npz / .npy   each file one sample or, with all axes of the input, a batch
    .npz                    keys are input names, axis 0 counts the samples
    .npy                    the same for a model with one input
    module:function         user code: an iterable of arrays or of mappings {input name: array}

A limit takes samples at even distances from the whole set, because sets are often sorted by class; of a function, whose
end is not known, the first ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from onnxprune.contracts import Batch, TensorSpec
from onnxprune.data.arrays import open_array_file
from onnxprune.data.images import IMAGE_SUFFIXES, files_below, require_pillow
from onnxprune.data.overlap import overlap_warning
from onnxprune.data.preprocess import Preprocess
from onnxprune.data.readers import ArrayReader, FunctionReader, PictureReader, SampleReader, match_arrays
from onnxprune.data.samples import CountedBatch, Sample, SampleBinder, batches_of
from onnxprune.data.user_code import load_callable, parse_function_spec
from onnxprune.errors import BadDataError, quoted_list

__all__ = ["DataSource", "open_data", "open_pictures", "overlap_warning"]

ARRAY_SUFFIXES = (".npy", ".npz")
FORMS = "a folder of pictures, a folder of .npz or .npy files, an .npz or .npy file, or module:function"


class DataSource:
    """Batches of samples, always the same; a `contracts.CalibrationSource`. Made by `open_data`."""

    def __init__(self, reader: SampleReader, *, name: str, batch_size: int, limit: int | None) -> None:
        self.name = name
        self._reader = reader
        self._batch_size = batch_size
        self._indices: range | tuple[int, ...] | None = None
        if reader.count is not None:
            self._indices = _spread(reader.count, limit)
        elif limit is not None:
            self._indices = range(limit)
        self._hashes: tuple[str, ...] | None = None

    @property
    def num_samples(self) -> int:
        """How many samples there are. For a function, the first call reads all of them."""
        if self._reader.count is None or self._indices is None:
            return len(self.sample_hashes())
        return len(self._indices)

    @property
    def indices(self) -> Sequence[int]:
        """The positions of the chosen samples in the whole set."""
        return range(self.num_samples) if self._indices is None else self._indices[: self.num_samples]

    def sample_hashes(self) -> tuple[str, ...]:
        """sha256 (hex) of each sample as it is fed; the first call reads all samples."""
        if self._hashes is None:
            self._hashes = tuple(sample.digest() for sample in self.samples())
        return self._hashes

    @property
    def content_hash(self) -> str:
        """sha256 (hex) over all samples as they are fed, whatever the batch size; the first call reads all samples."""
        return hashlib.sha256("\n".join(self.sample_hashes()).encode()).hexdigest()

    def file_digests(self) -> tuple[str, ...] | None:
        """sha256 of each sample's file; None where samples are not files of their own."""
        return self._reader.file_digests(self.indices)

    def samples(self) -> Iterator[Sample]:
        """One sample after the other."""
        return self._reader.read(self._indices)

    def counted_batches(self) -> Iterator[CountedBatch]:
        """The batches with the number of samples in each, which counts where a last batch is filled up."""
        return batches_of(self.samples(), self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.counted_batches():
            yield batch.feeds


def _spread(count: int, limit: int | None) -> range | tuple[int, ...]:
    if limit is None or limit >= count:
        return range(count)
    return tuple(position * count // limit for position in range(limit))


def open_data(
    spec: str,
    *,
    inputs: Sequence[TensorSpec],
    preprocess: Preprocess,
    batch_size: int = 1,
    limit: int | None = None,
) -> DataSource:
    """The samples that `spec` names, checked as far as can be without reading all: names, types, and the first sample.

    Args:
        spec: See the top of this file.
        inputs: What the model takes.
        preprocess: How pictures and other 8-bit data become input values.
        batch_size: Samples in a batch where the model takes any number; a model that takes a fixed number gets that.
        limit: At most this many samples.

    Raises:
        BadDataError: There is nothing of that name, the set is empty, or does not fit the inputs; names what and why.
            Samples behind the first one are checked when they are read, with the same error.
        UsageError: The preprocessing does not fit the input, or the function does not exist.
        PluginError: The user's function fails.
        MissingExtraError: Pictures need Pillow.
    """
    binder = SampleBinder(inputs, preprocess)
    function_spec = parse_function_spec(spec)
    reader: SampleReader
    if function_spec is not None:
        reader = FunctionReader(load_callable(spec, what="Data function"), spec, binder)
    else:
        reader = _open_path(Path(spec), binder)
    return _checked(DataSource(reader, name=spec, batch_size=batch_size, limit=limit))


def open_pictures(
    files: Sequence[Path],
    *,
    folder: Path,
    inputs: Sequence[TensorSpec],
    preprocess: Preprocess,
    batch_size: int,
    limit: int | None,
) -> DataSource:
    """The picture files, in the order given; `folder` names the set in messages. Errors as in `open_data`."""
    reader = _picture_reader(files, folder, SampleBinder(inputs, preprocess))
    return _checked(DataSource(reader, name=str(folder), batch_size=batch_size, limit=limit))


def _checked(source: DataSource) -> DataSource:
    if next(source.samples(), None) is None:
        raise BadDataError(f"'{source.name}' holds no samples.", f"Give {FORMS}.")
    return source


def _open_path(path: Path, binder: SampleBinder) -> SampleReader:
    if not path.exists():
        raise BadDataError(f"There are no data '{path}'.", f"Give {FORMS}.")
    if path.is_dir():
        return _open_folder(path, binder)
    if path.suffix.lower() not in ARRAY_SUFFIXES:
        raise BadDataError(f"'{path}' is no data file of a known kind.", f"Give {FORMS}.")
    file = open_array_file(path)
    return ArrayReader([file], [match_arrays(file, binder.inputs)], binder, is_folder=False)


def _open_folder(folder: Path, binder: SampleBinder) -> SampleReader:
    files = list(files_below(folder))
    pictures = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    arrays = [file for file in files if file.suffix.lower() in ARRAY_SUFFIXES]
    if pictures and arrays:
        raise BadDataError(
            f"Folder '{folder}' holds {len(pictures)} pictures and {len(arrays)} array files.",
            "Put them into folders of their own.",
        )
    if arrays:
        opened = [open_array_file(file) for file in arrays]
        return ArrayReader(opened, [match_arrays(file, binder.inputs) for file in opened], binder, is_folder=True)
    if not pictures:
        seen = sorted({file.suffix.lower() or "without ending" for file in files})
        found = f"only files of other kinds ({quoted_list(seen)})" if seen else "no files"
        raise BadDataError(
            f"Folder '{folder}' holds {found}.",
            f"Pictures end in {', '.join(IMAGE_SUFFIXES)}; arrays in {' or '.join(ARRAY_SUFFIXES)}.",
        )
    return _picture_reader(pictures, folder, binder)


def _picture_reader(files: Sequence[Path], folder: Path, binder: SampleBinder) -> PictureReader:
    names = list(binder.inputs)
    if len(names) != 1:
        raise BadDataError(
            f"'{folder}' holds pictures, which feed one input, but the model has {len(names)}: {quoted_list(names)}.",
            "Give an .npz file with one array for each input, or module:function.",
        )
    require_pillow("Reading pictures")
    binder.image_input(names[0])
    return PictureReader(files, folder, binder, names[0])
