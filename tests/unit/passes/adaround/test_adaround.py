"""Learned rounding: layers' outputs stay closer than with rounding to nearest, on the very grid of the plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx import helper

from onnxprune.contracts import ModelState, PassContext
from onnxprune.errors import PassError, PreconditionError, UsageError
from onnxprune.graph.weights import constant_array
from onnxprune.passes.adaround import AdaRoundConfig, AdaRoundPass
from onnxprune.passes.adaround.gptq import descend, fitted_target, gptq, nearest, second_moments
from onnxprune.passes.harness import check_requirements, run_pass
from onnxprune.passes.layerwise.packing import pack_integers, unpack_integers
from onnxprune.passes.quant.simulate import round_weight
from tests.builders import canonical, proto_of
from tests.layerwise import SHAPE, carried_out, images, int8_snr_db, mobile_net, normal, quantized


def adaround(**config) -> AdaRoundPass:
    return AdaRoundPass(AdaRoundConfig(**config))


@pytest.mark.parametrize(
    "config", [{"method": "gptq"}, {"method": "adaround", "iterations": 300}], ids=["gptq", "learned"]
)
def test_coarse_weights_lose_less_than_rounded_to_nearest(config: dict) -> None:
    model, source = mobile_net(), images(48)
    state = quantized(model, source, weight_bits=4)

    outcome = carried_out(adaround(**config), state, source)

    before = int8_snr_db(model, model, state.quantization, images(16, seed=9))
    after = int8_snr_db(model, outcome.state.model, state.quantization, images(16, seed=9))
    assert after > before + 3
    assert outcome.report.figures["snr_after_db"] > outcome.report.figures["snr_before_db"]
    assert outcome.state.quantization is state.quantization


def test_every_weight_is_exactly_integer_times_scale() -> None:
    source = images()
    state = quantized(mobile_net(), source, weight_bits=4)

    after = carried_out(adaround(), state, source).state.model

    for name, planned in state.quantization.weights.items():
        weight = constant_array(after.graph.initializers[name])
        assert np.array_equal(round_weight(weight, planned), weight)


def test_the_integers_differ_from_those_of_rounding_to_nearest() -> None:
    model, source = mobile_net(), images()
    state = quantized(model, source, weight_bits=4)

    outcome = carried_out(adaround(), state, source)

    changed = 0
    for name, planned in state.quantization.weights.items():
        nearest_one = round_weight(constant_array(model.graph.initializers[name]), planned)
        changed += int((constant_array(outcome.state.model.graph.initializers[name]) != nearest_one).sum())
    assert changed == outcome.report.figures["integers_changed"] > 0


def test_without_correct_bias_no_bias_moves() -> None:
    model, source = mobile_net(), images()
    after = carried_out(adaround(correct_bias=False), quantized(model, source, weight_bits=4), source).state.model
    for name in ("b1", "b2", "b3", "b4"):
        assert np.array_equal(
            constant_array(after.graph.initializers[name]), constant_array(model.graph.initializers[name])
        )


def test_a_second_run_finds_the_float_weights_gone_and_does_no_harm() -> None:
    source = images(32)
    first = carried_out(adaround(), quantized(mobile_net(), source, weight_bits=4), source)
    second = carried_out(adaround(), first.state, source)
    gain = second.plan.gain
    assert gain is not None
    assert second.plan.is_undone or gain.after_db >= gain.before_db


def test_the_same_seed_gives_the_same_plan() -> None:
    source = images()
    state = quantized(mobile_net(), source, weight_bits=4)
    plans = [run_pass(adaround(), state, PassContext(calibration=source, seed=7)).plan for _ in range(2)]
    assert plans[0] == plans[1]


def test_an_if_body_is_no_obstacle() -> None:
    body = helper.make_graph(
        [helper.make_node("Neg", ["c1"], ["t"], name="inner")],
        "body",
        [],
        [helper.make_tensor_value_info("t", 1, [1, 4, 8, 8])],
    )
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="first", pads=[1] * 4),
        helper.make_node("If", ["flag"], ["d"], name="if", then_branch=body, else_branch=body),
        helper.make_node("Conv", ["d", "w2"], ["y"], name="second", pads=[1] * 4),
    ]
    weights = {"w1": normal(4, 4, 3, 3), "w2": normal(4, 4, 3, 3, seed=1), "flag": np.array(True)}
    proto = proto_of(nodes, inputs={"x": SHAPE}, outputs={"y": [1, 4, 8, 8]}, weights=weights)
    model = canonical(proto)
    outcome = carried_out(adaround(), quantized(model, images(), weight_bits=4), images())
    assert {change.where for change in outcome.report.changes} == {"w1", "w2"}


def test_nothing_to_round_is_said_and_is_not_called_a_lack_of_data() -> None:
    state = quantized(mobile_net(), images())
    left = dict.fromkeys((node.name or "" for node in state.model.graph), "returned to float")
    all_float = replace(state, quantization=replace(state.quantization, returned_nodes=left))
    assert carried_out(adaround(), all_float, images()).report.notes == (
        "Nothing was done: no integer layer with a weight is left.",
    )


def test_a_plan_without_quantization_is_refused_before_the_run() -> None:
    with pytest.raises(PreconditionError, match="Put 'quant' before 'adaround'"):
        check_requirements([adaround()], has_calibration=True, has_evaluator=False)


def test_a_plan_for_another_quantization_is_refused() -> None:
    model, source = mobile_net(), images()
    plan = carried_out(adaround(), quantized(model, source, weight_bits=4), source).plan
    other = quantized(model, source, exclude=("depthwise",))
    with pytest.raises(PassError, match="rounds the weight 'w2'"):
        run_pass(adaround(), other, PassContext(), plan=plan)


def test_excluded_layers_are_rounded_to_nearest_and_a_pattern_that_means_nothing_is_an_error() -> None:
    state = quantized(mobile_net(), images(), weight_bits=4)
    outcome = carried_out(adaround(exclude=("depthwise",)), state, images())
    assert "w2" not in {change.where for change in outcome.report.changes}
    with pytest.raises(UsageError, match="'nowhere' in `exclude` of pass 'adaround'"):
        run_pass(adaround(exclude=("nowhere",)), state, PassContext(calibration=images()))


# --- the arithmetic -------------------------------------------------------------------------------------------


def problem(groups: int = 2, outputs: int = 3, inputs: int = 8, rows: int = 200):
    rng = np.random.default_rng(1)
    mix = rng.standard_normal((groups, inputs, inputs))
    x = (rng.standard_normal((groups, rows, inputs)) @ mix).astype(np.float32)
    weight = rng.standard_normal((groups, outputs, inputs))
    return x, weight, np.full((groups, outputs), 0.3)


def output_error(x: np.ndarray, weight: np.ndarray, integers: np.ndarray, scales: np.ndarray) -> float:
    return float(np.square(x @ (integers * scales[..., np.newaxis] - weight).transpose(0, 2, 1)).sum())


def test_gptq_and_descent_make_the_error_smaller_step_by_step() -> None:
    x, weight, scales = problem()
    moments = second_moments(x)
    plain = nearest(weight, scales, 127)
    closed = gptq(weight, moments, scales, 127)
    refined = descend(closed, weight, moments, scales, 127)
    errors = [output_error(x, weight, integers, scales) for integers in (plain, closed, refined)]
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] <= errors[1]


def test_descent_from_gptq_is_near_the_best_of_all_roundings() -> None:
    x, weight, scales = problem(groups=1, outputs=1, inputs=8)
    moments = second_moments(x)
    low = np.floor(weight / scales[..., np.newaxis])
    every = [low + np.array([number >> bit & 1 for bit in range(8)]) for number in range(256)]
    best = min(output_error(x, weight, integers, scales) for integers in every)
    found = output_error(x, weight, descend(gptq(weight, moments, scales, 127), weight, moments, scales, 127), scales)
    assert found <= 1.5 * best


def test_integers_stay_within_their_bits() -> None:
    x, weight, scales = problem()
    found = gptq(weight * 100, second_moments(x), scales, 7)
    assert np.abs(found).max() == 7


def test_an_input_that_is_always_zero_is_no_obstacle() -> None:
    x, weight, scales = problem()
    x[:, :, 3] = 0
    found = descend(gptq(weight, second_moments(x), scales, 127), weight, second_moments(x), scales, 127)
    assert np.isfinite(found).all()


def test_the_fitted_target_repeats_outputs_that_rounded_inputs_would_miss() -> None:
    x, weight, _ = problem()
    rounded = np.rint(x)
    wanted = x @ weight.transpose(0, 2, 1)
    target = fitted_target(weight, rounded, wanted.astype(np.float32), second_moments(rounded), 1e-4)
    before = np.square(rounded @ weight.transpose(0, 2, 1) - wanted).sum()
    assert np.square(rounded @ target.transpose(0, 2, 1) - wanted).sum() < before


def test_packed_integers_come_back_and_damage_is_named() -> None:
    array = np.random.default_rng(0).integers(-1, 2, (5, 7)).astype(np.int8)
    text = pack_integers(array)
    assert np.array_equal(unpack_integers(text, (5, 7)), array)
    with pytest.raises(UsageError, match="are not the 36 of a weight"):
        unpack_integers(text, (6, 6))
    with pytest.raises(UsageError, match="damaged"):
        unpack_integers("*" + text, (5, 7))


def test_a_state_without_a_plan_is_refused() -> None:
    with pytest.raises(PreconditionError, match="no pass before it quantizes"):
        run_pass(adaround(), ModelState(model=mobile_net()), PassContext(calibration=images()))
