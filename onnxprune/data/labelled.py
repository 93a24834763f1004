"""Samples with class labels, for scoring classifiers.

    folder/labels.csv       columns for the file and its class (`FILE_COLUMNS`, `LABEL_COLUMNS`); files lie in the
                            folder, in its `images/`, or where the path says. A folder beside the table works too.
    folder/<class>/*.jpg    one subfolder for each class; classes count from 0 in sorted order of the names
    .npz                    arrays for the inputs as in `onnxprune.data.source`, and one of `LABEL_KEYS`

Classes are whole numbers from 0, the index in the model's output. Names instead of numbers in a table count from 0 in
sorted order.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.contracts import Batch, TensorSpec
from onnxprune.data.arrays import ArrayFile, open_array_file
from onnxprune.data.images import IMAGE_SUFFIXES, files_below
from onnxprune.data.preprocess import Preprocess
from onnxprune.data.readers import LABEL_KEYS
from onnxprune.data.source import DataSource, open_data, open_pictures
from onnxprune.errors import BadDataError, quoted_list

__all__ = ["FILE_COLUMNS", "LABEL_COLUMNS", "LabelledSource", "open_labelled"]

FILE_COLUMNS = ("file", "filename", "file_name", "path", "image")
LABEL_COLUMNS = ("class_index", "label", "class", "class_id", "label_index", "target", "y")
TABLE_NAME = "labels.csv"
FORMS = (
    "a folder with a labels.csv (columns file and class_index), a folder with one subfolder for each class, or an "
    ".npz file with labels"
)


class LabelledSource:
    """Batches with their labels: iterating gives (feeds, labels), one label for each sample in the batch.

    A batch for a model that takes a fixed number may have more rows than labels: the rest is filling.
    """

    def __init__(self, data: DataSource, labels: npt.NDArray[np.int64]) -> None:
        self._data = data
        self.labels = labels

    @property
    def num_samples(self) -> int:
        """How many samples there are, each with one label."""
        return self._data.num_samples

    @property
    def content_hash(self) -> str:
        """sha256 (hex) over the samples as they are fed; labels don't count."""
        return self._data.content_hash

    def sample_hashes(self) -> tuple[str, ...]:
        """As `DataSource.sample_hashes`."""
        return self._data.sample_hashes()

    def file_digests(self) -> tuple[str, ...] | None:
        """As `DataSource.file_digests`."""
        return self._data.file_digests()

    def __iter__(self) -> Iterator[tuple[Batch, npt.NDArray[np.int64]]]:
        start = 0
        for batch in self._data.counted_batches():
            end = start + batch.num_samples
            yield batch.feeds, self.labels[start:end]
            start = end


def open_labelled(
    spec: str,
    *,
    inputs: Sequence[TensorSpec],
    preprocess: Preprocess,
    batch_size: int = 1,
    limit: int | None = None,
) -> LabelledSource:
    """The labelled samples at path `spec`; arguments and errors as in `onnxprune.data.source.open_data`.

    Raises:
        BadDataError: Also where labels are missing, ambiguous or no whole numbers from 0.
    """
    path = Path(spec)
    if path.is_dir():
        files, labels = _labelled_files(path)
        data = open_pictures(
            files, folder=path, inputs=inputs, preprocess=preprocess, batch_size=batch_size, limit=limit
        )
    elif path.suffix.lower() == ".npz":
        labels = _labels_of_archive(open_array_file(path), {one.name for one in inputs})
        data = open_data(spec, inputs=inputs, preprocess=preprocess, batch_size=batch_size, limit=limit)
    else:
        problem = "is no labelled data" if path.exists() else "does not exist"
        raise BadDataError(f"Evaluation data '{spec}': this {problem}.", f"Give {FORMS}, or module:function.")
    return LabelledSource(data, labels[np.asarray(data.indices, dtype=np.int64)])


def _labelled_files(folder: Path) -> tuple[list[Path], npt.NDArray[np.int64]]:
    if (folder / TABLE_NAME).is_file():
        return _read_table(folder / TABLE_NAME, folder)
    beside = folder.parent / TABLE_NAME
    if beside.is_file() and (_lists_files_of(beside, folder) or not _class_folders(folder)):
        return _read_table(beside, folder)
    return _read_subfolders(folder)


# --- one subfolder for each class -----------------------------------------------------------------------------


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _read_subfolders(folder: Path) -> tuple[list[Path], npt.NDArray[np.int64]]:
    classes = _class_folders(folder)
    if len(classes) < 2:
        raise BadDataError(
            f"Folder '{folder}' has no labels: neither a '{TABLE_NAME}' nor subfolders for classes.", f"Give {FORMS}."
        )
    if all(name.isdigit() for name in classes) and classes != sorted(classes, key=int):
        raise BadDataError(
            f"Folder '{folder}': its classes are named by numbers, and as names '{max(classes, key=int)}' sorts before "
            f"'{classes[-1]}', so that it can't be told which class has which index.",
            f"Pad the names with zeros, or write a '{TABLE_NAME}' with the columns file and class_index.",
        )
    files: list[Path] = []
    labels: list[int] = []
    for index, name in enumerate(classes):
        of_class = [file for file in files_below(folder / name) if file.suffix.lower() in IMAGE_SUFFIXES]
        files += of_class
        labels += [index] * len(of_class)
    return files, np.asarray(labels, dtype=np.int64)


# --- labels.csv -----------------------------------------------------------------------------------------------


def _rows_of(table: Path) -> list[list[str]]:
    """The lines of the table that are not empty, the header first."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            rows = [row for row in csv.reader(stream) if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadDataError(f"'{table}' is no CSV table in UTF-8 ({error}).", "Save it again.") from error
    except OSError as error:
        raise BadDataError(f"'{table}' can't be read: {error.strerror}.") from error
    if not rows:
        raise BadDataError(f"'{table}' is empty.", "It needs the columns file and class_index.")
    return rows


def _lists_files_of(table: Path, folder: Path) -> bool:
    """True where the first file that the table names lies in `folder`."""
    header, *rows = _rows_of(table)
    column = next((index for index, name in enumerate(header) if name.strip().lower() in FILE_COLUMNS), 0)
    return bool(rows) and len(rows[0]) > column and (folder / rows[0][column].strip()).is_file()


def _read_table(table: Path, folder: Path) -> tuple[list[Path], npt.NDArray[np.int64]]:
    rows = _rows_of(table)
    header = [name.strip().lower() for name in rows[0]]
    file_column = _column(header, FILE_COLUMNS, table, "files")
    label_column = _column(header, LABEL_COLUMNS, table, "classes")
    files: list[Path] = []
    names: list[str] = []
    folders = (folder, table.parent, table.parent / "images")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise BadDataError(f"'{table}', line {number}: {len(row)} values for {len(header)} columns.")
        files.append(_find_file(row[file_column].strip(), folders, table, number))
        names.append(row[label_column].strip())
    if len(set(files)) < len(files):
        twice = next(file for index, file in enumerate(files) if file in files[:index])
        raise BadDataError(f"'{table}': '{twice.name}' is in it twice.", "Each file has one class.")
    return files, _table_labels(names, table)


def _column(header: Sequence[str], known: Sequence[str], table: Path, what: str) -> int:
    for name in known:
        if name in header:
            return header.index(name)
    raise BadDataError(
        f"'{table}' has no column for the {what}; its first line is {quoted_list(header)}.",
        f"Name the column one of: {', '.join(known)}.",
    )


def _find_file(name: str, folders: Sequence[Path], table: Path, number: int) -> Path:
    for folder in folders:
        if name and (folder / name).is_file():
            return folder / name
    raise BadDataError(
        f"'{table}', line {number}: there is no file '{name}'.",
        "Files are looked for beside the table, in its folder 'images', and in the folder that was given.",
    )


def _table_labels(names: Sequence[str], table: Path) -> npt.NDArray[np.int64]:
    if "" in names:
        raise BadDataError(f"'{table}', line {names.index('') + 2}: the class is missing.")
    if all(name.removeprefix("-").isdecimal() for name in names):
        return _checked_labels(np.asarray([int(name) for name in names], dtype=np.int64), f"'{table}'")
    order = {name: index for index, name in enumerate(sorted(set(names)))}
    return np.asarray([order[name] for name in names], dtype=np.int64)


# --- .npz -----------------------------------------------------------------------------------------------------


def _labels_of_archive(file: ArrayFile, input_names: set[str]) -> npt.NDArray[np.int64]:
    keys = [key for key in LABEL_KEYS if key in file.arrays and key not in input_names]
    if not keys:
        raise BadDataError(
            f"'{file.path}' has no labels; it holds {quoted_list(file.arrays)}.",
            f"Add an array called one of: {', '.join(LABEL_KEYS)}.",
        )
    if len(keys) > 1:
        raise BadDataError(f"'{file.path}' has several arrays of labels: {quoted_list(keys)}.", "Leave one.")
    where = f"'{file.path}', array '{keys[0]}'"
    labels: npt.NDArray[Any] = file.whole(keys[0])
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise BadDataError(
            f"{where}: labels must be one whole number for each sample, got {labels.dtype} of shape "
            f"{list(labels.shape)}.",
            "One-hot labels become numbers with labels.argmax(axis=1).",
        )
    samples = {header.shape[0] for key, header in file.arrays.items() if header.shape and key not in LABEL_KEYS}
    if samples and samples != {len(labels)}:
        raise BadDataError(f"{where}: {len(labels)} labels for {max(samples)} samples.", "Give one for each sample.")
    return _checked_labels(labels.astype(np.int64), where)


def _checked_labels(labels: npt.NDArray[np.int64], where: str) -> npt.NDArray[np.int64]:
    if labels.size and labels.min() < 0:
        index = int(labels.argmin())
        raise BadDataError(f"{where}: sample {index} has the class {labels[index]}.", "Classes count from 0.")
    return labels
