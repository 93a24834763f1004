"""The pass itself: plan, apply, report."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from onnxprune.contracts import ModelState, Pass, PassContext, PassOutcome
from onnxprune.passes.sparsify.apply import apply_plan
from onnxprune.passes.sparsify.config import SparsifyConfig
from onnxprune.passes.sparsify.decide import decide
from onnxprune.passes.sparsify.plan import SparsifyPlan
from onnxprune.passes.sparsify.report import sparsify_report

__all__ = ["SparsifyPass"]


class SparsifyPass(Pass[SparsifyConfig, SparsifyPlan]):
    """Zero the weights of smallest magnitude.

    1. Weights are the constant weight inputs of convolutions, matrix products and recurrences, in subgraphs too; never
       biases or normalization parameters, nor a constant that something else reads as well.
    2. Exactly `round(sparsity * units)` units are zero afterwards, over all tensors that are ranked together; n:m and
       edge blocks may have fewer units to choose from. Units that are zero already count.
    3. Ties go by position: first the tensors in graph order, then the index. So the same plan comes out everywhere.
    4. Levels nest: what a lower sparsity zeroes, a higher one zeroes too, with all else equal.
    5. Biases are not touched: a unit of zeros still gives its bias.
    """

    name: ClassVar[str] = "sparsify"
    summary: ClassVar[str] = "sets the weights of smallest magnitude to zero"
    config_type: ClassVar[type[SparsifyConfig]] = SparsifyConfig
    plan_type: ClassVar[type[SparsifyPlan]] = SparsifyPlan

    @override
    def plan(self, state: ModelState, context: PassContext) -> SparsifyPlan:
        """Thresholds for every weight; reads all weights twice, a window at a time."""
        return decide(state.model, self.config, context.iteration)

    @override
    def apply(self, state: ModelState, plan: SparsifyPlan, context: PassContext) -> PassOutcome:
        """Zero the weights; those of large models when they are written or read."""
        sites = apply_plan(state.model, plan)
        report = sparsify_report(plan, sites, pass_id=self.pass_id, pass_name=self.name)
        return PassOutcome(state=state, report=report)
