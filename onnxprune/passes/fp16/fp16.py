"""The pass itself: plan, apply, report."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir
from typing_extensions import override

from onnxprune.contracts import (
    Change,
    ModelState,
    OutputDifference,
    Pass,
    PassContext,
    PassOutcome,
    PassReport,
    Skip,
    numpy_dtype,
)
from onnxprune.errors import OnnxPruneError
from onnxprune.evaluate.fidelity import compare_outputs
from onnxprune.graph.scope import require_scopes
from onnxprune.graph.weights import weight_bytes
from onnxprune.passes.fp16.full import apply_full_plan, plan_full
from onnxprune.passes.fp16.plan import Fp16Config, Fp16Plan
from onnxprune.passes.fp16.weights_only import apply_weights_plan, plan_weights
from onnxprune.passes.harness import MAX_TRIAL_RUN_BYTES

__all__ = ["Fp16Pass"]


class Fp16Pass(Pass[Fp16Config, Fp16Plan]):
    """Weights, and in mode "full" the arithmetic too, are float16.

    1. A weight stays float32, with the reason, when a value is beyond 65504, or when float16 changes it by more than
       rounding does.
    2. In mode "full" a node stays float32 when its operator needs that, or when its values come near 65504.
    3. With `keep_io` inputs and outputs stay float32, with Casts inside.
    4. Float32 inside the bodies of If, Loop and Scan stays (their weights in mode "weights" don't).
    """

    name: ClassVar[str] = "fp16"
    summary: ClassVar[str] = "stores weights as float16 (half the size), or computes in float16"
    config_type: ClassVar[type[Fp16Config]] = Fp16Config
    plan_type: ClassVar[type[Fp16Plan]] = Fp16Plan

    @property
    @override
    def changes_io_types(self) -> bool:
        """Only where it was asked for."""
        return self.config.mode == "full" and not self.config.keep_io

    @override
    @property
    def uses_calibration(self) -> bool:
        """In full precision, one batch shows which values leave float16's range."""
        return self.config.mode == "full"

    def plan(self, state: ModelState, context: PassContext) -> Fp16Plan:
        """Which weights and nodes.

        Raises:
            UsageError: A pattern of `skip` means nothing in the model.
        """
        require_scopes(state.model, self.config.skip, of=f"`skip` of pass '{self.name}'", operators=True)
        if self.config.mode == "weights":
            return plan_weights(state.model, self.config)
        return plan_full(state.model, self.config, context)

    @override
    def apply(self, state: ModelState, plan: Fp16Plan, context: PassContext) -> PassOutcome:
        """Convert them."""
        original = state.model.clone()
        if plan.mode == "weights":
            apply_weights_plan(state.model, plan)
        else:
            apply_full_plan(state.model, plan)
        bytes_before, bytes_after = weight_bytes(original), weight_bytes(state.model)
        error = _output_error(original, state.model, context) if plan.weights or plan.float16_nodes else None
        lost = sum(weight.lost for weight in plan.weights)
        report = PassReport(
            pass_id=self.pass_id,
            pass_name=self.name,
            summary=(
                f"{len(plan.weights)} weights are float16 now: {bytes_before:,} bytes before, {bytes_after:,} after"
                + (f"; {len(plan.float16_nodes)} nodes compute in float16" if plan.mode == "full" else "")
            ),
            changes=tuple(
                Change(
                    what="stored as float16",
                    where=f"weight '{weight.name}'",
                    figures={"max_error": weight.max_error, "values_lost": weight.lost},
                )
                for weight in plan.weights
            ),
            skips=(
                *(Skip(where=f"weight '{name}'", reason=reason) for name, reason in plan.float32_weights.items()),
                *(Skip(where=f"node '{name}'", reason=reason) for name, reason in plan.float32_nodes.items()),
                *(Skip(where=f"'{name}'", reason=reason) for name, reason in plan.float32_io.items()),
            ),
            notes=_notes(plan, error, lost),
            figures={
                "weight_bytes_before": bytes_before,
                "weight_bytes_after": bytes_after,
                "weights_converted": len(plan.weights),
                "nodes_converted": len(plan.float16_nodes),
                "values_lost": lost,
                **(
                    {"max_abs_error": error.max_abs, "max_rel_error": error.max_rel, "cosine": error.cosine}
                    if isinstance(error, OutputDifference)
                    else {}
                ),
            },
        )
        return PassOutcome(state=state, report=report)


def _notes(plan: Fp16Plan, error: OutputDifference | str | None, lost: int) -> tuple[str, ...]:
    notes = []
    if plan.mode == "weights" and plan.weights:
        notes.append(
            "The arithmetic is float32 as before: the file is smaller, speed and memory in use are the same. A target "
            "that folds constants when it writes its file makes the weights float32 again."
        )
    if lost:
        notes.append(f"{lost:,} weights below 6e-8 became zero.")
    if isinstance(error, OutputDifference):
        notes.append(
            f"On seeded inputs, outputs differ by at most {error.max_abs:.3g} ({error.max_rel:.2%} of the largest "
            "value)."
        )
    elif error:
        notes.append(f"Outputs were not compared: {error}.")
    return tuple(notes)


def _output_error(before: ir.Model, after: ir.Model, context: PassContext) -> OutputDifference | str:
    """How far the outputs moved on one batch of seeded inputs, or why that is not known."""
    from onnxprune.runtime.feeds import working_feeds
    from onnxprune.runtime.sessions import ort_runner_from_model

    if weight_bytes(before) > MAX_TRIAL_RUN_BYTES:
        return "the model is too large to load it twice"
    try:
        reference = ort_runner_from_model(before, custom_op_libraries=context.custom_op_libraries)
        feeds = working_feeds(reference, seed=context.seed)
        expected = reference.run(feeds)
        runner = ort_runner_from_model(after, custom_op_libraries=context.custom_op_libraries)
        narrowed = {spec.name: feeds[spec.name].astype(numpy_dtype(spec.dtype), copy=False) for spec in runner.inputs}
        actual = runner.run(narrowed)
    except OnnxPruneError as error:
        return error.message.rstrip(".")
    return compare_outputs(expected, {name: array.astype(expected[name].dtype) for name, array in actual.items()})
