"""Time and peak memory of a command, children counted in."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

SAMPLE_INTERVAL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFigures:
    """`peak_rss_bytes` is of the started process; `peak_tree_rss_bytes` the largest sum with its children."""

    wall_s: float
    peak_rss_bytes: int
    peak_tree_rss_bytes: int


def measure_command(command: Sequence[str]) -> ProcessFigures:
    """Run `command`, which must succeed; its stdout is dropped, its stderr shown."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        peak = peak_tree = 0
        while process.poll() is None:
            try:
                own = watched.memory_info().rss
                children = sum(child.memory_info().rss for child in watched.children(recursive=True))
            except psutil.Error:
                continue
            peak, peak_tree = max(peak, own), max(peak_tree, own + children)
            time.sleep(SAMPLE_INTERVAL_S)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return ProcessFigures(wall_s=time.perf_counter() - start, peak_rss_bytes=peak, peak_tree_rss_bytes=peak_tree)
