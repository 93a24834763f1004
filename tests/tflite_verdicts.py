"""What becomes of the official one-node cases, found out in processes of their own: LiteRT aborts on some graphs.

Run as a script, it reads pickled cases (collecting them takes seconds, and once is enough) from its input and prints
a line of JSON before and behind each.
"""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

PASSED, REFUSED = "passed", "refused"

_REPOSITORY = Path(__file__).resolve().parent.parent
_TIMEOUT_S = 280


def verdicts(names: Sequence[str]) -> dict[str, str]:
    """Name of each case -> "passed", "refused: reason", "crashed (signal)", or what was wrong."""
    from tests.tflite_cases import official_cases

    cases = {case.name: case for case in official_cases()}
    found: dict[str, str] = {}
    while len(found) < len(names):
        left = [cases[name] for name in names if name not in found]
        child = subprocess.run(
            [sys.executable, "-m", "tests.tflite_verdicts"],
            input=pickle.dumps(left),
            capture_output=True,
            cwd=_REPOSITORY,
            timeout=_TIMEOUT_S,
            check=False,
        )
        lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith(b'["')]
        found.update((name, verdict) for name, verdict in lines if verdict)
        if child.returncode:
            begun = [name for name, verdict in lines if not verdict and name not in found]
            if not begun:
                raise AssertionError(
                    f"the child ended with {child.returncode} before any case:\n{child.stderr[-2000:].decode()}"
                )
            found[begun[-1]] = f"crashed ({signal.Signals(-child.returncode).name if child.returncode < 0 else 'exit'})"
    return found


def main() -> None:
    """The verdicts of the cases in the input, on stdout."""
    from onnxprune.errors import OnnxPruneError
    from tests.tflite_cases import assert_agrees, run_case

    warnings.simplefilter("ignore")
    for case in pickle.load(sys.stdin.buffer):
        say(case.name, "")
        try:
            assert_agrees(case, run_case(case))
        except OnnxPruneError as error:
            say(case.name, f"{REFUSED}: {error.message}")
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is this case's verdict
            say(case.name, f"{type(error).__name__}: {str(error).strip()[:400]}")
        else:
            say(case.name, PASSED)


def say(name: str, verdict: str) -> None:
    """One line; "" says that the case begins."""
    print(json.dumps([name, verdict]), flush=True)


if __name__ == "__main__":
    main()
