"""The pass itself: plan, apply, report."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from typing_extensions import override

from onnxprune.contracts import Change, ModelState, Pass, PassContext, PassOutcome, PassReport, Skip
from onnxprune.passes.simplify.config import SimplifyConfig, SimplifyPlan
from onnxprune.passes.simplify.driver import Simplification, StageOutcome, run_stages
from onnxprune.passes.simplify.stages import STAGES, ToolLimits

__all__ = ["SimplifyPass"]


class SimplifyPass(Pass[SimplifyConfig, SimplifyPlan]):
    """Fewer nodes that compute the same outputs.

    1. The stages of `stages.STAGES` run in order, again and again, until none of them finds anything.
    2. What a stage did stays only where ONNX Runtime gives the same outputs as before, for seeded inputs of two batch
       sizes; otherwise it is taken back, with a note.
    3. Foreign tools (onnxsim, onnxscript) run in a child process; its death or delay costs their stage, not the run.
    4. Inputs, outputs, their names, module paths and quantization (QuantizeLinear, DequantizeLinear) stay.
    """

    name: ClassVar[str] = "simplify"
    summary: ClassVar[str] = "removes nodes that the outputs don't need, and folds what can be computed now"
    config_type: ClassVar[type[SimplifyConfig]] = SimplifyConfig
    plan_type: ClassVar[type[SimplifyPlan]] = SimplifyPlan

    @override
    def plan(self, state: ModelState, context: PassContext) -> SimplifyPlan:
        """The stages to run."""
        left_out = set(self.config.skip_stages)
        return SimplifyPlan(stages=tuple(name for name in self.config.stages if name not in left_out))

    @override
    def apply(self, state: ModelState, plan: SimplifyPlan, context: PassContext) -> PassOutcome:
        """Run them."""
        by_name = {stage.name: stage for stage in STAGES}
        limits = ToolLimits(timeout_s=self.config.timeout_s, memory_limit_bytes=self.config.memory_limit_bytes)
        nodes_before = sum(1 for _ in state.model.graph.all_nodes())
        done = run_stages(state.model, [by_name[name] for name in plan.stages], limits, context)
        nodes_after = sum(1 for _ in done.model.graph.all_nodes())
        return PassOutcome(
            state=replace(state, model=done.model),
            report=PassReport(
                pass_id=self.pass_id,
                pass_name=self.name,
                summary=f"{nodes_before} nodes before, {nodes_after} after",
                changes=tuple(_change(outcome) for outcome in done.outcomes if outcome.rewrites),
                skips=tuple(
                    Skip(where=f"stage '{outcome.stage}'", reason=outcome.skipped)
                    for outcome in done.outcomes
                    if outcome.skipped
                ),
                notes=_notes(done),
                figures={"nodes_before": nodes_before, "nodes_after": nodes_after},
            ),
        )


def _change(outcome: StageOutcome) -> Change:
    gone = ", ".join(f"{-count} {op}" for op, count in sorted(outcome.ops.items()) if count < 0)
    new = ", ".join(f"{count} {op}" for op, count in sorted(outcome.ops.items()) if count > 0)
    return Change(
        what=f"removed {gone or 'weights'}" + (f", added {new}" if new else ""),
        where=f"stage '{outcome.stage}'",
        figures={"nodes_removed": outcome.nodes_removed},
    )


def _notes(done: Simplification) -> tuple[str, ...]:
    notes = [f"Stage '{outcome.stage}' was {outcome.skipped}." for outcome in done.outcomes if outcome.skipped]
    if done.unchecked:
        notes.append(f"Outputs were not compared after each stage: {done.unchecked}.")
    return tuple(notes)
