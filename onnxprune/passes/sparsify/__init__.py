"""Pass `sparsify`: the weights of smallest magnitude become zero; shapes, sizes and operators stay as they are."""

from __future__ import annotations

from onnxprune.passes.sparsify.config import ScopeRule, SparsifyConfig
from onnxprune.passes.sparsify.plan import SparsifyPlan, TensorPlan
from onnxprune.passes.sparsify.sparsify import SparsifyPass

__all__ = ["ScopeRule", "SparsifyConfig", "SparsifyPass", "SparsifyPlan", "TensorPlan"]
