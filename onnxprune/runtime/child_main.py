"""The child of `onnxprune.runtime.child`: `python -m onnxprune.runtime.child_main FOLDER`."""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from onnxprune.errors import OnnxPruneError
from onnxprune.runtime.child import ANSWER_FILE, JOB_FILE

if TYPE_CHECKING:
    from onnxprune.contracts import JsonValue

__all__ = ["main"]


def main(folder: Path) -> int:
    """Do the job in `folder` and write the answer there; 1 when the answer is an error."""
    _end_with_parent()
    job = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
    module_name, _, function_name = job["function"].partition(":")
    try:
        value = getattr(importlib.import_module(module_name), function_name)(job["arguments"], folder)
    except OnnxPruneError as error:
        _answer(folder, {"error": {"type": type(error).__name__, "message": error.message, "hint": error.hint}})
        return 1
    except (MemoryError, OSError) as error:
        # Type "" stands for what is no error of ours. Anything else is a bug: its traceback goes to the log.
        text = f"ran out of memory ({error})" if isinstance(error, MemoryError) else f"failed: {error}"
        _answer(folder, {"error": {"type": "", "message": text, "hint": ""}})
        return 1
    _answer(folder, {"value": value})
    return 0


def _answer(folder: Path, answer: JsonValue) -> None:
    partial = folder / f"{ANSWER_FILE}.partial"
    partial.write_text(json.dumps(answer), encoding="utf-8")
    partial.replace(folder / ANSWER_FILE)


def _end_with_parent() -> None:
    """Watch the pipe that only the parent holds open, and put an empty stdin in its place."""
    pipe = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)

    def wait_for_end() -> None:
        while os.read(pipe, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads that the called code left running must not keep a process alive whose answer is written.
    os._exit(code)
