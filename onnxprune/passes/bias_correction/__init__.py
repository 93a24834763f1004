"""Bias correction: the mean error that rounding leaves in each output channel is taken out of the bias."""

from __future__ import annotations

from onnxprune.passes.bias_correction.bias_correction import BiasCorrectionPass
from onnxprune.passes.bias_correction.config import BiasCorrectionConfig

__all__ = ["BiasCorrectionConfig", "BiasCorrectionPass"]
