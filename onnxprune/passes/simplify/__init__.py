"""Pass `simplify`: fewer nodes that compute the same outputs."""

from __future__ import annotations

from onnxprune.passes.simplify.config import SimplifyConfig, SimplifyPlan
from onnxprune.passes.simplify.simplify import SimplifyPass

__all__ = ["SimplifyConfig", "SimplifyPass", "SimplifyPlan"]
