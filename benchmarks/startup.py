"""Start-up: `onnxprune --help` (goal: under 0.3 s) and `import onnxprune` (goal: under 0.1 s), medians of cold starts.

The time of an empty interpreter is printed beside them: it is in both figures and nothing here can shorten it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 15
COMMANDS = {
    "empty interpreter": [sys.executable, "-c", "pass"],
    "import onnxprune": [sys.executable, "-c", "import onnxprune"],
    "onnxprune --help": [str(Path(sys.executable).with_name("onnxprune")), "--help"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    timings: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        seconds(command)  # fill the page cache and the byte-code cache
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            timings[name].append(seconds(command))
    goals = {"import onnxprune": 0.1, "onnxprune --help": 0.3}
    for name, values in timings.items():
        goal = f" ({statistics.median(values) / goals[name]:.2f} of the goal)" if name in goals else ""
        print(f"{name:20} {statistics.median(values):.3f} s{goal}")


if __name__ == "__main__":
    main()
