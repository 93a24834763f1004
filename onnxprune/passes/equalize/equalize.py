"""The pass itself: plan, apply, report."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from onnxprune.contracts import Change, ModelState, Pass, PassContext, PassOutcome, PassReport, Skip
from onnxprune.passes.equalize.apply import apply_sites
from onnxprune.passes.equalize.config import EqualizeConfig
from onnxprune.passes.equalize.decide import decide
from onnxprune.passes.equalize.plan import EqualizePlan
from onnxprune.passes.layerwise.report import gain_notes

__all__ = ["EqualizePass"]


class EqualizePass(Pass[EqualizeConfig, EqualizePlan]):
    """Divide channels of a tensor by factors and multiply the weights behind (Nagel et al. 2019, arXiv:1906.04721).

    1. A layer takes part when its output reaches nothing but layers, through operators that let a positive factor for
       each channel through (Relu, LeakyRelu, PRelu, pooling, zero padding ...).
    2. A Clip from 0 becomes a Relu where calibration data stay below its upper bound; else its layers are left out.
    3. Biases that keep a channel well above zero are absorbed by the layers behind, where nothing is padded.
    4. The float function stays, up to rounding in float32; with 2 and 3, on the calibration data.
    5. With calibration data each way of choosing factors is tried with a trial quantization, and the best on held-out
       samples counts; if none beats the model as it is, nothing is done, and the report says so.
    """

    name: ClassVar[str] = "equalize"
    summary: ClassVar[str] = "gives the channels of a tensor ranges of one size, for int8 to lose less"
    config_type: ClassVar[type[EqualizeConfig]] = EqualizeConfig
    plan_type: ClassVar[type[EqualizePlan]] = EqualizePlan

    @property
    @override
    def uses_calibration(self) -> bool:
        """With data the factors are judged, and more can be done; without, weights alone decide."""
        return True

    @override
    def plan(self, state: ModelState, context: PassContext) -> EqualizePlan:
        """Choose the factors.

        Raises:
            UsageError: A pattern of `exclude` means nothing in the model.
            BadDataError: The calibration data do not fit the model.
        """
        return decide(state.model, self.config, context)

    @override
    def apply(self, state: ModelState, plan: EqualizePlan, context: PassContext) -> PassOutcome:
        """Rescale the weights.

        Raises:
            PassError: The plan was made for another model.
        """
        apply_sites(state.model, plan.sites)
        gained = plan.gain is not None and not plan.is_undone
        tried = ", ".join(f"{name} {found:.1f} dB" for name, found in (plan.tried_db or {}).items())
        report = PassReport(
            pass_id=self.pass_id,
            pass_name=self.name,
            summary=(
                f"{len(plan.sites)} layers equalized with the next ({plan.ranges})"
                + (f": {plan.gain.text}" if plan.gain is not None and gained else "")
            ),
            changes=tuple(
                Change(
                    what=f"equalized with {', '.join(site.consumers)}",
                    where=site.producer,
                    figures={
                        "smallest_factor": min(site.factors),
                        "largest_factor": max(site.factors),
                        "biases_absorbed": sum(number > 0 for number in site.absorbed),
                        "clips_relaxed": len(site.clips),
                    },
                )
                for site in plan.sites
            ),
            skips=tuple(Skip(where=layer, reason=reason) for layer, reason in plan.skipped.items()),
            notes=(
                *gain_notes(
                    plan.gain,
                    is_undone=plan.is_undone,
                    subject="the factors",
                    count=len(plan.sites),
                    skipped=plan.skipped,
                    idle="no factor can go from one layer through to the next",
                ),
                *((f"Tried: {tried}.",) if tried else ()),
            ),
            figures={"layers_equalized": len(plan.sites), **(plan.gain.figures if plan.gain is not None else {})},
        )
        return PassOutcome(state=state, report=report)
