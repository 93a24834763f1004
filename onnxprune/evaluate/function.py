"""Scores by a user's function: `module:function(runner) -> score`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from onnxprune.contracts import Runner, Score
from onnxprune.data.user_code import call_user_code, load_callable
from onnxprune.errors import PluginError

__all__ = ["FunctionEvaluator"]


class FunctionEvaluator:
    """Calls a function with a runner.

    The function returns a number (higher is better; the metric is called like the function), a mapping of names to
    numbers (the first entry is the score, the others are details), or a `contracts.Score`.
    """

    def __init__(self, spec: str) -> None:
        """Load the function 'path/file.py:function' or 'package.module:function'; this runs the code of its module.

        Raises:
            UsageError: There is no such function.
            PluginError: Its module fails while it is imported.
        """
        self._spec = spec
        self._function = load_callable(spec, what="Evaluator")

    @property
    def name(self) -> str:
        """The function's name."""
        return self._spec.rpartition(":")[2]

    def evaluate(self, runner: Runner) -> Score:
        """What the function says.

        Raises:
            PluginError: It fails, or gives something else than a finite score.
        """
        result = call_user_code(self._function, runner, spec=self._spec, what="Evaluator")
        score = self._as_score(result)
        if not math.isfinite(score.value):
            raise PluginError(
                f"Evaluator '{self._spec}' gave {score.value}, which is no score.", "Correct the function."
            )
        return score

    def _as_score(self, result: object) -> Score:
        if isinstance(result, Score):
            return result
        if isinstance(result, Mapping) and result:
            figures = {str(name): self._as_number(value, f" for '{name}'") for name, value in result.items()}
            (metric, value), *others = figures.items()
            return Score(metric=metric, value=value, details=dict(others))
        return Score(metric=self.name, value=self._as_number(result, ""))

    def _as_number(self, value: object, where: str) -> float:
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value[()]
        if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
            return float(value)
        raise PluginError(
            f"Evaluator '{self._spec}' must return a number, a mapping of names to numbers, or a Score, but gave "
            f"{type(value).__name__}{where}.",
            "Correct what the function returns.",
        )
