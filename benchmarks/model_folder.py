"""What the benchmarks over a folder of models share: each model in a process of its own, fed random numbers."""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onnxprune.contracts import Batch, Runner
from onnxprune.runtime.feeds import working_feeds

LEAST_RATIO = 0.98
"""A model counts as slower when the interval of float over int8 lies wholly below this."""

Found = dict[str, Any]


class RandomBatches:
    """A `CalibrationSource` of seeded random numbers that the model accepts."""

    content_hash = "seeded"

    def __init__(self, runner: Runner, count: int) -> None:
        self.batches = [working_feeds(runner, seed=seed) for seed in range(count)]
        self.num_samples = count

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def folder_arguments(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark over a folder takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="*", help="models whose name matches this pattern")
    parser.add_argument("--limit", type=int, default=None, help="the first so many models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="time for the timed runs of one comparison")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser


def model_paths(options: argparse.Namespace) -> list[Path]:
    """The models that were asked for, by name."""
    paths = sorted(path for path in options.folder.glob("*.onnx") if fnmatch.fnmatch(path.stem, options.only))
    return paths[: options.limit]


def measured_in_a_process(
    script: str, path: Path, options: argparse.Namespace, more: Sequence[str], *, limit_s: float
) -> Found:
    """What `script --one` prints as JSON about one model; "error" instead where it fails."""
    command = [sys.executable, script, str(path), "--one", "--threads", str(options.threads)]
    command += ["--seconds", str(options.seconds), *more]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"name": path.stem, "error": f"took more than {limit_s:g} s"}
    if done.returncode:
        return {"name": path.stem, "error": (done.stderr.strip().splitlines() or ["died"])[-1][:200]}
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


def slower_models(all_found: Sequence[Found]) -> str:
    """A line that names the models that are slower in int8."""
    slower = [found["name"] for found in all_found if found["high"] < LEAST_RATIO]
    return f"slower than float (interval wholly below {LEAST_RATIO}): {', '.join(slower) or 'none'}"
