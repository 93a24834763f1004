"""Load time and peak memory of a model file, each time in a fresh process.

Peak resident memory is read from `VmHWM` of /proc/self/status on Linux. `getrusage` would do on macOS only: on Linux
its `ru_maxrss` survives exec, so a child of a large process starts with that process's peak.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxprune.contracts import JsonObject, LoadFigures
from onnxprune.errors import ModelError, OutputError, UsageError
from onnxprune.runtime.artifacts import is_tflite, load_runtime, runner_from_path
from onnxprune.runtime.child import ChildFailure, call_in_child
from onnxprune.runtime.feeds import working_feeds
from onnxprune.runtime.litert import require_litert

__all__ = ["load_in_this_process", "measure_load", "peak_rss_bytes"]


def measure_load(
    path: Path,
    *,
    threads: int = 1,
    custom_op_libraries: Sequence[Path] = (),
    shapes: Mapping[str, Sequence[int]] | None = None,
    repeats: int = 3,
    timeout_s: float = 600.0,
) -> LoadFigures:
    """Load the model file and run it once on random inputs; medians over `repeats` fresh processes.

    Args:
        path: The model (`.onnx`, `.ort`, `.tflite`); its bytes are in the page cache from the second process on.
        threads: Threads of the runtime.
        custom_op_libraries: Shared libraries with custom operators.
        shapes: Input shapes where they are dynamic (see `onnxprune.runtime.feeds`).
        repeats: At least 1.
        timeout_s: For each process.

    Returns:
        `load_time_ms` is the making of the runner alone; `peak_rss_bytes` that of the process after one run;
        `baseline_rss_bytes` its peak before, with Python, NumPy and the runtime imported.

    Raises:
        OutputError: There is no such file.
        MissingExtraError: Its runtime is not installed.
        ModelError: The model can't be loaded or run, or the process crashed.
        UsageError: `repeats` is below 1.
    """
    if repeats < 1:
        raise UsageError(f"Load figures need at least 1 process, not {repeats}.")
    if not path.is_file():
        raise OutputError(f"There is no model file '{path}'.")
    if is_tflite(path):
        require_litert(f"Running '{path.name}'")
    arguments: JsonObject = {
        "path": str(path.resolve()),
        "threads": threads,
        "custom_op_libraries": [str(library.resolve()) for library in custom_op_libraries],
        "shapes": {name: list(shape) for name, shape in (shapes or {}).items()},
    }
    answers = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
            try:
                answers.append(
                    call_in_child(
                        "onnxprune.runtime.memory:load_in_this_process",
                        arguments,
                        folder=Path(folder),
                        timeout_s=timeout_s,
                    )
                )
            except ChildFailure as failure:
                raise ModelError(f"The process that loaded '{path.name}' {failure}.") from failure
    return LoadFigures(
        load_time_ms=statistics.median(answer["load_time_ms"] for answer in answers),
        peak_rss_bytes=int(statistics.median(answer["peak_rss_bytes"] for answer in answers)),
        baseline_rss_bytes=int(statistics.median(answer["baseline_rss_bytes"] for answer in answers)),
    )


def load_in_this_process(arguments: JsonObject, folder: Path) -> JsonObject:  # noqa: ARG001 - as `call_in_child` calls
    """The child's side of `measure_load`."""
    path = Path(arguments["path"])
    load_runtime(path)
    baseline = peak_rss_bytes()
    start = time.perf_counter()
    runner = runner_from_path(
        path,
        threads=arguments["threads"],
        custom_op_libraries=[Path(library) for library in arguments["custom_op_libraries"]],
    )
    load_time_ms = (time.perf_counter() - start) * 1e3
    working_feeds(runner, seed=0, shapes=arguments["shapes"])
    return {
        "load_time_ms": load_time_ms,
        "peak_rss_bytes": peak_rss_bytes(),
        "baseline_rss_bytes": baseline,
    }


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident; 0 where the system doesn't say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB
