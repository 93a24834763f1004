"""Calling one of our own functions in a process of its own: for native code that may crash, and for clean figures.

The child reads its job from a folder and writes its answer there, so whatever it prints is free to be captured.
It is killed with everything it started when it runs out of time, on Ctrl-C, and when this process ends in any way.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnxprune import errors
from onnxprune.errors import MissingExtraError, OnnxPruneError

if TYPE_CHECKING:  # a child starts faster without what the contracts import
    from onnxprune.contracts import JsonValue

__all__ = ["ANSWER_FILE", "JOB_FILE", "ChildFailure", "call_in_child", "call_script"]

JOB_FILE = "job.json"
ANSWER_FILE = "answer.json"
LOG_FILE = "log.txt"

_LOG_TAIL_BYTES = 4096
_POLL_S = 0.05
_KILL_GRACE_S = 5.0
_FREQUENT_SIGNALS = {
    "SIGKILL": "was killed by SIGKILL, perhaps for lack of memory",
    "SIGXFSZ": "reached the limit for the size of a file (SIGXFSZ)",
}


class ChildFailure(Exception):  # noqa: N818 - never reaches a user: callers turn it into an error of ours
    """The child ended without an answer; the text says how ("crashed in native code (SIGSEGV)") and its last words."""


def call_in_child(
    function: str,
    arguments: Mapping[str, JsonValue],
    *,
    folder: Path,
    timeout_s: float,
) -> JsonValue:
    """What `function(arguments, folder)` returns when it is called in a fresh Python process.

    Args:
        function: "package.module:name".
        arguments: Plain JSON values.
        folder: An existing folder that is the caller's, for job, answer, log and whatever the function leaves there.
        timeout_s: The child is killed after so many seconds.

    Raises:
        OnnxPruneError: What the function raised, as it raised it.
        ChildFailure: The child crashed, was killed, took too long, or raised anything else.
    """
    return _call(
        [sys.executable, "-P", "-m", "onnxprune.runtime.child_main", str(folder)],
        {"function": function, "arguments": dict(arguments)},
        folder=folder,
        timeout_s=timeout_s,
        environment={**os.environ, "PYTHONPATH": _python_path()},
    )


def call_script(
    python: Path,
    script: str,
    job: Mapping[str, JsonValue],
    *,
    folder: Path,
    timeout_s: float,
) -> JsonValue:
    """What a stand-alone script answers in another Python interpreter, with other packages than ours.

    The script is copied into `folder`, which is also its current folder, and is run with that folder as its argument.
    It reads the job there, writes its answer there ({"value": ...} or {"error": {"type", "message", "hint"}}), and ends
    itself when its standard input does. Nothing of this process's Python reaches it: no PYTHON* variables.

    Args:
        python: The interpreter.
        script: The script's text.
        job: Plain JSON values.
        folder: As for `call_in_child`.
        timeout_s: Likewise.

    Raises:
        ChildFailure: The interpreter can't be started; or as for `call_in_child`.
    """
    path = folder / "script.py"
    path.write_text(script, encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    kept.pop("VIRTUAL_ENV", None)
    return _call(
        [str(python), str(path), str(folder)],
        job,
        folder=folder,
        timeout_s=timeout_s,
        # What a script prints is UTF-8 on every system, and must not be able to end it.
        environment={**kept, "PYTHONIOENCODING": "utf-8:backslashreplace"},
        current_folder=folder,
    )


def _call(
    command: Sequence[str],
    job: Mapping[str, JsonValue],
    *,
    folder: Path,
    timeout_s: float,
    environment: Mapping[str, str],
    current_folder: Path | None = None,
) -> JsonValue:
    (folder / JOB_FILE).write_text(json.dumps(job), encoding="utf-8")
    (folder / ANSWER_FILE).unlink(missing_ok=True)
    with (folder / LOG_FILE).open("wb") as log:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # the child ends itself when this pipe closes, also when this process is killed
                stdout=log,
                stderr=log,
                env=environment,
                cwd=current_folder,
                start_new_session=True,
            )
        except OSError as error:
            raise ChildFailure(f"can't be started: {error.strerror or error}") from error
        try:
            return_code = _wait(process, timeout_s)
        finally:
            _kill_group(process)
    answer = _read_answer(folder)
    if answer is not None and "error" in answer:
        raise _as_error(answer["error"])
    if return_code is None:
        raise ChildFailure(f"did not finish within {timeout_s:g} s and was stopped")
    if return_code != 0 or answer is None:
        without = " without a proper answer" if return_code == 0 else ""
        raise ChildFailure(f"{_ending(return_code)}{without}{_last_words(folder)}")
    return answer["value"]


def _python_path() -> str:
    # The child imports what this process could import, but nothing from the current folder, where a `numpy.py` may lie.
    # Users' functions that are named by module get that folder back when they are loaded (data/user_code.py).
    return os.pathsep.join(entry for entry in sys.path if entry)


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    """The return code, or None when time ran out. Polls, so that Ctrl-C is seen at once on every system."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=_POLL_S)
    return process.poll()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_KILL_GRACE_S)
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _read_answer(folder: Path) -> dict[str, JsonValue] | None:
    try:
        answer = json.loads((folder / ANSWER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) and _is_well_formed(answer) else None


def _is_well_formed(answer: Mapping[str, JsonValue]) -> bool:
    if "error" not in answer:
        return "value" in answer
    record = answer["error"]
    return isinstance(record, dict) and all(isinstance(record.get(key), str) for key in ("type", "message", "hint"))


def _as_error(record: Mapping[str, str]) -> Exception:
    if record["type"] == "":
        return ChildFailure(record["message"])
    error_type = getattr(errors, record["type"], OnnxPruneError)
    if error_type is MissingExtraError or not (  # has another constructor
        isinstance(error_type, type) and issubclass(error_type, OnnxPruneError)
    ):
        error_type = OnnxPruneError
    error: OnnxPruneError = error_type(record["message"], record["hint"])
    return error


def _ending(return_code: int) -> str:
    if return_code >= 0:
        return f"ended with code {return_code}"
    try:
        name = signal.Signals(-return_code).name
    except ValueError:
        return f"was killed by signal {-return_code}"
    return _FREQUENT_SIGNALS.get(name, f"crashed in native code ({name})")


def _last_words(folder: Path) -> str:
    try:
        text = (folder / LOG_FILE).read_bytes()[-_LOG_TAIL_BYTES:].decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"; its last words: {lines[-1]}" if lines else ""
