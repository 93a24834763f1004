"""A budget of time: which widths pay, what is predicted, and the search that measures and corrects.

Times are made up, so that nothing here depends on the machine: a layer takes what its MACs take when its channels are
rounded up to blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxprune.contracts import Iteration, ModelState, NullProgress, PassContext, PassOutcome, Requirement
from onnxprune.ops.channels import ChannelPolicy
from onnxprune.passes.harness import plan_from_json, plan_to_json, run_pass
from onnxprune.passes.prune import PruneConfig, PrunePass, decide, latency_model, latency_search
from onnxprune.passes.prune.analysis import ChannelClasses, analyze_channels
from onnxprune.passes.prune.latency_model import LatencyModel, wanted_points
from onnxprune.passes.prune.latency_search import Stopwatch, search_latency
from onnxprune.passes.prune.layer_specs import actual_shapes, find_layers
from onnxprune.passes.prune.limits import axis_key
from onnxprune.passes.prune.selection import Selection
from onnxprune.runtime.latency_table import LayerSpec, Point, Timing
from onnxprune.runtime.op_profile import NodeTime, OpProfile
from onnxprune.runtime.sessions import ort_runner_from_model
from tests.layers import chain
from tests.patterns import network

RunVerified = Callable[..., PassOutcome]
BLOCK = 16


def blocks(channels: int) -> int:
    return -(-channels // BLOCK) * BLOCK


def made_up_ms(spec: LayerSpec, point: Point) -> float:
    """What a convolution takes when only whole blocks of channels are computed."""
    weight = spec.operands[1]
    assert weight is not None
    filters, inputs = weight.shape_at(point)[:2]
    return 1e-4 * blocks(filters) * (blocks(inputs) if inputs > 3 else inputs)


def made_up_times(wanted: Mapping[LayerSpec, Sequence[Point]], **_: Any) -> dict[LayerSpec, dict[Point, Timing]]:
    return {
        spec: {point: Timing(made_up_ms(spec, point), is_blocked=True) for point in points}
        for spec, points in wanted.items()
    }


def profile_of(model: ir.Model, times_ms: Mapping[str, float]) -> OpProfile:
    nodes = tuple(
        NodeTime(
            name=node.name or "",
            op_type=node.op_type,
            model_node=node.name or "",
            module_path="",
            calls_per_run=1.0,
            mean_ms=times_ms.get(node.name or "", 0.0),
            p50_ms=times_ms.get(node.name or "", 0.0),
            share=0.0,
        )
        for node in model.graph
    )
    return OpProfile(nodes=nodes, op_types=(), run_ms=0.0, nodes_ms=0.0, num_runs=1, threads=1)


def model_of_times(
    model: ir.Model, monkeypatch: pytest.MonkeyPatch, *, overhead_ms: float = 0.0
) -> tuple[LatencyModel, ChannelClasses]:
    monkeypatch.setattr(latency_model, "layer_times", made_up_times)
    classes = analyze_channels(model)
    runner = ort_runner_from_model(model)
    feeds = {"x": np.zeros((1, 3, 8, 8), np.float32)}
    layers, widths = find_layers(model, classes, actual_shapes(model, runner, feeds))
    times = {
        layer.node.name or "": made_up_ms(layer.spec, tuple(widths.full[number] for number in layer.widths))
        for layer in layers
    }
    profile = profile_of(model, times)
    run_ms = sum(times.values()) + overhead_ms
    return (
        LatencyModel(model, classes, layers, widths, profile, run_ms, threads=1, progress=NullProgress()),
        classes,
    )


def keeping(classes: ChannelClasses, *counts: int) -> np.ndarray:
    keeps = np.ones(classes.num_classes, dtype=np.bool_)
    for width, count in zip(classes.widths, counts, strict=False):
        keeps[width.classes[count:]] = False
    return keeps


# --- prediction -----------------------------------------------------------------------------------------------


def test_the_points_of_a_layer_are_a_grid_and_one_odd_width_for_each_block() -> None:
    points = wanted_points((64, 128), (1, 1))
    grid = {(a, b) for a, b in itertools.product((16, 32, 48, 64), (16, 32, 64, 96, 128))}
    assert grid <= set(points)
    odd = {point for point in points if point not in grid}
    assert {math.gcd(a, 16) for a, _ in odd if a % 16} == {8, 4, 1}
    assert {math.gcd(b, 16) for _, b in odd if b % 16} == {8, 4, 1}


def test_the_prediction_of_the_whole_model_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, classes = model_of_times(chain(64, 64, 10), monkeypatch)
    assert model.ratio(np.ones(classes.num_classes, dtype=np.bool_)) == 1.0


def test_the_prediction_is_the_sum_of_the_layers_times_and_what_does_not_shrink(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, classes = model_of_times(chain(64, 128, 10), monkeypatch, overhead_ms=0.1)
    predicted = model.ratio(keeping(classes, 32, 64, 10))
    whole = 64 * 3 + 128 * 64 + 16 * 128
    part = 32 * 3 + 64 * 32 + 16 * 64
    assert predicted == pytest.approx((0.1 + 1e-4 * part) / (0.1 + 1e-4 * whole), rel=1e-9)


def test_a_width_that_kernels_do_not_like_is_predicted_as_slow_as_it_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, classes = model_of_times(chain(64, 64, 10), monkeypatch)
    assert model.ratio(keeping(classes, 64, 63)) > model.ratio(keeping(classes, 64, 48))
    # Near the middle of the grid, where the odd widths were measured, it takes what the whole block takes.
    assert model.ratio(keeping(classes, 64, 31)) == pytest.approx(model.ratio(keeping(classes, 64, 32)), rel=0.02)


def test_layers_of_one_shape_and_other_widths_have_times_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, classes = model_of_times(chain(64, 64, 32, 96, 10), monkeypatch)
    predicted = model.ratio(keeping(classes, 32, 32, 16, 48))
    whole = 64 * 3 + 64 * 64 + 32 * 64 + 96 * 32 + 16 * 96
    part = 32 * 3 + 32 * 32 + 16 * 32 + 48 * 16 + 16 * 48
    assert predicted == pytest.approx(part / whole, rel=1e-9)


def test_only_widths_pay_that_are_faster_than_every_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, classes = model_of_times(chain(64, 40, 10), monkeypatch)
    paying = model.paying_widths(classes)
    assert paying[axis_key(classes.widths[0].classes)].tolist()[-4:] == [16, 32, 48, 64]
    assert paying[axis_key(classes.widths[1].classes)].tolist()[-3:] == [16, 32, 40]


@pytest.mark.parametrize(
    "names", [["depthwise"], ["grouped"], ["conv_transpose"], ["flatten_gemm"], ["lstm"], ["tokens"]]
)
def test_layers_of_every_kind_can_be_timed_alone(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxprune.runtime.latency_table import layer_times

    model = network(["conv_relu", *names], width=16)
    classes = analyze_channels(model)
    runner = ort_runner_from_model(model)
    feeds = {
        spec.name: np.zeros([d if isinstance(d, int) else 1 for d in spec.shape or ()], np.float32)
        for spec in runner.inputs
    }
    layers, widths = find_layers(model, classes, actual_shapes(model, runner, feeds))
    points = {
        layer.spec: [
            tuple(widths.full[number] for number in layer.widths),
            tuple(max(1, widths.full[number] // 2) for number in layer.widths),
        ]
        for layer in layers
    }
    assert layers
    for spec, found in layer_times(points).items():
        assert set(found) == set(points[spec]), spec.op_type


# --- search ---------------------------------------------------------------------------------------------------


class MadeUpStopwatch:
    """Says that the pruned model takes a power of its part of the weights, and counts how often it was asked."""

    def __init__(self, exponent: float) -> None:
        self.exponent = exponent
        self.num_timed = 0

    def ratio(self, pruned: ir.Model) -> float:
        self.num_timed += 1
        return float(self.part(pruned) ** self.exponent)

    def part(self, pruned: ir.Model) -> float:
        sizes = [value.const_value.size for value in pruned.graph.initializers.values() if value.const_value]
        return sum(sizes) / (64 * 3 + 256 * 64 + 10 * 256)


def searched(stopwatch: Any, goal: float) -> tuple[Selection, latency_search.LatencyFigures]:
    model = chain(64, 256, 10)
    classes = analyze_channels(model)
    order = np.concatenate([classes.widths[1].classes[8:][::-1], classes.widths[0].classes[8:][::-1]])

    def weights(keeps: np.ndarray) -> float:
        first, second = (float(keeps[width.classes].sum()) for width in classes.widths[:2])
        return (first * 3 + second * first + 10 * second) / (64 * 3 + 256 * 64 + 10 * 256)

    def by_cost(cost: Callable[[np.ndarray], float]) -> Selection:
        for count in range(len(order) + 1):
            keeps = np.ones(classes.num_classes, dtype=np.bool_)
            keeps[order[:count]] = False
            if cost(keeps) <= goal:
                return Selection(keeps=keeps, reached=True)
        return Selection(keeps=keeps, reached=False)

    return search_latency(model, weights, stopwatch, goal, by_cost, PassContext(), ChannelPolicy())


@pytest.mark.parametrize("exponent", [0.5, 0.8, 1.0, 1.6])
def test_a_wrong_prediction_is_corrected_by_what_is_measured(exponent: float) -> None:
    selection, figures = searched(MadeUpStopwatch(exponent), 0.5)
    assert selection.reached
    assert abs(figures.measured_ratio - 0.5) <= 0.03
    assert figures.num_candidates <= 5


def test_a_right_prediction_is_measured_once() -> None:
    stopwatch = MadeUpStopwatch(1.0)
    searched(stopwatch, 0.5)
    assert stopwatch.num_timed == 1


def test_a_goal_out_of_reach_is_said() -> None:
    selection, figures = searched(MadeUpStopwatch(0.01), 0.5)
    assert not selection.reached
    assert figures.measured_ratio > 0.9


# --- the pass -------------------------------------------------------------------------------------------------


@pytest.fixture
def made_up_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a layer takes what `made_up_ms` says, and a model the sum of its layers."""

    def ratio(self: Stopwatch, pruned: ir.Model) -> float:
        def whole(runner_model: ir.Model) -> float:
            shapes = [v.const_value.shape.numpy() for v in runner_model.graph.initializers.values() if v.const_value]
            return sum(blocks(s[0]) * (blocks(s[1]) if s[1] > 3 else s[1]) for s in shapes if len(s) == 4)

        return whole(pruned) / whole(self.made_up_original)  # type: ignore[attr-defined]

    def init(self: Stopwatch, original: ir.Model, context: PassContext, *, threads: int) -> None:
        self.made_up_original = original  # type: ignore[attr-defined]

    def times(model: ir.Model, classes: ChannelClasses, *_: Any, **__: Any) -> LatencyModel:
        return model_of_times(model, monkeypatch)[0]

    monkeypatch.setattr(Stopwatch, "__init__", init)
    monkeypatch.setattr(Stopwatch, "ratio", ratio)
    monkeypatch.setattr(decide, "latency_model", times)


@pytest.mark.usefixtures("made_up_machine")
@pytest.mark.parametrize("ranking", ["per-layer", "global"])
def test_the_pass_reaches_a_budget_of_time_with_widths_that_pay(run_verified: RunVerified, ranking: str) -> None:
    outcome = run_verified(PrunePass(PruneConfig(latency_ratio=0.5, ranking=ranking)), chain(128, 256, 128, 10))
    assert abs(outcome.report.figures["latency_ratio_measured"] - 0.5) <= 0.03
    assert all(change.figures["channels_after"] % BLOCK == 0 for change in outcome.report.changes)
    assert any("of the original's time" in note for note in outcome.report.notes)


@pytest.mark.usefixtures("made_up_machine")
def test_a_given_plan_is_carried_out_without_timing_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    pass_, state = PrunePass(PruneConfig(latency_ratio=0.5)), ModelState(model=chain(128, 256, 10))
    first = run_pass(pass_, state, PassContext())
    data = plan_to_json(pass_, first.plan)
    monkeypatch.setattr(Stopwatch, "__init__", lambda *_, **__: pytest.fail("timed again"))
    again = run_pass(pass_, state, PassContext(), plan=plan_from_json(pass_, data))
    assert again.report.figures == first.report.figures
    assert data["latency_ratio_measured"] == first.report.figures["latency_ratio_measured"]


@pytest.mark.usefixtures("made_up_machine")
def test_inside_a_block_the_budget_counts_from_the_model_that_the_block_began_with(run_verified: RunVerified) -> None:
    original = ModelState(model=chain(128, 256, 128, 10))
    pass_ = PrunePass(PruneConfig(latency_ratio=0.5))
    state, ratios = original, []
    for number in (1, 2):
        iteration = Iteration(number=number, times=2, original=original)
        outcome = run_pass(pass_, state, PassContext(iteration=iteration))
        state = outcome.state
        ratios.append(outcome.report.figures["latency_ratio_measured"])
    # Steps of 16 of 128 channels are no finer.
    assert ratios == pytest.approx([0.75, 0.5], abs=0.05)


def test_a_budget_of_time_needs_timings_and_looks_at_calibration_data_where_there_are_any() -> None:
    pass_ = PrunePass(PruneConfig(latency_ratio=0.5))
    assert pass_.requirements == {Requirement.TIMING}
    assert pass_.uses_calibration


def test_a_multiple_beside_a_budget_of_time_is_refused() -> None:
    with pytest.raises(ValueError, match="leave channel_multiple alone"):
        PruneConfig(latency_ratio=0.5, channel_multiple=8)


def test_the_whole_way_with_real_timings_changes_the_model_and_says_what_it_measured(
    run_verified: RunVerified, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = chain(64, 64, 64, 10, size=32, kernel=3, batch=1)
    outcome = run_verified(PrunePass(PruneConfig(latency_ratio=0.6)), model)
    # How long it takes here is not for a test to judge; that something was timed, chosen and kept is.
    assert outcome.report.figures["channels_after"] < outcome.report.figures["channels_before"]
    assert outcome.report.figures["latency_ratio_measured"] > 0
    assert list(tmp_path.rglob("onnxprune/latency/*/*.json"))
