"""The output folder: written beside itself, moved into place at the end, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onnxprune.errors import UsageError, disk_errors

__all__ = ["staged_folder", "write_text"]

STAGING_PREFIX = ".onnxprune-partial-"


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """A fresh folder whose content replaces that of `out` when the block ends well.

    What stands in `out` under other names stays. When the block raises, nothing in `out` has changed, and a folder
    that had to be made for it is gone again.

    Raises:
        UsageError: `out` is a file.
        OutputError: `out` can't be made or written to, or the disk is full.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"The output '{out}' is a file, not a folder.", "Name a folder with --out.")
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    with disk_errors(f"Making the output folder '{out}'"):
        out.mkdir(parents=True, exist_ok=True)
        for leftover in out.glob(f"{STAGING_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=out))
    try:
        yield staging
        with disk_errors(f"Writing to '{out}'"):
            _move_into_place(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def _move_into_place(staging: Path, out: Path) -> None:
    """Move everything of `staging` to `out`, or, when anything interrupts that, leave `out` as it was."""
    aside = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=out))
    begun: list[str] = []
    try:
        for name in sorted(item.name for item in staging.iterdir()):
            begun.append(name)
            # A folder can't be renamed over one that has content: what stands there goes aside first.
            if os.path.lexists(out / name):
                (out / name).replace(aside / name)
            (staging / name).replace(out / name)
    except BaseException:
        for name in reversed(begun):
            if os.path.lexists(out / name) and not os.path.lexists(staging / name):
                (out / name).replace(staging / name)
            if os.path.lexists(aside / name):
                (aside / name).replace(out / name)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 under a temporary name, then rename: the file is whole or not there."""
    with disk_errors(f"Writing '{path}'"):
        temporary = path.with_name(f".{path.name}.partial")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
