"""Placing and spelling every planned node, in 8 bits, 16 bits, and both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.contracts import ActivationQuantization, CanonicalModel, Placement, QuantizationPlan
from onnxprune.errors import TargetError
from onnxprune.graph.weights import constant_array
from onnxprune.passes.quant.simulate import simulated
from onnxprune.targets.qdq import SpellingName, place
from onnxprune.targets.qdq.everywhere import everywhere_target, place_everywhere, spell_everywhere
from tests.builders import canonical, conv_net, proto_of
from tests.quantization import ArraySource, normal_batches, plan_for, run, signal_to_noise_db

SOURCE = normal_batches((1, 3, 8, 8))
SHAPE = (1, 4, 8, 8)


def weights(*shape: int) -> np.ndarray:
    return (np.random.default_rng(9).standard_normal(shape) * 0.3).astype(np.float32)


def net(*nodes: helper.NodeProto, opset: int = 20, **constants: np.ndarray) -> CanonicalModel:
    return canonical(
        proto_of(list(nodes), inputs={"x": SHAPE}, outputs={"y": [None] * 4}, weights=constants, opset=opset)
    )


def spelled_of(
    model: CanonicalModel, plan: QuantizationPlan, spelling: SpellingName = "x86-vnni"
) -> tuple[Placement, ir.Model]:
    placement = place_everywhere(model, plan, spelling)
    spelled = spell_everywhere(model, plan, placement, spelling)
    onnx.checker.check_model(ir.to_proto(spelled))
    return placement, spelled


def widened(plan: QuantizationPlan, *tensors: str) -> QuantizationPlan:
    """`plan` with 16 bits for some tensors."""

    def wide(found: ActivationQuantization) -> ActivationQuantization:
        largest = max(-found.range_min, found.range_max)
        return replace(found, num_bits=16, zero_point=0, scale=float(np.float32(largest / 32767)))

    return replace(plan, activations={**plan.activations, **{name: wide(plan.activations[name]) for name in tensors}})


def conversions(model: ir.Model, op_type: str) -> list[tuple[str, str]]:
    """Element type and domain of each conversion of activations, in graph order."""
    position = 2
    found = []
    for node in model.graph:
        if node.op_type != op_type or len(node.attributes) or not node.inputs[0] or node.inputs[0].is_initializer():
            continue
        zero_point = node.inputs[position]
        assert zero_point is not None
        assert zero_point.dtype is not None
        found.append((zero_point.dtype.name, node.domain))
    return found


@pytest.mark.parametrize("spelling", ["x86-vnni", "arm64"])
@pytest.mark.parametrize(("bits", "least_db"), [(8, 35), (16, 45)])
def test_all_nodes_are_integer_and_compute_what_the_plan_says(
    bits: int, least_db: float, spelling: SpellingName
) -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, SOURCE, activation_bits=bits)

    placement, spelled = spelled_of(model, plan, spelling)

    assert len(placement.integer_nodes) == len(list(model.graph))
    assert not placement.float_nodes
    feeds = SOURCE.batches[0]
    exact, actual = run(model, feeds)[0], run(spelled, feeds)[0]
    assert signal_to_noise_db(exact, actual) > least_db
    # The oracle rounds the same numbers; biases are rounded to int32 besides.
    assert signal_to_noise_db(run(simulated(model, plan), feeds)[0], actual) > 80


@pytest.mark.parametrize(
    ("spelling", "opset", "expected"),
    [
        ("x86-vnni", 20, ("UINT16", "com.microsoft")),
        ("arm64", 20, ("INT16", "com.microsoft")),
        ("arm64", 21, ("INT16", "")),
    ],
)
def test_sixteen_bits_are_onnx_operators_from_opset_21_on(
    spelling: SpellingName, opset: int, expected: tuple[str, str]
) -> None:
    model = net(helper.make_node("Conv", ["x", "w"], ["y"], name="conv"), opset=opset, w=weights(8, 4, 3, 3))
    source = normal_batches(SHAPE)

    _, spelled = spelled_of(model, plan_for(model, source, activation_bits=16), spelling)

    assert set(conversions(spelled, "QuantizeLinear")) == {expected}
    weight = constant_array(spelled.graph.initializers["w_quantized"])
    assert weight is not None
    assert weight.dtype == np.int8


def test_relu_disappears_with_eight_bits_and_stays_in_its_group_with_sixteen() -> None:
    model = net(
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Clip", ["c", "low", "high"], ["y"], name="clip"),
        w=weights(8, 4, 3, 3),
        low=np.float32(0),
        high=np.float32(1.5),
    )
    source = normal_batches(SHAPE)
    narrow, wide = (spelled_of(model, plan_for(model, source, activation_bits=bits))[1] for bits in (8, 16))

    assert [node.op_type for node in narrow.graph if "Linear" not in node.op_type] == ["Conv"]
    assert [node.op_type for node in wide.graph if "Linear" not in node.op_type] == ["Conv", "Clip"]
    for spelled in (narrow, wide):
        result = run(spelled, source.batches[0])[0]
        assert result.min() >= 0
        # Saturation ends half a step beside the bound.
        assert result.max() <= 1.5 * (1 + 1 / 255)


def test_outputs_of_sigmoid_tanh_and_softmax_have_the_fixed_scale_of_sixteen_bits() -> None:
    model = net(
        helper.make_node("Sigmoid", ["x"], ["s"], name="sigmoid"),
        helper.make_node("Conv", ["s", "w"], ["c"], name="conv"),
        helper.make_node("Tanh", ["c"], ["t"], name="tanh"),
        helper.make_node("Conv", ["t", "v"], ["y"], name="conv2"),
        w=weights(8, 4, 1, 1),
        v=weights(4, 8, 1, 1),
    )
    plan = plan_for(model, normal_batches(SHAPE), activation_bits=16)

    assert {name: (plan.activations[name].scale, plan.activations[name].zero_point) for name in ("s", "t")} == {
        "s": (1 / 32768, 0),
        "t": (1 / 32768, 0),
    }
    assert {found.zero_point for found in plan.activations.values()} == {0}


def mixed_net() -> CanonicalModel:
    return net(
        helper.make_node("Conv", ["x", "w"], ["a"], name="first"),
        helper.make_node("Conv", ["a", "v"], ["b"], name="wide"),
        helper.make_node("Conv", ["b", "u"], ["c"], name="last"),
        helper.make_node("Conv", ["b", "t"], ["d"], name="beside"),
        helper.make_node("Concat", ["c", "d"], ["y"], name="concat", axis=1),
        w=weights(8, 4, 1, 1),
        v=weights(8, 8, 1, 1),
        u=weights(4, 8, 1, 1),
        t=weights(4, 8, 1, 1),
    )


def test_tensor_with_other_bits_than_its_reader_is_converted_once_for_all_of_them() -> None:
    model = mixed_net()
    source = normal_batches(SHAPE)
    plan = plan_for(model, source)
    mixed = widened(plan, "b")

    _, spelled = spelled_of(model, mixed)

    made = conversions(spelled, "QuantizeLinear")
    # x, a, then a again in the 16 bits of 'wide', b, b in 8 bits for its two readers, c and d (the tail is float).
    assert [kind for kind, _ in made] == ["UINT8", "UINT8", "UINT16", "UINT16", "UINT8", "UINT8", "UINT8"]
    feeds = source.batches[0]
    exact = run(model, feeds)[0]
    narrow_db = signal_to_noise_db(exact, run(spelled_of(model, plan)[1], feeds)[0])
    mixed_db = signal_to_noise_db(exact, run(spelled, feeds)[0])
    # The conversion to 8 bits in front of the readers costs about what 8 bits cost: no more than a wrong scale would.
    assert mixed_db > narrow_db - 3
    # ONNX Runtime's optimizer leaves the pairs of conversions as they are.
    literal = run(spelled, feeds, optimized=False)[0]
    assert signal_to_noise_db(literal, run(spelled, feeds)[0]) > 45


def test_moving_operator_with_sixteen_bits_gets_its_input_in_the_scale_of_its_output() -> None:
    model = net(
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("Transpose", ["a"], ["m"], name="move", perm=[0, 1, 3, 2]),
        helper.make_node("Conv", ["m", "v"], ["y"], name="last"),
        w=weights(8, 4, 1, 1),
        v=weights(4, 8, 1, 1),
    )
    source = normal_batches(SHAPE)
    plan = widened(plan_for(model, source), "m")

    _, spelled = spelled_of(model, plan)

    (move,) = (node for node in spelled.graph if node.name == "move")
    given = move.inputs[0].producer() if move.inputs[0] is not None else None
    (taken,) = (use.node for use in move.outputs[0].uses())
    assert given is not None
    assert given.op_type == "DequantizeLinear"
    # One scale and one zero point on both sides of what only moves numbers.
    assert list(given.inputs[1:]) == list(taken.inputs[1:])


def test_tensor_that_the_model_returns_keeps_its_name_and_float_readers_read_what_they_read() -> None:
    proto = proto_of(
        [
            helper.make_node("Conv", ["x", "w"], ["middle"], name="conv", pads=[1, 1, 1, 1]),
            helper.make_node("Erf", ["middle"], ["e"], name="erf"),
            helper.make_node("Conv", ["middle", "v"], ["c"], name="conv2", pads=[1, 1, 1, 1]),
            helper.make_node("Max", ["c", "e"], ["y"], name="max"),
        ],
        inputs={"x": SHAPE},
        outputs={"middle": [1, 4, 8, 8], "y": [1, 4, 8, 8]},
        weights={"w": weights(4, 4, 3, 3), "v": weights(4, 4, 3, 3)},
    )
    model = canonical(proto)
    source = normal_batches(SHAPE)

    placement, spelled = spelled_of(model, plan_for(model, source, activation_bits=16))

    assert [value.name for value in spelled.graph.outputs] == ["middle", "y"]
    assert set(placement.float_nodes) == {"erf", "max"}
    assert "Erf has no row" in placement.float_nodes["erf"]
    for exact, actual in zip(run(model, source.batches[0]), run(spelled, source.batches[0]), strict=True):
        assert signal_to_noise_db(exact, actual) > 40


def test_split_and_pooling_keep_one_scale_in_all_their_outputs() -> None:
    model = net(
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("Split", ["a"], ["p", "q"], name="split", axis=1, num_outputs=2),
        helper.make_node("Add", ["p", "q"], ["s"], name="add"),
        helper.make_node("MaxPool", ["s"], ["m"], name="pool", kernel_shape=[2, 2]),
        helper.make_node("Conv", ["m", "v"], ["y"], name="last"),
        w=weights(8, 4, 1, 1),
        v=weights(8, 4, 1, 1),
    )
    source = normal_batches(SHAPE)
    for bits in (8, 16):
        plan = plan_for(model, source, activation_bits=bits)
        placement, spelled = spelled_of(model, plan)
        assert {"split", "pool"} <= set(placement.integer_nodes)
        simulation = run(simulated(model, plan), source.batches[0])[0]
        assert signal_to_noise_db(simulation, run(spelled, source.batches[0])[0]) > 45


def test_table_keeps_sixteen_bits_in_float_and_says_why() -> None:
    model = conv_net(batch=1)

    placement = place(model, plan_for(model, SOURCE, activation_bits=16), "x86-vnni")

    assert placement.integer_nodes == ()
    reasons = {node: placement.float_nodes[node] for node in ("stem/conv", "block/add", "head/pool", "head/gemm")}
    assert all("kernels for 8 only" in reason for reason in reasons.values()), reasons


def test_excluded_nodes_stay_float_and_a_second_spelling_gives_the_same_bytes() -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, SOURCE, activation_bits=16, exclude=("block/conv",))

    placement, one = spelled_of(model, plan)
    _, other = spelled_of(model, plan)

    assert placement.float_nodes["block/conv"] == "excluded by 'block/conv'"
    assert placement.target == everywhere_target("x86-vnni") == "everywhere-x86-vnni"
    assert ir.to_proto(one).SerializeToString(deterministic=True) == ir.to_proto(other).SerializeToString(
        deterministic=True
    )


def test_placement_that_does_not_fit_the_plan_is_refused() -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, SOURCE)
    placement = Placement(target=everywhere_target("x86"), integer_nodes=("nowhere",), float_nodes={})

    with pytest.raises(TargetError, match="'nowhere' integer"):
        spell_everywhere(model, plan, placement, "x86")


def test_transformer_like_products_have_biases_and_constants_in_integers() -> None:
    nodes: list[Any] = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="product"),
        helper.make_node("Add", ["m", "b"], ["a"], name="add"),
        helper.make_node("Reshape", ["a", "shape"], ["r"], name="flat"),
        helper.make_node("Gemm", ["r", "v", "c"], ["y"], name="gemm", transB=1),
    ]
    proto = proto_of(
        nodes,
        inputs={"x": (1, 8, 16)},
        outputs={"y": (8, 10)},
        weights={
            "w": weights(16, 32),
            "b": weights(32),
            "shape": np.array([8, 32], dtype=np.int64),
            "v": weights(10, 32),
            "c": weights(10) * 5,
        },
    )
    model = canonical(proto)
    source: ArraySource = normal_batches((1, 8, 16))
    for bits, least_db in ((8, 33), (16, 40)):
        _, spelled = spelled_of(model, plan_for(model, source, activation_bits=bits))
        assert signal_to_noise_db(run(model, source.batches[0])[0], run(spelled, source.batches[0])[0]) > least_db
        assert spelled.graph.initializers["c_quantized"].dtype == ir.DataType.INT32


def test_name_of_the_tensor_before_its_integers_may_be_taken_already() -> None:
    model = net(
        helper.make_node("Conv", ["x", "w"], ["t"], name="first"),
        helper.make_node("Sigmoid", ["t"], ["t_raw"], name="second"),
        helper.make_node("Conv", ["t_raw", "v"], ["y"], name="third"),
        w=weights(8, 4, 1, 1),
        v=weights(8, 8, 1, 1),
    )
    source = normal_batches(SHAPE)

    _, spelled = spelled_of(model, plan_for(model, source))

    names = [value.name for node in spelled.graph for value in node.outputs]
    assert len(names) == len(set(names))
    assert signal_to_noise_db(run(model, source.batches[0])[0], run(spelled, source.batches[0])[0]) > 30


@pytest.mark.parametrize("bits", [8, 16])
def test_dilated_average_pool_stays_float_and_onnx_runtime_loads_the_model(bits: int) -> None:
    model = net(
        helper.make_node("Conv", ["x", "w"], ["a"], name="first"),
        helper.make_node("AveragePool", ["a"], ["b"], name="pool", kernel_shape=[3, 3], dilations=[2, 2]),
        helper.make_node("Conv", ["b", "v"], ["y"], name="last"),
        w=weights(8, 4, 1, 1),
        v=weights(8, 8, 1, 1),
    )
    source = normal_batches(SHAPE)

    placement, spelled = spelled_of(model, plan_for(model, source, activation_bits=bits))

    assert "refuses the model" in placement.float_nodes["pool"]
    feeds = source.batches[0]
    # An average of nine is small beside the steps of what it averages.
    assert signal_to_noise_db(run(model, feeds)[0], run(spelled, feeds)[0]) > 25
