"""Which nodes become integer, and what is said about the others."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxprune.contracts import CanonicalModel
from onnxprune.errors import UsageError
from onnxprune.ops.planned import PlannedNode
from onnxprune.targets.qdq import float_reasons, place
from onnxprune.targets.qdq.cost_table import TableCosts
from onnxprune.targets.qdq.place import NOT_WORTH_REASON
from tests.builders import canonical, conv_net, proto_of
from tests.quantization import normal_batches, plan_for

RNG = np.random.default_rng(3)


def weights(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * 0.3).astype(np.float32)


def chain(*nodes: helper.NodeProto, shape: tuple[int, ...] = (1, 4, 8, 8), **constants: np.ndarray) -> CanonicalModel:
    """x -> `nodes` -> y; every weight is given by name."""
    return canonical(proto_of(list(nodes), inputs={"x": shape}, outputs={"y": [None] * len(shape)}, weights=constants))


def test_whole_residual_network_is_integer_with_its_absorbed_relus() -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, normal_batches((1, 3, 8, 8)))

    placement = place(model, plan, "x86-vnni")

    assert placement.target == "onnxruntime-x86-vnni"
    assert placement.decided_by == "table"
    assert set(placement.integer_nodes) == {node.name for node in model.graph}
    assert not placement.float_nodes


def test_every_node_is_integer_or_has_a_reason() -> None:
    model = chain(
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("Erf", ["a"], ["b"], name="erf"),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="conv2"),
        helper.make_node("Softmax", ["c"], ["y"], name="softmax", axis=1),
        w=weights(8, 4, 1, 1),
        w2=weights(8, 8, 1, 1),
    )
    plan = plan_for(model, normal_batches((1, 4, 8, 8)))

    placement = place(model, plan, "arm64")

    assert placement.integer_nodes == ("conv", "conv2")
    assert "Erf has no row" in placement.float_nodes["erf"]
    assert "after the last convolution" in placement.float_nodes["softmax"]


def test_cheap_operator_between_float_operators_stays_float_instead_of_becoming_an_island() -> None:
    # The two Erf keep the Add from integer neighbours on both sides.
    model = chain(
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("Erf", ["a"], ["b"], name="erf"),
        helper.make_node("Add", ["b", "b"], ["c"], name="island"),
        helper.make_node("Erf", ["c"], ["d"], name="erf2"),
        helper.make_node("Conv", ["d", "w"], ["y"], name="conv2"),
        w=weights(4, 4, 3, 3),
    )
    plan = plan_for(model, normal_batches((1, 4, 8, 8)))

    placement = place(model, plan, "x86-vnni")

    assert placement.integer_nodes == ("conv", "conv2")
    assert "beside float operators" in placement.float_nodes["island"]


def test_same_operator_between_integer_layers_is_integer() -> None:
    model = chain(
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv", pads=[1] * 4),
        helper.make_node("Add", ["a", "x"], ["c"], name="add"),
        helper.make_node("Conv", ["c", "w"], ["y"], name="conv2"),
        w=weights(4, 4, 3, 3),
    )
    plan = plan_for(model, normal_batches((1, 4, 8, 8)))

    assert place(model, plan, "x86-vnni").integer_nodes == ("conv", "add", "conv2")


def test_operator_without_integer_kernel_stays_float_although_the_plan_has_its_scales() -> None:
    model = chain(
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("Tanh", ["a"], ["b"], name="tanh"),
        helper.make_node("Conv", ["b", "w"], ["y"], name="conv2"),
        w=weights(4, 4, 3, 3),
    )
    plan = plan_for(model, normal_batches((1, 4, 8, 8)))

    placement = place(model, plan, "x86-vnni")

    assert "b" in plan.activations
    assert placement.float_nodes == {"tanh": "ONNX Runtime has no integer kernel for Tanh"}


def test_average_with_uncounted_padding_stays_float_and_says_why() -> None:
    model = chain(
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("AveragePool", ["a"], ["b"], name="pool", kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Conv", ["b", "w"], ["y"], name="conv2"),
        w=weights(4, 4, 3, 3),
    )
    plan = plan_for(model, normal_batches((1, 4, 8, 8)))

    assert "count_include_pad=0" in place(model, plan, "x86-vnni").float_nodes["pool"]


def test_node_whose_tensor_lost_its_scale_stays_float_with_the_plan_s_reason() -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, normal_batches((1, 3, 8, 8)))
    (relu,) = (node for node in model.graph if node.name == "block/relu")
    lost = relu.outputs[0].name
    activations = {name: found for name, found in plan.activations.items() if name != lost}
    plan = dataclasses.replace(plan, activations=activations, skipped={lost: "it was lost"})

    placement = place(model, plan, "x86-vnni")

    assert placement.float_nodes["block/add"] == f"tensor '{lost}' has no scale: it was lost"
    assert "head/gemm" in placement.integer_nodes


def test_relu_whose_planned_range_reaches_below_zero_is_not_absorbed() -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, normal_batches((1, 3, 8, 8)))
    (relu,) = (node for node in model.graph if node.name == "stem/relu")
    name = relu.outputs[0].name
    broken = dataclasses.replace(plan.activations[name], zero_point=0)
    plan = dataclasses.replace(plan, activations={**plan.activations, name: broken})

    assert "reaches beyond what 'stem/relu' clips to" in place(model, plan, "x86-vnni").float_nodes["stem/conv"]


def test_nodes_inside_an_if_stay_float() -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["a"], ["t"], name="inner")],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, [1, 4, 6, 6])],
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["a"], ["e"], name="inner2")],
        "else",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, [1, 4, 6, 6])],
    )
    model = chain(
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("ReduceSum", ["a"], ["s"], name="sum", keepdims=0),
        helper.make_node("Cast", ["s"], ["cond"], name="cast", to=TensorProto.BOOL),
        helper.make_node("If", ["cond"], ["y"], name="if", then_branch=branch, else_branch=other),
        w=weights(4, 4, 3, 3),
    )
    plan = plan_for(model, normal_batches((1, 4, 8, 8)))

    assert place(model, plan, "x86-vnni").float_nodes["inner"] == "it stands inside the body of an If, Loop or Scan"


def test_float_reasons_are_counted_most_frequent_first() -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, normal_batches((1, 3, 8, 8)), exclude=("block/*",))

    counts = float_reasons(place(model, plan, "x86"))

    # The pooling behind the excluded block has no integer neighbour left but the Gemm.
    assert list(counts.items()) == [("excluded by 'block/*'", 3), (NOT_WORTH_REASON, 2)]


def test_unknown_spelling_is_refused_with_the_known_ones() -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, normal_batches((1, 3, 8, 8)))

    with pytest.raises(UsageError, match=r"Unknown int8 spelling 'x86-vni'\. Did you mean 'x86-vnni'\?"):
        place(model, plan, "x86-vni")  # type: ignore[arg-type]


class EverythingDearInIntegers(TableCosts):
    """Float costs nothing, so nothing is worth a conversion."""

    def float_ns(self, planned: PlannedNode) -> float:
        return 0.0

    def integer_ns(self, planned: PlannedNode) -> float:
        return 1e6


def test_given_costs_decide_over_layers_with_weights_too() -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, normal_batches((1, 3, 8, 8)))

    placement = place(model, plan, "x86-vnni", costs=EverythingDearInIntegers("x86-vnni"))

    assert placement.integer_nodes == ()
    assert set(placement.float_nodes.values()) == {NOT_WORTH_REASON}


def test_returned_node_stays_float_with_what_it_would_absorb_and_the_given_reason() -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, normal_batches((1, 3, 8, 8)))

    placement = place(model, plan, "x86-vnni", returned={"stem/relu": "told so"})

    assert {name: placement.float_nodes[name] for name in ("stem/conv", "stem/relu")} == {
        "stem/conv": "told so",
        "stem/relu": "told so",
    }
    assert "block/conv" in placement.integer_nodes
