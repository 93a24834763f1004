"""Where timings of this machine are kept between runs, and how such files are read and written.

A folder stands for the processor, its instruction set, ONNX Runtime's version and the number of threads. Files are
written beside their place and renamed. A disk that refuses costs time in the next run, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from pathlib import Path

from onnxprune.contracts import JsonValue
from onnxprune.runtime.host import host_isa, processor_name, runtime_versions

__all__ = ["machine_key", "read_timings", "write_timings"]


def machine_key(threads: int, *, schema: int) -> str:
    """A name for this machine with this ONNX Runtime and so many threads; `schema` is that of the files."""
    facts = {
        "schema": schema,
        "processor": processor_name(),
        "isa": host_isa().summary,
        "system": platform.system(),
        "onnxruntime": runtime_versions().get("onnxruntime", ""),
        "threads": threads,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def read_timings(path: Path) -> JsonValue:
    """What the file holds; None where there is none, or none that can be read."""
    try:
        content: JsonValue = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content


def write_timings(path: Path, content: JsonValue) -> None:
    """Put `content` into the file at `path`, where the disk allows."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=".partial-", delete=False
        ) as file:
            json.dump(content, file)
        Path(file.name).replace(path)
    except OSError:
        return
