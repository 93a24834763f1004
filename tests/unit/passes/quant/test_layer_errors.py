"""Where error arises, where it has piled up, and what it does to the outputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.contracts import EXACT_DB, CanonicalModel, QuantizationPlan
from onnxprune.evaluate.fidelity import compare_outputs
from onnxprune.graph.writer import content_hash
from onnxprune.passes.quant.layer_errors import finite_db, layer_errors, with_own_twins
from onnxprune.passes.quant.ranking import ranked_layers
from onnxprune.passes.quant.sensitivity import OutputNoise, output_noise
from onnxprune.passes.quant.simulate import simulated
from onnxprune.passes.quant.units import FirstSamples, followers, layers_of
from onnxprune.runtime.sessions import ort_runner_from_model
from tests.builders import canonical, conv_net, proto_of
from tests.quantization import ArraySource, normal_batches, plan_for, signal_to_noise_db

SOURCE = normal_batches((1, 3, 8, 8), count=2)


@pytest.fixture(scope="module")
def net() -> CanonicalModel:
    return conv_net(batch=1)


@pytest.fixture(scope="module")
def plan(net: CanonicalModel) -> QuantizationPlan:
    return plan_for(net, SOURCE)


def test_layers_are_what_rounds_and_not_what_only_moves_numbers(net: CanonicalModel, plan: QuantizationPlan) -> None:
    assert [layer.node.name for layer in layers_of(net, plan)] == [
        "stem/conv",
        "block/conv",
        "block/add",
        "head/pool",
        "head/gemm",
    ]


def test_own_error_is_that_of_a_model_in_which_this_layer_alone_is_rounded(
    net: CanonicalModel, plan: QuantizationPlan
) -> None:
    errors = {error.node: error for error in layer_errors(net, plan, SOURCE)}
    alone = ort_runner_from_model(simulated(net, plan, only_nodes=["block/conv"]), extra_outputs=["c2"])
    reference = ort_runner_from_model(net, extra_outputs=["c2"])
    batches = list(SOURCE)
    expected = np.concatenate([reference.run(batch)["c2"] for batch in batches])
    found = np.concatenate([alone.run(batch)["c2"] for batch in batches])
    # ONNX Runtime sums the twin in another kernel (it fuses otherwise): single numbers may round the other way.
    assert errors["block/conv"].own_db == pytest.approx(signal_to_noise_db(expected, found), abs=0.05)


def test_accumulated_error_is_that_of_the_simulation_and_more_than_the_own_one_behind_the_first_layer(
    net: CanonicalModel, plan: QuantizationPlan
) -> None:
    errors = {error.node: error for error in layer_errors(net, plan, SOURCE)}
    runners = [ort_runner_from_model(model, extra_outputs=["r2"]) for model in (net, simulated(net, plan))]
    expected, found = (np.concatenate([runner.run(batch)["r2"] for batch in SOURCE]) for runner in runners)
    assert errors["block/add"].accumulated_db == pytest.approx(signal_to_noise_db(expected, found), abs=0.05)
    assert errors["stem/conv"].accumulated_db == pytest.approx(errors["stem/conv"].own_db, abs=0.05)
    assert errors["block/add"].accumulated_db < errors["block/add"].own_db


def mean_noise_db(model: CanonicalModel, other: ir.Model) -> float:
    runners = [ort_runner_from_model(one) for one in (model, other)]
    each = [compare_outputs(*(runner.run(batch) for runner in runners)).snr_db for batch in SOURCE]
    return float(-10 * np.log10(np.mean([10 ** (-snr_db / 10) for snr_db in each])))


def test_noise_of_a_weight_is_that_of_a_model_in_which_it_alone_is_rounded(
    net: CanonicalModel, plan: QuantizationPlan
) -> None:
    noise = output_noise(net, plan, layers_of(net, plan), SOURCE)
    assert list(noise.weights) == ["stem/conv", "block/conv", "head/gemm"]
    for layer, found in noise.weights.items():
        alone = simulated(net, plan, only_nodes=[layer], with_activations=False)
        # As above: some numbers round the other way.
        assert -10 * np.log10(found) == pytest.approx(mean_noise_db(net, alone), abs=0.2), layer


def test_noise_of_tensors_is_measured_for_inputs_inner_tensors_and_outputs(
    net: CanonicalModel, plan: QuantizationPlan
) -> None:
    noise = output_noise(net, plan, layers_of(net, plan), SOURCE)
    assert set(noise.tensors) == {"x", "r1", "c2", "r2", "p", "f", "y"}
    # Flatten moves the numbers of p: rounding them before or after is the same.
    assert noise.tensors["p"] == pytest.approx(noise.tensors["f"], rel=1e-3)
    output, entry = [], plan.activations["y"]
    for batch in SOURCE:
        exact = ort_runner_from_model(net).run(batch)["y"]
        error = np.rint(exact / entry.scale) * entry.scale - exact
        output.append(np.square(error).sum() / np.square(exact).sum())
    assert noise.tensors["y"] == pytest.approx(np.mean(output), rel=1e-3)


def test_layers_at_one_tensor_leave_together_and_a_bad_weight_leaves_alone(
    net: CanonicalModel, plan: QuantizationPlan
) -> None:
    layers = layers_of(net, plan)

    def first(tensors: dict[str, float], weights: dict[str, float], count: int) -> set[str | None]:
        nothing = dict.fromkeys(["x", "r1", "c2", "r2", "p", "f", "y"], 0.0)
        noise = OutputNoise(tensors={**nothing, **tensors}, weights=weights)
        return {layer.node.name for layer in ranked_layers(net, plan, layers, noise)[:count]}

    assert first({}, {"block/conv": 1.0}, 1) == {"block/conv"}
    # Written by the stem, read by the block's convolution and its residual sum.
    assert first({"r1": 1.0}, {"head/gemm": 0.1}, 3) == {"stem/conv", "block/conv", "block/add"}
    assert first({"r1": 1.0}, {"head/gemm": 0.5}, 1) == {"head/gemm"}
    # Written by the pooling, moved, and read by the Gemm.
    assert first({"p": 1.0, "f": 1.0}, {"stem/conv": 0.1}, 2) == {"head/pool", "head/gemm"}


def test_models_stay_as_they_were(net: CanonicalModel, plan: QuantizationPlan) -> None:
    before = content_hash(net)
    layer_errors(net, plan, SOURCE, output_noise={layer.node.name or "": 0.1 for layer in layers_of(net, plan)})
    output_noise(net, plan, layers_of(net, plan), SOURCE)
    assert content_hash(net) == before


def test_twins_are_read_by_nobody_and_round_nothing_else(net: CanonicalModel, plan: QuantizationPlan) -> None:
    twins = with_own_twins(net, plan, layers_of(net, plan))
    assert set(twins.outputs) == {"r1", "c2", "r2", "p", "y"}
    batch = next(iter(SOURCE))
    expected, found = (ort_runner_from_model(model).run(batch)["y"] for model in (net, twins.model))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # sums in another order


def test_weight_of_four_bits_shows_as_the_layer_where_error_arises(net: CanonicalModel, plan: QuantizationPlan) -> None:
    coarse = plan_for(net, SOURCE, weight_bits=4).weights["block.weight"]
    errors = layer_errors(net, replace(plan, weights={**plan.weights, "block.weight": coarse}), SOURCE)
    assert min(errors, key=lambda error: error.own_db).node == "block/conv"


def test_the_output_that_suffers_most_counts() -> None:
    model = canonical(
        proto_of(
            [
                helper.make_node("Conv", ["x", "w"], ["side"], name="conv"),
                helper.make_node("Conv", ["x", "w"], ["y"], name="last"),
            ],
            inputs={"x": (1, 3, 8, 8)},
            outputs={"y": [None] * 4, "side": [None] * 4},
            weights={"w": np.random.default_rng(0).standard_normal((16, 3, 3, 3)).astype(np.float32)},
        )
    )
    plan = plan_for(model, SOURCE)
    noise = output_noise(model, plan, layers_of(model, plan), SOURCE)
    # Either layer touches one output only, and both do the same.
    assert noise.tensors["side"] == pytest.approx(noise.tensors["y"], rel=1e-6)
    assert noise.tensors["side"] > 0


@pytest.mark.parametrize(
    ("given", "kept"), [(np.inf, EXACT_DB), (-np.inf, -EXACT_DB), (np.nan, -EXACT_DB), (12.5, 12.5)]
)
def test_figures_in_a_plan_are_finite(given: float, kept: float) -> None:
    assert finite_db(given) == kept


def test_a_mover_follows_when_all_its_neighbours_leave_and_stays_with_one(
    net: CanonicalModel, plan: QuantizationPlan
) -> None:
    def moved(*away: str) -> list[str | None]:
        return [item.node.name for item in followers(net, plan, away)]

    assert moved("head/pool", "head/gemm") == ["head/flatten"]
    assert moved("head/pool") == []
    assert moved("head/gemm") == []


def test_first_samples_end_with_the_batch_that_reaches_the_count_and_can_be_read_again() -> None:
    source = ArraySource(tuple({"x": np.zeros((3, 1), np.float32)} for _ in range(4)))
    samples = FirstSamples(source, 4)
    assert [len(list(samples)) for _ in range(2)] == [2, 2]
