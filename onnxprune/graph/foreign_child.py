"""What runs in the child process of a foreign graph tool: `python -m onnxprune.graph.foreign_child FOLDER`.

The folder holds `input.onnx` and `request.json`; `output.onnx` is written there. The process ends with code 0 only
if that file is complete.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import onnx

from onnxprune.graph.limits import BIG_WEIGHTS_BYTES

# Tools import them when they are there; that takes seconds and a gigabyte, and changes what some tools do.
_BLOCKED_PACKAGES = ("torch", "tensorflow", "jax")
_CODE_RESULT_WRONG = 3


def main(folder: Path) -> int:
    """Run the tool that `folder` asks for; the exit code."""
    faulthandler.enable()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for package in _BLOCKED_PACKAGES:
        # None makes `import` fail and `find_spec` find nothing.
        sys.modules[package] = None  # type: ignore[assignment]
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    _limit(request["memory_limit_bytes"])
    module_name, _, name = request["function"].partition(":")
    function = getattr(importlib.import_module(module_name), name)
    result: Any = function(onnx.load(folder / "input.onnx"), **request["arguments"])
    if isinstance(result, tuple):
        result, is_right = result
        if not is_right:
            print("the tool's own check says that its result is wrong", file=sys.stderr)  # noqa: T201
            return _CODE_RESULT_WRONG
    if not isinstance(result, onnx.ModelProto):
        print(f"the tool returned {type(result).__name__}, not a model", file=sys.stderr)  # noqa: T201
        return _CODE_RESULT_WRONG
    is_big = sum(len(tensor.raw_data) for tensor in result.graph.initializer) > BIG_WEIGHTS_BYTES
    onnx.save(result, folder / "output.onnx", save_as_external_data=is_big, location="output.onnx.data")
    return 0


def _end_with_parent() -> None:
    # Not through sys.stdin, whose lock the interpreter wants at its end. Nothing is ever written to the pipe.
    os.read(0, 1)
    os._exit(1)


def _limit(memory_limit_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    # Writable private memory, not address space: runtimes map far more than they use.
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = memory_limit_bytes if hard == resource.RLIM_INFINITY else min(memory_limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    # A crash is expected here; gigabytes of core dumps are not.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    code = 1
    try:
        code = main(Path(sys.argv[1]))
    except BaseException:  # noqa: BLE001 - a tool raises what it likes; the parent process reads the traceback
        traceback.print_exc()
    sys.stderr.flush()
    # Without the interpreter's own end: destructors of native libraries may crash after the work is done.
    os._exit(code)
