"""Runs every benchmark of this folder in turn and prints what each prints (an hour or so on two cores)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NOT_BENCHMARKS = {"run.py", "networks.py", "process_figures.py"}


def main() -> None:
    failed = []
    for path in sorted(HERE.glob("*.py")):
        if path.name in NOT_BENCHMARKS:
            continue
        print(f"\n== {path.stem}", flush=True)
        if subprocess.run([sys.executable, path.name], cwd=HERE, check=False).returncode:
            failed.append(path.name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
