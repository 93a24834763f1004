"""Learned rounding: which of its neighbours on the grid each weight becomes, so that the layer's output stays."""

from __future__ import annotations

from onnxprune.passes.adaround.adaround import AdaRoundPass
from onnxprune.passes.adaround.config import AdaRoundConfig

__all__ = ["AdaRoundConfig", "AdaRoundPass"]
