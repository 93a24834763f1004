"""The last step of the `quant` pass: hold the plan against its goal, measure its layers, and say what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import onnx_ir as ir

from onnxprune.contracts import (
    EXACT_DB,
    CalibrationSource,
    Change,
    FallbackRecord,
    LayerError,
    PassContext,
    QuantizationPlan,
    Skip,
)
from onnxprune.errors import PreconditionError, quoted_list
from onnxprune.passes.quant.fallback import Diagnosis, FallbackKind, with_fallback
from onnxprune.passes.quant.goals import WORST_DROP, Goal, ScoreGoal, SnrGoal
from onnxprune.passes.quant.layer_errors import layer_errors
from onnxprune.passes.quant.ranking import ranked_layers
from onnxprune.passes.quant.sensitivity import output_noise
from onnxprune.passes.quant.units import FirstSamples, layers_of

__all__ = [
    "DIAGNOSED_SAMPLES",
    "GOAL_SAMPLES",
    "RANKED_SAMPLES",
    "AccountSettings",
    "account_changes",
    "account_figures",
    "account_notes",
    "account_skips",
    "with_account",
]

DIAGNOSED_SAMPLES = 8
"""Samples that the errors of layers are measured on."""

RANKED_SAMPLES = 4
"""Samples that decide the order in which layers leave; each takes a run of the model for every layer."""

GOAL_SAMPLES = 32
"""Samples whose worst has to keep `min_snr_db`; as many as artifacts are compared on."""

_SHOWN = 5


class AccountSettings(Protocol):
    """What of the pass's configuration counts here."""

    @property
    def max_drop(self) -> float | None:
        """Of the score."""
        ...

    @property
    def min_snr_db(self) -> float | None:
        """Of the outputs."""
        ...

    @property
    def fallback(self) -> FallbackKind:
        """Where layers go."""
        ...

    @property
    def diagnose(self) -> bool:
        """Measure the layers in any case."""
        ...

    @property
    def threads(self) -> int:
        """Threads of all models that are run."""
        ...


def with_account(
    model: ir.Model, plan: QuantizationPlan, settings: AccountSettings, context: PassContext
) -> QuantizationPlan:
    """`plan` with layers taken out of 8 bits where its goal asks for that, and with the errors of its layers.

    Raises:
        PreconditionError: A goal is set for a plan without static activations, or the run lacks what it needs.
        PluginError: The evaluator fails, or gives no number for the float model.
    """
    wants_goal = settings.max_drop is not None or settings.min_snr_db is not None
    if not (wants_goal or settings.diagnose):
        return plan
    if plan.mode != "static":
        raise PreconditionError(
            f"`max_drop`, `min_snr_db` and `diagnose` are about static int8, and the plan is {plan.mode}.",
            "Drop them, or quantize statically.",
        )
    if context.calibration is None:
        raise PreconditionError("Measuring quantized layers needs calibration data, but the run has none.")
    measuring = _Measuring(model, plan, settings.threads, context.calibration, context)
    goal = _goal(model, settings, context.calibration, context)
    if goal is not None:
        plan = with_fallback(
            model,
            plan,
            goal,
            kind=settings.fallback,
            diagnose=measuring.full,
            progress=context.progress,
        )
    if settings.diagnose and not plan.layer_errors:
        plan = replace(plan, layer_errors=measuring.errors())
    return plan


def account_changes(plan: QuantizationPlan) -> list[Change]:
    """The errors of every layer that was measured, and what was given 16 bits."""
    changes = [
        Change(
            what="error of the layer",
            where=error.node,
            figures=_figures_of(error),
        )
        for error in plan.layer_errors
    ]
    record = plan.fallback
    if record is not None and record.kind == "int16":
        changes += [Change(what=reason, where=node) for node, reason in record.nodes.items()]
    return changes


def account_skips(plan: QuantizationPlan) -> list[Skip]:
    """The nodes that were returned to float, each with the figures that say why."""
    errors = {error.node: error for error in plan.layer_errors}
    return [
        # One reason for all, so that reports can group them; the figures stand beside it.
        Skip(where=node, reason=reason.partition(": ")[0], figures=_figures_of(errors.get(node)))
        for node, reason in plan.returned_nodes.items()
    ]


def account_notes(plan: QuantizationPlan) -> list[str]:
    """What became of the goal, and the layers with the largest errors."""
    notes = []
    if plan.fallback is not None:
        names = [error.node for error in sorted(plan.layer_errors, key=_damage)]
        notes.append(_goal_note(plan.fallback, names) + _nothing_left(plan.fallback))
    if plan.layer_errors:
        worst = sorted(plan.layer_errors, key=lambda error: error.own_db)[:_SHOWN]
        shown = "; ".join(
            f"'{error.node}' {_db(error.own_db)} of its own, {_db(error.accumulated_db)} with all that came before"
            for error in worst
        )
        notes.append(f"Least exact in 8 bits: {shown}.")
    return notes


def account_figures(plan: QuantizationPlan) -> dict[str, float]:
    """The headline numbers of a goal; none without one."""
    record = plan.fallback
    if record is None:
        return {}
    figures: dict[str, float] = {
        record.goal: record.limit,
        "evaluations": record.evaluations,
        "fallback_layers": record.num_layers,
        "without_fallback": record.before,
        "with_fallback": record.reached,
    }
    if record.float_score is not None:
        figures["float_score"] = record.float_score.value
    return figures


def _damage(error: LayerError) -> float:
    return error.own_db if error.output_db is None else error.output_db


def _figures_of(error: LayerError | None) -> dict[str, float]:
    if error is None:
        return {}
    figures = {"own_db": error.own_db, "accumulated_db": error.accumulated_db}
    return figures if error.output_db is None else {**figures, "output_db": error.output_db}


@dataclass(frozen=True, slots=True)
class _Measuring:
    model: ir.Model
    plan: QuantizationPlan
    threads: int
    calibration: CalibrationSource
    context: PassContext

    def errors(self, noise: Mapping[str, float] | None = None) -> tuple[LayerError, ...]:
        """What each layer of the plan as it was made costs."""
        return layer_errors(
            self.model,
            self.plan,
            FirstSamples(self.calibration, DIAGNOSED_SAMPLES),
            output_noise=noise,
            threads=self.threads,
            custom_op_libraries=self.context.custom_op_libraries,
            progress=self.context.progress,
        )

    def full(self) -> Diagnosis:
        """The same with what each layer does to the outputs, and the order in which layers are to leave."""
        layers = layers_of(self.model, self.plan)
        noise = output_noise(
            self.model,
            self.plan,
            layers,
            FirstSamples(self.calibration, RANKED_SAMPLES),
            threads=self.threads,
            custom_op_libraries=self.context.custom_op_libraries,
            progress=self.context.progress,
        )
        of_layers = {layer.node.name or "": noise.of_layer(layer) for layer in layers}
        return Diagnosis(errors=self.errors(of_layers), ranked=ranked_layers(self.model, self.plan, layers, noise))


def _goal(
    model: ir.Model, settings: AccountSettings, calibration: CalibrationSource, context: PassContext
) -> Goal | None:
    libraries = context.custom_op_libraries
    if settings.max_drop is not None:
        if context.evaluator is None:
            raise PreconditionError(
                "`max_drop` needs an evaluator, but the run has none.",
                "Give `--eval DATA`, or ask for `min_snr_db`, which needs none.",
            )
        context.progress.note("Scoring the float model")
        return ScoreGoal(
            model,
            context.evaluator,
            limit=settings.max_drop,
            threads=settings.threads,
            custom_op_libraries=libraries,
        )
    if settings.min_snr_db is not None:
        return SnrGoal(
            model,
            FirstSamples(calibration, GOAL_SAMPLES),
            limit=settings.min_snr_db,
            threads=settings.threads,
            custom_op_libraries=libraries,
        )
    return None


def _goal_note(record: FallbackRecord, layers: Sequence[str]) -> str:
    asked = f"{record.goal} {record.limit:g}"
    evaluations = f"{record.evaluations} evaluation" + ("s" if record.evaluations > 1 else "")
    if record.float_score is not None:
        evaluations += ", one of them of the float model"
    if not record.num_layers:
        verdict = "holds" if record.met else "does not hold, and no layer is left to take out of 8 bits"
        return f"{asked} {verdict} for the simulated plan: {_figure(record, record.reached)} ({evaluations})."
    place = "are back in float" if record.kind == "float" else "have activations of 16 bits"
    which = quoted_list([node for node in layers if node in record.nodes], limit=_SHOWN)
    text = (
        f"{record.num_layers} of {len(layers)} layers {place} ({which}). Simulated, {_figure(record, record.reached)}; "
        f"without that {_figure(record, record.before)}. {asked} "
    )
    if record.met:
        return f"{text}holds ({evaluations})."
    return f'{text}does NOT hold even so ({evaluations}); `fallback = "float"` or better scales may reach it.'


def _nothing_left(record: FallbackRecord) -> str:
    if not record.is_all_float:
        return ""
    return " Nothing is left in int8: the artifact is the float model. A milder goal, or passes that repair int8, help."


def _figure(record: FallbackRecord, figure: float) -> str:
    if record.goal == "min_snr_db":
        return f"the outputs keep {_db(figure)}"
    metric = record.float_score.metric if record.float_score is not None else "the score"
    if figure >= WORST_DROP:
        return f"{metric} is no number"
    return f"{metric} is as good as in float" if figure <= 0 else f"{metric} is worse by {figure:.4g}"


def _db(snr_db: float) -> str:
    return "exact" if snr_db >= EXACT_DB else f"{snr_db:.1f} dB"
