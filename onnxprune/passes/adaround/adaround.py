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
from onnxprune.passes.adaround.apply import apply_layers
from onnxprune.passes.adaround.config import AdaRoundConfig
from onnxprune.passes.adaround.decide import decide
from onnxprune.passes.adaround.plan import AdaRoundPlan
from onnxprune.passes.layerwise.report import gain_notes, require_static_plan

__all__ = ["AdaRoundPass"]

_FEWER_BITS = (
    "The integers hold in every spelling but that of x86 without VNNI, which rounds those channels again, to nearest, "
    "whose scales it widens."
)


class AdaRoundPass(Pass[AdaRoundConfig, AdaRoundPlan]):
    """Round each weight so that its layer's output stays, instead of to nearest; no labels, no training of the model.

    1. Layers are those that the quantization plan makes integer, in graph order: each sees the input that the rounded
       layers before it make, and is to give what the float layer gives for the float input (Nagel et al. 2020).
    2. "gptq": several targets, from the float weight to what repeats the float output best, are rounded column by
       column (Frantar et al. 2023) and refined by coordinate descent. "adaround": up or down is learned.
    3. Of a layer's candidates, rounding to nearest among them, the best on rows that none was fitted to counts.
    4. With `correct_bias` the mean of each output is left to the bias, which follows.
    5. The outputs' signal-to-noise ratio on held-out samples decides: if all layers together make it lower, every
       weight stays as it was, and the report says so.

    A rounded weight is stored as exactly integer times scale, so that the plan's scales give that integer everywhere.
    """

    name: ClassVar[str] = "adaround"
    summary: ClassVar[str] = "rounds int8 weights so that each layer's output stays, instead of to nearest"
    config_type: ClassVar[type[AdaRoundConfig]] = AdaRoundConfig
    plan_type: ClassVar[type[AdaRoundPlan]] = AdaRoundPlan
    keeps_quantization: ClassVar[bool] = True
    needs_quantization: ClassVar[bool] = True

    @property
    @override
    def requirements(self) -> frozenset[Requirement]:
        """Calibration data, always."""
        return frozenset({Requirement.CALIBRATION})

    @override
    def plan(self, state: ModelState, context: PassContext) -> AdaRoundPlan:
        """Find the integers.

        Raises:
            PreconditionError: No static quantization plan stands before this pass, or there are no calibration data.
            UsageError: A pattern of `exclude` means nothing in the model.
            BadDataError: The calibration data do not fit the model.
        """
        return decide(state.model, require_static_plan(state, self.pass_id), self.config, context)

    @override
    def apply(self, state: ModelState, plan: AdaRoundPlan, context: PassContext) -> PassOutcome:
        """Round the weights.

        Raises:
            PreconditionError: No static quantization plan stands before this pass.
            PassError: The plan was made for another model.
        """
        apply_layers(state.model, plan.layers, require_static_plan(state, self.pass_id))
        gained = plan.gain is not None and not plan.is_undone
        report = PassReport(
            pass_id=self.pass_id,
            pass_name=self.name,
            summary=(
                f"{len(plan.layers)} weights rounded ({plan.method})"
                + (f": {plan.gain.text}" if plan.gain is not None and gained else "")
            ),
            changes=tuple(
                Change(
                    what=f"rounded ({layer.variant})",
                    where=layer.weight,
                    figures={
                        "integers_changed": layer.changed,
                        "snr_nearest_db": layer.snr_nearest_db,
                        "snr_db": layer.snr_db,
                    },
                )
                for layer in plan.layers
            ),
            skips=tuple(Skip(where=layer, reason=reason) for layer, reason in plan.skipped.items()),
            notes=(
                *gain_notes(
                    plan.gain,
                    is_undone=plan.is_undone,
                    subject="the roundings",
                    count=len(plan.layers),
                    skipped=plan.skipped,
                    idle="no integer layer with a weight is left",
                ),
                *((_FEWER_BITS,) if plan.layers else ()),
            ),
            figures={
                "weights_rounded": len(plan.layers),
                "integers_changed": sum(layer.changed for layer in plan.layers),
                **(plan.gain.figures if plan.gain is not None else {}),
            },
        )
        return PassOutcome(state=state, report=report)
