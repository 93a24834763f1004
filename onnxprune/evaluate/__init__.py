"""Scores, fidelity to the original, static figures and budgets."""

from __future__ import annotations

from collections.abc import Sequence

from onnxprune.contracts import Evaluator, TensorSpec
from onnxprune.data.labelled import open_labelled
from onnxprune.data.preprocess import Preprocess
from onnxprune.data.user_code import parse_function_spec
from onnxprune.evaluate.classification import ClassificationEvaluator
from onnxprune.evaluate.function import FunctionEvaluator

__all__ = ["open_evaluator"]


def open_evaluator(
    spec: str,
    *,
    inputs: Sequence[TensorSpec],
    preprocess: Preprocess,
    batch_size: int = 1,
    limit: int | None = None,
) -> Evaluator:
    """The evaluator that `--eval` names: a path to labelled samples scores a classifier, `module:function` itself.

    Args:
        spec: A path (see `onnxprune.data.labelled`), or 'path/file.py:function' or 'package.module:function'.
        inputs: What the model takes.
        preprocess: How pictures become input values; a function does its own.
        batch_size: Samples in a batch where the model takes any number.
        limit: At most this many samples; a function chooses its own.

    Raises:
        BadDataError: The labelled samples are missing or don't fit the model.
        UsageError: There is no such function, or the preprocessing does not fit the input.
        PluginError: The function's module fails while it is imported.
    """
    if parse_function_spec(spec) is not None:
        return FunctionEvaluator(spec)
    samples = open_labelled(spec, inputs=inputs, preprocess=preprocess, batch_size=batch_size, limit=limit)
    return ClassificationEvaluator(samples)
