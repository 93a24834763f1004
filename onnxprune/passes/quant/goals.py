"""What a quantized model must keep: a score, or the signal-to-noise ratio of its outputs, both of the simulation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import onnx_ir as ir

from onnxprune.contracts import EXACT_DB, Batch, Evaluator, QuantizationPlan, Score
from onnxprune.errors import PluginError
from onnxprune.evaluate.budget import is_at_most, score_drop
from onnxprune.evaluate.fidelity import fidelity
from onnxprune.passes.quant.layer_errors import finite_db
from onnxprune.passes.quant.simulate import simulated
from onnxprune.runtime.sessions import OrtRunner, ort_runner_from_model

__all__ = ["Goal", "ScoreGoal", "SnrGoal"]

WORST_DROP = 1e300
"""Stands for the drop to a score that is no number: it keeps no limit, and survives JSON."""


class Goal(Protocol):
    """Something to hold. A figure is what `measure` says about a plan."""

    @property
    def name(self) -> Literal["max_drop", "min_snr_db"]:
        """The setting that asks for it."""
        ...

    @property
    def limit(self) -> float:
        """What was asked."""
        ...

    @property
    def float_score(self) -> Score | None:
        """The float model's score, where there are scores."""
        ...

    @property
    def num_evaluations(self) -> int:
        """How often a model was scored or compared so far."""
        ...

    @property
    def exact_figure(self) -> float:
        """The figure of a plan in which nothing is integer."""
        ...

    @property
    def max_tries_to_give_back(self) -> int:
        """How many evaluations it is worth to find layers that need not have left 8 bits."""
        ...

    def measure(self, plan: QuantizationPlan) -> float:
        """The figure of a plan; finite."""
        ...

    def holds(self, figure: float) -> bool:
        """True when it is good enough."""
        ...

    def describe(self, figure: float) -> str:
        """The figure in words."""
        ...


class ScoreGoal:
    """The score of the simulated model is at most `limit` worse than that of the float model."""

    name: Literal["max_drop", "min_snr_db"] = "max_drop"
    exact_figure = 0.0
    max_tries_to_give_back = 3

    def __init__(
        self,
        model: ir.Model,
        evaluator: Evaluator,
        *,
        limit: float,
        threads: int,
        custom_op_libraries: Sequence[Path] = (),
    ) -> None:
        """Score the float model.

        Raises:
            PluginError: Its score is not a number.
        """
        self.limit = limit
        self.num_evaluations = 1
        self._model = model
        self._evaluator = evaluator
        self._threads = threads
        self._libraries = custom_op_libraries
        score = evaluator.evaluate(self._runner(model))
        if not math.isfinite(score.value):
            raise PluginError(
                f"Evaluator '{evaluator.name}' gave {score.value} for the float model, and no drop can be counted "
                "from that.",
                "Correct the evaluator, or give `min_snr_db` instead of `max_drop`.",
            )
        self.float_score: Score | None = Score(
            metric=score.metric, value=score.value, higher_is_better=score.higher_is_better
        )
        self._before = score

    def measure(self, plan: QuantizationPlan) -> float:
        """By how much the score falls; negative where it rises."""
        self.num_evaluations += 1
        drop = score_drop(self._before, self._evaluator.evaluate(self._runner(simulated(self._model, plan))))
        return drop if math.isfinite(drop) else WORST_DROP

    def holds(self, figure: float) -> bool:
        """True when the drop keeps the limit, whatever floats say in the last digits."""
        return is_at_most(figure, self.limit)

    def describe(self, figure: float) -> str:
        """'top1 falls by 0.012'."""
        if figure >= WORST_DROP:
            return f"{self._before.metric} is not a number"
        verb = "falls" if self._before.higher_is_better else "rises"
        if figure < 0:
            verb = "rises" if self._before.higher_is_better else "falls"
        return f"{self._before.metric} {verb} by {abs(figure):.4g}"

    def _runner(self, model: ir.Model) -> OrtRunner:
        return ort_runner_from_model(model, threads=self._threads, custom_op_libraries=self._libraries)


class SnrGoal:
    """The outputs of the simulated model keep a signal-to-noise ratio; the worst output on the worst sample counts.

    That is how `evaluate.fidelity` measures artifacts, so that the figures can be held against each other.
    """

    name: Literal["max_drop", "min_snr_db"] = "min_snr_db"
    exact_figure = EXACT_DB
    float_score: Score | None = None
    max_tries_to_give_back = 6

    def __init__(
        self,
        model: ir.Model,
        batches: Iterable[Batch],
        *,
        limit: float,
        threads: int,
        custom_op_libraries: Sequence[Path] = (),
    ) -> None:
        """`batches` are iterated again for every plan."""
        self.limit = limit
        self.num_evaluations = 0
        self._model = model
        self._batches = batches
        self._threads = threads
        self._libraries = custom_op_libraries
        self._reference = self._runner(model)

    def measure(self, plan: QuantizationPlan) -> float:
        """Decibels, within +-`EXACT_DB`."""
        self.num_evaluations += 1
        found = fidelity(self._reference, self._runner(simulated(self._model, plan)), self._batches)
        return finite_db(found.snr_db)

    def holds(self, figure: float) -> bool:
        """True when the ratio is at least the limit."""
        return is_at_most(-figure, -self.limit)

    def describe(self, figure: float) -> str:
        """'the outputs keep 21.3 dB'."""
        return "the outputs stay exact" if figure >= EXACT_DB else f"the outputs keep {figure:.1f} dB"

    def _runner(self, model: ir.Model) -> OrtRunner:
        return ort_runner_from_model(model, threads=self._threads, custom_op_libraries=self._libraries)
