from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from onnxprune.errors import BadDataError, MissingExtraError, OnnxPruneError
from onnxprune.runtime.child import ChildFailure, call_in_child, call_script

if TYPE_CHECKING:
    from onnxprune.contracts import JsonObject, JsonValue

HERE = "tests.unit.runtime.test_child"
ROOT = str(Path(__file__).parents[3])


@pytest.fixture(autouse=True)
def _children_find_this_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("PYTHONPATH", ROOT)  # for children of the processes that tests start


def add(arguments: JsonObject, folder: Path) -> JsonValue:
    print("noise on stdout")
    (folder / "left.txt").write_text("mine")
    return arguments["a"] + arguments["b"]


def mean_of_numpy(arguments: JsonObject, folder: Path) -> float:
    import numpy as np

    return float(np.mean(arguments["values"]))


def crash(arguments: JsonObject, folder: Path) -> None:
    ctypes.string_at(0)


def hang(arguments: JsonObject, folder: Path) -> None:
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "pids").write_text(f"{os.getpid()} {grandchild.pid}")
    time.sleep(600)


def leave(arguments: JsonObject, folder: Path) -> None:
    os._exit(7)


def raise_ours(arguments: JsonObject, folder: Path) -> None:
    raise BadDataError("The data are bad.", "Get better ones.")


def raise_missing(arguments: JsonObject, folder: Path) -> None:
    raise MissingExtraError(package="torch", extra="torch", needed_for="This")


def raise_foreign(arguments: JsonObject, folder: Path) -> None:
    raise KeyError("lost")


def raise_os_error(arguments: JsonObject, folder: Path) -> None:
    (folder / "missing" / "file").write_text("")


def read_stdin(arguments: JsonObject, folder: Path) -> str:
    return sys.stdin.read()


def call(function: str, folder: Path, timeout_s: float = 60.0, **arguments: JsonValue) -> JsonValue:
    return call_in_child(f"{HERE}:{function}", arguments, folder=folder, timeout_s=timeout_s)


def test_child_answers_and_its_prints_stay_out_of_ours(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("add", tmp_path, a=1, b=2) == 3
    assert (tmp_path / "left.txt").read_text() == "mine"
    assert capfd.readouterr() == ("", "")


def test_child_has_an_empty_stdin(tmp_path: Path) -> None:
    assert call("read_stdin", tmp_path) == ""


@pytest.mark.parametrize("entries", [[], [""]], ids=["installed command", "python -c"])
def test_child_runs_nothing_that_lies_in_the_current_folder(
    entries: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "was_run"
    for name in ("numpy.py", "json.py"):
        (tmp_path / name).write_text(f"open({str(trace)!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*entries, *sys.path])

    assert call("mean_of_numpy", tmp_path, values=[1, 3]) == 2.0
    assert not trace.exists()


def test_crash_in_native_code_is_told_from_its_signal(tmp_path: Path) -> None:
    with pytest.raises(ChildFailure, match=r"^crashed in native code \(SIGSEGV\)"):
        call("crash", tmp_path)


def test_hanging_child_is_killed_with_what_it_started(tmp_path: Path) -> None:
    with pytest.raises(ChildFailure, match="did not finish within 2 s and was stopped"):
        call("hang", tmp_path, timeout_s=2.0)
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        assert_gone(pid)


def assert_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":  # dead, not yet collected by whoever adopted it
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} is still alive")


def start_parent_of_hanging_child(folder: Path) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from pathlib import Path; from onnxprune.runtime.child import call_in_child; "
        f"call_in_child('{HERE}:hang', {{}}, folder=Path(sys.argv[1]), timeout_s=600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(folder)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if (folder / "pids").exists() and (folder / "pids").read_text().count(" "):
            return parent
        time.sleep(0.05)
    parent.kill()
    pytest.fail("the child did not start")


def test_interrupt_kills_the_child_with_what_it_started(tmp_path: Path) -> None:
    parent = start_parent_of_hanging_child(tmp_path)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(timeout=30) != 0
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        assert_gone(pid)


def test_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = start_parent_of_hanging_child(tmp_path)
    parent.kill()
    parent.wait()
    child, grandchild = map(int, (tmp_path / "pids").read_text().split())
    assert_gone(child)
    os.kill(grandchild, signal.SIGKILL)  # only the child itself watches its parent


def test_child_that_leaves_without_an_answer_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ChildFailure, match=r"^ended with code 7"):
        call("leave", tmp_path)


def test_error_of_ours_arrives_as_it_was_raised(tmp_path: Path) -> None:
    with pytest.raises(BadDataError) as caught:
        call("raise_ours", tmp_path)
    assert (caught.value.message, caught.value.hint) == ("The data are bad.", "Get better ones.")


def test_error_with_another_constructor_keeps_its_text(tmp_path: Path) -> None:
    with pytest.raises(OnnxPruneError, match="This needs the package 'torch'"):
        call("raise_missing", tmp_path)


def test_foreign_exception_is_a_failure_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(ChildFailure, match=r"ended with code 1; its last words: KeyError: 'lost'"):
        call("raise_foreign", tmp_path)


def test_refusal_of_the_operating_system_is_a_failure_with_its_text(tmp_path: Path) -> None:
    with pytest.raises(ChildFailure, match=r"failed: .*No such file or directory"):
        call("raise_os_error", tmp_path)


def test_answer_of_an_earlier_call_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    assert call("add", tmp_path, a=1, b=2) == 3
    with pytest.raises(ChildFailure):
        call("leave", tmp_path)


SCRIPT = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
seen = {"job": job, "python": [name for name in os.environ if name.startswith("PYTHONPATH")], "here": os.getcwd()}
(folder / "answer.json").write_text(json.dumps(job.get("answer", {"value": seen})))
print("noise \u2713")
"""


def test_script_runs_in_its_folder_without_anything_of_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", ROOT)
    job = {"number": 3}
    seen = call_script(Path(sys.executable), SCRIPT, job, folder=tmp_path, timeout_s=60)
    assert seen == {"job": job, "python": [], "here": str(tmp_path)}


@pytest.mark.parametrize(
    "answer", [[], {}, {"error": "text"}, {"error": {"type": "", "message": 3, "hint": ""}}], ids=str
)
def test_answer_of_a_script_that_makes_no_sense_is_a_failure(answer: JsonValue, tmp_path: Path) -> None:
    with pytest.raises(ChildFailure, match="ended with code 0 without a proper answer; its last words: noise"):
        call_script(Path(sys.executable), SCRIPT, {"answer": answer}, folder=tmp_path, timeout_s=60)


def test_script_can_raise_errors_of_ours_and_nothing_else_of_that_module(tmp_path: Path) -> None:
    def answer(kind: str) -> JsonObject:
        return {"answer": {"error": {"type": kind, "message": "No.", "hint": ""}}}

    with pytest.raises(BadDataError, match="No"):
        call_script(Path(sys.executable), SCRIPT, answer("BadDataError"), folder=tmp_path, timeout_s=60)
    with pytest.raises(OnnxPruneError, match="No"):
        call_script(Path(sys.executable), SCRIPT, answer("quoted_list"), folder=tmp_path, timeout_s=60)


def test_interpreter_that_is_missing_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ChildFailure, match="can't be started: No such file"):
        call_script(tmp_path / "python", SCRIPT, {}, folder=tmp_path, timeout_s=60)
