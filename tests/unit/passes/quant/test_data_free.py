"""Plans without calibration data: which weights have scales, and why the others have none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper
from pydantic import ValidationError

from onnxprune.contracts import CanonicalModel, ModelState, PassContext, QuantizationPlan
from onnxprune.errors import PassError, PreconditionError, UsageError
from onnxprune.passes.harness import check_requirements, plan_from_json, plan_to_json, run_pass
from onnxprune.passes.quant import QuantConfig, QuantPass
from tests.builders import canonical, conv_net, proto_of
from tests.recurrent import embedding_lstm_head


def weights(*shape: int) -> np.ndarray:
    return (np.random.default_rng(3).standard_normal(shape) * 0.3).astype(np.float32)


def net(*nodes: helper.NodeProto, shape: tuple[int, ...] = (1, 4, 8, 8), **constants: np.ndarray) -> CanonicalModel:
    return canonical(
        proto_of(list(nodes), inputs={"x": shape}, outputs={"y": [None] * len(shape)}, weights=constants, opset=20)
    )


def data_free(model: CanonicalModel, **config: Any) -> QuantizationPlan:
    pass_ = QuantPass(QuantConfig(**{"mode": "dynamic", **config}))
    plan = run_pass(pass_, ModelState(model=model), PassContext()).state.quantization
    assert plan is not None
    return plan


def test_weights_of_layers_and_tables_have_scales_and_nothing_is_calibrated() -> None:
    plan = data_free(embedding_lstm_head(), mode="weight-only")

    axes = {name: (found.axis, len(found.scales)) for name, found in plan.weights.items()}
    assert axes == {"table": (0, 200), "W": (1, 128), "R": (1, 128), "head": (1, 48)}
    assert (plan.mode, plan.num_samples, plan.calibration_hash, plan.activations) == ("weight-only", 0, "", {})


def test_the_largest_magnitude_of_each_channel_is_127_steps() -> None:
    plan = data_free(embedding_lstm_head())

    table = embedding_lstm_head().graph.initializers["table"].const_value
    assert table is not None
    expected = np.abs(table.numpy()).max(axis=1) / 127
    np.testing.assert_array_equal(np.float32(plan.weights["table"].scales), expected.astype(np.float32))


def test_one_scale_for_each_weight_where_channels_are_not_wanted() -> None:
    plan = data_free(embedding_lstm_head(), per_channel=False, weight_bits=4)

    found = plan.weights["head"]
    assert (found.axis, len(found.scales), found.num_bits) == (None, 1, 4)


def test_small_weights_constants_of_arithmetic_and_excluded_nodes_stay_float() -> None:
    model = net(
        helper.make_node("Conv", ["x", "small"], ["a"], name="small_conv"),
        helper.make_node("Conv", ["a", "w"], ["b"], name="conv"),
        helper.make_node("Conv", ["b", "v"], ["c"], name="kept"),
        helper.make_node("Add", ["c", "anchors"], ["y"], name="add"),
        small=weights(4, 4, 1, 1),
        w=weights(64, 4, 3, 3),
        v=weights(16, 64, 1, 1),
        anchors=weights(1, 16, 6, 6) + 100,
    )
    plan = data_free(model, exclude=("kept",))

    assert set(plan.weights) == {"w"}
    assert plan.excluded_nodes == {
        "small_conv": "its weight has fewer than 1024 numbers",
        "kept": "excluded by 'kept'",
    }
    assert not plan.skipped


def test_a_weight_whose_scales_would_outweigh_what_integers_save_stays_float() -> None:
    model = net(
        helper.make_node("Gather", ["thin", "rows"], ["g"], name="pick"),
        helper.make_node("MatMul", ["x", "w"], ["m"], name="product"),
        helper.make_node("Add", ["m", "g"], ["y"], name="add"),
        shape=(1, 1, 8, 64),
        thin=weights(2000, 1),
        rows=np.array([3], dtype=np.int64),
        w=weights(64, 64),
    )
    # A table that is picked from at fixed rows is folded; only the matrix is left.
    plan = data_free(model)

    assert set(plan.weights) == {"w"}


def test_integers_of_another_type_are_named_as_the_reason() -> None:
    model = net(
        helper.make_node("Cast", ["x"], ["h"], to=10),
        helper.make_node("MatMul", ["h", "w"], ["m"], name="half"),
        helper.make_node("Cast", ["m"], ["f"], to=1),
        helper.make_node("MatMul", ["f", "v"], ["y"], name="full"),
        shape=(1, 1, 8, 64),
        w=weights(64, 64).astype(np.float16),
        v=weights(64, 64),
    )
    plan = data_free(model)

    assert plan.excluded_nodes == {"half": "its weight has element type float16, not float"}


def test_weight_that_is_not_finite_is_refused_with_its_name() -> None:
    broken = weights(64, 64)
    broken[3, 5] = np.nan
    model = net(helper.make_node("MatMul", ["x", "w"], ["y"], name="product"), shape=(1, 1, 8, 64), w=broken)

    with pytest.raises(PassError, match=r"'product' \(MatMul\).*'w' holds NaN or infinity"):
        data_free(model)


def test_model_with_small_weights_only_has_nothing_to_quantize() -> None:
    model = net(helper.make_node("Conv", ["x", "w"], ["y"], name="conv"), w=weights(4, 4, 1, 1))

    with pytest.raises(PassError, match="fewer than 1024 numbers"):
        data_free(model)


def test_pattern_that_means_nothing_is_an_error_without_data_too() -> None:
    with pytest.raises(UsageError, match="'nowhere'"):
        data_free(conv_net(batch=1), exclude=("nowhere",))


@pytest.mark.parametrize("mode", ["dynamic", "weight-only"])
def test_static_mode_alone_needs_data_and_its_error_names_the_others(mode: str) -> None:
    check_requirements([QuantPass(QuantConfig(mode=mode))], has_calibration=False, has_evaluator=False)  # type: ignore[arg-type]

    with pytest.raises(PreconditionError, match=r"set quant.mode to 'dynamic' or 'weight-only'.*drop 'quant'"):
        check_requirements([QuantPass(QuantConfig())], has_calibration=False, has_evaluator=False)
    with pytest.raises(PreconditionError, match=mode):
        QuantPass(QuantConfig()).plan(ModelState(model=conv_net(batch=1)), PassContext())


@pytest.mark.parametrize(
    ("setting", "value"), [("activation_bits", 16), ("calibration_method", "percentile"), ("num_samples", 4)]
)
def test_settings_of_calibration_are_refused_where_nothing_is_calibrated(setting: str, value: object) -> None:
    with pytest.raises(ValidationError, match=f"'{setting}' has no effect"):
        QuantConfig.model_validate({"mode": "dynamic", setting: value})


def test_plan_survives_json_and_a_second_run_gives_the_same() -> None:
    pass_ = QuantPass(QuantConfig(mode="dynamic"))
    plan = data_free(embedding_lstm_head())

    assert plan_from_json(pass_, plan_to_json(pass_, plan)) == plan
    assert data_free(embedding_lstm_head()) == plan
