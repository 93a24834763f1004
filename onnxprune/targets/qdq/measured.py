"""Placement by what this machine takes: a node is integer where that pays.

1. Every node is timed in float and in integers, in its place in the model (`profiled`), and the minimum cut chooses.
   Its choice replaces the operator table's where the whole model is faster by it beyond doubt.
2. The integer part is cut into regions, and each is timed against its float twin, with the conversions at its border.
   What loses beyond doubt goes back to float. That changes its neighbours' borders, so it is done again.
3. The whole is timed against the float model. Where it loses beyond doubt, all of it goes back.

Where timings leave doubt, the operator table's choice stands. All comparisons are of runs in turn, and of times as if
nothing else ran (`runtime.latency.timed_pair`); all are kept on disk by the structure of what was timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from onnxprune.contracts import Batch, NullProgress, Placement, Progress, QuantizationPlan, RegionTiming
from onnxprune.errors import OnnxPruneError
from onnxprune.ops.planned import planned_nodes
from onnxprune.runtime.feeds import working_feeds
from onnxprune.runtime.latency import PairTiming
from onnxprune.runtime.model_timing import ModelTimer
from onnxprune.runtime.sessions import ort_runner_from_model
from onnxprune.targets.qdq.cost_table import TableCosts
from onnxprune.targets.qdq.costs import PlacementCosts
from onnxprune.targets.qdq.place import NOT_WORTH_REASON, place
from onnxprune.targets.qdq.profiled import ProfiledCosts, profiled_costs
from onnxprune.targets.qdq.region_models import region_models
from onnxprune.targets.qdq.regions import Region, find_regions
from onnxprune.targets.qdq.spell import spell
from onnxprune.targets.qdq.spelling import SpellingName
from onnxprune.targets.qdq.writer import IntegerUnit

__all__ = ["MeasuredPlacement", "measured_placement"]

# How many regions a model is cut into where it allows, and the least that one should take to be timed well.
_REGIONS = 12
_MIN_REGION_MS = 0.05
_MAX_ROUNDS = 3
# A region leaves the integers where float is faster by so much more than the timing's error.
_REGION_MARGIN = 0.02
_WHOLE_MARGIN = 0.005
# No further region is timed after so long; what was not timed keeps the choice it has.
_REGIONS_S = 25.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPlacement:
    """A placement with what decided it.

    `float_ms` and `integer_ms` are of the whole model, None where it was not timed. `notes` say what did not go as it
    should: a model that can't be timed, regions that time did not suffice for.
    """

    placement: Placement
    regions: tuple[RegionTiming, ...] = ()
    float_ms: float | None = None
    integer_ms: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_all_float(self) -> bool:
        """True when integers as a whole did not pay, so there are none."""
        return self.integer_ms is not None and not self.placement.integer_nodes


def measured_placement(
    model: ir.Model,
    plan: QuantizationPlan,
    spelling: SpellingName,
    *,
    timer: ModelTimer,
    seed: int = 0,
    progress: Progress | None = None,
) -> MeasuredPlacement:
    """Choose the nodes of `model` that are integer by timing them on this machine, which is the target.

    Args:
        model: The float model that `plan` was made for. It is not changed.
        plan: Scales; what it leaves out stays float.
        spelling: This machine's.
        timer: How the artifact will run.
        seed: For the inputs that are timed.
        progress: Follows the regions.

    Returns:
        The placement. It is the operator table's, with a note, where the model can't be timed.
    """
    table = place(model, plan, spelling)
    if not table.integer_nodes:
        return MeasuredPlacement(placement=table)
    try:
        feeds, run_s = _feeds(model, timer, seed)
        job = _Job(model=model, plan=plan, spelling=spelling, timer=timer, feeds=feeds)
        return _measure(job, table, run_s, progress or NullProgress())
    except OnnxPruneError as error:
        note = f"The operator table decided, because timing failed: {error.message}"
        return MeasuredPlacement(placement=table, notes=(note,))


def _feeds(model: ir.Model, timer: ModelTimer, seed: int) -> tuple[Batch, float]:
    """Inputs that the model takes, and the seconds that one run takes."""
    runner = timer.runner(model)
    feeds = working_feeds(runner, seed=seed)
    started = time.perf_counter()
    runner.run(feeds)
    return feeds, max(time.perf_counter() - started, 1e-5)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What all steps share."""

    model: ir.Model
    plan: QuantizationPlan
    spelling: SpellingName
    timer: ModelTimer
    feeds: Batch
    spelled: dict[tuple[str, ...], ir.Model] = field(default_factory=dict)

    def place(self, costs: PlacementCosts, returned: Mapping[str, str]) -> Placement:
        return place(self.model, self.plan, self.spelling, costs=costs, returned=returned)

    def spell(self, placement: Placement) -> ir.Model:
        key = placement.integer_nodes
        if key not in self.spelled:
            self.spelled[key] = spell(self.model, self.plan, placement, self.spelling)
        return self.spelled[key]

    def compare(self, before: Placement | None, after: Placement) -> PairTiming:
        """Whole models; `before` None is the float model."""
        first = self.model if before is None else self.spell(before)
        return self.timer.pair(first, self.spell(after), self.feeds, round_seconds=0.3, max_rounds=8)


def _measure(job: _Job, table: Placement, run_s: float, progress: Progress) -> MeasuredPlacement:
    profiled = profiled_costs(job.model, job.plan, job.spelling, timer=job.timer, feeds=job.feeds, run_s=run_s)
    costs, chosen = _better_of_table_and_profile(job, table, profiled)
    found = _regions_that_pay(job, chosen, costs, profiled, progress)
    if found.returned and (not found.placement.integer_nodes or _is_slower(job.compare(chosen, found.placement))):
        # Regions alone were misleading: together they are faster.
        found = _Found(
            placement=chosen,
            timings=tuple(replace(timing, is_integer=True) for timing in found.timings),
            notes=found.notes,
        )
    whole = job.compare(None, found.placement)
    placement, timings = found.placement, found.timings
    if _is_slower(whole):
        reason = f"int8 as a whole takes {whole.after_ms:.2f} ms on this machine and float {whole.before_ms:.2f} ms"
        integer = placement.integer_nodes
        reasons = {**placement.float_nodes, **dict.fromkeys(integer, reason)}
        placement = replace(placement, integer_nodes=(), float_nodes=reasons)
        timings = tuple(replace(timing, is_integer=False) for timing in timings)
    return MeasuredPlacement(
        placement=replace(placement, float_nodes=_reasons(job, placement, profiled), decided_by="measured"),
        regions=timings,
        float_ms=whole.before_ms,
        integer_ms=whole.after_ms,
        notes=found.notes,
    )


def _better_of_table_and_profile(
    job: _Job, table: Placement, profiled: ProfiledCosts
) -> tuple[PlacementCosts, Placement]:
    by_profile = job.place(profiled, {})
    if not by_profile.integer_nodes or by_profile.integer_nodes == table.integer_nodes:
        return TableCosts(job.spelling), table
    timing = job.compare(table, by_profile)
    is_faster = timing.ratio - max(2 * timing.error, _WHOLE_MARGIN) > 1
    return (profiled, by_profile) if is_faster else (TableCosts(job.spelling), table)


def _is_slower(timing: PairTiming, margin: float = _WHOLE_MARGIN) -> bool:
    return timing.ratio + max(2 * timing.error, margin) < 1


# --- regions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    placement: Placement
    timings: tuple[RegionTiming, ...]
    returned: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _regions_that_pay(
    job: _Job, chosen: Placement, costs: PlacementCosts, profiled: ProfiledCosts, progress: Progress
) -> _Found:
    """`chosen` without the regions that are slower than their float twins."""
    deadline = time.monotonic() + _REGIONS_S
    returned: dict[str, str] = {}
    lost: list[RegionTiming] = []
    kept: list[RegionTiming] = []
    untimed = 0
    placement = chosen
    region_ms = _region_ms(chosen, profiled)
    timed: dict[Region, PairTiming | None] = {}
    for _ in range(_MAX_ROUNDS):
        regions = find_regions(job.model, placement, cost_of=_cost_of(profiled), region_cost=region_ms)
        new = [region for region in regions if region not in timed]
        tensors = _border_tensors(job, new) if new else {}
        for region in progress.track(new, "timing regions", total=len(new)):
            timed[region] = _time_region(job, region, tensors) if time.monotonic() < deadline else None
        kept, losers, untimed = [], [], 0
        for region in regions:
            timing = timed[region]
            if timing is None:
                untimed += 1
            elif _is_slower(timing, _REGION_MARGIN):
                losers.append(_region_timing(region, timing, is_integer=False))
            else:
                kept.append(_region_timing(region, timing, is_integer=True))
        if not losers:
            break
        lost.extend(losers)
        for loser in losers:
            reason = f"returned to float: {loser.float_ms:.3f} ms measured in float, {loser.integer_ms:.3f} ms in int8"
            returned.update(dict.fromkeys(loser.nodes, reason))
        placement = job.place(costs, returned)
    integer = set(placement.integer_nodes)
    still = [timing for timing in kept if integer.issuperset(timing.nodes)]
    notes = (f"{untimed} regions were not timed by themselves and stay as they are.",) if untimed else ()
    return _Found(placement=placement, timings=(*still, *lost), returned=returned, notes=notes)


def _region_ms(placement: Placement, profiled: ProfiledCosts) -> float:
    integer = set(placement.integer_nodes)
    total = sum(found.float_ms for name, found in profiled.costs.items() if name in integer)
    return max(total / _REGIONS, _MIN_REGION_MS)


def _cost_of(profiled: ProfiledCosts) -> Callable[[IntegerUnit], float]:
    def cost(unit: IntegerUnit) -> float:
        found = profiled.costs.get(unit.node.name or "")
        return 0.0 if found is None else found.float_ms

    return cost


def _border_tensors(job: _Job, regions: list[Region]) -> Batch:
    """The tensors that the regions read, as one run of the float model makes them."""
    fed = {value.name for value in job.model.graph.inputs}
    names = sorted({name for region in regions for name in region.inputs} - fed)
    runner = ort_runner_from_model(
        job.model, custom_op_libraries=job.timer.custom_op_libraries, optimization="basic", extra_outputs=names
    )
    return {**job.feeds, **runner.run(job.feeds)}


def _time_region(job: _Job, region: Region, tensors: Batch) -> PairTiming | None:
    """The region's float twin before its integer form; None where they can't be run alone."""
    models = region_models(job.model, job.plan, region, job.spelling)
    try:
        return job.timer.pair(
            models.float_twin, models.integer, models.feeds(tensors), round_seconds=0.08, max_rounds=6
        )
    except OnnxPruneError:
        return None


def _region_timing(region: Region, timing: PairTiming, *, is_integer: bool) -> RegionTiming:
    return RegionTiming(
        nodes=region.nodes, float_ms=timing.before_ms, integer_ms=timing.after_ms, is_integer=is_integer
    )


# --- what is said -----------------------------------------------------------------------------------------------------


def _reasons(job: _Job, placement: Placement, profiled: ProfiledCosts) -> dict[str, str]:
    """The reasons of `placement`, with the times of every node that was not worth it."""
    reasons = dict(placement.float_nodes)
    for planned in planned_nodes(job.model, job.plan):
        found = profiled.costs.get(planned.names[0])
        if found is None or reasons.get(planned.names[0]) != NOT_WORTH_REASON:
            continue
        reasons.update(dict.fromkeys(planned.names, _not_worth(found.float_ms, found.integer_ms)))
    return reasons


def _not_worth(float_ms: float, integer_ms: float) -> str:
    times = f"{float_ms:.3f} ms measured in float, {integer_ms:.3f} ms in int8"
    return times if integer_ms >= float_ms else f"{times}, and its conversions cost more than that saves"
