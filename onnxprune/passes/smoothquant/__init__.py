"""SmoothQuant: outlying channels of activations are divided, and the weights that read them multiplied."""

from __future__ import annotations

from onnxprune.passes.smoothquant.config import SmoothQuantConfig
from onnxprune.passes.smoothquant.smoothquant import SmoothQuantPass

__all__ = ["SmoothQuantConfig", "SmoothQuantPass"]
