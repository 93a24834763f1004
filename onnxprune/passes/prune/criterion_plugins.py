"""Criteria that users and installed packages bring: `criterion = "my_criterion.py:function"`, or an entry point.

Such a function takes `ChannelSlices` and a seeded generator and gives one score per channel. What it needs besides the
weights it says with an attribute: `function.needs = "calibration"`, or `"gradients"`.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np

from onnxprune.data.user_code import call_user_code, load_callable, parse_function_spec
from onnxprune.errors import PluginError, did_you_mean
from onnxprune.passes.prune.channel_slices import ChannelSlices, Scores
from onnxprune.passes.prune.criteria import CRITERIA, CriterionRow, Need, with_mean_one

__all__ = ["ENTRY_POINT_GROUP", "check_criterion_name", "criterion_file", "find_criterion"]

ENTRY_POINT_GROUP = "onnxprune.criteria"


def check_criterion_name(name: str) -> None:
    """Refuse what is neither one of our own criteria, nor installed, nor of the form of a function. Imports nothing.

    Raises:
        ValueError: It is none of these.
    """
    if name in CRITERIA or name in _entry_points() or parse_function_spec(name) is not None:
        return
    hint = did_you_mean(name, [*CRITERIA, *_entry_points()])
    raise ValueError(f"there is no such criterion. {hint} Or give a function: 'path/file.py:function'.")


def find_criterion(name: str) -> CriterionRow:
    """The criterion called `name`, or the function that it names; that runs the code of its module.

    Raises:
        UsageError: There is no such function.
        PluginError: Its module fails while it is imported, or what it says that it needs is unknown.
    """
    if name in CRITERIA:
        return CRITERIA[name]
    spec = _function_spec(name)
    function = load_callable(spec, what="Criterion")
    needs = getattr(function, "needs", None)
    if needs is not None and needs not in get_args(Need):
        raise PluginError(
            f"Criterion '{spec}' says that it needs {needs!r}.",
            f"Possible: {', '.join(repr(need) for need in get_args(Need))}, or no attribute `needs` at all.",
        )
    return CriterionRow(score=_guarded(function, spec), needs=needs)


def criterion_file(name: str) -> Path | None:
    """The file that holds a user's criterion; None for our own, and for modules without a file."""
    if name in CRITERIA:
        return None
    spec = parse_function_spec(_function_spec(name))
    if spec is None or spec.file is not None:
        return None if spec is None else spec.file
    load_callable(_function_spec(name), what="Criterion")
    file = getattr(sys.modules.get(spec.module), "__file__", None)
    return None if file is None else Path(file)


def _function_spec(name: str) -> str:
    return _entry_points().get(name, name)


def _entry_points() -> dict[str, str]:
    """Names that installed packages bring, and 'module:function' for each. They can't replace our own."""
    found = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return {entry.name: entry.value for entry in found if entry.name not in CRITERIA}


def _guarded(function: Callable[..., Any], spec: str) -> Callable[[ChannelSlices, np.random.Generator], Scores]:
    def score(slices: ChannelSlices, rng: np.random.Generator) -> Scores:
        result = call_user_code(function, slices, rng, spec=spec, what="Criterion")
        return with_mean_one(_checked(result, slices, spec))

    return score


def _checked(result: object, slices: ChannelSlices, spec: str) -> Scores:
    """`result` as scores.

    Raises:
        PluginError: It is something else.
    """
    try:
        given = np.asarray(result)
        if np.iscomplexobj(given):
            raise _wrong(spec, slices, "gave complex numbers, which have no order")
        scores = given.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise _wrong(spec, slices, f"gave a '{type(result).__name__}', not an array of numbers") from error
    if scores.ndim == 0:
        raise _wrong(spec, slices, f"gave a '{type(result).__name__}', not an array of numbers")
    if scores.shape != (slices.num_channels,):
        raise _wrong(spec, slices, f"gave an array of shape {list(scores.shape)}, not [{slices.num_channels}]")
    if not np.isfinite(scores).all():
        raise _wrong(spec, slices, f"gave {int((~np.isfinite(scores)).sum())} scores that are NaN or infinite")
    if (scores < 0).any():
        raise _wrong(spec, slices, f"gave negative scores (the lowest is {scores.min():g})")
    return scores


def _wrong(spec: str, slices: ChannelSlices, problem: str) -> PluginError:
    return PluginError(
        f"Criterion '{spec}' {problem}, for the channels '{slices.group}'.",
        "It must give one finite score of at least 0 for each channel; the lowest go first.",
    )
