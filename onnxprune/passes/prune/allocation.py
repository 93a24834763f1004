"""How many channels each layer gives: from one number, the removed part, to flags for every class.

    per-layer     the same part of every group, its lowest scores first
    global        the lowest scores of all groups (of all groups of one structure with isomorphic grouping)
    sensitivity   the least predicted damage for what is saved

**Sensitivity.** Calibration gave each group a curve of damage over the removed part s of its importance, D(s) = a s^b
with b >= 1 (`sensitivity`). With the channels of a group in the order of their scores, the k-th adds D(s_k) - D(s_k-1),
and saves c, the same for every channel of the group. Damage of different groups is taken to add up. As each group's
damages never fall with k, taking the least damage per saving everywhere, again and again, gives the least sum of damage
for what is saved in all (marginal analysis: Fox, "Discrete optimization via marginal analysis", Management Science 13,
1966; for a budget, as in the greedy solution of the fractional knapsack, Dantzig 1957). So one ranking of all channels
by damage per saving serves every budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from onnxprune.ops.channels import LabelArray
from onnxprune.passes.prune.analysis import ChannelClasses, ChannelGroup
from onnxprune.passes.prune.baseline import Baseline
from onnxprune.passes.prune.config import PruneConfig
from onnxprune.passes.prune.isomorphism import isomorphic_sets

__all__ = ["Chooser", "Cost", "DamageCurve", "damage_rates", "make_chooser", "savings_per_channel"]

Keeps: TypeAlias = npt.NDArray[np.bool_]
Scores: TypeAlias = npt.NDArray[np.float64]
Cost: TypeAlias = Callable[[Keeps], float]
"""What the model costs when exactly the flagged classes stay: MACs, parameters, bytes, milliseconds."""
Chooser: TypeAlias = Callable[[float], Keeps]
"""From the part of the baseline's channels that shall be gone to flags per class; more is a superset of less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DamageCurve:
    """How far the outputs move when a part s of a group's importance is gone: scale * s ** exponent."""

    scale: float
    exponent: float

    def at(self, removed: Scores) -> Scores:
        """The damage; `removed` is from 0 to 1."""
        return np.asarray(self.scale * removed**self.exponent)


def make_chooser(
    classes: ChannelClasses,
    free: Sequence[ChannelGroup],
    scoped: Sequence[tuple[ChannelGroup, float]],
    scores: Scores,
    config: PruneConfig,
    baseline: Baseline,
    *,
    part: float = 1.0,
    rates: Scores | None = None,
) -> Chooser:
    """The function from the part of the `free` groups that shall be gone to flags per class.

    Args:
        classes: Of the model.
        free: Groups that share the removed part.
        scoped: Groups with the part that each of them loses in any case.
        scores: One per class.
        config: Says how the part is shared.
        baseline: What parts count from.
        part: How much of this pass shall be done: scoped groups lose that part of theirs.
        rates: Damage per saving of each class, for the ranking "sensitivity".
    """
    fixed = np.ones(classes.num_classes, dtype=np.bool_)
    for group, ratio in scoped:
        count = baseline.count(baseline.ratio_at(ratio, part), [group])
        fixed[_ranked(group.classes, scores)[:count]] = False
    pools: list[Sequence[ChannelGroup]]
    if config.ranking == "per-layer":
        pools = [[group] for group in free]
    elif config.grouping == "isomorphic":
        pools = [own for own in isomorphic_sets(classes, free) if own]
    else:
        pools = [free] if free else []
    order = scores if rates is None else rates
    ranked = [(_ranked(np.concatenate([group.classes for group in pool]), order), pool) for pool in pools]

    def choose(removed_ratio: float) -> Keeps:
        keeps = fixed.copy()
        for own, pool in ranked:
            keeps[own[: baseline.count(removed_ratio, pool)]] = False
        return keeps

    return choose


def savings_per_channel(groups: Sequence[ChannelGroup], keeps: Keeps, cost: Cost) -> Scores:
    """What removing one channel of each group saves, at least a millionth of the whole; in the order of `groups`.

    Taken over the first half of the group's channels: a layer's time falls in steps.
    """
    whole = cost(keeps)
    savings = np.empty(len(groups))
    for index, group in enumerate(groups):
        without = keeps.copy()
        alive = group.classes[keeps[group.classes]]
        half = alive[: max(1, len(alive) // 2)]
        without[half] = False
        savings[index] = (whole - cost(without)) / max(1, len(half))
    return np.maximum(savings, 1e-6 * max(whole, 1e-300))


def damage_rates(
    groups: Sequence[ChannelGroup],
    scores: Scores,
    curves: Mapping[str, DamageCurve],
    savings: Scores,
    num_classes: int,
) -> Scores:
    """Damage per saving of each class, as its group loses its channels in the order of `scores`.

    Classes that are gone already (score minus infinity) come first. NaN for classes of no group in `groups`.
    """
    rates = np.full(num_classes, np.nan)
    for group, saving in zip(groups, savings, strict=True):
        ranked = _ranked(group.classes, scores)
        is_gone = np.isneginf(scores[ranked])
        rates[ranked[is_gone]] = -np.inf
        alive = ranked[~is_gone]
        if not len(alive):
            continue
        gone_part = is_gone.mean()
        importance = np.cumsum(np.maximum(scores[alive], 0.0))
        if importance[-1] <= 0:
            importance = np.arange(1, len(alive) + 1, dtype=np.float64)
        removed = gone_part + (1.0 - gone_part) * importance / importance[-1]
        damage = curves[group.id].at(np.concatenate([[gone_part], removed]))
        rates[alive] = np.diff(damage) / saving
    return rates


def _ranked(own: LabelArray, order: Scores) -> LabelArray:
    """The classes `own`, lowest first, equal ones in the order of the channels."""
    return own[np.argsort(order[own], kind="stable")]
