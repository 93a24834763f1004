"""The float model that computes with rounded numbers, held against the QDQ graph carried out literally."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx import helper

from onnxprune.contracts import QuantizationPlan
from onnxprune.ops.planned import planned_node, planned_nodes
from onnxprune.passes.quant.simulate import round_weight, simulated
from onnxprune.targets import qdq
from tests.builders import canonical, conv_net, proto_of
from tests.quantization import everything_integer, normal_batches, plan_for, run, signal_to_noise_db

SOURCE = normal_batches((1, 3, 8, 8))
FEEDS = SOURCE.batches[0]


@pytest.fixture(scope="module")
def plan() -> QuantizationPlan:
    return plan_for(conv_net(batch=1), SOURCE)


def with_16_bits(plan: QuantizationPlan) -> QuantizationPlan:
    activations = {
        name: replace(found, num_bits=16, scale=found.scale / 256, zero_point=found.zero_point * 256)
        for name, found in plan.activations.items()
    }
    return replace(plan, activations=activations)


def test_simulation_computes_what_the_spelled_graph_computes_up_to_the_bias(plan: QuantizationPlan) -> None:
    model = conv_net(batch=1)
    spelled = qdq.spell(model, plan, everything_integer(model, plan), "arm64")

    literally = run(spelled, FEEDS, optimized=False)[0]
    simulation = run(simulated(model, plan), FEEDS)[0]

    # A sum on the edge between two integers may fall on either side: one step of the output at most.
    assert np.abs(literally - simulation).max() <= plan.activations["y"].scale * 1.01


def test_simulation_holds_only_numbers_that_the_integers_stand_for(plan: QuantizationPlan) -> None:
    found = run(simulated(conv_net(batch=1), plan), FEEDS)[0]
    steps = found / np.float32(plan.activations["y"].scale)
    np.testing.assert_allclose(steps, np.rint(steps), rtol=0, atol=1e-3)


def test_sixteen_bits_leave_the_error_of_the_weights(plan: QuantizationPlan) -> None:
    model = conv_net(batch=1)
    expected = run(simulated(model, plan, with_activations=False), FEEDS)[0]
    found = run(simulated(model, with_16_bits(plan)), FEEDS)[0]
    assert signal_to_noise_db(expected, found) > 70.0


def test_with_nothing_to_round_the_model_computes_what_it_did(plan: QuantizationPlan) -> None:
    model = conv_net(batch=1)
    expected = run(model, FEEDS)[0]
    np.testing.assert_array_equal(run(simulated(model, plan, only_nodes=()), FEEDS)[0], expected)
    names = [node.name or "" for node in model.graph]
    np.testing.assert_array_equal(run(simulated(model, plan, float_nodes=names), FEEDS)[0], expected)


def test_only_named_nodes_round(plan: QuantizationPlan) -> None:
    model = conv_net(batch=1)
    copy = simulated(model, plan, only_nodes=["head/gemm"])
    rounded = {node.name.removesuffix("_simulated_Round") for node in copy.graph if node.op_type == "Round"}
    assert rounded == {"f", "y"}
    assert set(copy.graph.initializers) >= {"head.weight_rounded", "stem.weight", "block.weight"}


def test_names_and_interface_stay(plan: QuantizationPlan) -> None:
    model = conv_net(batch=1)
    copy = simulated(model, plan)
    tensors = {value.name for node in copy.graph for value in node.outputs}
    assert tensors >= {value.name for node in model.graph for value in node.outputs}
    assert [value.name for value in copy.graph.outputs] == ["y"]


def test_a_float_node_reads_exact_numbers(plan: QuantizationPlan) -> None:
    model = conv_net(batch=1)
    first = next(iter(model.graph))
    copy = simulated(model, plan, float_nodes=[first.name or ""])
    (reader,) = [node for node in copy.graph if node.name == first.name]
    assert reader.inputs[0] is copy.graph.inputs[0]


def test_weights_are_rounded_to_multiples_of_the_scale_of_their_channel(plan: QuantizationPlan) -> None:
    array = np.asarray(conv_net(batch=1).graph.initializers["stem.weight"].const_value.numpy())
    planned = plan.weights["stem.weight"]
    rounded = round_weight(array, planned)
    steps = rounded / np.asarray(planned.scales, dtype=np.float32).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(steps, np.rint(steps), rtol=0, atol=1e-4)
    assert np.abs(rounded - array).max() <= max(planned.scales) / 2 * 1.0001


def test_a_returned_node_is_not_planned_and_says_why(plan: QuantizationPlan) -> None:
    model = conv_net(batch=1)
    returned = replace(plan, returned_nodes={"head/gemm": "returned: 3.1 dB"})
    (head,) = [node for node in model.graph if node.name == "head/gemm"]
    assert planned_node(head, returned) == "returned: 3.1 dB"
    assert "head/gemm" not in {name for item in planned_nodes(model, returned) for name in item.names}


def test_a_group_of_nodes_without_weights_between_float_ones_stays_float() -> None:
    # The length of a vector, which is at least 1e-12, would round to zero, and dividing by it would give no number.
    model = canonical(
        proto_of(
            [
                helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
                helper.make_node("ReduceL2", ["c", "axes"], ["length"], name="length"),
                helper.make_node("Max", ["length", "tiny"], ["bounded"], name="bound"),
                helper.make_node("Expand", ["bounded", "shape"], ["expanded"], name="expand"),
                helper.make_node("Div", ["c", "expanded"], ["normal"], name="divide"),
                helper.make_node("Conv", ["normal", "v"], ["y"], name="last"),
            ],
            inputs={"x": [1, 3, 8, 8]},
            outputs={"y": [None] * 4},
            weights={
                "w": np.eye(8, 3, dtype=np.float32).reshape(8, 3, 1, 1),
                "v": np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1),
                "axes": np.array([1]),
                "tiny": np.array(1e-12, dtype=np.float32),
                "shape": np.array([1, 8, 8, 8]),
            },
        )
    )
    plan = plan_for(model, SOURCE)
    feeds = {"x": FEEDS["x"] * np.float32([1e-6, 1, 1, 1, 1, 1, 1, 1])}
    rounded = {node.name for node in simulated(model, plan).graph if node.op_type == "Round"}
    assert "expanded_simulated_Round" not in rounded
    assert np.isfinite(run(simulated(model, plan), feeds)[0]).all()


def test_names_that_the_simulation_would_choose_may_be_taken_already() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="a_simulated_Div"),
        helper.make_node("Sigmoid", ["a"], ["a_exact"], name="b"),
        helper.make_node("Conv", ["a_exact", "v"], ["a_simulated_Round"], name="c"),
        helper.make_node("Sigmoid", ["a_simulated_Round"], ["w_rounded"], name="d"),
        helper.make_node("Conv", ["w_rounded", "v"], ["simulated_scalar_0"], name="e"),
        helper.make_node("Sigmoid", ["simulated_scalar_0"], ["y"], name="f"),
    ]
    rng = np.random.default_rng(3)
    constants = {
        "w": rng.standard_normal((8, 3, 1, 1)).astype(np.float32),
        "v": rng.standard_normal((8, 8, 1, 1)).astype(np.float32),
    }
    model = canonical(proto_of(nodes, inputs={"x": (1, 3, 8, 8)}, outputs={"y": [None] * 4}, weights=constants))

    simulation = simulated(model, plan_for(model, SOURCE))

    names = [value.name for node in simulation.graph for value in node.outputs]
    names += list(simulation.graph.initializers)
    assert len(names) == len(set(names))
    assert len({node.name for node in simulation.graph}) == len(list(simulation.graph))
    assert "v_rounded" in names
    assert signal_to_noise_db(run(model, FEEDS)[0], run(simulation, FEEDS)[0]) > 25
