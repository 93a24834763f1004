"""The plan of the `quant` pass: what is in it, what is not, and why."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper
from pydantic import ValidationError

from onnxprune.contracts import CanonicalModel, ModelState, PassContext, QuantizationPlan
from onnxprune.errors import BadDataError, PassError, PreconditionError, UsageError
from onnxprune.graph.metadata import MODULE_PATH_KEY
from onnxprune.graph.weights import replace_weight
from onnxprune.passes.harness import plan_from_json, plan_to_json, run_pass
from onnxprune.passes.quant import QuantConfig, QuantPass
from onnxprune.passes.quant.candidates import find_candidates
from onnxprune.passes.quant.simulate import simulated
from onnxprune.passes.quant.weights import weight_scales
from tests.builders import canonical, conv_net, proto_of
from tests.quantization import ArraySource, normal_batches, plan_for, run, signal_to_noise_db

SHAPE = (1, 4, 8, 8)
SOURCE = normal_batches(SHAPE)


def weights(*shape: int, scale: float = 0.3) -> np.ndarray:
    return (np.random.default_rng(11).standard_normal(shape) * scale).astype(np.float32)


def net(*nodes: helper.NodeProto, rank: int = 4, opset: int = 20, **constants: np.ndarray) -> CanonicalModel:
    return canonical(
        proto_of(list(nodes), inputs={"x": SHAPE}, outputs={"y": [None] * rank}, weights=constants, opset=opset)
    )


def test_plan_has_scales_for_every_tensor_between_integer_nodes_and_none_inside_conv_and_relu() -> None:
    source = normal_batches((1, 3, 8, 8))

    plan = plan_for(conv_net(batch=1), source)

    assert set(plan.activations) == {"x", "r1", "c2", "r2", "p", "f", "y"}
    assert set(plan.weights) == {"stem.weight", "block.weight", "head.weight"}
    assert plan.activations["r1"].zero_point == -128
    assert plan.activations["r1"].range_min == 0.0
    assert (plan.method, plan.num_samples, plan.calibration_hash) == ("minmax", 8, source.content_hash)
    assert not plan.excluded_nodes
    assert not plan.skipped


def test_pass_changes_no_graph_and_reports_ranges_and_skips() -> None:
    state = ModelState(model=conv_net(batch=1))
    context = PassContext(calibration=normal_batches((1, 3, 8, 8)))

    outcome = run_pass(QuantPass(QuantConfig(exclude=("head/gemm",), threads=1)), state, context)

    assert outcome.state.model is state.model
    assert outcome.state.quantization is not None
    assert outcome.report.figures["quantized_weights"] == 2
    assert {change.where for change in outcome.report.changes} >= {"x", "stem.weight"}
    assert ("head/gemm", "excluded by 'head/gemm'") in {(skip.where, skip.reason) for skip in outcome.report.skips}


@pytest.mark.parametrize("pattern", ["head", "head.weight"], ids=["module around it", "weight"])
def test_a_node_is_excluded_by_a_module_around_it_and_by_its_weight(pattern: str) -> None:
    model = conv_net(batch=1)
    for node in model.graph:
        node.metadata_props[MODULE_PATH_KEY] = "head.fc" if node.op_type == "Gemm" else "backbone.conv"
    excluded = find_candidates(model, exclude=(pattern,)).excluded_nodes
    by_user = {name: reason for name, reason in excluded.items() if reason.startswith("excluded by")}
    assert by_user == {"head/gemm": f"excluded by '{pattern}'"}


def test_a_pattern_that_means_nothing_in_the_model_is_an_error() -> None:
    context = PassContext(calibration=normal_batches((1, 3, 8, 8)))
    with pytest.raises(UsageError, match="'nowhere' in `exclude` of pass 'quant' matches no node, weight or module"):
        run_pass(QuantPass(QuantConfig(exclude=("nowhere",))), ModelState(model=conv_net(batch=1)), context)


def test_plan_survives_json() -> None:
    pass_ = QuantPass(QuantConfig(threads=1))
    plan = plan_for(conv_net(batch=1), normal_batches((1, 3, 8, 8)))

    assert plan_from_json(pass_, plan_to_json(pass_, plan)) == plan


def test_second_run_gives_the_same_plan() -> None:
    assert plan_for(conv_net(batch=1), normal_batches((1, 3, 8, 8))) == plan_for(
        conv_net(batch=1), normal_batches((1, 3, 8, 8))
    )


def test_plan_of_another_model_is_refused() -> None:
    pass_ = QuantPass(QuantConfig(threads=1))
    plan = plan_for(conv_net(batch=1), normal_batches((1, 3, 8, 8)))
    other = net(helper.make_node("Conv", ["x", "w"], ["y"], name="conv"), w=weights(8, 4, 3, 3))

    with pytest.raises(PassError, match="made for another model"):
        pass_.apply(ModelState(model=other), plan, PassContext())


def test_missing_calibration_is_refused() -> None:
    with pytest.raises(PreconditionError, match="calibration data"):
        QuantPass(QuantConfig()).plan(ModelState(model=conv_net(batch=1)), PassContext())


def test_model_without_layers_is_refused_with_the_reasons() -> None:
    model = net(helper.make_node("Erf", ["x"], ["y"], name="erf"))

    with pytest.raises(PassError, match=r"Nothing to quantize.*'erf': operator Erf has no row"):
        plan_for(model, SOURCE)


def test_a_model_that_is_quantized_already_is_named_as_such() -> None:
    quantized = net(
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["y"], name="dq"),
        scale=np.array(0.1, np.float32),
    )
    with pytest.raises(PassError, match="the model is quantized already"):
        plan_for(quantized, SOURCE)


@pytest.mark.parametrize(
    "wrong",
    [
        {"momentum": 1.0},
        {"calibration_method": "median"},
        {"weight_method": "entropy"},
        {"percentile": 50.0},
        {"weight_bits": 9},
        {"num_samples": 0},
        {"exclude": ("",)},
        {"percentil": 99.0},
    ],
)
def test_wrong_configuration_is_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        QuantConfig(**wrong)


def test_data_movement_and_pooling_share_the_scale_of_their_input() -> None:
    model = net(
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("MaxPool", ["a"], ["m"], name="pool", kernel_shape=[2, 2]),
        helper.make_node("Transpose", ["m"], ["t"], name="transpose", perm=[0, 1, 3, 2]),
        helper.make_node("Conv", ["t", "v"], ["y"], name="conv2"),
        w=weights(8, 4, 3, 3),
        v=weights(8, 8, 1, 1),
    )

    activations = plan_for(model, SOURCE).activations

    assert activations["a"] == activations["m"] == activations["t"]
    # What is only moved is not looked at in every sample.
    assert [value.name for value in find_candidates(model).calibrated] == ["x", "a", "y"]


def concat_net(second_scale: float, second_op: str) -> CanonicalModel:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("Conv", ["x", "v"], ["b0"], name="conv_b"),
        helper.make_node(second_op, ["b0"], ["b"], name="second"),
        helper.make_node("Concat", ["a", "b"], ["c"], name="concat", axis=1),
        helper.make_node("Conv", ["c", "u"], ["y"], name="last"),
    ]
    return net(*nodes, w=weights(8, 4, 1, 1), v=weights(8, 4, 1, 1, scale=second_scale), u=weights(8, 16, 1, 1))


def test_concat_of_like_ranges_gets_one_scale() -> None:
    activations = plan_for(concat_net(0.3, "LeakyRelu"), SOURCE).activations

    assert activations["a"].scale == activations["b"].scale == activations["c"].scale


def test_concat_leaves_a_narrow_input_its_own_scale() -> None:
    activations = plan_for(concat_net(0.03, "LeakyRelu"), SOURCE).activations

    assert activations["a"].scale == activations["c"].scale
    assert activations["b"].scale < activations["c"].scale / 4


def test_concat_stays_float_where_an_input_would_be_left_with_too_few_of_the_steps_that_its_bits_have() -> None:
    model = concat_net(0.003, "LeakyRelu")

    assert "of 255 steps" in plan_for(model, SOURCE).excluded_nodes["concat"]
    assert not plan_for(model, SOURCE, activation_bits=16).excluded_nodes


@pytest.mark.parametrize("method", ["entropy", "mse"])
def test_calibration_for_sixteen_bits_clips_no_more_than_these_need(method: str) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "v"], ["y"], name="last"),
    ]
    model = net(*nodes, w=weights(8, 4, 3, 3), v=weights(8, 8, 1, 1))

    # Tails so long that 8 bits would rather saturate than round so coarsely.
    source = normal_batches(SHAPE, count=300)
    expected = np.concatenate([run(model, batch)[0] for batch in source])

    def snr_db_and_scale(calibration_method: str) -> tuple[float, float]:
        plan = plan_for(model, source, calibration_method=calibration_method, activation_bits=16)
        twin = simulated(model, plan)
        actual = np.concatenate([run(twin, batch)[0] for batch in source])
        return signal_to_noise_db(expected, actual), plan.activations["x"].scale

    (snr_db, scale), (widest_snr_db, widest_scale) = snr_db_and_scale(method), snr_db_and_scale("minmax")
    assert snr_db > widest_snr_db - 0.5
    assert scale > 0.99 * widest_scale


def test_concat_does_not_widen_a_relu_below_zero() -> None:
    activations = plan_for(concat_net(0.3, "Relu"), SOURCE).activations

    assert activations["b"].zero_point == -128
    assert activations["a"].scale == activations["c"].scale
    assert activations["b"].scale != activations["c"].scale


def test_boxes_beside_scores_stay_float() -> None:
    plan = plan_for(concat_net(300.0, "LeakyRelu"), SOURCE)

    assert "would keep 0." in plan.excluded_nodes["concat"]


def test_sigmoid_has_its_fixed_range_and_is_not_calibrated() -> None:
    plan = plan_for(concat_net(0.3, "Sigmoid"), SOURCE)

    assert (plan.activations["b"].scale, plan.activations["b"].zero_point) == (1 / 256, -128)


def test_tail_behind_the_last_layer_stays_float_but_its_relu_does_not() -> None:
    model = net(
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("Sigmoid", ["r"], ["s"], name="score"),
        helper.make_node("Mul", ["s", "r"], ["m"], name="decode"),
        # 16 weights are a weighted mean over bins, not a layer.
        helper.make_node("Conv", ["m", "bins"], ["y"], name="expectation"),
        w=weights(16, 4, 1, 1),
        bins=np.arange(16, dtype=np.float32).reshape(1, 16, 1, 1),
    )

    plan = plan_for(model, SOURCE)

    assert set(plan.excluded_nodes) == {"score", "decode", "expectation"}
    assert all("decode arithmetic" in reason for reason in plan.excluded_nodes.values())
    assert set(plan.activations) == {"x", "r"}


def test_excluded_relu_is_not_absorbed_and_its_input_gets_a_scale() -> None:
    plan = plan_for(conv_net(batch=1), normal_batches((1, 3, 8, 8)), exclude=("stem/relu",))

    assert "c1" in plan.activations


def test_module_path_excludes_as_well() -> None:
    plan = plan_for(conv_net(batch=1), normal_batches((1, 3, 8, 8)), exclude=("block",))

    assert set(plan.excluded_nodes) == {"block/conv", "block/add", "block/relu"}


def test_product_of_two_activations_and_computed_weight_stay_float() -> None:
    model = net(
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("MatMul", ["a", "a"], ["m"], name="scores"),
        helper.make_node("Conv", ["m", "w"], ["y"], name="conv2"),
        w=weights(4, 4, 3, 3),
    )

    assert "two activations" in plan_for(model, SOURCE).excluded_nodes["scores"]


def test_per_channel_scales_follow_the_output_axis_of_each_operator() -> None:
    conv = net(helper.make_node("Conv", ["x", "w"], ["y"], name="conv"), w=weights(6, 4, 3, 3))
    grouped = net(helper.make_node("ConvTranspose", ["x", "w"], ["y"], name="up", group=2), w=weights(4, 3, 3, 3))
    gemm = net(
        helper.make_node("Flatten", ["x"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w"], ["y"], name="gemm"),
        rank=2,
        w=weights(256, 5),
    )
    matmul = net(helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul"), w=weights(8, 7))

    found = {
        name: plan_for(model, SOURCE).weights["w"]
        for name, model in {"conv": conv, "grouped": grouped, "gemm": gemm, "matmul": matmul}.items()
    }

    assert {name: (weight.axis, len(weight.scales)) for name, weight in found.items()} == {
        "conv": (0, 6),
        "grouped": (None, 1),
        "gemm": (1, 5),
        "matmul": (1, 7),
    }
    array = weights(6, 4, 3, 3)
    np.testing.assert_allclose(found["conv"].scales, np.abs(array).reshape(6, -1).max(axis=1) / 127, rtol=1e-6)


def test_per_tensor_weights_on_request() -> None:
    plan = plan_for(conv_net(batch=1), normal_batches((1, 3, 8, 8)), per_channel=False)

    assert {(weight.axis, len(weight.scales)) for weight in plan.weights.values()} == {(None, 1)}


def test_bias_of_a_nearly_dead_channel_fits_into_int32() -> None:
    weight, bias = weights(8, 4, 3, 3), np.full(8, 2.0, dtype=np.float32)
    weight[3] *= 1e-9
    weight[5] = 0.0
    model = net(helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv"), w=weight, b=bias)

    plan = plan_for(model, SOURCE)

    integers = bias / (plan.activations["x"].scale * np.array(plan.weights["w"].scales))
    assert integers.max() <= 2**30 * 1.0001
    assert integers[5] == pytest.approx(2**30, rel=1e-3)
    assert plan.weights["w"].scales[0] == pytest.approx(np.abs(weight[0]).max() / 127, rel=1e-6)


@pytest.mark.parametrize("name", ["w", "b"])
def test_weight_that_is_not_finite_is_refused_with_its_name(name: str) -> None:
    model = net(helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv"), w=weights(8, 4, 3, 3), b=weights(8))
    array = {"w": weights(8, 4, 3, 3), "b": weights(8)}[name]
    array.reshape(-1)[1] = np.nan
    # Behind a Relu the NaN would not reach a tensor; the weight itself is looked at.
    given = plan_for(model, SOURCE).activations
    replace_weight(model.graph.initializers[name], array)

    with pytest.raises(PassError, match=f"its constant '{name}' holds NaN or infinity"):
        weight_scales(find_candidates(model), given, num_bits=8, per_channel=True)


def test_tensor_that_is_always_zero_and_huge_range_are_both_planned() -> None:
    huge = ArraySource(({"x": np.full(SHAPE, 3e38, dtype=np.float32)}, {"x": np.full(SHAPE, -3e38, np.float32)}))
    model = net(
        helper.make_node("Mul", ["x", "zero"], ["z"], name="mul"),
        helper.make_node("Conv", ["z", "w"], ["y"], name="conv"),
        w=weights(8, 4, 3, 3),
        zero=np.zeros((), dtype=np.float32),
    )

    plan: QuantizationPlan = plan_for(model, huge)

    assert plan.activations["x"].scale == pytest.approx(6e38 / 255, rel=1e-6)
    assert (plan.activations["z"].scale, plan.activations["z"].zero_point) == (1.0, -128)


def test_fewer_bits_for_weights_widen_the_scales() -> None:
    source = normal_batches((1, 3, 8, 8))
    eight, four = (plan_for(conv_net(batch=1), source, weight_bits=bits).weights["stem.weight"] for bits in (8, 4))

    np.testing.assert_allclose(np.array(four.scales) / np.array(eight.scales), 127 / 7, rtol=1e-6)


# Of so few numbers "entropy" cuts none; `test_range_search.py` shows where it does.
@pytest.mark.parametrize("method", ["moving-average", "percentile", "mse"])
def test_a_method_narrows_ranges_but_not_that_of_the_last_layer(method: str) -> None:
    source = normal_batches((1, 3, 8, 8), count=120)

    plan = plan_for(conv_net(batch=1), source, calibration_method=method)
    extremes = plan_for(conv_net(batch=1), source)

    assert plan.method.startswith(method)
    # The largest of the scores is the one that counts.
    assert plan.activations["y"] == extremes.activations["y"]
    assert plan.activations["x"].range_max < extremes.activations["x"].range_max


def test_weight_scales_of_least_squared_error_on_request() -> None:
    source = normal_batches((1, 3, 8, 8))

    narrow = plan_for(conv_net(batch=1), source, weight_method="mse", weight_bits=4).weights["stem.weight"].scales
    wide = plan_for(conv_net(batch=1), source, weight_bits=4).weights["stem.weight"].scales

    assert all(one <= other for one, other in zip(narrow, wide, strict=True))
    assert sum(narrow) < 0.97 * sum(wide)


@pytest.mark.parametrize("method", ["moving-average", "percentile", "entropy", "mse"])
def test_every_method_refuses_what_is_not_finite(method: str) -> None:
    broken = np.ones(SHAPE, np.float32)
    broken[0, 0, 0, 0] = np.nan
    model = net(helper.make_node("Conv", ["x", "w"], ["y"], name="conv"), w=weights(8, 4, 3, 3))

    with pytest.raises(BadDataError, match="Calibration sample 1 makes input 'x' not finite"):
        plan_for(model, ArraySource((*SOURCE.batches[:1], {"x": broken})), calibration_method=method)


def test_model_in_half_precision_is_refused_with_the_reason() -> None:
    with pytest.raises(PassError, match="the weights are float16, and int8 is planned from float32"):
        plan_for(conv_net(dtype=np.float16, batch=1), normal_batches((1, 3, 8, 8)))
