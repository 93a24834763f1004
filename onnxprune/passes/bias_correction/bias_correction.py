"""The pass itself: plan, apply, report."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
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
from onnxprune.passes.bias_correction.config import BiasCorrectionConfig
from onnxprune.passes.bias_correction.decide import decide
from onnxprune.passes.bias_correction.estimate import rms
from onnxprune.passes.bias_correction.plan import BiasCorrectionPlan
from onnxprune.passes.layerwise.layers import add_to_bias
from onnxprune.passes.layerwise.report import gain_notes, require_static_plan

__all__ = ["BiasCorrectionPass"]


class BiasCorrectionPass(Pass[BiasCorrectionConfig, BiasCorrectionPlan]):
    """Take the mean error of each output channel out of the bias (Nagel et al. 2019, arXiv:1906.04721).

    1. Layers are those that the quantization plan makes integer. A Conv, ConvTranspose or Gemm without a bias gets one;
       of a MatMul the constant of the Add behind it is corrected, where there is one.
    2. With `method = "data"` layers are corrected in graph order, each with all layers before it corrected.
    3. Corrections are shrunk as far as they may be chance, and left out where the bias would not fit into int32.
    4. The outputs' signal-to-noise ratio on held-out samples decides: if all corrections together make it lower, there
       are none, and the report says so.

    Scales stay as they are, so the quantization plan stays right.
    """

    name: ClassVar[str] = "bias-correction"
    summary: ClassVar[str] = "takes the mean error that int8 leaves in each channel out of the biases"
    config_type: ClassVar[type[BiasCorrectionConfig]] = BiasCorrectionConfig
    plan_type: ClassVar[type[BiasCorrectionPlan]] = BiasCorrectionPlan
    keeps_quantization: ClassVar[bool] = True
    needs_quantization: ClassVar[bool] = True

    @property
    @override
    def requirements(self) -> frozenset[Requirement]:
        """Calibration data for `method = "data"`; the others do without."""
        return frozenset({Requirement.CALIBRATION}) if self.config.method == "data" else frozenset()

    @property
    @override
    def uses_calibration(self) -> bool:
        """The analytic method takes means from the data where there are some, and judges its result with them."""
        return True

    @override
    def plan(self, state: ModelState, context: PassContext) -> BiasCorrectionPlan:
        """Find the corrections.

        Raises:
            PreconditionError: No static quantization plan stands before this pass.
            UsageError: A pattern of `exclude` means nothing in the model.
            BadDataError: The calibration data do not fit the model.
        """
        return decide(state.model, require_static_plan(state, self.pass_id), self.config, context)

    @override
    def apply(self, state: ModelState, plan: BiasCorrectionPlan, context: PassContext) -> PassOutcome:
        """Correct the biases.

        Raises:
            PassError: The plan was made for another model.
        """
        for layer in plan.corrections:
            add_to_bias(state.model, layer.place, np.asarray(layer.correction))
        subject = "the corrections"
        report = PassReport(
            pass_id=self.pass_id,
            pass_name=self.name,
            summary=(
                f"{len(plan.corrections)} biases corrected ({plan.method})"
                + (f": {plan.gain.text}" if plan.gain is not None and not plan.is_undone else "")
            ),
            changes=tuple(
                Change(
                    what="bias corrected",
                    where=layer.layer,
                    figures={"mean_error": layer.mean_error, "correction": rms(layer.correction)},
                )
                for layer in plan.corrections
            ),
            skips=tuple(Skip(where=layer, reason=reason) for layer, reason in plan.skipped.items()),
            notes=gain_notes(
                plan.gain,
                is_undone=plan.is_undone,
                subject=subject,
                count=len(plan.corrections),
                skipped=plan.skipped,
                idle="no integer layer has an error that a bias could take out",
            ),
            figures={"biases_corrected": len(plan.corrections), **(plan.gain.figures if plan.gain is not None else {})},
        )
        return PassOutcome(state=state, report=report)
