"""The pass `fp16`: what becomes float16, what stays float32 and why."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest

from onnxprune.contracts import ModelState, PassContext
from onnxprune.errors import UsageError
from onnxprune.graph.canonical import canonicalize
from onnxprune.graph.weights import constant_array
from onnxprune.ops.shapes import SHAPES
from onnxprune.passes.fp16 import Fp16Config, Fp16Pass
from onnxprune.passes.harness import plan_from_json, plan_to_json, run_pass

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16

TWO_CONVS = """g (float[1,4,8,8] x) => (float[1,8,8,8] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r = Relu(a)
    y = Conv(r, w2)
}"""


def normal(*shape, scale=1.0):
    return (np.random.default_rng(shape).standard_normal(shape) * scale).astype(np.float32)


@pytest.fixture
def two_convs(make_model):
    weights = {"w1": normal(16, 4, 3, 3), "b1": normal(16), "w2": normal(8, 16, 1, 1)}
    return make_model(TWO_CONVS, weights, modules={"a": "backbone.conv"})


def fp16(**config):
    return Fp16Pass(Fp16Config(**config))


def op_types(outcome):
    return [node.op_type for node in outcome.state.model.graph]


def io_types(outcome):
    graph = outcome.state.model.graph
    return [value.dtype for value in (*graph.inputs, *graph.outputs)]


def reasons(outcome):
    return {skip.where: skip.reason for skip in outcome.report.skips}


# --- weights only ---------------------------------------------------------------------------------------------


def test_weights_are_stored_as_float16_and_cast_once(two_convs, run_verified, outputs_of):
    outcome = run_verified(fp16(), two_convs)
    weights = outcome.state.model.graph.initializers
    assert {name: value.dtype for name, value in weights.items()} == {"w1": FLOAT16, "b1": FLOAT, "w2": FLOAT16}
    assert sorted(op_types(outcome)) == ["Cast", "Cast", "Conv", "Conv", "Relu"]
    assert io_types(outcome) == [FLOAT, FLOAT]
    expected, actual = outputs_of(two_convs)["y"], outputs_of(outcome.state.model)["y"]
    # Each weight is off by at most 2**-11 of itself, and the outputs are sums of 36 and 16 products of them.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2**-10 * np.abs(expected).max())


def test_the_report_gives_bytes_and_the_largest_error(two_convs, run_verified):
    report = run_verified(fp16(), two_convs).report
    converted = (16 * 4 * 9 + 8 * 16) * 2
    assert report.figures["weight_bytes_before"] - report.figures["weight_bytes_after"] == converted
    assert 0 < report.figures["max_rel_error"] < 1e-3
    assert [change.where for change in report.changes] == ["weight 'w1'", "weight 'w2'"]
    assert report.changes[0].figures["max_error"] == pytest.approx(
        np.abs(normal(16, 4, 3, 3) - normal(16, 4, 3, 3).astype(np.float16)).max()
    )


def test_a_weight_that_two_nodes_read_gets_one_cast(make_model, run_verified):
    model = make_model("g (float[1,16] x) => (float[1,16] y) { y = MatMul(x, w) }", {"w": normal(16, 16)})
    matmul = model.graph[0]
    second = ir.node("MatMul", [matmul.outputs[0], matmul.inputs[1]], name="again")
    second.outputs[0].name, second.outputs[0].type = "z", ir.TensorType(FLOAT)
    second.outputs[0].shape = ir.Shape([1, 16])
    model.graph.append(second)
    model.graph.outputs.append(second.outputs[0])
    plan = fp16().plan(ModelState(model=model), PassContext())
    outcome = fp16().apply(ModelState(model=model), plan, PassContext())
    assert op_types(outcome).count("Cast") == 1


def test_a_weight_inside_an_if_body_is_stored_as_float16(make_model, run_verified):
    model = make_model(
        """g (float[1,16] x, bool c) => (float[1,16] y) {
            y = If(c) <
                then_branch = t () => (float[1,16] a) { a = MatMul(x, w1) },
                else_branch = e () => (float[1,16] b) { b = MatMul(x, w2) }
            >
        }""",
        {"w1": normal(16, 16), "w2": normal(16, 16, scale=2)},
    )
    outcome = run_verified(fp16(), model)
    assert outcome.report.figures["weights_converted"] == 2


@pytest.mark.parametrize(
    ("scale", "reason"),
    [(1e5, "float16 ends at 65504"), (1e-8, "float16 would change them by")],
    ids=["too large", "too small"],
)
def test_weights_that_float16_can_not_hold_stay_with_the_reason(make_model, run_verified, scale, reason):
    model = make_model("g (float[1,16] x) => (float[1,16] y) { y = MatMul(x, w) }", {"w": normal(16, 16, scale=scale)})
    outcome = run_verified(fp16(), model)
    assert outcome.state.model is model
    assert reason in reasons(outcome)["weight 'w'"]


def test_numbers_that_become_zero_are_counted(make_model, run_verified):
    weight = normal(16, 16)
    weight[0, :3] = 1e-9
    model = make_model("g (float[1,16] x) => (float[1,16] y) { y = MatMul(x, w) }", {"w": weight})
    outcome = run_verified(fp16(), model)
    assert outcome.report.figures["values_lost"] == 3
    assert "3 weights below 6e-8 became zero." in outcome.report.notes


def test_skipped_weights_stay(two_convs, run_verified):
    outcome = run_verified(fp16(skip=("w1", "y")), two_convs)
    assert outcome.state.model is two_convs
    assert reasons(outcome)["weight 'w2'"] == "excluded by skip 'y'"


@pytest.mark.parametrize("mode", ["weights", "full"])
def test_a_module_is_skipped_with_everything_inside_it(mode, two_convs, run_verified):
    plan = run_verified(fp16(mode=mode, skip=("backbone",)), two_convs).plan
    assert [weight.name for weight in plan.weights] == ["w2"]


def test_a_skip_pattern_that_means_nothing_is_an_error(two_convs):
    message = "'spine' in `skip` of pass 'fp16' matches no node, weight, module or operator"
    with pytest.raises(UsageError, match=message):
        run_pass(fp16(skip=("spine",)), ModelState(model=two_convs), PassContext())


def test_quantized_weights_and_their_scales_stay(make_model, run_verified):
    model = make_model(
        "g (float[1,200] x) => (float[1,200] y) { f = DequantizeLinear<axis=1>(q, s)  y = MatMul(x, f) }",
        {"q": np.ones((200, 200), np.int8), "s": np.full(200, 0.1, np.float32)},
    )
    outcome = run_verified(fp16(), model)
    assert outcome.state.model is model
    assert "(DequantizeLinear) needs it as a float32 constant" in reasons(outcome)["weight 's'"]


def test_the_canonical_form_keeps_weights_stored_as_float16(two_convs, run_verified):
    outcome = run_verified(fp16(), two_convs)
    again = canonicalize(outcome.state.model.clone(), shape_rules=SHAPES)
    assert again.graph.initializers["w1"].dtype is FLOAT16


@pytest.mark.parametrize("config", [{}, {"mode": "full"}, {"mode": "full", "keep_io": False}], ids=str)
def test_a_second_run_changes_nothing(two_convs, run_verified, config):
    first = run_verified(fp16(**config), two_convs)
    second = run_verified(fp16(**config), first.state.model)
    assert second.state.model is first.state.model


# --- full -----------------------------------------------------------------------------------------------------


def test_full_computes_in_float16_between_casts_at_the_edges(two_convs, run_verified, outputs_of):
    outcome = run_verified(fp16(mode="full"), two_convs)
    assert op_types(outcome) == ["Cast", "Conv", "Relu", "Conv", "Cast"]
    assert io_types(outcome) == [FLOAT, FLOAT]
    assert {value.dtype for value in outcome.state.model.graph.initializers.values()} == {FLOAT16}
    expected, actual = outputs_of(two_convs)["y"], outputs_of(outcome.state.model)["y"]
    # Weights, activations and products are rounded to 2**-11; a few of these errors add up.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=4 * 2**-11 * np.abs(expected).max())


def test_full_without_keep_io_makes_inputs_and_outputs_float16(two_convs, run_verified):
    outcome = run_verified(fp16(mode="full", keep_io=False), two_convs)
    assert op_types(outcome) == ["Conv", "Relu", "Conv"]
    assert io_types(outcome) == [FLOAT16, FLOAT16]
    assert [value.name for value in outcome.state.model.graph.outputs] == ["y"]


def test_an_operator_that_needs_float32_gets_it_between_casts(make_model, run_verified):
    model = make_model(
        """g (float[1,8] x) => (float[1,8] y, int64[1,2] i) {
            e = Exp(x)  v, i = TopK(e, k)  y = Tanh(e)
        }""",
        {"k": np.array([2], np.int64)},
    )
    outcome = run_verified(fp16(mode="full"), model)
    assert op_types(outcome) == ["Cast", "Exp", "Cast", "TopK", "Tanh", "Cast"] or sorted(op_types(outcome)) == sorted(
        ["Cast", "Exp", "Cast", "TopK", "Tanh", "Cast"]
    )
    assert "it compares values that would become equal" in next(
        reason for where, reason in reasons(outcome).items() if where.startswith("node")
    )


def test_values_that_come_near_the_end_of_the_range_keep_their_nodes_in_float32(make_model, run_verified):
    model = make_model(
        "g (float[1,8] x) => (float[1,8] y) { a = Mul(x, k)  b = Mul(a, l)  y = Tanh(b) }",
        {"k": np.array(3e4, np.float32), "l": np.array(1e-4, np.float32)},
    )
    outcome = run_verified(fp16(mode="full"), model)
    kept = {where for where, reason in reasons(outcome).items() if "float16 ends at 65504" in reason}
    assert kept == {"node 'a'", "node 'b'"}
    assert outcome.plan.float16_nodes == ("y",)


def test_an_output_beyond_the_range_stays_float32_even_without_keep_io(make_model, run_verified):
    model = make_model("g (float[1,8] x) => (float[1,8] y) { y = Mul(x, k) }", {"k": np.array(6e4, np.float32)})
    outcome = run_verified(fp16(mode="full", keep_io=False), model)
    assert io_types(outcome) == [FLOAT16, FLOAT]
    assert "float16 ends at 65504" in reasons(outcome)["'y'"]


def test_an_if_body_stays_float32_and_gets_float32_from_outside(make_model, run_verified):
    model = make_model(
        """g (float[1,8] x, bool c) => (float[1,8] y) {
            e = Exp(x)
            z = If(c) <
                then_branch = t () => (float[1,8] a) { a = Neg(e) },
                else_branch = f () => (float[1,8] b) { b = Abs(e) }
            >
            y = Tanh(z)
        }""",
        {},
    )
    outcome = run_verified(fp16(mode="full"), model)
    assert sorted(op_types(outcome)) == ["Cast"] * 4 + ["Exp", "If", "Tanh"]


def test_a_value_that_is_an_output_and_read_inside_keeps_its_name_and_type(make_model, run_verified):
    model = make_model("g (float[1,8] x) => (float[1,8] e, float[1,8] y) { e = Exp(x)  y = Tanh(e) }", {})
    outcome = run_verified(fp16(mode="full"), model)
    assert [(value.name, value.dtype) for value in outcome.state.model.graph.outputs] == [("e", FLOAT), ("y", FLOAT)]


def test_a_weight_read_in_both_types_is_kept_in_both(make_model):
    model = make_model(
        "g (float[1,8] x) => (float[1,8] y, float[1,8] s) { a = Add(x, w)  y = Tanh(a)  s = Sub(x, w) }",
        {"w": normal(8)},
    )
    weight = model.graph.initializers["w"]
    for name, value in list(model.graph.initializers.items()):
        if name.startswith("w_"):
            value.replace_all_uses_with(weight)
            del model.graph.initializers[name]
    plan = fp16(mode="full", skip=("s",)).plan(ModelState(model=model), PassContext())
    fp16(mode="full").apply(ModelState(model=model), plan, PassContext())
    assert {value.dtype for value in model.graph.initializers.values()} >= {FLOAT, FLOAT16}
    np.testing.assert_array_equal(constant_array(model.graph.initializers["w"]), normal(8))


def test_the_plan_survives_json_and_repeats_the_run(two_convs):
    pass_ = fp16(mode="full")
    first = run_pass(pass_, ModelState(model=two_convs), PassContext())
    plan = plan_from_json(pass_, json.loads(json.dumps(plan_to_json(pass_, first.plan))))
    assert plan == first.plan
    again = run_pass(pass_, ModelState(model=two_convs), PassContext(), plan=plan)
    assert op_types(again) == op_types(first)
