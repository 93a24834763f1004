"""SmoothQuant: outlying channels go into the weights, the float function stays, and harm is undone."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper
from pydantic import ValidationError

from onnxprune.contracts import ModelState, PassContext
from onnxprune.errors import PassError, PreconditionError, UsageError
from onnxprune.passes.harness import run_pass
from onnxprune.passes.smoothquant import SmoothQuantConfig, SmoothQuantPass
from onnxprune.passes.smoothquant.factors import smoothing_factors
from onnxprune.passes.smoothquant.groups import find_groups
from tests.builders import canonical, proto_of
from tests.layerwise import carried_out, images, int8_snr_db, largest_change, normal
from tests.quantization import plan_for

SHAPE = (1, 6, 16)
WIDTH = 16
OUTLIERS = np.where(np.arange(WIDTH) % 8 == 3, 40.0, 1.0).astype(np.float32)


def smooth(**config) -> SmoothQuantPass:
    return SmoothQuantPass(SmoothQuantConfig(**config))


def samples(count: int = 24, seed: int = 0):
    return images(count, seed=seed, shape=SHAPE)


def net(norm: str = "LayerNormalization", *, residual: bool = False):
    """x -> norm, whose channels 3 and 11 stick out -> q and k, added -> gelu-free MLP -> y."""
    gamma, beta = (1 + normal(WIDTH, scale=0.1)) * OUTLIERS, normal(WIDTH, seed=1) * OUTLIERS
    makers = {
        "LayerNormalization": [
            helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["n"], name="norm", axis=-1)
        ],
        "RMSNormalization": [
            helper.make_node("SimplifiedLayerNormalization", ["x", "gamma"], ["n"], name="norm", axis=-1)
        ],
        "decomposed": [
            helper.make_node("ReduceMean", ["x", "axes"], ["mean"], name="mean"),
            helper.make_node("Sub", ["x", "mean"], ["d"], name="sub"),
            helper.make_node("Mul", ["d", "gamma"], ["m"], name="scale"),
            helper.make_node("Add", ["m", "beta"], ["n"], name="shift"),
        ],
        "none": [
            helper.make_node("Tanh", ["x"], ["t"], name="tanh"),
            helper.make_node("Abs", ["t"], ["n"], name="abs"),
        ],
    }
    nodes = [
        *makers[norm],
        helper.make_node("MatMul", ["n", "wq"], ["q"], name="query"),
        helper.make_node("MatMul", ["n", "wk"], ["k"], name="key"),
        helper.make_node("Add", ["q", "k"], ["s"], name="sum"),
        helper.make_node("Relu", ["s"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "wo"], ["o"], name="out"),
        helper.make_node("Add", ["o", "n"] if residual else ["o", "bo"], ["y"], name="last"),
    ]
    weights = {
        "wq": normal(WIDTH, 12, seed=2) / OUTLIERS.reshape(-1, 1),
        "wk": normal(WIDTH, 12, seed=3) / OUTLIERS.reshape(-1, 1),
        "wo": normal(12, WIDTH, seed=4),
    }
    if norm != "none":
        weights["gamma"] = gamma
    if norm in ("LayerNormalization", "decomposed"):
        weights["beta"] = beta
    if norm == "decomposed":
        weights["axes"] = np.array([-1], np.int64)
    if not residual:
        weights["bo"] = normal(WIDTH, seed=5)
    return canonical(proto_of(nodes, inputs={"x": SHAPE}, outputs={"y": SHAPE}, weights=weights))


@pytest.mark.parametrize("norm", ["LayerNormalization", "RMSNormalization", "decomposed"])
def test_the_float_function_stays_and_int8_gains_much(norm: str) -> None:
    model, source = net(norm), samples()

    outcome = carried_out(smooth(), ModelState(model=model), source)

    changed = outcome.state.model
    assert [change.where for change in outcome.report.changes] == ["n"]
    assert len(changed.graph) == len(model.graph)
    assert largest_change(model, changed, samples(4, seed=5)) < 1e-5
    before = int8_snr_db(model, model, plan_for(model, source), samples(8, seed=9))
    after = int8_snr_db(model, changed, plan_for(changed, source), samples(8, seed=9))
    assert after > before + 6
    assert outcome.report.figures["snr_after_db"] > outcome.report.figures["snr_before_db"] + 6


def test_a_given_alpha_is_taken() -> None:
    outcome = carried_out(smooth(alpha=0.5), ModelState(model=net()), samples())
    assert [change.figures["alpha"] for change in outcome.report.changes] == [0.5]


def test_alpha_beyond_one_is_refused() -> None:
    with pytest.raises(ValidationError):
        smooth(alpha=1.5)


def test_a_second_run_changes_nothing() -> None:
    first = carried_out(smooth(), ModelState(model=net()), samples())
    second = carried_out(smooth(), first.state, samples())
    assert second.state.model is first.state.model


def test_a_tensor_that_a_residual_reads_is_left_alone_and_the_report_says_so() -> None:
    state = ModelState(model=net(residual=True))
    outcome = carried_out(smooth(), state, samples())
    assert outcome.state.model is state.model
    assert ("query", "'last' (Add) reads 'n' too") in {(s.where, s.reason) for s in outcome.report.skips}


def test_with_insert_mul_a_residual_keeps_its_tensor_and_the_layers_get_another() -> None:
    model = net(residual=True)
    outcome = carried_out(smooth(insert_mul=True, alpha=0.5), ModelState(model=model), samples())
    groups, _ = find_groups(model, insert_mul=True)
    assert not groups[0].folds
    assert largest_change(model, outcome.state.model, samples(4, seed=5)) < 1e-5
    assert [group.tensor for group in outcome.plan.groups] == ["n", "r"]
    assert sum(node.op_type == "Mul" for node in outcome.state.model.graph) == 2


def test_an_operator_that_takes_no_division_is_named() -> None:
    _, skipped = find_groups(net("none"), insert_mul=False)
    assert skipped["query"] == "'abs' (Abs) before it can't take the division"


def test_a_gated_product_is_folded_into_one_of_its_layers() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "wg"], ["g"], name="gate"),
        helper.make_node("Sigmoid", ["g"], ["sg"], name="sigmoid"),
        helper.make_node("MatMul", ["x", "wu"], ["u"], name="up"),
        helper.make_node("Mul", ["sg", "u"], ["h"], name="product"),
        helper.make_node("MatMul", ["h", "wd"], ["d"], name="down"),
        helper.make_node("Relu", ["d"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "wl"], ["y"], name="last"),
    ]
    wide = np.where(np.arange(12) == 5, 40.0, 1.0).astype(np.float32)
    weights = {
        "wg": normal(WIDTH, 12),
        "wu": normal(WIDTH, 12, seed=1) * wide,
        "wd": normal(12, 8, seed=2) / wide.reshape(-1, 1),
        "wl": normal(8, 8, seed=3),
    }
    model = canonical(proto_of(nodes, inputs={"x": SHAPE}, outputs={"y": [1, 6, 8]}, weights=weights))

    outcome = carried_out(smooth(), ModelState(model=model), samples())

    (group,) = [group for group in outcome.plan.groups if group.tensor == "h"]
    assert [(fold.node, fold.is_layer) for fold in group.folds] == [("up", True)]
    assert largest_change(model, outcome.state.model, samples(4, seed=5)) < 1e-5


def test_factors_follow_the_paper_and_dead_channels_get_one() -> None:
    found = smoothing_factors(np.array([4.0, 1.0, 0.0]), np.array([1.0, 4.0, 1.0]), 0.5)
    np.testing.assert_allclose(found, [2.0, 0.5, 1.0])


def test_missing_data_and_patterns_without_meaning_are_refused() -> None:
    with pytest.raises(PreconditionError, match="needs calibration data"):
        run_pass(smooth(), ModelState(model=net()), PassContext())
    with pytest.raises(UsageError, match="'nowhere' in `exclude` of pass 'smoothquant'"):
        run_pass(smooth(exclude=("nowhere",)), ModelState(model=net()), PassContext(calibration=samples()))


def test_a_plan_for_another_model_is_refused() -> None:
    plan = carried_out(smooth(), ModelState(model=net("decomposed")), samples()).plan
    with pytest.raises(PassError, match="which this model does not have"):
        run_pass(smooth(), ModelState(model=net()), PassContext(), plan=plan)
