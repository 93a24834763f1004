"""Labels from tables, folders and archives, and the warning about shared samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxprune.contracts import Runner, Score, TensorSpec
from onnxprune.data.labelled import LabelledSource, open_labelled
from onnxprune.data.preprocess import Preprocess
from onnxprune.data.source import open_data, overlap_warning
from onnxprune.errors import BadDataError

IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 4, 4))
FEATURES = TensorSpec(name="x", dtype="float32", shape=("batch", 4))


def save_picture(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (level, 0, 0)).save(path)


def opened(path: Path, spec: TensorSpec = IMAGE, *, batch_size: int = 1, limit: int | None = None) -> LabelledSource:
    return open_labelled(str(path), inputs=[spec], preprocess=Preprocess(scale=1.0), batch_size=batch_size, limit=limit)


def pairs(source: LabelledSource) -> list[tuple[int, int]]:
    """(red level, label) of each sample."""
    return [
        (int(level), int(label))
        for feeds, labels in source
        for level, label in zip(feeds["image"][:, 0, 0, 0], labels, strict=False)
    ]


def write_table(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.csv").write_text(text, encoding="utf-8")


# --- tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [".", "images"], ids=["beside the table", "in its folder images"])
def test_table_gives_each_file_its_class(tmp_path: Path, images: str) -> None:
    for level, name in ((1, "a.png"), (2, "b.png"), (3, "c.png")):
        save_picture(tmp_path / images / name, level)
    write_table(tmp_path, "file,class_index,wnid\nc.png,7,n1\na.png,0,n2\n")
    source = opened(tmp_path)
    assert pairs(source) == [(3, 7), (1, 0)]
    assert source.num_samples == 2


def test_folder_of_images_finds_the_table_above_it(tmp_path: Path) -> None:
    save_picture(tmp_path / "images" / "a.png", 1)
    write_table(tmp_path, "file,class_index\na.png,5\n")
    assert pairs(opened(tmp_path / "images")) == [(1, 5)]


def test_table_above_that_is_about_other_files_does_not_hide_class_folders(tmp_path: Path) -> None:
    save_picture(tmp_path / "set" / "ant" / "a.png", 1)
    save_picture(tmp_path / "set" / "bee" / "b.png", 2)
    write_table(tmp_path, "file,class_index\nother.png,5\n")
    assert pairs(opened(tmp_path / "set")) == [(1, 0), (2, 1)]
    write_table(tmp_path, "file,class_index\nbee/b.png,5\n")
    assert pairs(opened(tmp_path / "set")) == [(2, 5)]


def test_other_column_names_and_class_names_are_read(tmp_path: Path) -> None:
    for level, name in ((1, "a.png"), (2, "b.png")):
        save_picture(tmp_path / name, level)
    write_table(tmp_path, "\ufeffFilename, Label\na.png, zebra\nb.png, ant\n")
    assert pairs(opened(tmp_path)) == [(1, 1), (2, 0)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("name,class_index\na.png,1\n", r"no column for the files; its first line is 'name', 'class_index'"),
        ("file,kind\na.png,1\n", "no column for the classes"),
        ("file,class_index\nz.png,1\n", r"line 2: there is no file 'z\.png'"),
        ("file,class_index\na.png\n", "line 2: 1 values for 2 columns"),
        ("file,class_index\na.png,\n", "line 2: the class is missing"),
        ("file,class_index\na.png,-1\n", "sample 0 has the class -1"),
        ("file,class_index\na.png,1\na.png,2\n", r"'a\.png' is in it twice"),
    ],
    ids=["empty", "file column", "label column", "file", "short row", "no class", "negative", "twice"],
)
def test_broken_tables_are_refused_with_the_line(tmp_path: Path, text: str, says: str) -> None:
    save_picture(tmp_path / "a.png", 1)
    write_table(tmp_path, text)
    with pytest.raises(BadDataError, match=says):
        opened(tmp_path)


def test_table_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(BadDataError, match="is no CSV table in UTF-8"):
        opened(tmp_path)


# --- subfolders -----------------------------------------------------------------------------------------------


def test_subfolders_are_classes_in_sorted_order(tmp_path: Path) -> None:
    save_picture(tmp_path / "dog" / "b.png", 2)
    save_picture(tmp_path / "cat" / "deep" / "a.png", 1)
    save_picture(tmp_path / "dog" / "a.png", 3)
    assert pairs(opened(tmp_path)) == [(1, 0), (3, 1), (2, 1)]


def test_limit_takes_samples_of_all_classes(tmp_path: Path) -> None:
    for index in range(3):
        for number in range(4):
            save_picture(tmp_path / f"class{index}" / f"{number}.png", 10 * index + number)
    assert pairs(opened(tmp_path, limit=3)) == [(0, 0), (10, 1), (20, 2)]


def test_numbered_classes_whose_order_is_ambiguous_are_refused(tmp_path: Path) -> None:
    for name in ("1", "2", "10"):
        save_picture(tmp_path / name / "a.png", 1)
    with pytest.raises(BadDataError, match=r"as names '10' sorts before '2'.*labels\.csv"):
        opened(tmp_path)


def test_folder_without_labels_is_refused(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", 1)
    with pytest.raises(BadDataError, match=r"neither a 'labels\.csv' nor subfolders for classes"):
        opened(tmp_path)


# --- archives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["label", "labels", "y", "target", "class_index"])
def test_archive_brings_its_labels(tmp_path: Path, key: str) -> None:
    np.savez(tmp_path / "a.npz", x=np.eye(4, dtype=np.float32), **{key: np.uint8([3, 1, 2, 0])})
    batches = list(opened(tmp_path / "a.npz", FEATURES, batch_size=3))
    assert [labels.tolist() for _, labels in batches] == [[3, 1, 2], [0]]
    assert [feeds["x"].shape for feeds, _ in batches] == [(3, 4), (1, 4)]


def test_filled_up_batch_has_labels_for_its_samples_only(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.eye(4, dtype=np.float32)[:3], y=[3, 1, 2])
    fixed = TensorSpec(name="x", dtype="float32", shape=(2, 4))
    assert [(feeds["x"].shape, labels.tolist()) for feeds, labels in opened(tmp_path / "a.npz", fixed)] == [
        ((2, 4), [3, 1]),
        ((2, 4), [2]),
    ]


def test_archives_with_unusable_labels_are_refused(tmp_path: Path) -> None:
    features = np.eye(4, dtype=np.float32)

    def refused(says: str, **labels: object) -> None:
        np.savez(tmp_path / "a.npz", x=features, **labels)  # type: ignore[arg-type]
        with pytest.raises(BadDataError, match=says):
            opened(tmp_path / "a.npz", FEATURES)

    refused("has no labels; it holds 'x'")
    refused("several arrays of labels: 'label', 'y'", label=[0] * 4, y=[0] * 4)
    refused(r"labels\.argmax\(axis=1\)", y=np.eye(4, dtype=np.int64))
    refused("got float64", y=np.zeros(4))
    refused("3 labels for 4 samples", y=[1, 2, 3])
    refused("sample 2 has the class -5", y=[1, 2, -5, 0])


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match=r"does not exist\. Give a folder with a labels\.csv"):
        opened(tmp_path / "nothing")
    np.save(tmp_path / "a.npy", np.zeros((2, 4), np.float32))
    with pytest.raises(BadDataError, match="is no labelled data"):
        opened(tmp_path / "a.npy", FEATURES)


@pytest.mark.parametrize(("name", "count", "classes"), [("vww", 400, 2), ("cifar10_ic01", 100, 10)])
def test_real_labelled_folders_are_read(shared_data: Path, name: str, count: int, classes: int) -> None:
    side = 96 if name == "vww" else 32
    spec = TensorSpec(name="image", dtype="float32", shape=(1, side, side, 3))
    source = open_labelled(str(shared_data / name), inputs=[spec], preprocess=Preprocess())
    assert source.num_samples == count
    assert sorted(set(source.labels.tolist())) == list(range(classes))
    feeds, labels = next(iter(source))
    assert feeds["image"].shape == (1, side, side, 3)
    assert labels.shape == (1,)


# --- shared samples -------------------------------------------------------------------------------------------


class Shows:
    """An evaluator that shows its samples."""

    name = "shows"

    def __init__(self, samples: object) -> None:
        self.samples = samples

    def evaluate(self, runner: Runner) -> Score:
        raise NotImplementedError


class Hides:
    name = "hides"

    def evaluate(self, runner: Runner) -> Score:
        raise NotImplementedError


def test_pictures_in_calibration_and_evaluation_are_counted(tmp_path: Path) -> None:
    for level in range(4):
        save_picture(tmp_path / "eval" / f"class{level % 2}" / f"{level}.png", level)
    for level, name in ((2, "other name.png"), (9, "b.png")):
        save_picture(tmp_path / "calib" / name, level)
    calibration = open_data(str(tmp_path / "calib"), inputs=[IMAGE], preprocess=Preprocess())
    warning = overlap_warning(calibration, Shows(opened(tmp_path / "eval")))
    assert warning.startswith("1 sample is in both the calibration and the evaluation data")


def test_shared_samples_are_found_across_forms_as_they_are_fed(tmp_path: Path) -> None:
    values = np.arange(40, dtype=np.float32).reshape(10, 4)
    np.savez(tmp_path / "eval.npz", x=values, y=np.zeros(10, np.int64))
    np.save(tmp_path / "calib.npy", values[7:].astype(np.float64))
    calibration = open_data(str(tmp_path / "calib.npy"), inputs=[FEATURES], preprocess=Preprocess())
    warning = overlap_warning(calibration, Shows(opened(tmp_path / "eval.npz", FEATURES)))
    assert warning.startswith("3 samples are in both")


def test_nothing_is_said_where_nothing_is_shared_or_can_be_seen(tmp_path: Path) -> None:
    np.savez(tmp_path / "eval.npz", x=np.zeros((2, 4), np.float32), y=[0, 1])
    np.save(tmp_path / "calib.npy", np.ones((2, 4), np.float32))
    calibration = open_data(str(tmp_path / "calib.npy"), inputs=[FEATURES], preprocess=Preprocess())
    assert overlap_warning(calibration, Shows(opened(tmp_path / "eval.npz", FEATURES))) == ""
    assert overlap_warning(calibration, Hides()) == ""
    assert overlap_warning(None, Hides()) == ""
    assert overlap_warning(calibration, None) == ""
