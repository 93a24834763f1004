"""Regions of integer nodes, and the two models that time one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxprune.contracts import CanonicalModel, QuantizationPlan
from onnxprune.runtime.sessions import ort_runner_from_model
from onnxprune.targets.qdq import place
from onnxprune.targets.qdq.costs import IntegerWhereverPossible
from onnxprune.targets.qdq.region_models import region_models
from onnxprune.targets.qdq.regions import Region, find_regions
from tests.builders import conv_net
from tests.quantization import normal_batches, plan_for, run, signal_to_noise_db

IMAGE = (1, 3, 8, 8)


@pytest.fixture(scope="module")
def network() -> CanonicalModel:
    return conv_net(batch=1)


@pytest.fixture(scope="module")
def plan(network: CanonicalModel) -> QuantizationPlan:
    return plan_for(network, normal_batches(IMAGE))


def regions_of(
    network: CanonicalModel, plan: QuantizationPlan, region_cost: float, returned: dict[str, str] | None = None
) -> list[Region]:
    placement = place(network, plan, "x86-vnni", costs=IntegerWhereverPossible("x86-vnni"), returned=returned)
    return find_regions(network, placement, cost_of=lambda _unit: 1.0, region_cost=region_cost)


def test_each_integer_node_is_in_one_region(network: CanonicalModel, plan: QuantizationPlan) -> None:
    regions = regions_of(network, plan, 2.0)

    names = [name for region in regions for name in region.nodes]
    assert sorted(names) == sorted(place(network, plan, "x86-vnni").integer_nodes)
    assert len(regions) > 1


def test_network_is_cut_behind_the_residual_addition_and_not_inside(
    network: CanonicalModel, plan: QuantizationPlan
) -> None:
    first, *_ = regions_of(network, plan, 2.0)

    assert first.nodes[-1] == "block/relu"
    assert first.inputs == ("x",)
    assert first.integer_inputs == frozenset()
    assert first.outputs == ()
    assert first.integer_outputs == {"r2"}


def test_cheap_network_is_one_region_with_float_borders(network: CanonicalModel, plan: QuantizationPlan) -> None:
    (region,) = regions_of(network, plan, 100.0)

    assert region.outputs == ("y",)
    assert not region.integer_outputs


def test_tensor_that_a_float_node_reads_as_well_leaves_in_both_forms(
    network: CanonicalModel, plan: QuantizationPlan
) -> None:
    first = regions_of(network, plan, 1.0, {"block/conv": "told so"})[0]

    assert first.nodes == ("stem/conv", "stem/relu")
    assert first.outputs == ("r1",)
    assert first.integer_outputs == {"r1"}


def test_both_models_of_a_region_inside_integers_take_and_give_integers(
    network: CanonicalModel, plan: QuantizationPlan
) -> None:
    last = regions_of(network, plan, 2.0)[-1]
    models = region_models(network, plan, last, "x86-vnni")

    assert models.fed_integers
    for model in (models.integer, models.float_twin):
        assert [(value.name, value.dtype) for value in model.graph.inputs] == [
            (f"{name}_integers", ir.DataType.UINT8) for name in last.inputs
        ]


@pytest.mark.parametrize("region_cost", [1.0, 2.0, 100.0])
def test_both_models_of_every_region_compute_the_same(
    network: CanonicalModel, plan: QuantizationPlan, region_cost: float
) -> None:
    rng = np.random.default_rng(2)
    feeds = {"x": rng.standard_normal(IMAGE).astype(np.float32)}
    names = [value.name or "" for node in network.graph for value in node.outputs]
    tensors = {**feeds, **ort_runner_from_model(network, extra_outputs=names).run(feeds)}

    for region in regions_of(network, plan, region_cost):
        models = region_models(network, plan, region, "x86-vnni")
        feeds = models.feeds(tensors)
        for real, integer in zip(run(models.float_twin, feeds), run(models.integer, feeds), strict=True):
            assert signal_to_noise_db(real.astype(np.float32), integer.astype(np.float32)) > 20


def test_region_models_leave_the_model_as_it_was(network: CanonicalModel, plan: QuantizationPlan) -> None:
    before = [(node.name, [value.name for value in node.inputs if value]) for node in network.graph]

    region_models(network, plan, regions_of(network, plan, 2.0)[0], "x86-vnni")

    assert [(node.name, [value.name for value in node.inputs if value]) for node in network.graph] == before
