"""Who gives how many channels: budgets that are reached, and damage that is spread so that its sum is least."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from onnxprune.contracts import PassOutcome
from onnxprune.graph.weights import weight_bytes
from onnxprune.passes.prune import PruneConfig, PrunePass
from onnxprune.passes.prune.allocation import DamageCurve, damage_rates, savings_per_channel
from onnxprune.passes.prune.analysis import ChannelClasses, ChannelGroup, analyze_channels
from onnxprune.passes.prune.costs import CostModel
from tests.builders import conv_net
from tests.layers import chain

RunVerified = Callable[..., PassOutcome]


def prune(**settings: Any) -> PrunePass:
    return PrunePass(PruneConfig(**settings))


def free_groups(classes: ChannelClasses) -> list[ChannelGroup]:
    return [group for group in classes.groups if group.frozen_reason is None]


# --- bytes ----------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_initializers_as_they_are_stored() -> None:
    model = conv_net(dtype=np.float16)
    classes = analyze_channels(model)
    costs = CostModel(model, classes).costs(np.ones(classes.num_classes, dtype=np.bool_))
    assert costs.weight_bytes == weight_bytes(model)


@pytest.mark.parametrize("ranking", ["per-layer", "global"])
def test_a_budget_of_bytes_is_reached_with_hardly_more_than_is_asked(run_verified: RunVerified, ranking: str) -> None:
    outcome = run_verified(prune(ranking=ranking, bytes_ratio=0.4), chain(64, 64, 64, 10))
    before, after = (outcome.report.figures[f"weight_bytes_{when}"] for when in ("before", "after"))
    assert after == weight_bytes(outcome.state.model)
    assert 0.4 <= 1 - after / before < 0.4 + 0.03


def test_two_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="give one target, not macs_ratio and bytes_ratio"):
        PruneConfig(macs_ratio=0.5, bytes_ratio=0.5)


def test_a_budget_leaves_one_layer_at_most_off_the_widths_that_kernels_like(run_verified: RunVerified) -> None:
    outcome = run_verified(prune(params_ratio=0.37), chain(64, 96, 128, 10))
    widths = [int(change.figures["channels_after"]) for change in outcome.report.changes]
    assert sum(width % 8 != 0 for width in widths) <= 1


# --- damage ---------------------------------------------------------------------------------------------------


def rates_of(
    exponents: tuple[float, float], scales: tuple[float, float]
) -> tuple[list[ChannelGroup], np.ndarray, np.ndarray]:
    """Two groups of 6 and 8 channels with these curves; scores rise with the class."""
    classes = analyze_channels(chain(6, 8, 4))
    groups = free_groups(classes)
    curves = {
        group.id: DamageCurve(scale=scale, exponent=exponent)
        for group, scale, exponent in zip(groups, scales, exponents, strict=True)
    }
    scores = np.arange(1.0, classes.num_classes + 1)
    return groups, scores, damage_rates(groups, scores, curves, np.array([2.0, 1.0]), classes.num_classes)


def test_damage_rates_rise_within_a_group_so_that_the_greedy_order_is_right() -> None:
    groups, scores, rates = rates_of((1.0, 2.5), (0.3, 0.7))
    for group in groups:
        order = group.classes[np.argsort(scores[group.classes])]
        assert (np.diff(rates[order]) >= 0).all()


def test_taking_the_lowest_rates_first_gives_the_least_damage_for_what_is_saved() -> None:
    groups, _, rates = rates_of((1.0, 2.0), (0.4, 0.9))
    first, second = (rates[group.classes] for group in groups)
    # What is saved a channel: 2 in the first group, 1 in the second; damage = rate * saving.
    for count in range(1, len(first) + len(second)):
        order = np.argsort(np.concatenate([first, second]))[:count]
        taken = (int((order < len(first)).sum()), int((order >= len(first)).sum()))
        saved = 2 * taken[0] + taken[1]
        damage = 2 * first[: taken[0]].sum() + second[: taken[1]].sum()
        others = [
            2 * first[:a].sum() + second[:b].sum()
            for a, b in itertools.product(range(len(first) + 1), range(len(second) + 1))
            if 2 * a + b >= saved
        ]
        assert damage <= min(others) + 1e-12


def test_what_is_gone_already_comes_first_and_its_damage_is_not_counted_again() -> None:
    classes = analyze_channels(chain(8, 4))
    (group,) = free_groups(classes)
    scores = np.full(classes.num_classes, np.nan)
    scores[group.classes] = [-np.inf, -np.inf, 1, 1, 1, 1, 1, 1]
    rates = damage_rates(
        [group], scores, {group.id: DamageCurve(scale=1.0, exponent=2.0)}, np.ones(1), classes.num_classes
    )
    assert np.isneginf(rates[group.classes[:2]]).all()
    assert rates[group.classes[2:]].sum() == pytest.approx(1.0 - 0.25**2, abs=1e-12)


def test_savings_are_what_a_channel_of_the_first_half_brings() -> None:
    model = chain(8, 16, 4)
    classes = analyze_channels(model)
    costs = CostModel(model, classes)
    groups = free_groups(classes)
    everything = np.ones(classes.num_classes, dtype=np.bool_)
    savings = savings_per_channel(groups, everything, lambda keeps: costs.costs(keeps).parameters)
    # A filter of the first layer has 3 weights and 16 readers; of the second 8 weights and 4 readers.
    assert savings.tolist() == [3 + 16, 8 + 4]
