"""A budget of time: predict, build, time end to end, correct the prediction, and search again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import Batch, CalibrationSource, PassContext
from onnxprune.errors import OnnxPruneError
from onnxprune.ops.channels import ChannelPolicy
from onnxprune.passes.prune.allocation import Cost
from onnxprune.passes.prune.analysis import ChannelClasses, analyze_channels
from onnxprune.passes.prune.latency_model import LatencyModel
from onnxprune.passes.prune.layer_specs import actual_shapes, find_layers
from onnxprune.passes.prune.selection import Selection
from onnxprune.passes.prune.surgery import remove_channels
from onnxprune.runtime.feeds import working_feeds
from onnxprune.runtime.latency import undisturbed_ms, undisturbed_ratio
from onnxprune.runtime.profile import profile_ops
from onnxprune.runtime.sessions import OrtRunner, ort_runner_from_model

__all__ = ["LatencyFigures", "Stopwatch", "latency_model", "search_latency"]

Keeps = npt.NDArray[np.bool_]

# A measured ratio this near to the goal is the goal: medians of a quiet machine repeat to about a hundredth.
_TOLERANCE = 0.03
_NEAR_ENOUGH = 0.015
_MAX_CANDIDATES = 5
_TIMING_TOLERANCE = 0.01
# What profiling the original should take; the number of runs follows.
_PROFILE_S = 2.0
_PROFILE_RUNS = (5, 40)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyFigures:
    """Time of the pruned model over the original's: as the corrected prediction has it, and as measured."""

    predicted_ratio: float
    measured_ratio: float
    num_candidates: int


class Stopwatch:
    """Times pruned models against the model that ratios count from."""

    def __init__(self, original: ir.Model, context: PassContext, *, threads: int) -> None:
        self._libraries: tuple[Path, ...] = context.custom_op_libraries
        self._threads = threads
        self.runner = self._runner(original)
        self.feeds = _feeds(self.runner, context.calibration, context.seed)

    def ratio(self, pruned: ir.Model) -> float:
        """Time of `pruned` over that of the original, timed in turn."""
        return undisturbed_ratio(self.runner, self._runner(pruned), self.feeds, tolerance=_TIMING_TOLERANCE)

    def _runner(self, model: ir.Model) -> OrtRunner:
        return ort_runner_from_model(model, threads=self._threads, custom_op_libraries=self._libraries)


def _feeds(runner: OrtRunner, calibration: CalibrationSource | None, seed: int) -> Batch:
    """One real batch where there is one: dynamic axes then have the sizes that they have in use."""
    if calibration is not None:
        return next(iter(calibration))
    return working_feeds(runner, seed=seed)


def latency_model(
    model: ir.Model, classes: ChannelClasses, stopwatch: Stopwatch, context: PassContext, *, threads: int
) -> LatencyModel:
    """The latency model of `model`, whose table is read from the disk or measured now."""
    context.progress.note("Timing the layers at several widths")
    layers, widths = find_layers(model, classes, actual_shapes(model, stopwatch.runner, stopwatch.feeds))
    run_ms = undisturbed_ms(stopwatch.runner, stopwatch.feeds)
    profile = profile_ops(
        model,
        stopwatch.feeds,
        runs=int(np.clip(_PROFILE_S * 1e3 / run_ms, *_PROFILE_RUNS)),
        threads=threads,
        custom_op_libraries=context.custom_op_libraries,
    )
    return LatencyModel(model, classes, layers, widths, profile, run_ms, threads=threads, progress=context.progress)


def search_latency(
    model: ir.Model,
    predicted: Cost,
    stopwatch: Stopwatch,
    goal: float,
    by_cost: Callable[[Cost], Selection],
    context: PassContext,
    policy: ChannelPolicy,
) -> tuple[Selection, LatencyFigures]:
    """The selection whose measured time is nearest to `goal`, as a part of the original's.

    Args:
        model: Unpruned; stays as it is.
        predicted: The time of a choice over that of the original.
        stopwatch: Times candidates.
        goal: Between 0 and 1.
        by_cost: The fewest channels with which a cost is within the budget.
        context: Shows progress.
        policy: The one that the classes were found under.
    """
    aim = goal
    tried: list[_Candidate] = []
    for _ in range(_MAX_CANDIDATES):
        scale = goal / aim
        selection = by_cost(lambda keeps, scale=scale: scale * predicted(keeps))  # type: ignore[misc]
        if any(np.array_equal(selection.keeps, candidate.keeps) for candidate in tried):
            break
        raw = predicted(selection.keeps)
        candidate = _Candidate(
            keeps=selection.keeps,
            raw=raw,
            predicted=scale * raw,
            measured=_measured(model, selection.keeps, stopwatch, policy),
        )
        context.progress.note(
            f"Latency ratio: predicted {candidate.predicted:.3f}, measured {candidate.measured:.3f}, goal {goal:.3f}"
        )
        tried.append(candidate)
        if abs(candidate.measured - goal) <= _NEAR_ENOUGH:
            break
        aim = _next_aim(tried, goal)
    chosen = min(tried, key=lambda candidate: abs(candidate.measured - goal))
    figures = LatencyFigures(
        predicted_ratio=chosen.predicted, measured_ratio=chosen.measured, num_candidates=len(tried)
    )
    return Selection(keeps=chosen.keeps, reached=chosen.measured <= goal + _TOLERANCE), figures


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Candidate:
    """A choice: its time as the layers' times have it, as corrected by what was measured before, and as measured."""

    keeps: Keeps
    raw: float
    predicted: float
    measured: float


def _next_aim(tried: Sequence[_Candidate], goal: float) -> float:
    """The uncorrected prediction that should measure `goal`.

    On the line between the nearest candidates on both sides of the goal; where all lie on one side, in proportion to
    the last one.
    """
    slower = [candidate for candidate in tried if candidate.measured > goal]
    faster = [candidate for candidate in tried if candidate.measured <= goal]
    if not slower or not faster:
        # Not so far that nothing is left to remove.
        return min(tried[-1].raw * goal / tried[-1].measured, (1.0 + goal) / 2)
    above = min(slower, key=lambda candidate: candidate.measured)
    below = max(faster, key=lambda candidate: candidate.measured)
    part = (goal - below.measured) / (above.measured - below.measured)
    return below.raw + part * (above.raw - below.raw)


def _measured(model: ir.Model, keeps: Keeps, stopwatch: Stopwatch, policy: ChannelPolicy) -> float:
    """The measured ratio; a candidate that does not run (its groups will be rolled back) counts as no faster."""
    if keeps.all():
        return 1.0
    pruned = model.clone()
    try:
        remove_channels(pruned, analyze_channels(pruned, policy), keeps)
        return stopwatch.ratio(pruned)
    except OnnxPruneError:
        return 1.0
