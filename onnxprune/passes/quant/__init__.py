"""Static int8 quantization: calibration data in, one quantization plan for all targets out."""

from __future__ import annotations

from onnxprune.passes.quant.quant_pass import QuantConfig, QuantPass

__all__ = ["QuantConfig", "QuantPass"]
