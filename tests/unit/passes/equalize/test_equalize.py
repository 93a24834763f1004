"""Cross-layer equalization: the float function stays, channels come to one size, and harm is undone."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from onnxprune.contracts import ModelState, PassContext
from onnxprune.errors import PassError, UsageError
from onnxprune.graph.weights import constant_array
from onnxprune.passes.equalize import EqualizeConfig, EqualizePass
from onnxprune.passes.equalize.sites import find_sites
from onnxprune.passes.harness import run_pass
from tests.builders import canonical, proto_of
from tests.layerwise import SHAPE, carried_out, images, int8_snr_db, largest_change, mobile_net, normal
from tests.quantization import plan_for

PER_TENSOR = {"per_channel": False}


def equalize(**config) -> EqualizePass:
    return EqualizePass(EqualizeConfig(**config))


def magnitudes(model, name: str, axes: tuple[int, ...]) -> np.ndarray:
    return np.abs(constant_array(model.graph.initializers[name])).max(axis=axes)


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", "Identity"])
@pytest.mark.parametrize("ranges", ["weights", "activations", "depthwise"])
def test_the_float_function_stays(activation: str, ranges: str) -> None:
    model = mobile_net(spread=300.0, activation=activation)

    outcome = carried_out(equalize(ranges=ranges, **PER_TENSOR), ModelState(model=model), images())

    assert outcome.report.figures["layers_equalized"] > 0
    assert largest_change(model, outcome.state.model, images(seed=5)) < 1e-5


def test_without_data_the_ranges_of_neighbouring_weights_become_equal() -> None:
    model = mobile_net(spread=300.0)

    after = carried_out(equalize(), ModelState(model=model)).state.model

    first, depthwise = magnitudes(after, "w1", (1, 2, 3)), magnitudes(after, "w2", (1, 2, 3))
    np.testing.assert_allclose(first / first[0], depthwise / depthwise[0], rtol=2e-3)


def test_chains_converge_so_that_a_second_run_changes_nothing() -> None:
    first = carried_out(equalize(), ModelState(model=mobile_net(spread=300.0)))
    second = carried_out(equalize(), first.state)
    assert second.state.model is first.state.model


def test_int8_with_one_scale_a_tensor_gains_much_where_channels_differ() -> None:
    model, source = mobile_net(spread=300.0), images()

    outcome = carried_out(equalize(**PER_TENSOR), ModelState(model=model), source)

    before = int8_snr_db(model, model, plan_for(model, source, **PER_TENSOR), images(seed=9))
    changed = outcome.state.model
    after = int8_snr_db(model, changed, plan_for(changed, source, **PER_TENSOR), images(seed=9))
    assert after > before + 10
    figures = outcome.report.figures
    assert figures["snr_after_db"] > figures["snr_before_db"] + 10
    assert "on 6 held-out samples" in outcome.report.summary


def test_factors_that_help_nothing_are_undone_and_the_report_says_so() -> None:
    model = mobile_net()

    outcome = carried_out(equalize(ranges="depthwise"), ModelState(model=model), images())
    again = carried_out(equalize(ranges="depthwise"), outcome.state, images())

    assert again.state.model is outcome.state.model
    assert again.report.figures["layers_equalized"] == 0
    assert any(note.startswith("Undone: the factors would have") for note in again.report.notes) or not again.plan.gain


def clipped(high: float):
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="first"),
        helper.make_node("Clip", ["c1", "low", "high"], ["r1"], name="clip"),
        helper.make_node("Conv", ["r1", "w2"], ["y"], name="second"),
    ]
    spread = np.geomspace(1, 0.01, 8).astype(np.float32).reshape(-1, 1, 1, 1)
    weights = {
        "w1": normal(8, 4, 1, 1) * spread,
        "w2": normal(6, 8, 1, 1) / spread.reshape(1, -1, 1, 1),
        "low": np.float32(0),
        "high": np.float32(high),
    }
    return canonical(proto_of(nodes, inputs={"x": SHAPE}, outputs={"y": [1, 6, 8, 8]}, weights=weights))


def test_a_clip_that_never_clips_becomes_a_relu() -> None:
    model = clipped(600.0)

    outcome = carried_out(equalize(**PER_TENSOR), ModelState(model=model), images())

    assert [node.op_type for node in outcome.state.model.graph] == ["Conv", "Relu", "Conv"]
    assert outcome.report.changes[0].figures["clips_relaxed"] == 1
    assert largest_change(model, outcome.state.model, images()) < 1e-5


@pytest.mark.parametrize(
    ("high", "config", "has_data", "reason"),
    [
        (0.5, {}, True, "'clip' clips to 0.5, which calibration data reach"),
        (600.0, {}, False, "'clip' clips to 600, and there are no calibration data to show that it never does"),
        (600.0, {"relax_clips": False}, True, "'clip' clips to 600, and `relax_clips` is off"),
    ],
)
def test_a_clip_that_may_clip_leaves_its_layers_alone(high: float, config: dict, has_data: bool, reason: str) -> None:
    state = ModelState(model=clipped(high))
    outcome = carried_out(equalize(**config), state, images() if has_data else None)
    assert outcome.state.model is state.model
    assert ("first", reason) in {(skip.where, skip.reason) for skip in outcome.report.skips}


def residual(reader: str = "Add"):
    second = ["y"] if reader == "output" else ["c2"]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="first", pads=[1] * 4),
        helper.make_node("Conv", ["c1", "w2"], second, name="second", pads=[1] * 4),
    ]
    outputs = {"y": [1, 4, 8, 8]}
    if reader == "Add":
        nodes.append(helper.make_node("Add", ["c1", "c2"], ["y"], name="join"))
    if reader == "output":
        outputs["c1"] = [1, 4, 8, 8]
    if reader == "If":
        body = helper.make_graph(
            [helper.make_node("Abs", ["c1"], ["t"], name="inner")],
            "body",
            [],
            [helper.make_tensor_value_info("t", 1, [1, 4, 8, 8])],
        )
        nodes.append(helper.make_node("If", ["flag"], ["d"], name="if", then_branch=body, else_branch=body))
        nodes.append(helper.make_node("Add", ["c2", "d"], ["y"], name="join"))
    weights = {"w1": normal(4, 4, 3, 3), "w2": normal(4, 4, 3, 3, seed=1), "flag": np.array(True)}
    if reader != "If":
        del weights["flag"]
    return canonical(proto_of(nodes, inputs={"x": SHAPE}, outputs=outputs, weights=weights))


def test_a_tensor_that_a_residual_reads_is_left_alone() -> None:
    state = ModelState(model=residual())
    outcome = carried_out(equalize(), state)
    assert outcome.state.model is state.model
    assert any(
        skip.where == "first" and "'join' (Add) reads its output" in skip.reason for skip in outcome.report.skips
    )


@pytest.mark.parametrize("reader", ["output", "If"])
def test_a_tensor_that_others_see_is_left_alone(reader: str) -> None:
    sites, skipped = find_sites(residual(reader))
    assert not sites
    assert "first" in skipped


def test_one_tensor_may_feed_several_layers() -> None:
    spread = np.geomspace(1, 0.01, 8).astype(np.float32).reshape(-1, 1, 1, 1)
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="squeeze"),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu"),
        helper.make_node("Conv", ["r1", "w2"], ["a"], name="one"),
        helper.make_node("Conv", ["r1", "w3"], ["b"], name="three", pads=[1] * 4),
        helper.make_node("Concat", ["a", "b"], ["y"], name="join", axis=1),
    ]
    weights = {
        "w1": normal(8, 4, 1, 1) * spread,
        "w2": normal(6, 8, 1, 1) / spread.reshape(1, -1, 1, 1),
        "w3": normal(6, 8, 3, 3) / spread.reshape(1, -1, 1, 1),
    }
    model = canonical(proto_of(nodes, inputs={"x": SHAPE}, outputs={"y": [1, 12, 8, 8]}, weights=weights))

    outcome = carried_out(equalize(), ModelState(model=model))

    assert outcome.plan.sites[0].consumers == ("one", "three")
    assert largest_change(model, outcome.state.model, images()) < 1e-5


def test_grouped_and_transposed_convolutions_and_gemm_are_rescaled_exactly() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="grouped", group=2),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu"),
        helper.make_node("ConvTranspose", ["r1", "w2", "b2"], ["c2"], name="up", group=2, strides=[2, 2]),
        helper.make_node("MaxPool", ["c2"], ["m"], name="maxpool", kernel_shape=[2, 2]),
        helper.make_node("GlobalAveragePool", ["m"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["g"], name="fc1", alpha=0.5, beta=2.0),
        helper.make_node("Relu", ["g"], ["rg"], name="relu2"),
        helper.make_node("MatMul", ["rg", "w4"], ["y"], name="fc2"),
    ]
    weights = {
        "w1": normal(8, 2, 1, 1),
        "b1": normal(8),
        "w2": normal(8, 3, 2, 2),
        "b2": normal(6),
        "w3": normal(6, 10),
        "b3": normal(1, 10),
        "w4": normal(10, 3),
    }
    model = canonical(proto_of(nodes, inputs={"x": SHAPE}, outputs={"y": [1, 3]}, weights=weights))

    outcome = carried_out(equalize(), ModelState(model=model))

    assert [site.producer for site in outcome.plan.sites] == ["grouped", "up", "fc1"]
    assert largest_change(model, outcome.state.model, images()) < 1e-5


def test_a_bias_far_above_zero_is_absorbed_by_the_next_layer() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="first"),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["y"], name="second"),
    ]
    weights = {
        "w1": normal(8, 4, 1, 1, scale=0.1),
        "b1": np.array([50, 40, 0, 0, 0, 0, 0, 0], np.float32),
        "w2": normal(6, 8, 1, 1),
        "b2": normal(6),
    }
    model = canonical(proto_of(nodes, inputs={"x": SHAPE}, outputs={"y": [1, 6, 8, 8]}, weights=weights))

    outcome = carried_out(equalize(absorb_biases=True), ModelState(model=model), images(48))

    assert outcome.plan.ranges.endswith("biases absorbed")
    assert outcome.report.changes[0].figures["biases_absorbed"] == 2
    assert outcome.report.figures["snr_after_db"] > outcome.report.figures["snr_before_db"] + 6
    assert largest_change(model, outcome.state.model, images(48)) < 1e-5


def test_excluded_layers_stay_and_a_pattern_that_means_nothing_is_an_error() -> None:
    model = mobile_net(spread=300.0)
    outcome = carried_out(equalize(exclude=("depthwise",)), ModelState(model=model))
    assert all("depthwise" not in (site.producer, *site.consumers) for site in outcome.plan.sites)
    with pytest.raises(UsageError, match="'nowhere' in `exclude` of pass 'equalize'"):
        run_pass(equalize(exclude=("nowhere",)), ModelState(model=model), PassContext())


def test_a_plan_for_another_model_is_refused() -> None:
    plan = carried_out(equalize(), ModelState(model=mobile_net(spread=300.0))).plan
    with pytest.raises(PassError, match="which this model does not have"):
        run_pass(equalize(), ModelState(model=residual()), PassContext(), plan=plan)
