"""A first look at a `.tflite` file of unknown origin, in a process that may crash.

LiteRT verifies the flatbuffer, but not all that its operators read: of files with one number changed at random about
one in a hundred ends the process.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from onnxprune.contracts import JsonObject
from onnxprune.errors import ModelError, OutputError
from onnxprune.runtime.child import ChildFailure, call_in_child
from onnxprune.runtime.feeds import working_feeds
from onnxprune.runtime.litert import litert_runner_from_path, require_litert

__all__ = ["check_foreign_file", "load_and_run"]


def check_foreign_file(path: Path, *, timeout_s: float = 600.0) -> None:
    """Nothing happens when the file loads, and runs once on random inputs, in a process of its own.

    Raises:
        OutputError: There is no such file.
        MissingExtraError: LiteRT is not installed.
        ModelError: It can't be loaded or run, or it crashed that process.
    """
    if not path.is_file():
        raise OutputError(f"There is no model file '{path}'.")
    require_litert(f"Running '{path.name}'")
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        try:
            call_in_child(
                "onnxprune.runtime.litert_foreign:load_and_run",
                {"path": str(path.resolve())},
                folder=Path(folder),
                timeout_s=timeout_s,
            )
        except ChildFailure as failure:
            raise ModelError(
                f"'{path.name}' can't be run by LiteRT: the process that tried {failure}.",
                "The file is damaged, or asks for something that LiteRT does not check.",
            ) from failure


def load_and_run(arguments: JsonObject, folder: Path) -> None:  # noqa: ARG001 - as `call_in_child` calls
    """The child's side of `check_foreign_file`."""
    working_feeds(litert_runner_from_path(Path(arguments["path"])), seed=0)
