"""From a configuration to the classes that go: limits, ranking and budget put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxprune.contracts import ModelState, PassContext
from onnxprune.passes.prune.allocation import Cost, DamageCurve
from onnxprune.passes.prune.analysis import ChannelClasses, ChannelGroup
from onnxprune.passes.prune.baseline import Baseline
from onnxprune.passes.prune.config import PruneConfig
from onnxprune.passes.prune.costs import CostModel, Costs
from onnxprune.passes.prune.latency_search import LatencyFigures, Stopwatch, latency_model, search_latency
from onnxprune.passes.prune.limits import AxisKey, Widths, width_limits
from onnxprune.passes.prune.scoring import Scorer, score_groups
from onnxprune.passes.prune.selection import Candidates, Selection, Selector, find_candidates
from onnxprune.passes.prune.sensitivity import damage_curves

__all__ = ["Decision", "decide"]

Keeps = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decision:
    """What goes.

    Attributes:
        keeps: One flag per class.
        reached: False when limits or frozen channels keep the target out of reach.
        target_ratio: What was to be reached, inside a repeated block in this iteration.
        skipped: Groups that `skip` or a scope of ratio 0 leaves alone, with the glob.
        latency: Where the target is a time.
    """

    keeps: Keeps
    reached: bool
    target_ratio: float
    skipped: tuple[tuple[ChannelGroup, str], ...]
    latency: LatencyFigures | None


def decide(
    state: ModelState,
    classes: ChannelClasses,
    costs: CostModel,
    config: PruneConfig,
    scorer: Scorer,
    baseline: Baseline,
    context: PassContext,
) -> Decision:
    """Choose the classes to remove from the model of `state`.

    Args:
        state: The model.
        classes: Of the model.
        costs: Of the same model; its MACs must be known when the target is `macs_ratio`.
        config: What is asked.
        scorer: Tells which channels matter least.
        baseline: What ratios count from.
        context: Data, and how to time.
    """
    candidates = find_candidates(classes, config)
    damage = _damage(state, classes, candidates, config, scorer, context)
    kind, ratio = config.target

    def selector(paying_widths: Mapping[AxisKey, Widths] | None = None) -> Selector:
        limits = width_limits(
            classes,
            min_channels=config.min_channels,
            channel_multiple=config.channel_multiple,
            width_before=baseline.width_of,
            paying_widths=paying_widths,
            # Where channels of all layers are compared, those that stay are worth more than those that go.
            rounds_down=config.ranking == "per-layer",
        )
        return Selector(classes, candidates, limits, config, scorer, baseline, damage=damage)

    latency = None
    goal = baseline.ratio_at(ratio, 1.0)
    if kind == "latency_ratio":
        # Of this target, the part that stays is given.
        goal = 1.0 - baseline.ratio_at(1.0 - ratio, 1.0)
        original = state.model if context.iteration is None else context.iteration.original.model
        stopwatch = Stopwatch(original, context, threads=config.latency_threads)
        # Inside a repeated block, the model has lost time already.
        start = 1.0 if original is state.model else stopwatch.ratio(state.model)
        times = latency_model(state.model, classes, stopwatch, context, threads=config.latency_threads)
        paying, every = selector(times.paying_widths(classes)), selector()

        def by_cost(cost: Cost) -> Selection:
            found = paying.by_cost(cost, 1.0 - ratio, whole=1.0)
            # Narrower layers than those that pay best may still be what the budget takes.
            return found if found.reached else every.by_cost(cost, 1.0 - ratio, whole=1.0)

        selection, latency = search_latency(
            state.model,
            lambda keeps: start * times.ratio(keeps),
            stopwatch,
            goal,
            by_cost,
            context,
            config.policy,
        )
    elif kind == "ratio":
        selection = selector().by_ratio(ratio, lambda keeps: float(keeps.sum()))
    else:
        figure = _FIGURES[kind]
        selection = selector().by_cost(_cost(costs, figure), ratio, whole=figure(baseline.costs))
    return Decision(
        keeps=selection.keeps,
        reached=selection.reached,
        target_ratio=goal,
        skipped=candidates.skipped,
        latency=latency,
    )


def _damage(
    state: ModelState,
    classes: ChannelClasses,
    candidates: Candidates,
    config: PruneConfig,
    scorer: Scorer,
    context: PassContext,
) -> Mapping[str, DamageCurve] | None:
    if config.ranking != "sensitivity" or context.calibration is None:
        return None
    everything = np.ones(classes.num_classes, dtype=np.bool_)
    return damage_curves(
        state.model,
        config.policy,
        candidates.free,
        score_groups(classes, candidates.free, everything, scorer),
        context.calibration,
        custom_op_libraries=context.custom_op_libraries,
        progress=context.progress,
    )


_FIGURES: dict[str, Callable[[Costs], float]] = {
    "macs_ratio": lambda costs: float(costs.macs or 0),
    "params_ratio": lambda costs: float(costs.parameters),
    "bytes_ratio": lambda costs: float(costs.weight_bytes),
}


def _cost(costs: CostModel, figure: Callable[[Costs], float]) -> Cost:
    return lambda keeps: figure(costs.costs(keeps))
