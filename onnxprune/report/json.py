"""Reports as JSON: infinities as strings, paths as text, keys in the order of the types."""

from __future__ import annotations

from pydantic_core import to_json

__all__ = ["to_json_text"]


def to_json_text(report: object) -> str:
    """Any frozen report of `onnxprune.contracts` as indented JSON."""
    return to_json(report, inf_nan_mode="strings", indent=2).decode()
