"""What timings decide. The clock is a fake one, so that each decision has its cause."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.contracts import Batch, CanonicalModel, QuantizationPlan
from onnxprune.errors import ModelError
from onnxprune.runtime.latency import PairTiming
from onnxprune.runtime.model_timing import ModelTimer, NodeMs
from onnxprune.targets.qdq import place
from onnxprune.targets.qdq.measured import measured_placement
from onnxprune.targets.qdq.profiled import profiled_costs
from tests.builders import canonical, conv_net, proto_of
from tests.quantization import normal_batches, plan_for

IMAGE = (1, 3, 8, 8)

Ratio = Callable[[ir.Model, ir.Model], float]


@dataclass(frozen=True, kw_only=True)
class FakeTimer(ModelTimer):
    """Says of each pair what `ratio` says, and of each node what `node_ms` has for it, else 1 ms in both forms."""

    ratio: Ratio
    node_ms: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    error: float = 0.001

    def pair(
        self, before: ir.Model, after: ir.Model, feeds: Batch, *, round_seconds: float, max_rounds: int
    ) -> PairTiming:
        del feeds, round_seconds, max_rounds
        ratio = self.ratio(before, after)
        return PairTiming(before_ms=10 * ratio, after_ms=10.0, ratio=ratio, error=self.error)

    def node_times(
        self, models: Mapping[str, ir.Model], feeds: Batch, *, run_s: float
    ) -> dict[str, tuple[NodeMs, ...]]:
        del feeds, run_s
        return {
            form: tuple(
                NodeMs(
                    name=node.name or "",
                    op_type=node.op_type,
                    model_node=node.name or "",
                    time_ms=self.node_ms.get(node.name or "", (1.0, 1.0))[0 if form == "float" else 1],
                )
                for node in model.graph
            )
            for form, model in models.items()
        }


def timer(ratio: Ratio, *, error: float = 0.001, **node_ms: tuple[float, float]) -> FakeTimer:
    by_name = {name.replace("__", "/"): times for name, times in node_ms.items()}
    return FakeTimer(threads=1, folder=None, ratio=ratio, node_ms=by_name, error=error)


def is_region(model: ir.Model) -> bool:
    return model.graph.name == "region"


def num_integer(model: ir.Model) -> int:
    return sum(node.op_type == "QuantizeLinear" for node in model.graph)


@pytest.fixture(scope="module")
def network() -> CanonicalModel:
    return conv_net(batch=1)


@pytest.fixture(scope="module")
def plan(network: CanonicalModel) -> QuantizationPlan:
    return plan_for(network, normal_batches(IMAGE))


def test_placement_that_pays_everywhere_is_the_table_s(network: CanonicalModel, plan: QuantizationPlan) -> None:
    found = measured_placement(network, plan, "x86-vnni", timer=timer(lambda _before, _after: 2.0))

    assert found.placement.decided_by == "measured"
    assert found.placement.integer_nodes == place(network, plan, "x86-vnni").integer_nodes
    assert found.regions
    assert all(region.is_integer and region.float_ms == 20.0 for region in found.regions)
    assert (found.float_ms, found.integer_ms) == (20.0, 10.0)


def test_region_that_loses_goes_back_to_float_and_says_by_how_much(
    network: CanonicalModel, plan: QuantizationPlan
) -> None:
    def ratio(before: ir.Model, _after: ir.Model) -> float:
        return 0.5 if is_region(before) and any(node.name == "stem/conv" for node in before.graph) else 2.0

    found = measured_placement(network, plan, "x86-vnni", timer=timer(ratio))

    assert "stem/conv" not in found.placement.integer_nodes
    assert "head/gemm" in found.placement.integer_nodes
    reason = found.placement.float_nodes["stem/conv"]
    assert reason == "returned to float: 5.000 ms measured in float, 10.000 ms in int8"
    (lost,) = (region for region in found.regions if not region.is_integer)
    assert lost.nodes[0] == "stem/conv"


def test_region_stays_integer_where_the_timing_leaves_doubt(network: CanonicalModel, plan: QuantizationPlan) -> None:
    def ratio(before: ir.Model, _after: ir.Model) -> float:
        return 0.9 if is_region(before) else 2.0

    found = measured_placement(network, plan, "x86-vnni", timer=timer(ratio, error=0.06))

    assert found.placement.integer_nodes == place(network, plan, "x86-vnni").integer_nodes


def test_returned_regions_come_back_where_the_whole_is_slower_without_them(
    network: CanonicalModel, plan: QuantizationPlan
) -> None:
    def ratio(before: ir.Model, after: ir.Model) -> float:
        if is_region(before):
            return 0.5 if any(node.name == "stem/conv" for node in before.graph) else 2.0
        # The whole: the more is integer, the faster.
        return 2.0 if num_integer(after) >= num_integer(before) else 0.5

    found = measured_placement(network, plan, "x86-vnni", timer=timer(ratio))

    assert "stem/conv" in found.placement.integer_nodes
    assert all(region.is_integer for region in found.regions)


def test_whole_that_loses_goes_back_to_float_with_both_times(network: CanonicalModel, plan: QuantizationPlan) -> None:
    def ratio(before: ir.Model, _after: ir.Model) -> float:
        return 2.0 if is_region(before) else 0.8

    found = measured_placement(network, plan, "x86-vnni", timer=timer(ratio))

    assert found.is_all_float
    assert found.placement.integer_nodes == ()
    assert set(found.placement.float_nodes) == {node.name for node in network.graph}
    reason = found.placement.float_nodes["stem/conv"]
    assert reason == "int8 as a whole takes 10.00 ms on this machine and float 8.00 ms"
    assert not any(region.is_integer for region in found.regions)


def test_node_whose_integer_kernel_is_slower_than_its_conversions_cost_goes_to_float(
    network: CanonicalModel, plan: QuantizationPlan
) -> None:
    found = measured_placement(
        network, plan, "x86-vnni", timer=timer(lambda _before, _after: 2.0, stem__conv=(1.0, 3.0))
    )

    assert "stem/conv" not in found.placement.integer_nodes
    assert "block/conv" in found.placement.integer_nodes
    # The Relu counts to the convolution that absorbs it; so does, in integers, what the spelling adds.
    reason = found.placement.float_nodes["stem/relu"]
    assert re.fullmatch(r"2\.000 ms measured in float, [34]\.000 ms in int8", reason)


def test_time_of_a_node_counts_to_no_other_whose_name_its_own_begins_with() -> None:
    rng = np.random.default_rng(0)
    model = canonical(
        proto_of(
            [
                helper.make_node("MatMul", ["x", "w"], ["a"], name="attn/MatMul"),
                # Never integer, so no unit of its own.
                helper.make_node("Erf", ["a"], ["y"], name="attn/MatMul_1"),
            ],
            inputs={"x": [4, 16]},
            outputs={"y": [4, 16]},
            weights={"w": rng.standard_normal((16, 16)).astype(np.float32)},
        )
    )
    feeds = normal_batches((4, 16))
    fake = timer(lambda _before, _after: 2.0, attn__MatMul=(1.0, 2.0), attn__MatMul_1=(50.0, 60.0))

    costs = profiled_costs(
        model, plan_for(model, feeds), "x86-vnni", timer=fake, feeds=feeds.batches[0], run_s=0.001
    ).costs

    assert set(costs) == {"attn/MatMul"}
    assert costs["attn/MatMul"].float_ms == 1.0
    assert costs["attn/MatMul"].integer_ms < 10.0


def test_choice_by_profile_needs_a_faster_whole(network: CanonicalModel, plan: QuantizationPlan) -> None:
    def ratio(before: ir.Model, _after: ir.Model) -> float:
        # Table against profile: equal. Against float, and in regions: faster.
        return 1.0 if num_integer(before) and not is_region(before) else 2.0

    found = measured_placement(network, plan, "x86-vnni", timer=timer(ratio, stem__conv=(1.0, 3.0)))

    assert "stem/conv" in found.placement.integer_nodes


def test_model_that_can_not_be_timed_is_placed_by_the_table_with_a_note(
    network: CanonicalModel, plan: QuantizationPlan
) -> None:
    def ratio(_before: ir.Model, _after: ir.Model) -> float:
        raise ModelError("ONNX Runtime fails.")

    found = measured_placement(network, plan, "x86-vnni", timer=timer(ratio))

    assert found.placement == place(network, plan, "x86-vnni")
    assert found.notes == ("The operator table decided, because timing failed: ONNX Runtime fails.",)


def test_region_that_can_not_run_alone_keeps_its_choice_and_is_counted(
    network: CanonicalModel, plan: QuantizationPlan
) -> None:
    def ratio(before: ir.Model, _after: ir.Model) -> float:
        if is_region(before):
            raise ModelError("ONNX Runtime fails.")
        return 2.0

    found = measured_placement(network, plan, "x86-vnni", timer=timer(ratio))

    assert found.placement.integer_nodes == place(network, plan, "x86-vnni").integer_nodes
    assert found.regions == ()
    (note,) = found.notes
    assert "not timed" in note


def test_model_without_integer_nodes_is_not_timed(network: CanonicalModel, plan: QuantizationPlan) -> None:
    plan = dataclasses.replace(plan, excluded_nodes={node.name or "": "told so" for node in network.graph})

    def ratio(_before: ir.Model, _after: ir.Model) -> float:
        pytest.fail("timed")

    assert measured_placement(network, plan, "x86-vnni", timer=timer(ratio)).placement.integer_nodes == ()


def test_model_with_free_sizes_integer_inputs_and_a_branch_is_really_timed(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["c"], ["t"], name="inner")],
        "then",
        [],
        [helper.make_tensor_value_info("t", 1, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["c"], ["e"], name="inner2")],
        "else",
        [],
        [helper.make_tensor_value_info("e", 1, None)],
    )
    rng_weights = conv_net().graph.initializers["stem.weight"].const_value.numpy()  # type: ignore[union-attr]
    model = canonical(
        proto_of(
            [
                helper.make_node("Conv", ["x", "w"], ["a"], name="conv", pads=[1] * 4),
                helper.make_node("Conv", ["a", "v"], ["c"], name="conv2", pads=[1] * 4),
                helper.make_node("Cast", ["flag"], ["cond"], name="cast", to=9),
                helper.make_node("If", ["cond"], ["y"], name="if", then_branch=branch, else_branch=other),
            ],
            inputs={"x": ["N", 3, "H", "W"], "flag": []},
            outputs={"y": [None] * 4},
            weights={"w": rng_weights, "v": rng_weights.repeat(6, axis=1)[:, :16]},
        )
    )
    model.graph.inputs[1].dtype = ir.DataType.INT64
    batches = normal_batches((1, 3, 16, 16))
    source = dataclasses.replace(
        batches, batches=tuple({**batch, "flag": np.array(1, dtype=np.int64)} for batch in batches.batches)
    )
    plan = plan_for(model, source)

    found = measured_placement(model, plan, "x86-vnni", timer=ModelTimer(threads=1, folder=tmp_path))

    assert found.notes == ()
    assert found.placement.decided_by == "measured"
    assert {"if", "inner"} <= set(found.placement.float_nodes)
