"""Pruning in several iterations comes to what is asked of the model that the block began with."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.contracts import CanonicalModel, Iteration, ModelState, PassContext, PassOutcome
from onnxprune.ops.macs import count_macs_per_sample
from onnxprune.passes.harness import run_pass
from onnxprune.passes.prune import PruneConfig, PrunePass
from onnxprune.passes.prune.analysis import analyze_channels
from onnxprune.passes.prune.baseline import Baseline
from onnxprune.passes.prune.costs import CostModel
from tests.builders import canonical, proto_of

Schedule = Literal["linear", "geometric"]


def chain(*channels: int) -> CanonicalModel:
    """x (N,3,8,8) -> 3x3 convolutions of these widths -> y; weights w0, w1 ..."""
    rng = np.random.default_rng(0)
    nodes, weights, source, incoming = [], {}, "x", 3
    for index, width in enumerate(channels):
        weights[f"w{index}"] = rng.standard_normal((width, incoming, 3, 3)).astype(np.float32)
        node = helper.make_node("Conv", [source, f"w{index}"], [f"h{index}"], name=f"h{index}_conv", pads=[1] * 4)
        nodes.append(node)
        source, incoming = f"h{index}", width
    return canonical(proto_of(nodes, inputs={"x": [1, 3, 8, 8]}, outputs={source: None}, weights=weights))


def prune_in_iterations(
    model: CanonicalModel,
    *,
    times: int,
    schedule: Schedule = "linear",
    between: Callable[[CanonicalModel], CanonicalModel] = lambda model: model,
    **settings: Any,
) -> list[PassOutcome]:
    state = original = ModelState(model=model)
    outcomes = []
    for number in range(1, times + 1):
        iteration = Iteration(number=number, times=times, schedule=schedule, original=original)
        outcome = run_pass(PrunePass(PruneConfig(**settings)), state, PassContext(iteration=iteration))
        outcomes.append(outcome)
        state = ModelState(model=between(outcome.state.model))
    return outcomes


def filters(model: ir.Model) -> list[int]:
    return [
        int(value.shape.numpy()[0])
        for value in model.graph.initializers.values()
        if value.shape is not None and len(value.shape) == 4
    ]


# --- the schedule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [0.125, 0.25, 0.375, 0.5]), ("geometric", [1 - 0.5 ** (k / 4) for k in (1, 2, 3, 4)])],
)
def test_a_ratio_is_reached_along_its_schedule(schedule: Schedule, expected: list[float]) -> None:
    original = ModelState(model=chain(8))
    reached = [
        Iteration(number=k, times=4, schedule=schedule, original=original).ratio_by_now(0.5) for k in (1, 2, 3, 4)
    ]
    # A few roundings of doubles between 0 and 1.
    np.testing.assert_allclose(reached, expected, rtol=0, atol=1e-15)
    assert reached[-1] == 0.5


def test_a_part_of_an_iteration_counts_from_the_iteration_before() -> None:
    iteration = Iteration(number=2, times=4, original=ModelState(model=chain(8)))
    assert [iteration.ratio_by_now(0.8, part=part) for part in (0.0, 0.5, 1.0)] == [0.2, 0.8 * 0.375, 0.4]


# --- widths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "geometric"])
@pytest.mark.parametrize("ranking", ["per-layer", "global"])
def test_rounding_does_not_add_up_over_the_iterations(schedule: Schedule, ranking: str) -> None:
    settings = {"ratio": 0.5, "ranking": ranking, "channel_multiple": 1, "min_channels": 1}
    outcomes = prune_in_iterations(chain(10, 17, 33, 4), times=7, schedule=schedule, **settings)
    at_once = run_pass(PrunePass(PruneConfig(**settings)), ModelState(model=chain(10, 17, 33, 4)), PassContext())
    assert sum(filters(outcomes[-1].state.model)) == sum(filters(at_once.state.model))
    if ranking == "per-layer":
        assert filters(outcomes[-1].state.model) == [5, 9, 17, 4]


def test_linear_iterations_take_equal_parts_of_the_original() -> None:
    outcomes = prune_in_iterations(chain(64, 8), times=4, ratio=0.5, channel_multiple=1)
    assert [filters(outcome.state.model)[0] for outcome in outcomes] == [56, 48, 40, 32]


def test_geometric_iterations_take_equal_parts_of_what_is_left() -> None:
    outcomes = prune_in_iterations(chain(1000, 8), times=3, schedule="geometric", ratio=0.488, channel_multiple=1)
    # 0.8 ** 3 = 0.512; each width is rounded up from the original's part.
    assert [filters(outcome.state.model)[0] for outcome in outcomes] == [800, 640, 512]


def test_the_least_width_is_that_of_the_original() -> None:
    outcomes = prune_in_iterations(chain(128, 8), times=6, ratio=0.99, channel_multiple=1)
    # An eighth of 128, not an eighth of an eighth.
    assert filters(outcomes[-1].state.model)[0] == 16


def test_widths_stay_multiples_and_reach_the_ratio_all_the_same() -> None:
    outcomes = prune_in_iterations(chain(32, 8), times=8, ratio=0.5, channel_multiple=8)
    reached = [filters(outcome.state.model)[0] for outcome in outcomes]
    assert reached == [32, 32, 32, 24, 24, 24, 24, 16]


def test_scopes_follow_the_schedule_as_well() -> None:
    scopes = ({"match": "h0_conv", "ratio": 0.75},)
    outcomes = prune_in_iterations(chain(64, 64, 8), times=3, ratio=0.25, scopes=scopes, channel_multiple=1)
    assert [filters(outcome.state.model)[:2] for outcome in outcomes] == [[48, 59], [32, 54], [16, 48]]


def test_steps_inside_an_iteration_end_where_it_ends() -> None:
    outcomes = prune_in_iterations(chain(64, 8), times=2, ratio=0.5, steps=3, channel_multiple=1)
    assert [filters(outcome.state.model)[0] for outcome in outcomes] == [48, 32]


@pytest.mark.parametrize("target", ["macs_ratio", "params_ratio"])
def test_cost_targets_count_from_the_original(target: str) -> None:
    model = chain(64, 96, 64, 8)
    outcomes = prune_in_iterations(model, times=4, channel_multiple=1, **{target: 0.6})
    costs = [cost_of(outcome.state.model, target) / cost_of(model, target) for outcome in outcomes]
    for reached, asked in zip(costs, (0.85, 0.7, 0.55, 0.4), strict=True):
        # One channel of each of the three layers is less than 5 % of the cost here.
        assert asked - 0.05 < reached <= asked


def cost_of(model: CanonicalModel, target: str) -> int:
    if target == "macs_ratio":
        return count_macs_per_sample(model).total or 0
    return sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value is not None)


def test_what_an_iteration_removed_stays_removed_in_the_next_plan() -> None:
    outcomes = prune_in_iterations(chain(64, 8), times=2, ratio=0.5, channel_multiple=1)
    assert [outcome.plan.target_ratio for outcome in outcomes] == [0.25, 0.5]
    assert sum(len(group.removed) for group in outcomes[1].plan.groups) == 16


def test_a_pass_between_that_renames_the_weights_does_not_make_layers_lose_too_much() -> None:
    outcomes = prune_in_iterations(chain(64, 64, 8), times=4, between=renamed, ratio=0.5, channel_multiple=1)
    for outcome in outcomes:
        for width in filters(outcome.state.model)[:2]:
            assert width >= 32
    # Without names to go by each group is taken to have lost what it was asked for, to within the rounding of a width.
    assert all(abs(width - 32) <= 1 for width in filters(outcomes[-1].state.model)[:2])


def renamed(model: CanonicalModel) -> CanonicalModel:
    copy = model.clone()
    for value in list(copy.graph.initializers.values()):
        value.name = f"{value.name}x"
    return CanonicalModel(copy)


def test_groups_that_took_another_form_are_found_by_their_weight() -> None:
    wide, narrow = chain(64, 8), chain(48, 8)
    classes = analyze_channels(wide)
    baseline = Baseline.of(classes, CostModel(wide, classes))
    group = analyze_channels(narrow).groups[0]
    assert group.slices[0].key == "w0[0]"
    assert baseline.count(0.5, [group]) == 16
    assert baseline.count(0.25, [group]) == 0


def test_a_later_iteration_never_puts_channels_back() -> None:
    outcomes = prune_in_iterations(chain(40, 24, 8), times=5, schedule="geometric", ratio=0.7, min_channels=1)
    for before, after in pairwise(outcomes):
        assert all(b >= a for b, a in zip(filters(before.state.model), filters(after.state.model), strict=True))
