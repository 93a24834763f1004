"""Where a plan breaks TFLite's rules, and where it does not."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.contracts import CanonicalModel, QuantizationPlan
from onnxprune.ops.quant import QUANT
from onnxprune.targets.qdq import TfliteConflict, place_tflite, spell, tflite_conflicts
from onnxprune.targets.qdq.tflite import BESIDE_FLOAT, TFLITE_OPERATORS, WIDE_REASON
from tests.builders import canonical, conv_net, proto_of
from tests.quantization import normal_batches, plan_for, run, signal_to_noise_db
from tests.unit.targets.qdq.test_operators import CASES, INPUT_SHAPE, OperatorCase, make, normal, sandwich


def conflicts_of(case: OperatorCase) -> tuple[TfliteConflict, ...]:
    model = sandwich(case)
    plan = plan_for(model, normal_batches(INPUT_SHAPE))
    return tflite_conflicts(model, plan, place_tflite(model, plan))


def changed(plan: QuantizationPlan, name: str, **fields: object) -> QuantizationPlan:
    activation = dataclasses.replace(plan.activations[name], **fields)
    return dataclasses.replace(plan, activations={**plan.activations, name: activation})


def sandwiched(*nodes: object, **options: object) -> tuple[CanonicalModel, QuantizationPlan]:
    model = sandwich(OperatorCase(id="", nodes=nodes, kernel="", **options))
    return model, plan_for(model, normal_batches(INPUT_SHAPE))


def test_every_quantizable_operator_is_one_of_tflites_but_gather_elements() -> None:
    keys = QUANT.keys()
    planned = {key.op_type for key in keys}

    assert planned - set(TFLITE_OPERATORS) == {"GatherElements"}
    assert set(TFLITE_OPERATORS) <= planned


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_plan_serves_tflite_as_it_is(case: OperatorCase) -> None:
    assert conflicts_of(case) == ()


def test_concat_of_different_scales_wants_a_requantized_input() -> None:
    model, plan = sandwiched(
        make("Mul", ["a", "k"], "m"),
        make("Concat", ["a", "m"], axis=1),
        channels_out=16,
        weights={"k": np.full((8, 1, 1), 0.1, dtype=np.float32)},
    )

    (conflict,) = tflite_conflicts(model, plan, place_tflite(model, plan))

    assert (conflict.node, conflict.tensors, conflict.remedy) == ("Concat_b", ("m",), "requantize input")
    assert "CONCATENATION share scale and zero point" in conflict.rule


def test_pooling_with_another_output_scale_wants_a_requantized_side() -> None:
    model, plan = sandwiched(make("MaxPool", ["a"], kernel_shape=[2, 2]))
    plan = changed(plan, "b", scale=plan.activations["b"].scale * 2)

    (conflict,) = tflite_conflicts(model, plan, place_tflite(model, plan))

    assert (conflict.tensors, conflict.remedy) == (("a",), "requantize input")


@pytest.mark.parametrize(("op_type", "rule"), [("Sigmoid", "0.00390625 and zero point -128"), ("Tanh", "0.0078125")])
def test_output_with_a_fixed_scale_and_another_one_in_the_plan_is_a_conflict(op_type: str, rule: str) -> None:
    model, plan = sandwiched(make(op_type, ["a"]))
    placement = place_tflite(model, plan)
    assert tflite_conflicts(model, plan, placement) == ()

    (conflict,) = tflite_conflicts(model, changed(plan, "b", scale=0.01), placement)

    assert conflict.remedy == "requantize output"
    assert rule in conflict.rule


def test_fully_connected_layer_with_a_scale_for_each_unit_is_a_conflict_and_one_with_one_scale_is_not() -> None:
    model = conv_net(batch=1)
    for per_channel, wanted in ((True, ["head/gemm"]), (False, [])):
        plan = plan_for(model, normal_batches((1, 3, 8, 8)), per_channel=per_channel)
        found = tflite_conflicts(model, plan, place_tflite(model, plan))
        assert [conflict.node for conflict in found] == wanted


def test_sixteen_bit_activations_need_the_zero_point_zero() -> None:
    model, plan = sandwiched(make("LeakyRelu", ["a"], alpha=0.1))
    placement = place_tflite(model, plan)
    wide = changed(changed(plan, "a", num_bits=16, zero_point=0), "b", num_bits=16, zero_point=7)

    found = tflite_conflicts(model, wide, placement)

    assert {(conflict.op_type, conflict.tensors) for conflict in found} == {("LeakyRelu", ("b",)), ("Conv", ("b",))}


def test_node_that_stays_float_breaks_no_rule() -> None:
    model, plan = sandwiched(make("Tanh", ["a"]))
    placement = place_tflite(model, plan)
    without = tuple(name for name in placement.integer_nodes if name != "Tanh_b")

    wrong = changed(plan, "b", scale=0.01)

    assert len(tflite_conflicts(model, wrong, placement)) == 1
    assert tflite_conflicts(model, wrong, dataclasses.replace(placement, integer_nodes=without)) == ()


def test_operator_that_tflite_lacks_stays_float_with_the_reason() -> None:
    indices = np.zeros((1, 8, 12, 12), dtype=np.int64)
    model, plan = sandwiched(make("GatherElements", ["a", "i"], axis=1), weights={"i": indices})

    placement = place_tflite(model, plan)

    assert placement.float_nodes["GatherElements_b"] == "TFLite has no int8 operator for GatherElements"
    everywhere = dataclasses.replace(placement, integer_nodes=(*placement.integer_nodes, "GatherElements_b"))
    assert [found.remedy for found in tflite_conflicts(model, plan, everywhere)] == ["stay float"]


def test_spelling_for_tflite_keeps_every_operator_between_conversions() -> None:
    model, plan = sandwiched(
        make("HardSwish", ["a"], "h"), make("AveragePool", ["h"], "p", kernel_shape=[2, 2]), make("Tanh", ["p"]),
        opset=22,
    )  # fmt: skip

    spelled = spell(model, plan, place_tflite(model, plan), "tflite")

    for name in ("HardSwish_h", "AveragePool_p", "Tanh_b"):
        (node,) = (node for node in spelled.graph if node.name == name)
        assert node.op_type == name.partition("_")[0]
        (reader,) = node.outputs[0].consumers()
        assert reader.op_type == "QuantizeLinear"
        assert reader.outputs[0].dtype == ir.DataType.INT8
    feeds = normal_batches(INPUT_SHAPE).batches[0]
    # Four roundings to 8 bits.
    assert signal_to_noise_db(run(model, feeds)[0], run(spelled, feeds, optimized=False)[0]) > 25


def test_body_of_an_if_is_listed_with_its_reason() -> None:
    def branch(name: str) -> object:
        return helper.make_graph(
            [helper.make_node("Relu", ["a"], [name], name=f"{name}_node")],
            name,
            [],
            [helper.make_tensor_value_info(name, 1, [1, 8, 12, 12])],
        )

    proto = proto_of(
        [
            make("Conv", ["x", "w"], "a"),
            helper.make_node("ReduceSum", ["x"], ["s"], name="sum", keepdims=0),
            helper.make_node("Cast", ["s"], ["cond"], name="cast", to=9),
            helper.make_node("If", ["cond"], ["y"], name="if", then_branch=branch("t"), else_branch=branch("e")),
        ],
        inputs={"x": INPUT_SHAPE},
        outputs={"y": [1, 8, 12, 12]},
        weights={"w": normal(8, 4, 1, 1)},
    )
    model = canonical(proto)
    plan = plan_for(model, normal_batches(INPUT_SHAPE))

    placement = place_tflite(model, plan)

    assert placement.integer_nodes == ("Conv_a",)
    assert placement.float_nodes["t_node"] == "it stands inside the body of an If, Loop or Scan"


def test_plan_of_sixteen_bits_stays_float_with_the_reason() -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, normal_batches((1, 3, 8, 8)), activation_bits=16)

    placement = place_tflite(model, plan)

    assert placement.integer_nodes == ()
    assert placement.float_nodes["stem/conv"] == WIDE_REASON


def test_operators_that_only_pass_on_float_results_stay_float_with_the_reason() -> None:
    model, plan = sandwiched(
        make("Reshape", ["a", "shape"], "r"),
        make("LeakyRelu", ["r"], alpha=0.1),
        weights={"shape": np.array([1, 8, 12, 12], dtype=np.int64)},
    )
    leaky = next(node.name for node in model.graph if node.op_type == "LeakyRelu")
    first, last = (node.name for node in model.graph if node.op_type == "Conv")
    reshape = next(node.name for node in model.graph if node.op_type == "Reshape")

    def placed(*excluded: str | None) -> tuple[bool, str | None]:
        nodes = {name or "": "asked for" for name in excluded}
        placement = place_tflite(model, dataclasses.replace(plan, excluded_nodes=nodes))
        return reshape in placement.integer_nodes, placement.float_nodes.get(reshape or "")

    assert placed() == (True, None)
    # One neighbour that computes in integers is enough, on either side.
    assert placed(first) == (True, None)
    assert placed(leaky, last) == (True, None)
    assert placed(first, leaky, last) == (False, BESIDE_FLOAT)
