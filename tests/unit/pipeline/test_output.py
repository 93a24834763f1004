"""The output folder: whole or untouched."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from onnxprune.errors import OutputError, UsageError, disk_errors
from onnxprune.pipeline.output import staged_folder, write_text


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_staged_content_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with staged_folder(out) as staging:
        (staging / "onnx").mkdir()
        (staging / "onnx" / "model.onnx").write_bytes(b"new")
        assert not (out / "onnx").exists()
    assert names(out) == ["onnx"]
    assert (out / "onnx" / "model.onnx").read_bytes() == b"new"


def test_staged_folder_replaces_an_earlier_one_whole_and_keeps_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "stale.onnx").write_bytes(b"old")
    (tmp_path / "notes.txt").write_text("mine")
    with staged_folder(tmp_path) as staging:
        (staging / "onnx").mkdir()
        (staging / "onnx" / "model.onnx").write_bytes(b"new")
    assert names(tmp_path) == ["notes.txt", "onnx"]
    assert names(tmp_path / "onnx") == ["model.onnx"]


def write_half(out: Path, error: BaseException) -> None:
    with staged_folder(out) as staging:
        (staging / "onnx").mkdir()
        (staging / "onnx" / "model.onnx").write_bytes(b"half")
        raise error


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_a_block_that_raises_leaves_nothing_behind_and_changes_nothing(tmp_path: Path, error: BaseException) -> None:
    kept = tmp_path / "kept"
    (kept / "onnx").mkdir(parents=True)
    (kept / "onnx" / "model.onnx").write_bytes(b"old")
    for out in (kept, tmp_path / "fresh" / "deep"):
        with pytest.raises(type(error)):
            write_half(out, error)
    assert names(tmp_path) == ["kept"]
    assert (kept / "onnx" / "model.onnx").read_bytes() == b"old"
    assert names(kept) == ["onnx"]


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_an_interrupt_while_moving_into_place_brings_everything_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    for name in ("onnx", "ort-mobile"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_bytes(b"old")
    renames = Path.replace
    done = 0

    def interrupted(self: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done == step + 1:
            raise KeyboardInterrupt
        return renames(self, target)

    def run() -> None:
        with staged_folder(tmp_path) as staging:
            for name in ("onnx", "ort-mobile"):
                (staging / name).mkdir()
                (staging / name / "model").write_bytes(b"new")
            monkeypatch.setattr(Path, "replace", interrupted)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert names(tmp_path) == ["onnx", "ort-mobile"]
    assert [(tmp_path / name / "model").read_bytes() for name in names(tmp_path)] == [b"old", b"old"]


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".onnxprune-partial-dead").mkdir()
    with staged_folder(tmp_path):
        pass
    assert names(tmp_path) == []


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("precious")
    with pytest.raises(UsageError, match="is a file, not a folder"), staged_folder(file):
        pass
    assert file.read_text() == "precious"


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    blocker = tmp_path / "blocker"
    blocker.write_text("")
    with pytest.raises(OutputError, match="Making the output folder"), staged_folder(blocker / "out"):
        pass


def test_full_disk_is_named_with_a_way_out() -> None:
    with pytest.raises(OutputError, match="No space left") as caught, disk_errors("Writing 'x'"):
        raise OSError(errno.ENOSPC, "No space left on device", "x")
    assert "--out" in caught.value.hint


def test_write_text_leaves_the_old_file_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def full(self: Path, text: str, encoding: str) -> int:
        with self.open("w", encoding=encoding) as file:
            file.write(text[:2])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError):
        write_text(path, "new text")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["report.json"]
