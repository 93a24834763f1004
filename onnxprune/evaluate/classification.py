"""Top-1 and top-5 accuracy.

A sample counts as right in the top k when fewer than k classes come before its own: those with a higher value, and
those with the same value and a lower index. So a model that gives the same value for all classes is right only about
class 0, and the same outputs always give the same score. A sample whose outputs hold NaN is wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.contracts import Runner, Score
from onnxprune.data.labelled import LabelledSource
from onnxprune.errors import BadDataError, UsageError, did_you_mean, quoted_list
from onnxprune.evaluate.feeds import feeds_for

__all__ = ["ClassificationEvaluator", "rank_of_label"]


def rank_of_label(scores: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many classes come before the right one; the number of classes where a sample has NaN.

    Args:
        scores: (N, classes), higher is more likely.
        labels: (N,), each below the number of classes.
    """
    values = scores.astype(np.float64)
    own = np.take_along_axis(values, labels[:, np.newaxis], axis=1)
    before = (values > own) | ((values == own) & (np.arange(values.shape[1]) < labels[:, np.newaxis]))
    ranks: npt.NDArray[np.int64] = before.sum(axis=1, dtype=np.int64)
    ranks[np.isnan(values).any(axis=1)] = values.shape[1]
    return ranks


class ClassificationEvaluator:
    """Scores a classifier on labelled samples. `samples` shows them, so that calibration data can be held against."""

    def __init__(self, samples: LabelledSource, *, output: str | None = None) -> None:
        """Score the output called `output`; None: the model's only one, or the only one of the form (N, classes)."""
        self.samples = samples
        self._output = output

    @property
    def name(self) -> str:
        """What the score is called."""
        return "top-1 accuracy"

    def evaluate(self, runner: Runner) -> Score:
        """Top-1 accuracy from 0 to 1; details: top5 (with more than 5 classes), samples, classes, nan_samples.

        Raises:
            BadDataError: The output does not fit the labels.
            UsageError: Which output holds the classes can't be told.
        """
        output = self._output_of(runner)
        top1 = top5 = count = invalid = num_classes = 0
        for feeds, labels in self.samples:
            scores = _class_scores(runner.run(feeds_for(runner.inputs, feeds))[output], labels, output)
            num_classes = scores.shape[1]
            if labels.max() >= num_classes:
                raise BadDataError(
                    f"Evaluation data: a sample has the class {labels.max()}, but output '{output}' has {num_classes} "
                    "classes (counted from 0).",
                    "Check that the labels belong to this model and count from 0.",
                )
            ranks = rank_of_label(scores, labels)
            top1 += int((ranks < 1).sum())
            top5 += int((ranks < 5).sum())
            invalid += int((ranks == num_classes).sum())
            count += len(labels)
        details = {"samples": float(count), "classes": float(num_classes)}
        if num_classes > 5:
            details["top5"] = top5 / count
        if invalid:
            details["nan_samples"] = float(invalid)
        return Score(metric=self.name, value=top1 / count, details=details)

    def _output_of(self, runner: Runner) -> str:
        names = [spec.name for spec in runner.outputs]
        if self._output is not None:
            if self._output not in names:
                raise UsageError(f"The model has no output '{self._output}'.", did_you_mean(self._output, names))
            return self._output
        if len(names) == 1:
            return names[0]
        tables = [
            spec.name
            for spec in runner.outputs
            if spec.shape is not None and len(spec.shape) == 2 and spec.shape[1] != 1 and spec.dtype != "int64"
        ]
        if len(tables) == 1:
            return tables[0]
        raise UsageError(
            f"Which of the model's outputs holds the classes can't be told: {quoted_list(names)}.",
            "Score it with `--eval module:function`, or give `output` to ClassificationEvaluator.",
        )


def _class_scores(array: npt.NDArray[Any], labels: npt.NDArray[np.int64], output: str) -> npt.NDArray[Any]:
    """The rows of real samples as (N, classes)."""
    shape = array.shape
    if array.ndim > 2 and set(shape[2:]) == {1}:
        # Fully convolutional classifiers end in N x classes x 1 x 1.
        array = array.reshape(shape[:2])
    if array.ndim == 1 and len(labels) == 1:
        array = array[np.newaxis]
    if array.ndim != 2 or array.shape[1] < 2 or array.shape[0] < len(labels) or array.dtype.kind == "O":
        raise BadDataError(
            f"Output '{output}' of shape {list(shape)} does not hold one value for each class and sample "
            f"({len(labels)} in this batch).",
            "Score this model with `--eval module:function`.",
        )
    return array[: len(labels)]
