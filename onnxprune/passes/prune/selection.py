"""Which classes go: the groups that may lose some, and the search for the fewest that reach a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxprune.graph.scope import matches_scope
from onnxprune.ops.channels import LabelArray, Role
from onnxprune.passes.prune.allocation import (
    Chooser,
    Cost,
    DamageCurve,
    damage_rates,
    make_chooser,
    savings_per_channel,
)
from onnxprune.passes.prune.analysis import ChannelClasses, ChannelGroup
from onnxprune.passes.prune.baseline import Baseline
from onnxprune.passes.prune.config import PruneConfig, ScopeRatio
from onnxprune.passes.prune.limits import WidthLimits
from onnxprune.passes.prune.scoring import Scorer, score_groups

__all__ = ["Candidates", "Selection", "Selector", "find_candidates", "matches"]

Keeps = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float64]

# The search halves an interval of the removed part: 2**-14 of a model of 16,384 channels is one channel.
_SEARCH_STEPS = 14


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """What was decided.

    Attributes:
        keeps: One flag per class.
        reached: False when limits or frozen channels keep the target out of reach.
    """

    keeps: Keeps
    reached: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidates:
    """Groups that may lose channels, by who decides how many.

    Attributes:
        free: Share the target.
        scoped: Have a ratio of their own.
        skipped: Groups that `skip` or a scope of ratio 0 leaves alone, with the glob.
    """

    free: tuple[ChannelGroup, ...]
    scoped: tuple[tuple[ChannelGroup, float], ...]
    skipped: tuple[tuple[ChannelGroup, str], ...]

    @property
    def all_groups(self) -> tuple[ChannelGroup, ...]:
        """Those that may lose channels."""
        return (*self.free, *(group for group, _ in self.scoped))


class Selector:
    """Chooses the classes to remove, for any budget.

    The lowest scores go first. A class is put back where its layer would break a limit. With several steps, each step
    goes its part of the way and ranks anew, with what is gone left out of the weights.
    """

    def __init__(
        self,
        classes: ChannelClasses,
        candidates: Candidates,
        limits: WidthLimits,
        config: PruneConfig,
        scorer: Scorer,
        baseline: Baseline,
        *,
        damage: Mapping[str, DamageCurve] | None = None,
    ) -> None:
        """Prepare to choose.

        Args:
            classes: Of the model.
            candidates: Groups that may lose channels.
            limits: What no choice may break.
            config: How the removed part is shared, and in how many steps.
            scorer: Tells which channels matter least.
            baseline: What ratios count from.
            damage: By the id of each free group; for the ranking "sensitivity".
        """
        self._classes = classes
        self._candidates = candidates
        self._limits = limits
        self._config = config
        self._scorer = scorer
        self._baseline = baseline
        self._damage = damage
        self._scores: dict[bytes, Scores] = {}

    def by_ratio(self, ratio: float, cost: Cost) -> Selection:
        """Remove `ratio` of the baseline's channels; `cost` is what "sensitivity" weighs damage against."""
        keeps = np.ones(self._classes.num_classes, dtype=np.bool_)
        for part in self._parts():
            keeps = self._chooser(keeps, part, cost)(self._baseline.ratio_at(ratio, part))
        return Selection(keeps=keeps, reached=True)

    def by_cost(self, cost: Cost, ratio: float, *, whole: float) -> Selection:
        """Remove the fewest channels with which `cost` is down by `ratio` of `whole`, what the baseline costs."""
        keeps = np.ones(self._classes.num_classes, dtype=np.bool_)
        reached = True
        for part in self._parts():
            allowed = whole * (1.0 - self._baseline.ratio_at(ratio, part))
            choose = self._chooser(keeps, part, cost)
            scores = self._score(keeps)
            found = _search(choose, cost, allowed)
            keeps, reached = found.keeps, found.reached
            if found.before is not None:
                keeps = self._refined(keeps, found.before, cost, allowed, scores)
        return Selection(keeps=keeps, reached=reached)

    def _refined(self, keeps: Keeps, before: Keeps, cost: Cost, allowed: float, scores: Scores) -> Keeps:
        """`keeps` with what it need not remove put back, group by group.

        Where widths move in steps, many groups take a step at the same removed part. `before` is the choice before that
        step, which costs too much. Groups go back to it in the order of importance per cost, as many as fit; of the
        next one go back as many channels as fit, which need not be a width that kernels like.
        """
        changed = [group.classes[before[group.classes] & ~keeps[group.classes]] for group in self._candidates.free]
        changed = [own[np.argsort(-scores[own], kind="stable")] for own in changed if len(own)]

        def put_back(own: Sequence[LabelArray], *, rounds: bool = True) -> Keeps:
            wider = keeps.copy()
            for classes in own:
                wider[classes] = True
            return self._limits.repaired(wider, scores, rounds=rounds)

        base = cost(keeps)
        worth = [float(scores[own].sum()) / max(cost(_with(keeps, own)) - base, 1e-12 * base) for own in changed]
        order = [changed[index] for index in np.argsort([-value for value in worth], kind="stable")]
        num_groups = _most(len(order), lambda count: cost(put_back(order[:count])) <= allowed)
        if num_groups:
            keeps = put_back(order[:num_groups])
        if num_groups == len(order):
            return keeps
        own = order[num_groups]
        num_channels = _most(len(own), lambda count: cost(put_back([own[:count]], rounds=False)) <= allowed)
        return put_back([own[:num_channels]], rounds=False) if num_channels else keeps

    def _parts(self) -> list[float]:
        return [step / self._config.steps for step in range(1, self._config.steps + 1)]

    def _chooser(self, keeps: Keeps, part: float, cost: Cost) -> Chooser:
        """Flags that break no limit, by the removed part; `keeps` is what earlier steps left."""
        scores = self._score(keeps)
        rates = None
        if self._damage is not None:
            savings = savings_per_channel(self._candidates.free, keeps, cost)
            rates = damage_rates(self._candidates.free, scores, self._damage, savings, self._classes.num_classes)
        choose = make_chooser(
            self._classes,
            self._candidates.free,
            self._candidates.scoped,
            scores,
            self._config,
            self._baseline,
            part=part,
            rates=rates,
        )
        return lambda removed_ratio: self._limits.repaired(choose(removed_ratio), scores)

    def _score(self, keeps: Keeps) -> Scores:
        # Budgets are searched more than once, and scores may take a pass over data.
        key = keeps.tobytes()
        if key not in self._scores:
            self._scores[key] = score_groups(self._classes, self._candidates.all_groups, keeps, self._scorer)
        return self._scores[key]


def _with(keeps: Keeps, own: LabelArray) -> Keeps:
    wider = keeps.copy()
    wider[own] = True
    return wider


def find_candidates(classes: ChannelClasses, config: PruneConfig) -> Candidates:
    """The groups that may lose channels, and those that `config` leaves alone."""
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
    return Candidates(free=tuple(free), scoped=tuple(scoped), skipped=tuple(skipped))


def matches(glob: str, group: ChannelGroup) -> bool:
    """True when `glob` means a layer that produces the group's channels, its filters, or a module around it."""
    filters = (place.weight.name for place in group.slices if place.role is Role.FILTER)
    return matches_scope(glob, *group.layers, *filters, module_paths=group.modules)


def _scope_of(group: ChannelGroup, scopes: Sequence[ScopeRatio]) -> ScopeRatio | None:
    return next((scope for scope in scopes if matches(scope.match, group)), None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Found:
    """The flags of the smallest removed part within the budget, and of the largest one tried that is not."""

    keeps: Keeps
    reached: bool
    before: Keeps | None = None


def _search(choose: Callable[[float], Keeps], cost: Cost, allowed: float) -> _Found:
    """Bisect the removed part: the smallest one that costs at most `allowed`."""
    before = choose(0.0)
    if cost(before) <= allowed:
        return _Found(keeps=before, reached=True)
    low, high = 0.0, 1.0
    best = choose(high)
    if cost(best) > allowed:
        return _Found(keeps=best, reached=False)
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        keeps = choose(middle)
        if cost(keeps) <= allowed:
            high, best = middle, keeps
        else:
            low, before = middle, keeps
    return _Found(keeps=best, reached=True, before=before)


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to `limit` that fits; 0 always does, and less fits where more does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
