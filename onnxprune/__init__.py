"""Makes trained models small and fast on phones and small CPUs, and proves what it did.

    import onnxprune

    report = onnxprune.run("model.onnx", passes=["simplify", "prune", "quant"], calibration="images/", out="out")

Importing this package imports nothing heavy; each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxprune.api import apply, build, compare, convert_model, load, run, save
    from onnxprune.contracts import ModelState, RunReport
    from onnxprune.errors import OnnxPruneError

__version__ = "0.1.0"

_PUBLIC = {
    "ModelState": "onnxprune.contracts",
    "OnnxPruneError": "onnxprune.errors",
    "RunReport": "onnxprune.contracts",
    "apply": "onnxprune.api",
    "build": "onnxprune.api",
    "compare": "onnxprune.api",
    "convert_model": "onnxprune.api",
    "load": "onnxprune.api",
    "run": "onnxprune.api",
    "save": "onnxprune.api",
}
__all__ = [
    "ModelState",
    "OnnxPruneError",
    "RunReport",
    "__version__",
    "apply",
    "build",
    "compare",
    "convert_model",
    "load",
    "run",
    "save",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'onnxprune' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
