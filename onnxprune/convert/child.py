"""Running a source's own code, and the converters that go with it, in a process of their own.

PyTorch, TensorFlow and tf2onnx can abort in native code, hang, exhaust memory and block Ctrl-C, and a factory is the
user's code.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path

from onnxprune.contracts import JsonObject, JsonValue
from onnxprune.errors import ModelError
from onnxprune.runtime.child import ChildFailure, call_in_child

__all__ = ["run_converter"]


def run_converter(
    function: str,
    arguments: Mapping[str, JsonValue],
    *,
    folder: Path,
    subject: str,
    timeout_s: float,
    memory_limit_bytes: int | None,
) -> None:
    """Call `function(arguments, folder)` in a child process, and return when it has ended well.

    Args:
        function: "package.module:name".
        arguments: Plain JSON values.
        folder: An empty folder of the caller's, where the function leaves its result.
        subject: What is converted, for messages: "Source 'net.h5'".
        timeout_s: The child is killed after so many seconds.
        memory_limit_bytes: Memory that it may ask for; None: this machine's.

    Raises:
        OnnxPruneError: What the function raised, as it raised it.
        ModelError: The child died, ran out of memory or took too long.
    """
    job = {"function": function, "arguments": dict(arguments), "memory_limit_bytes": memory_limit_bytes}
    try:
        call_in_child(f"{__name__}:run_limited", job, folder=folder, timeout_s=timeout_s)
    except ChildFailure as error:
        raise ModelError(
            f"{subject}: the converter {error}.",
            "It runs in a process of its own, so nothing else is affected; a larger machine or a smaller model may do.",
        ) from error


def run_limited(job: JsonObject, folder: Path) -> None:
    """Limit this process's memory, then do the job (runs in the child process)."""
    _limit_memory(job["memory_limit_bytes"])
    module_name, _, function_name = job["function"].partition(":")
    getattr(importlib.import_module(module_name), function_name)(job["arguments"], folder)


def _limit_memory(limit_bytes: int | None) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    if limit_bytes is None:
        limit_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Writable private memory, not address space: TensorFlow and PyTorch map far more than they use.
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
