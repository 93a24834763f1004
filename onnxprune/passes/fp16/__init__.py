"""Pass `fp16`: weights, or the arithmetic too, in half precision."""

from __future__ import annotations

from onnxprune.passes.fp16.fp16 import Fp16Pass
from onnxprune.passes.fp16.plan import Fp16Config, Fp16Plan, RoundedTensor

__all__ = ["Fp16Config", "Fp16Pass", "Fp16Plan", "RoundedTensor"]
