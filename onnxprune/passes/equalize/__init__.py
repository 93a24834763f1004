"""Cross-layer equalization: channels of one tensor get ranges of one size, and the function stays."""

from __future__ import annotations

from onnxprune.passes.equalize.config import EqualizeConfig
from onnxprune.passes.equalize.equalize import EqualizePass

__all__ = ["EqualizeConfig", "EqualizePass"]
