"""How each ONNX operator is emitted: one small function an operator, in files by family.

`TFLITE` is complete once `load_emitters` ran.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from onnxprune.targets.tflite.ops.table import TFLITE

__all__ = ["TFLITE", "exclusions", "load_emitters"]

FAMILIES = (
    "activations",
    "arithmetic",
    "attention",
    "bits",
    "blocks",
    "casting",
    "comparison",
    "contraction",
    "contrib",
    "control",
    "convolution",
    "deformable",
    "einsum",
    "filtering",
    "generation",
    "impossible",
    "indexing",
    "losses",
    "mathematics",
    "ngrams",
    "normalization",
    "padding",
    "pooling",
    "powers",
    "quantization",
    "recurrent",
    "reduction",
    "resizing",
    "sampling",
    "scattering",
    "selection",
    "shaping",
    "signal",
    "transposed_convolution",
    "unpooling",
)


def load_emitters() -> None:
    """Import all families."""
    for family in FAMILIES:
        _module(family)


def exclusions() -> dict[str, str]:
    """Official cases of the `onnx` package that can't be expressed, by a pattern of their names -> the fact.

    Each family states its own, as `EXCLUDED`.
    """
    return {pattern: fact for family in FAMILIES for pattern, fact in getattr(_module(family), "EXCLUDED", {}).items()}


def _module(family: str) -> ModuleType:
    return importlib.import_module(f"onnxprune.targets.tflite.ops.{family}")
