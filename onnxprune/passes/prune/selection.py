"""Which classes go: ranking, targets, and the search for the fewest that reach a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxprune.graph.scope import matches_scope
from onnxprune.ops.channels.flow import Role
from onnxprune.passes.prune.analysis import ChannelClasses, ChannelGroup
from onnxprune.passes.prune.config import PruneConfig, ScopeRatio
from onnxprune.passes.prune.costs import CostModel
from onnxprune.passes.prune.criteria import CRITERIA
from onnxprune.passes.prune.limits import width_limits
from onnxprune.passes.prune.scoring import score_groups

__all__ = ["Selection", "matches", "select"]

Keeps = npt.NDArray[np.bool_]

# The search halves an interval of the removed part: 2**-14 of a model of 16,384 channels is one channel.
_SEARCH_STEPS = 14


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """What was decided.

    Attributes:
        keeps: One flag per class.
        skipped: Groups that `skip` or a scope of ratio 0 leaves alone, with the glob.
        reached: False when limits or frozen channels keep the target out of reach.
    """

    keeps: Keeps
    skipped: tuple[tuple[ChannelGroup, str], ...]
    reached: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Candidates:
    """Groups that may lose channels, by who decides how many."""

    free: tuple[ChannelGroup, ...]
    scoped: tuple[tuple[ChannelGroup, float], ...]
    skipped: tuple[tuple[ChannelGroup, str], ...]

    @property
    def all_groups(self) -> tuple[ChannelGroup, ...]:
        return (*self.free, *(group for group, _ in self.scoped))


def select(classes: ChannelClasses, costs: CostModel, config: PruneConfig, rng: np.random.Generator) -> Selection:
    """Choose the classes to remove.

    The lowest scores go first. A class is put back where its layer would break a limit. With several steps, each step
    goes its part of the way and ranks anew, with what is gone left out of the weights.

    Args:
        classes: Of the model.
        costs: Of the same model; its MACs must be known when the target is `macs_ratio`.
        config: What is asked.
        rng: For criteria that draw.
    """
    candidates = _candidates(classes, config)
    limits = width_limits(classes, min_channels=config.min_channels, channel_multiple=config.channel_multiple)
    keeps = np.ones(classes.num_classes, dtype=np.bool_)
    reached = True
    kind, ratio = config.target
    for step in range(1, config.steps + 1):
        part = step / config.steps
        scores = score_groups(classes, candidates.all_groups, keeps, CRITERIA[config.criterion], rng)
        choose = _chooser(candidates, scores, config, part, classes.num_classes)

        def repaired(
            removed_ratio: float,
            choose: Callable[[float], Keeps] = choose,
            scores: npt.NDArray[np.float64] = scores,
        ) -> Keeps:
            return limits.repaired(choose(removed_ratio), scores)

        if kind == "ratio":
            keeps = repaired(ratio * part)
        else:
            cost = _macs_of(costs) if kind == "macs_ratio" else _parameters_of(costs)
            keeps, reached = _search(repaired, cost, ratio * part)
    return Selection(keeps=keeps, skipped=candidates.skipped, reached=reached)


def matches(glob: str, group: ChannelGroup) -> bool:
    """True when `glob` means a layer that produces the group's channels, its filters, or a module around it."""
    filters = (place.weight.name for place in group.slices if place.role is Role.FILTER)
    return matches_scope(glob, *group.layers, *filters, module_paths=group.modules)


def _candidates(classes: ChannelClasses, config: PruneConfig) -> _Candidates:
    free: list[ChannelGroup] = []
    scoped: list[tuple[ChannelGroup, float]] = []
    skipped: list[tuple[ChannelGroup, str]] = []
    for group in classes.groups:
        if group.frozen_reason is not None:
            continue
        glob = next((glob for glob in config.skip if matches(glob, group)), None)
        if glob is not None:
            skipped.append((group, f"skip = '{glob}'"))
            continue
        scope = _scope_of(group, config.scopes)
        if scope is None:
            free.append(group)
        elif scope.ratio > 0:
            scoped.append((group, scope.ratio))
        else:
            skipped.append((group, f"scope '{scope.match}' has ratio 0"))
    return _Candidates(
        free=tuple(free),
        scoped=tuple(scoped),
        skipped=tuple(skipped),
    )


def _scope_of(group: ChannelGroup, scopes: Sequence[ScopeRatio]) -> ScopeRatio | None:
    return next((scope for scope in scopes if matches(scope.match, group)), None)


def _chooser(
    candidates: _Candidates,
    scores: npt.NDArray[np.float64],
    config: PruneConfig,
    part: float,
    num_classes: int,
) -> Callable[[float], Keeps]:
    """A function from the removed part of the free groups to flags per class. More is a superset of less."""
    per_group = [
        (group.classes[np.argsort(scores[group.classes], kind="stable")], fixed_ratio)
        for group, fixed_ratio in (*((group, None) for group in candidates.free), *candidates.scoped)
    ]
    pool = np.concatenate([group.classes for group in candidates.free]) if candidates.free else np.zeros(0, np.int64)
    ranked_pool = pool[np.argsort(scores[pool], kind="stable")]

    def choose(removed_ratio: float) -> Keeps:
        keeps = np.ones(num_classes, dtype=np.bool_)
        for ranked, fixed_ratio in per_group:
            if fixed_ratio is not None:
                keeps[ranked[: _count(fixed_ratio * part, len(ranked))]] = False
            elif config.ranking == "per-layer":
                keeps[ranked[: _count(removed_ratio, len(ranked))]] = False
        if config.ranking == "global":
            keeps[ranked_pool[: _count(removed_ratio, len(ranked_pool))]] = False
        return keeps

    return choose


def _count(ratio: float, size: int) -> int:
    """How many of `size` channels `ratio` is, rounded down; 0.3 * 10 is 3, whatever floats say."""
    return int(ratio * size + 1e-9)


def _macs_of(costs: CostModel) -> Callable[[Keeps], int]:
    return lambda keeps: costs.costs(keeps).macs or 0


def _parameters_of(costs: CostModel) -> Callable[[Keeps], int]:
    return lambda keeps: costs.costs(keeps).parameters


def _search(choose: Callable[[float], Keeps], cost: Callable[[Keeps], int], target: float) -> tuple[Keeps, bool]:
    """The smallest removed part whose cost is down by `target`, and whether any part is."""
    nothing = choose(0.0)
    allowed = cost(np.ones_like(nothing)) * (1.0 - target)
    if cost(nothing) <= allowed:
        return nothing, True
    low, high = 0.0, 1.0
    best = choose(high)
    if cost(best) > allowed:
        return best, False
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        keeps = choose(middle)
        if cost(keeps) <= allowed:
            high, best = middle, keeps
        else:
            low = middle
    return best, True
