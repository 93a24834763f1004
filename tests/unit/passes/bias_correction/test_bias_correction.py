"""Bias correction: mean errors vanish, biases appear where there were none, and harm is undone."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxprune.contracts import ModelState, PassContext
from onnxprune.errors import PassError, PreconditionError, UsageError
from onnxprune.graph.weights import constant_array
from onnxprune.passes.bias_correction import BiasCorrectionConfig, BiasCorrectionPass
from onnxprune.passes.bias_correction.estimate import MeanError, mean_after_batchnorm
from onnxprune.passes.harness import check_requirements, run_pass
from onnxprune.passes.quant import QuantConfig, QuantPass
from onnxprune.passes.quant.simulate import simulated
from tests.builders import canonical, proto_of
from tests.layerwise import SHAPE, carried_out, images, int8_snr_db, mobile_net, normal, outputs, quantized
from tests.quantization import ArraySource


def correct(**config) -> BiasCorrectionPass:
    return BiasCorrectionPass(BiasCorrectionConfig(**config))


def mean_error(reference, state: ModelState, source) -> np.ndarray:
    rounded = simulated(state.model, state.quantization)
    return np.mean([outputs(reference, batch) - outputs(rounded, batch) for batch in source], axis=0)


@pytest.mark.parametrize("method", ["data", "analytic", "auto"])
def test_the_outputs_of_coarse_weights_come_closer_to_the_float_ones(method: str) -> None:
    model, source = mobile_net(), images(48)
    state = quantized(model, source, weight_bits=4)

    outcome = carried_out(correct(method=method), state, source)

    before = int8_snr_db(model, model, state.quantization, images(16, seed=9))
    after = int8_snr_db(model, outcome.state.model, state.quantization, images(16, seed=9))
    assert after > before + 1
    assert outcome.report.figures["snr_after_db"] > outcome.report.figures["snr_before_db"]
    assert outcome.state.quantization is state.quantization


def test_the_mean_error_of_the_outputs_nearly_vanishes() -> None:
    model, source = mobile_net(), images(64)
    state = quantized(model, source, weight_bits=4)

    after = carried_out(correct(method="data"), state, source).state

    before_size = np.abs(mean_error(model, state, source)).max()
    assert np.abs(mean_error(model, after, source)).max() < 0.2 * before_size


def test_layers_without_a_bias_get_one() -> None:
    model, source = mobile_net(with_bias=False), images()
    state = quantized(model, source, weight_bits=4)

    outcome = carried_out(correct(), state, source)

    nodes = {node.name: node for node in outcome.state.model.graph}
    assert constant_array(nodes["depthwise"].inputs[2]).shape == (8,)
    assert {change.where for change in outcome.report.changes} == {"expand", "depthwise", "project", "head"}


def test_a_bias_that_two_layers_share_is_corrected_for_each_on_its_own() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b"], ["c1"], name="first", pads=[1] * 4),
        helper.make_node("Conv", ["c1", "w2", "b"], ["y"], name="second", pads=[1] * 4),
    ]
    weights = {"w1": normal(4, 4, 3, 3), "w2": normal(4, 4, 3, 3, seed=1), "b": normal(4)}
    model = canonical(proto_of(nodes, inputs={"x": SHAPE}, outputs={"y": [1, 4, 8, 8]}, weights=weights))

    after = carried_out(correct(), quantized(model, images(), weight_bits=4), images()).state.model

    first, second = (constant_array(node.inputs[2]) for node in after.graph)
    assert not np.array_equal(first, second)


def matmul_add():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="product"),
        helper.make_node("Add", ["m", "b"], ["a"], name="bias"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="last"),
    ]
    weights = {"w": normal(8, 6), "b": normal(6), "w2": normal(6, 5)}
    return canonical(proto_of(nodes, inputs={"x": (1, 8, 8)}, outputs={"y": [1, 8, 5]}, weights=weights))


def test_the_constant_added_behind_a_matmul_is_its_bias() -> None:
    source = images(shape=(1, 8, 8), mean=4.0)
    outcome = carried_out(correct(), quantized(matmul_add(), source, weight_bits=4), source)
    assert [change.where for change in outcome.report.changes] == ["product"]
    assert [(s.where, s.reason) for s in outcome.report.skips] == [
        ("last", "MatMul has no bias, and no Add of a constant alone reads it")
    ]


def test_weights_that_are_on_the_grid_already_are_left_alone() -> None:
    model, source = mobile_net(), images()
    state = quantized(model, source, weight_bits=4)
    rounded = simulated(model, state.quantization, with_activations=False)
    for name in ("w1", "w2", "w3", "w4"):
        model.graph.initializers[name].const_value = rounded.graph.initializers[f"{name}_rounded"].const_value

    outcome = carried_out(correct(), state, source)

    assert outcome.state.model is state.model
    assert all(skip.reason.startswith("its weight is on the grid already") for skip in outcome.report.skips)


def test_corrections_that_make_the_outputs_worse_are_undone() -> None:
    # Every fourth sample judges, and these are the mirror images of those that decide.
    source = images(32)
    batches = tuple({"x": -batch["x"] if n % 4 == 3 else batch["x"]} for n, batch in enumerate(source))
    model = linear_net()
    state = quantized(model, ArraySource(batches), weight_bits=4)

    outcome = carried_out(correct(method="data"), state, ArraySource(batches))

    assert outcome.plan.is_undone
    assert outcome.state.model is state.model
    assert outcome.report.notes[0].startswith("Undone: the corrections would have made the outputs worse")
    assert outcome.report.figures["snr_after_db"] < outcome.report.figures["snr_before_db"]


def linear_net():
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="first", pads=[1] * 4),
        helper.make_node("Conv", ["c1", "w2"], ["y"], name="second", pads=[1] * 4),
    ]
    weights = {"w1": normal(4, 4, 3, 3), "w2": normal(4, 4, 3, 3, seed=1)}
    return canonical(proto_of(nodes, inputs={"x": SHAPE}, outputs={"y": [1, 4, 8, 8]}, weights=weights))


def test_a_mean_that_may_be_chance_is_shrunk_and_a_sure_one_is_not() -> None:
    rng = np.random.default_rng(0)
    error = MeanError(2)
    noise = rng.standard_normal((64, 2, 1, 1)).astype(np.float32)
    noise[:, 0] -= noise[:, 0].mean()
    noise[:, 0] += 0.05
    noise[:, 1] = 1.0 + 0.01 * noise[:, 1]
    error.add(noise, np.zeros_like(noise), 1)
    assert error.correction[0] == 0.0
    assert error.correction[1] == pytest.approx(error.mean[1], rel=1e-4)


def test_without_data_the_mean_input_comes_from_a_batchnormalization() -> None:
    gamma, beta = np.array([1.0, 2.0], np.float32), np.array([0.5, -1.0], np.float32)
    nodes = [
        helper.make_node("BatchNormalization", ["x", "gamma", "beta", "mean", "var"], ["n"], name="norm"),
        helper.make_node("Relu", ["n"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "w"], ["y"], name="conv", pads=[1] * 4),
    ]
    weights = {
        "gamma": gamma,
        "beta": beta,
        "mean": np.zeros(2, np.float32),
        "var": np.ones(2, np.float32),
        "w": normal(3, 2, 3, 3),
    }
    model = canonical(proto_of(nodes, inputs={"x": (1, 2, 8, 8)}, outputs={"y": [1, 3, 8, 8]}, weights=weights))
    source = images(shape=(1, 2, 8, 8))
    state = quantized(model, source, weight_bits=4)

    means = mean_after_batchnorm(next(node for node in model.graph if node.op_type == "Conv").inputs[0])
    outcome = carried_out(correct(method="analytic"), state)

    drawn = np.random.default_rng(0).standard_normal((400_000, 2)) * gamma + beta
    np.testing.assert_allclose(means, np.maximum(drawn, 0).mean(axis=0), rtol=1e-2)
    assert [change.where for change in outcome.report.changes] == ["conv"]
    assert outcome.report.notes[0].startswith("Not judged")


def test_without_data_and_batchnormalization_nothing_is_done() -> None:
    state = quantized(mobile_net(), images(), weight_bits=4)
    outcome = carried_out(correct(method="analytic"), state)
    assert outcome.state.model is state.model
    assert "nothing is known about the mean of its input" in outcome.report.skips[0].reason


def test_the_pass_needs_a_quantization_plan_and_data_for_its_method() -> None:
    with pytest.raises(PreconditionError, match="repairs what quantization does, but no pass before it quantizes"):
        check_requirements([correct()], has_calibration=True, has_evaluator=False)
    with pytest.raises(PreconditionError, match="needs calibration data"):
        run_pass(correct(method="data"), quantized(mobile_net(), images()), PassContext())


def test_excluded_layers_stay_and_a_pattern_that_means_nothing_is_an_error() -> None:
    state = quantized(mobile_net(), images(), weight_bits=4)
    outcome = carried_out(correct(exclude=("depthwise",)), state, images())
    assert ("depthwise", "excluded by 'depthwise'") in {(s.where, s.reason) for s in outcome.report.skips}
    with pytest.raises(UsageError, match="'nowhere' in `exclude` of pass 'bias-correction'"):
        run_pass(correct(exclude=("nowhere",)), state, PassContext(calibration=images()))


def test_a_plan_for_another_model_is_refused() -> None:
    plan = carried_out(correct(), quantized(mobile_net(), images(), weight_bits=4), images()).plan
    source = images(shape=(1, 8, 8))
    with pytest.raises(PassError, match="which this model does not have"):
        run_pass(correct(), quantized(matmul_add(), source), PassContext(), plan=plan)


def test_a_layer_behind_a_loop_whose_result_has_no_known_shape_gets_a_bias() -> None:
    body = helper.make_graph(
        [helper.make_node("Relu", ["state"], ["next"]), helper.make_node("Identity", ["go_on"], ["still"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [1, 8, 8, 8]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [1, 8, 8, 8]),
        ],
    )
    model = canonical(
        proto_of(
            [
                helper.make_node("Conv", ["x", "first"], ["a"], name="first", pads=[1] * 4),
                helper.make_node("Loop", ["turns", "", "a"], ["b"], name="loop", body=body),
                helper.make_node("Conv", ["b", "second"], ["y"], name="second", pads=[1] * 4),
            ],
            inputs={"x": [1, 3, 8, 8]},
            outputs={"y": [1, 4, 8, 8]},
            weights={"first": normal(8, 3, 3, 3), "second": normal(4, 8, 3, 3), "turns": np.array(2)},
        )
    )
    source = images(16, shape=(1, 3, 8, 8))

    after = carried_out(correct(method="data"), quantized(model, source, weight_bits=4), source).state

    nodes = {node.name: node for node in after.model.graph}
    assert len(nodes["second"].inputs) == 3


def test_a_plan_without_scales_for_activations_is_refused_before_anything_runs() -> None:
    with pytest.raises(PreconditionError, match="'quant' plans none in its mode"):
        check_requirements(
            [QuantPass(QuantConfig(mode="dynamic")), correct()], has_calibration=True, has_evaluator=False
        )
