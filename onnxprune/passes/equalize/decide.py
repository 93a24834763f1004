"""Which way of equalizing is best, judged by what a trial quantization does to the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import CanonicalModel, PassContext
from onnxprune.graph.scope import require_scopes
from onnxprune.passes.equalize.absorb import absorbable
from onnxprune.passes.equalize.apply import apply_sites
from onnxprune.passes.equalize.config import EqualizeConfig
from onnxprune.passes.equalize.factors import Ranges, site_factors
from onnxprune.passes.equalize.plan import EqualizePlan, SitePlan
from onnxprune.passes.equalize.sites import Site, find_sites
from onnxprune.passes.layerwise.gain import WORTH_DB, Gain
from onnxprune.passes.layerwise.samples import SampleSplit, split_samples
from onnxprune.passes.layerwise.statistics import ChannelStatistics, channel_statistics
from onnxprune.passes.layerwise.trial import trial_snr_db

__all__ = ["decide"]

Array = npt.NDArray[Any]

_ALL: tuple[Ranges, ...] = ("weights", "activations", "depthwise")


def decide(model: CanonicalModel, config: EqualizeConfig, context: PassContext) -> EqualizePlan:
    """Factors for every site, the way that a trial quantization likes best; none where all do harm."""
    require_scopes(model, config.exclude, of="`exclude` of pass 'equalize'")
    sites, skipped = find_sites(model, exclude=config.exclude)
    split = split_samples(context.calibration, max_samples=config.num_samples) if context.calibration else None
    statistics: dict[str, ChannelStatistics] = {}
    if split is not None and sites:
        names = dict.fromkeys(name for site in sites for name in (site.tensor, site.raw))
        axes = {name: _channel_axis(model, name) for name in names}
        statistics = channel_statistics(model, axes, split.fit, custom_op_libraries=context.custom_op_libraries)
    kept: list[Site] = []
    for site in sites:
        reason = _refuse_clips(site, statistics, config)
        if reason is None:
            kept.append(site)
        else:
            skipped[site.producer.name or ""] = reason
    candidates = _candidates(kept, statistics, config, is_judged=split is not None)
    if split is None:
        name, plans = next(iter(candidates.items()), ("none", ()))
        return EqualizePlan(ranges=name, sites=plans, skipped=skipped)
    judged = _Judge(model, split, config, context)
    plan = judged.best(candidates, skipped)
    if not config.absorb_biases:
        return plan
    absorbing = _with_absorption(plan.sites, kept, statistics)
    return plan if absorbing is None else judged.with_absorption(plan, absorbing)


def _candidates(
    sites: Sequence[Site],
    statistics: Mapping[str, ChannelStatistics],
    config: EqualizeConfig,
    *,
    is_judged: bool,
) -> dict[str, tuple[SitePlan, ...]]:
    """Everything that is to be tried, by name; the ways that need statistics only where there are some."""
    ways: tuple[Ranges, ...] = _ALL if config.ranges == "auto" else (config.ranges,)
    magnitudes = {name: found.magnitude for name, found in statistics.items()}
    candidates: dict[str, tuple[SitePlan, ...]] = {}
    for ranges in ways:
        known = [site for site in sites if ranges == "weights" or site.tensor in magnitudes]
        factors = site_factors(known, magnitudes, ranges)
        plans = tuple(
            SitePlan(
                producer=site.producer.name or "",
                consumers=tuple(node.name or "" for node in site.consumers),
                factors=tuple(float(factor) for factor in factors[site.producer.name or ""]),
                clips=tuple(site.ceilings),
            )
            for site in known
            if (site.producer.name or "") in factors
        )
        if plans and (is_judged or ranges == "weights"):
            candidates[ranges] = plans
    return candidates


def _with_absorption(
    plans: tuple[SitePlan, ...], sites: Sequence[Site], statistics: Mapping[str, ChannelStatistics]
) -> tuple[SitePlan, ...] | None:
    """`plans` with what each site can absorb, sites that only absorb added; None where nothing can be absorbed."""
    by_producer = {plan.producer: plan for plan in plans}
    found: list[SitePlan] = []
    is_any = False
    for site in sites:
        name = site.producer.name or ""
        plan = by_producer.get(name)
        factors = np.asarray(plan.factors) if plan is not None else np.ones(site.channels)
        raw = statistics.get(site.raw)
        shift = absorbable(site, raw, factors) if raw is not None and not site.ceilings else np.zeros(site.channels)
        if shift.any():
            is_any = True
            plan = SitePlan(
                producer=name,
                consumers=tuple(node.name or "" for node in site.consumers),
                factors=tuple(float(factor) for factor in factors),
                absorbed=tuple(float(number) for number in shift),
            )
        if plan is not None:
            found.append(plan)
    return tuple(found) if is_any else None


class _Judge:
    """Tries plans with a trial quantization each."""

    def __init__(self, model: CanonicalModel, split: SampleSplit, config: EqualizeConfig, context: PassContext) -> None:
        self._model, self._split, self._config, self._context = model, split, config, context

    def best(self, candidates: Mapping[str, tuple[SitePlan, ...]], skipped: Mapping[str, str]) -> EqualizePlan:
        """The best of `candidates`, or none of them where they don't beat the model as it is."""
        if not candidates:
            return EqualizePlan(ranges="none", sites=(), skipped=skipped)
        before = self._snr_db(self._model)
        ways = self._context.progress.track(list(candidates), "Trying equalizations", len(candidates))
        found = {name: self._snr_db(self._changed(candidates[name])) for name in ways}
        best = max(found, key=lambda name: found[name])
        gain = Gain(before_db=before, after_db=found[best], measured_on=self._split.judged_on)
        return EqualizePlan(
            ranges=best if gain.is_worth_it else "none",
            sites=candidates[best] if gain.is_worth_it else (),
            skipped=skipped,
            gain=gain,
            is_undone=not gain.is_worth_it,
            tried_db=found,
        )

    def with_absorption(self, plan: EqualizePlan, absorbing: tuple[SitePlan, ...]) -> EqualizePlan:
        """`plan` with biases absorbed too, where that is better still."""
        after = self._snr_db(self._changed(absorbing))
        before = self._snr_db(self._model) if plan.gain is None else plan.gain.before_db
        so_far = before if plan.is_undone or plan.gain is None else plan.gain.after_db
        name = f"{plan.ranges}, biases absorbed"
        tried = {**(plan.tried_db or {}), name: after}
        if after < so_far + WORTH_DB:
            return replace(plan, tried_db=tried)
        gain = Gain(before_db=before, after_db=after, measured_on=self._split.judged_on)
        return replace(plan, ranges=name, sites=absorbing, gain=gain, is_undone=False, tried_db=tried)

    def _changed(self, plans: tuple[SitePlan, ...]) -> CanonicalModel:
        changed = CanonicalModel(self._model.clone())
        apply_sites(changed, plans)
        return changed

    def _snr_db(self, changed: CanonicalModel) -> float:
        return trial_snr_db(
            self._model,
            changed,
            self._split,
            self._context,
            per_channel=self._config.per_channel,
            weight_bits=self._config.weight_bits,
        )


def _refuse_clips(site: Site, statistics: Mapping[str, ChannelStatistics], config: EqualizeConfig) -> str | None:
    """Why the site's Clips can't become Relu; None where they can, or there are none."""
    for name, ceiling in site.ceilings.items():
        if not config.relax_clips:
            return f"'{name}' clips to {ceiling:g}, and `relax_clips` is off"
        known = statistics.get(site.tensor)
        if known is None:
            return f"'{name}' clips to {ceiling:g}, and there are no calibration data to show that it never does"
        if float(known.high.max(initial=0.0)) >= ceiling:
            return f"'{name}' clips to {ceiling:g}, which calibration data reach"
    return None


def _channel_axis(model: ir.Model, name: str) -> int:
    for value in _values(model):
        if value.name == name:
            return 1 if value.shape is not None and len(value.shape) > 2 else -1
    return 1


def _values(model: ir.Model) -> Iterator[ir.Value]:
    return (value for node in model.graph for value in node.outputs)
