"""Two passes of a third party for blocks that are repeated: one recovers outputs, one fails when it is told to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxprune.contracts import (
    CanonicalModel,
    ModelState,
    Pass,
    PassConfig,
    PassContext,
    PassOutcome,
    PassReport,
    Requirement,
)
from onnxprune.graph.weights import replace_weight
from onnxprune.runtime.sessions import ort_runner_from_model


class RefitConfig(PassConfig):
    """Nothing to choose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitPlan:
    """The last layer's new weights (outputs, inputs) and biases; small enough to be written down."""

    weight: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]
    error: float


class RefitPass(Pass[RefitConfig, RefitPlan]):
    """Fits the last Gemm by least squares to what the model gave before the block, on the calibration data."""

    name: ClassVar[str] = "refit"
    summary: ClassVar[str] = "fits the last Gemm to the outputs before the block"
    config_type: ClassVar[type[RefitConfig]] = RefitConfig
    plan_type: ClassVar[type[RefitPlan]] = RefitPlan

    @property
    def requirements(self) -> frozenset[Requirement]:
        return frozenset({Requirement.CALIBRATION})

    def plan(self, state: ModelState, context: PassContext) -> RefitPlan:
        assert context.iteration is not None
        assert context.calibration is not None
        wanted, features = [], []
        teacher = ort_runner_from_model(context.iteration.original.model)
        student = ort_runner_from_model(with_features(state.model))
        for batch in context.calibration:
            wanted.append(teacher.run(batch)["scores"])
            features.append(student.run(batch)["features"])
        inputs = np.concatenate(features).astype(np.float64)
        inputs = np.hstack([inputs, np.ones((len(inputs), 1))])
        outputs = np.concatenate(wanted)
        # The few samples don't determine all weights: a little ridge takes the smallest that fit.
        solution = np.linalg.solve(inputs.T @ inputs + 1e-3 * np.eye(inputs.shape[1]), inputs.T @ outputs)
        return RefitPlan(
            weight=tuple(tuple(row) for row in solution[:-1].T.tolist()),
            bias=tuple(solution[-1].tolist()),
            error=float(np.abs(inputs @ solution - outputs).max()),
        )

    def apply(self, state: ModelState, plan: RefitPlan, context: PassContext) -> PassOutcome:
        weights = state.model.graph.initializers
        replace_weight(weights["fc.weight"], np.array(plan.weight, dtype=np.float32))
        replace_weight(weights["fc.bias"], np.array(plan.bias, dtype=np.float32))
        report = PassReport(
            pass_id=self.pass_id, pass_name=self.name, summary="refitted", figures={"error": plan.error}
        )
        return PassOutcome(state=state, report=report)


def with_features(model: CanonicalModel) -> CanonicalModel:
    """`model` with what goes into its last Gemm as a further output "features"."""
    copy = model.clone()
    (gemm,) = [node for node in copy.graph if node.op_type == "Gemm"]
    features = ir.val("features", dtype=ir.DataType.FLOAT)
    copy.graph.append(ir.node("Identity", [gemm.inputs[0]], outputs=[features]))
    copy.graph.outputs.append(features)
    return CanonicalModel(copy)


class StumbleConfig(PassConfig):
    """`stone` is a file: while it exists, the third time around fails."""

    stone: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StumblePlan:
    """Nothing is decided."""


class StumblePass(Pass[StumbleConfig, StumblePlan]):
    """Does nothing, or fails."""

    name: ClassVar[str] = "stumble"
    summary: ClassVar[str] = "fails where a stone lies"
    config_type: ClassVar[type[StumbleConfig]] = StumbleConfig
    plan_type: ClassVar[type[StumblePlan]] = StumblePlan

    def plan(self, state: ModelState, context: PassContext) -> StumblePlan:
        if context.iteration is not None and context.iteration.number == 3 and Path(self.config.stone).exists():
            raise RuntimeError("fell over the stone")
        return StumblePlan()

    def apply(self, state: ModelState, plan: StumblePlan, context: PassContext) -> PassOutcome:
        return PassOutcome(state=state, report=PassReport(pass_id=self.pass_id, pass_name=self.name, summary="walked"))
