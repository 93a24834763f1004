"""The pass itself: plan, apply, report."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from onnxprune.contracts import (
    Change,
    ModelState,
    Pass,
    PassContext,
    PassOutcome,
    PassReport,
    Requirement,
    Skip,
)
from onnxprune.passes.layerwise.report import gain_notes
from onnxprune.passes.smoothquant.apply import apply_groups
from onnxprune.passes.smoothquant.config import SmoothQuantConfig
from onnxprune.passes.smoothquant.decide import decide
from onnxprune.passes.smoothquant.plan import SmoothQuantPlan

__all__ = ["SmoothQuantPass"]


class SmoothQuantPass(Pass[SmoothQuantConfig, SmoothQuantPlan]):
    """Divide outlying channels of activations, multiply the weights that read them (Xiao et al., arXiv:2211.10438).

    1. A group is all MatMul and Gemm layers that read one tensor, if nothing else reads it.
    2. The division is folded into what makes the tensor, exactly: a LayerNormalization or RMSNormalization, a Mul by a
       constant (decomposed norms), a layer, one side of a gated product. Where there is no such place the group is left
       out, or gets a Mul with `insert_mul`.
    3. With `alpha = "auto"` each group takes the alpha that makes the error of its outputs smallest, or none.
    4. The float function stays, up to rounding in float32.
    5. A trial quantization judges the result on held-out samples; if it is no better, nothing is done, and the report
       says so.
    """

    name: ClassVar[str] = "smoothquant"
    summary: ClassVar[str] = "moves outlying channels of activations into weights, for int8 transformers"
    config_type: ClassVar[type[SmoothQuantConfig]] = SmoothQuantConfig
    plan_type: ClassVar[type[SmoothQuantPlan]] = SmoothQuantPlan

    @property
    @override
    def requirements(self) -> frozenset[Requirement]:
        """Calibration data, always."""
        return frozenset({Requirement.CALIBRATION})

    @override
    def plan(self, state: ModelState, context: PassContext) -> SmoothQuantPlan:
        """Choose the factors.

        Raises:
            PreconditionError: There are no calibration data.
            UsageError: A pattern of `exclude` means nothing in the model.
            BadDataError: The calibration data do not fit the model.
        """
        return decide(state.model, self.config, context)

    @override
    def apply(self, state: ModelState, plan: SmoothQuantPlan, context: PassContext) -> PassOutcome:
        """Divide and multiply.

        Raises:
            PassError: The plan was made for another model.
        """
        apply_groups(state.model, plan.groups)
        gained = plan.gain is not None and not plan.is_undone
        report = PassReport(
            pass_id=self.pass_id,
            pass_name=self.name,
            summary=(
                f"{len(plan.groups)} tensors smoothed"
                + (f": {plan.gain.text}" if plan.gain is not None and gained else "")
            ),
            changes=tuple(
                Change(
                    what=f"smoothed before {', '.join(group.layers)}" + ("" if group.folds else ", with a Mul"),
                    where=group.tensor,
                    figures={"alpha": group.alpha, "error_ratio": group.error_ratio},
                )
                for group in plan.groups
            ),
            skips=tuple(Skip(where=layer, reason=reason) for layer, reason in plan.skipped.items()),
            notes=gain_notes(
                plan.gain,
                is_undone=plan.is_undone,
                subject="the factors",
                count=len(plan.groups),
                skipped=plan.skipped,
                idle="no layer reads a tensor that could be smoothed",
            ),
            figures={"tensors_smoothed": len(plan.groups), **(plan.gain.figures if plan.gain is not None else {})},
        )
        return PassOutcome(state=state, report=report)
