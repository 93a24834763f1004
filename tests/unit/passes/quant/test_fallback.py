"""Taking layers out of 8 bits: the right ones, no more than needed, with few evaluations, and on the record."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from onnx import helper
from pydantic import ValidationError

from onnxprune.contracts import (
    EXACT_DB,
    CanonicalModel,
    Evaluator,
    ModelState,
    PassContext,
    PassOutcome,
    QuantizationPlan,
    Requirement,
    Runner,
    Score,
)
from onnxprune.errors import PluginError, PreconditionError
from onnxprune.ops.planned import planned_nodes
from onnxprune.passes.harness import plan_from_json, plan_to_json, run_pass
from onnxprune.passes.quant import QuantConfig, QuantPass
from onnxprune.passes.quant.accounting import with_account
from onnxprune.passes.quant.fallback import Diagnosis, with_fallback, without_fallback
from onnxprune.passes.quant.goals import SnrGoal
from onnxprune.passes.quant.plan_report import plan_report
from onnxprune.passes.quant.simulate import simulated
from onnxprune.passes.quant.widen import with_wide_activations
from onnxprune.runtime.sessions import ort_runner_from_model
from tests.builders import canonical, conv_net, proto_of
from tests.quantization import ArraySource, normal_batches, plan_for

SHAPE = (1, 4, 8, 8)
SOURCE = normal_batches(SHAPE)
CLEAN_DB = 30.0


def weights(*shape: int, seed: int = 11) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.3).astype(np.float32)


def chain(*, spoilt: int | None = 2, count: int = 5) -> CanonicalModel:
    """Layers "conv0" to "conv4" with Relu between; one filter of the spoilt one is 2,000 times as large as the others.

    Its output has one scale for all channels, so int8 leaves the other channels nothing; the layer behind it hardly
    reads the large one.
    """
    nodes, constants = [], {}
    value = "x"
    for index in range(count):
        kernel = weights(8, 4 if index == 0 else 8, 3, 3, seed=index)
        if index == spoilt:
            kernel[0] *= 2000
        if spoilt is not None and index == spoilt + 1:
            kernel[:, 0] /= 20000
        constants[f"w{index}"] = kernel
        output = "y" if index == count - 1 else f"c{index}"
        nodes.append(helper.make_node("Conv", [value, f"w{index}"], [output], name=f"conv{index}", pads=[1] * 4))
        value = output
        if index < count - 1:
            value = f"r{index}"
            nodes.append(helper.make_node("Relu", [output], [value], name=f"relu{index}"))
    return canonical(proto_of(nodes, inputs={"x": SHAPE}, outputs={"y": [None] * 4}, weights=constants))


@dataclass
class NoiseScore:
    """Scores a model by how close it is to the float one; `sign` -1 makes it an error, where lower is better."""

    model: CanonicalModel
    higher_is_better: bool = True
    broken_from: int = 10**6
    calls: list[float] = field(default_factory=list)
    name: str = "closeness"

    def evaluate(self, runner: Runner) -> Score:
        batch = next(iter(SOURCE))
        expected = ort_runner_from_model(self.model).run(batch)["y"].astype(np.float64)
        found = runner.run(batch)["y"]
        error = float(np.square(found - expected).sum() / np.square(expected).sum())
        value = 1.0 - error if self.higher_is_better else error
        self.calls.append(value)
        if len(self.calls) > self.broken_from:
            value = math.nan
        return Score(metric=self.name, value=value, higher_is_better=self.higher_is_better)


def quantized(model: CanonicalModel, evaluator: Evaluator | None = None, **config: object) -> PassOutcome:
    pass_ = QuantPass(QuantConfig.model_validate({"threads": 1, **config}))
    return run_pass(pass_, ModelState(model=model), PassContext(calibration=SOURCE, evaluator=evaluator))


def plan_of(outcome: PassOutcome) -> QuantizationPlan:
    assert outcome.state.quantization is not None
    return outcome.state.quantization


def integer_layers(model: CanonicalModel, plan: QuantizationPlan) -> list[str | None]:
    return [item.node.name for item in planned_nodes(model, plan)]


# --- which layers -------------------------------------------------------------------------------------------------


def test_the_one_tensor_that_int8_spoils_is_found_and_only_the_layers_at_it_are_returned() -> None:
    model = chain()
    outcome = quantized(model, min_snr_db=CLEAN_DB)
    plan = plan_of(outcome)
    # conv2 writes the spoilt tensor, conv3 reads it: either would round it.
    assert set(plan.returned_nodes) == {"conv2", "relu2", "conv3", "relu3"}
    assert integer_layers(model, plan) == ["conv0", "conv1", "conv4"]
    record = plan.fallback
    assert record is not None
    assert record.met
    assert record.before < 10 < CLEAN_DB <= record.reached
    assert "it leaves the model's outputs at" in plan.returned_nodes["conv2"]


def test_a_sensitive_weight_is_found_and_its_layer_returned_alone() -> None:
    model = chain(spoilt=None)
    plan = plan_for(model, SOURCE)
    coarse = plan_for(model, SOURCE, weight_bits=4).weights["w1"]
    damaged = replace(plan, weights={**plan.weights, "w1": coarse})
    held = with_account(model, damaged, QuantConfig(min_snr_db=CLEAN_DB, threads=1), PassContext(calibration=SOURCE))
    assert set(held.returned_nodes) == {"conv1", "relu1"}
    assert min(held.layer_errors, key=lambda error: error.own_db).node == "conv1"


def test_figure_of_the_record_is_what_the_simulation_gives() -> None:
    model = chain()
    plan = plan_of(quantized(model, min_snr_db=CLEAN_DB))
    assert plan.fallback is not None
    reference, found = ort_runner_from_model(model), ort_runner_from_model(simulated(model, plan))
    worst = math.inf
    for batch in SOURCE:
        expected = reference.run(batch)["y"].astype(np.float64)
        error = found.run(batch)["y"] - expected
        worst = min(worst, 10 * math.log10(np.square(expected).sum() / np.square(error).sum()))
    assert plan.fallback.reached == pytest.approx(worst, abs=1e-6)


# --- goals --------------------------------------------------------------------------------------------------------


def test_a_goal_that_holds_takes_one_evaluation_and_returns_nothing() -> None:
    outcome = quantized(chain(spoilt=None), min_snr_db=20.0)
    plan = plan_of(outcome)
    assert plan.fallback is not None
    assert (plan.fallback.met, plan.fallback.evaluations, plan.fallback.num_layers) == (True, 1, 0)
    assert not plan.returned_nodes
    assert not plan.layer_errors
    assert outcome.report.figures["evaluations"] == 1


def test_drop_of_a_score_is_counted_from_the_float_model_and_every_evaluation_is_counted() -> None:
    model = chain()
    evaluator = NoiseScore(model)
    plan = plan_of(quantized(model, evaluator, max_drop=0.001))
    record = plan.fallback
    assert record is not None
    assert record.float_score is not None
    assert (record.float_score.value, record.met) == (1.0, True)
    assert record.evaluations == len(evaluator.calls)
    assert {"conv2", "conv3"} <= set(plan.returned_nodes)
    assert record.before > 0.001 >= record.reached


def test_score_of_which_less_is_better_is_understood() -> None:
    model = chain()
    higher = plan_of(quantized(model, NoiseScore(model), max_drop=0.001))
    lower = plan_of(quantized(model, NoiseScore(model, higher_is_better=False), max_drop=0.001))
    assert lower.returned_nodes == higher.returned_nodes
    assert lower.fallback is not None
    assert higher.fallback is not None
    assert lower.fallback.reached == pytest.approx(higher.fallback.reached, abs=1e-12)


def test_drop_of_zero_may_return_every_layer_and_that_needs_no_proof() -> None:
    model = chain()
    evaluator = NoiseScore(model)
    plan = plan_of(quantized(model, evaluator, max_drop=0.0))
    assert plan.fallback is not None
    assert (plan.fallback.met, plan.fallback.reached, plan.fallback.num_layers) == (True, 0.0, 5)
    assert integer_layers(model, plan) == []
    # Only the float model itself scores 1.
    assert evaluator.calls.count(1.0) == 1


def test_what_has_no_weight_goes_along_when_no_layer_with_one_is_left() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1] * 4),
        helper.make_node("Add", ["c", "x"], ["a"], name="add"),
        helper.make_node("Conv", ["a", "v"], ["y"], name="head", pads=[1] * 4),
    ]
    kernels = {"w": weights(4, 4, 3, 3), "v": weights(8, 4, 3, 3)}
    model = canonical(proto_of(nodes, inputs={"x": SHAPE}, outputs={"y": [None] * 4}, weights=kernels))
    plan = plan_for(model, SOURCE)
    goal = SnrGoal(model, SOURCE, limit=100.0, threads=1)
    convs = tuple(item for item in planned_nodes(model, plan) if item.row.is_compute)
    held = with_fallback(model, plan, goal, kind="float", diagnose=lambda: Diagnosis(errors=(), ranked=convs))
    record = held.fallback
    assert record is not None
    assert (record.met, record.is_all_float, record.reached) == (True, True, EXACT_DB)
    # The plan as it was and those without one layer: that nothing integer is the float model needs no proof.
    assert (record.evaluations, record.num_layers) == (3, 3)
    assert integer_layers(model, held) == []
    assert held.returned_nodes["add"] == "no layer with a weight is left in 8 bits"
    assert without_fallback(held).returned_nodes == plan.returned_nodes


def test_report_says_when_nothing_is_left_in_int8() -> None:
    everything = quantized(chain(), min_snr_db=150.0).report
    assert everything.figures["fallback_layers"] == 5
    assert "Nothing is left in int8" in everything.notes[0]
    assert "Nothing is left" not in quantized(chain(), min_snr_db=CLEAN_DB).report.notes[0]


def test_model_with_one_layer_is_either_integer_or_float() -> None:
    model = chain(spoilt=None, count=1)
    assert integer_layers(model, plan_of(quantized(model, min_snr_db=20.0))) == ["conv0"]
    assert integer_layers(model, plan_of(quantized(model, min_snr_db=100.0))) == []


def test_score_that_is_no_number_keeps_no_limit() -> None:
    model = chain(spoilt=None)
    plan = plan_of(quantized(model, NoiseScore(model, broken_from=1), max_drop=0.5))
    assert integer_layers(model, plan) == []
    pass_ = QuantPass(QuantConfig(max_drop=0.5))
    assert plan_from_json(pass_, plan_to_json(pass_, plan)) == plan


def test_float_model_without_a_score_is_an_error_of_the_evaluator() -> None:
    model = chain()
    with pytest.raises(PluginError, match=r"'closeness' gave nan for the float model"):
        quantized(model, NoiseScore(model, broken_from=0), max_drop=0.5)


def test_error_of_the_evaluator_is_not_swallowed() -> None:
    class Failing:
        name = "failing"

        def evaluate(self, runner: Runner) -> Score:
            raise PluginError("No labels.")

    with pytest.raises(PluginError, match="No labels"):
        quantized(chain(), Failing(), max_drop=0.5)


def test_an_evaluator_is_required_by_a_limit_of_the_score_only() -> None:
    assert Requirement.EVALUATOR in QuantPass(QuantConfig(max_drop=0.1)).requirements
    assert Requirement.EVALUATOR not in QuantPass(QuantConfig(min_snr_db=20)).requirements
    with pytest.raises(PreconditionError, match="evaluator"):
        quantized(chain(), max_drop=0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_drop": -0.1},
        {"max_drop": math.nan},
        {"min_snr_db": math.inf},
        {"fallback": "int4"},
        {"max_drop": 0.1, "min_snr_db": 20.0},
    ],
)
def test_wrong_goal_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        QuantConfig.model_validate(wrong)


# --- 16 bits ------------------------------------------------------------------------------------------------------


def test_sixteen_bits_go_to_the_tensors_of_the_layers_that_spoil_the_result_and_weights_stay() -> None:
    model = chain()
    before = plan_for(model, SOURCE)
    # What the large channel drowns in the weight of conv3, 16 bits of its input don't bring back: 23 dB.
    plan = plan_of(quantized(model, min_snr_db=20.0, fallback="int16"))
    assert plan.fallback is not None
    assert plan.fallback.met
    assert not plan.returned_nodes
    assert {name for name, entry in plan.activations.items() if entry.num_bits == 16} == {"r2", "r3"}
    assert plan.weights == before.weights
    assert without_fallback(plan).activations == before.activations


def test_sixteen_bits_that_do_not_help_are_reported_as_a_goal_that_does_not_hold() -> None:
    outcome = quantized(chain(spoilt=None), min_snr_db=60.0, weight_bits=4, fallback="int16")
    record = plan_of(outcome).fallback
    assert record is not None
    assert not record.met
    assert record.reached < 60.0
    assert any("does NOT hold even so" in note for note in outcome.report.notes)


def test_tied_tensors_change_together_and_keep_their_range() -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, normal_batches((1, 3, 8, 8)))
    wide = with_wide_activations(model, plan, ["head/gemm"]).activations
    # The Flatten in front moves integers: both its tensors have one scale.
    assert {name for name, entry in wide.items() if entry.num_bits == 16} == {"p", "f", "y"}
    assert wide["p"].scale == wide["f"].scale
    narrow = plan.activations["p"]
    # 255 steps for 0 to the largest number, against 32767 on that side of zero.
    assert wide["p"].scale == pytest.approx(narrow.scale * 255 / 32767, rel=1e-6)
    assert (wide["p"].range_min, wide["p"].range_max) == (narrow.range_min, narrow.range_max)


def test_widened_tensors_are_quantized_as_those_that_had_sixteen_bits_from_the_start() -> None:
    names = ["conv", "sigmoid", "conv2", "relu2"]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("Sigmoid", ["a"], ["s"], name="sigmoid"),
        helper.make_node("Conv", ["s", "w2"], ["b"], name="conv2"),
        helper.make_node("Relu", ["b"], ["r"], name="relu2"),
        helper.make_node("Conv", ["r", "w2"], ["y"], name="conv3"),
    ]
    constants = {"w": weights(8, 4, 1, 1), "w2": weights(8, 8, 1, 1)}
    model = canonical(proto_of(nodes, inputs={"x": SHAPE}, outputs={"y": [None] * 4}, weights=constants))
    plan = plan_for(model, SOURCE)
    wide = with_wide_activations(model, plan, names).activations
    from_the_start = plan_for(model, SOURCE, activation_bits=16).activations
    assert plan.activations["x"].zero_point != 0
    assert {name: (wide[name].scale, wide[name].zero_point) for name in "xasr"} == {
        name: (from_the_start[name].scale, 0) for name in "xasr"
    }
    assert wide["s"].scale == 1 / 32768


def test_widening_twice_changes_nothing_more() -> None:
    model = conv_net(batch=1)
    plan = plan_for(model, normal_batches((1, 3, 8, 8)))
    once = with_wide_activations(model, plan, ["head/gemm"])
    assert with_wide_activations(model, once, ["head/gemm"]) == once


# --- on the record ------------------------------------------------------------------------------------------------


def test_plan_repeats_the_fallback_without_evaluator_or_data() -> None:
    model = chain()
    pass_ = QuantPass(QuantConfig(max_drop=0.001, threads=1))
    first = quantized(model, NoiseScore(model), max_drop=0.001)
    plan = plan_from_json(pass_, plan_to_json(pass_, plan_of(first)))
    again = run_pass(pass_, ModelState(model=model), PassContext(), plan=plan)
    assert again.state.quantization == first.state.quantization
    assert again.report.notes == first.report.notes


def test_report_has_a_row_for_each_layer_and_names_the_worst() -> None:
    outcome = quantized(chain(), diagnose=True)
    rows = {change.where: change.figures for change in outcome.report.changes if change.what == "error of the layer"}
    assert list(rows) == [f"conv{index}" for index in range(5)]
    assert min(rows, key=lambda name: rows[name]["accumulated_db"]) in ("conv3", "conv4")
    (note,) = [note for note in outcome.report.notes if note.startswith("Least exact")]
    assert note.count("of its own") == 5


@pytest.mark.parametrize(("count", "text"), [(1, "; 1 node stays float"), (9, "; 9 nodes stay float")])
def test_summary_counts_what_stays_float_in_the_right_number(count: int, text: str) -> None:
    left = {str(number): "excluded" for number in range(count)}
    plan = replace(plan_for(chain(), SOURCE), excluded_nodes=left)
    assert plan_report("quant", "quant", plan).summary.endswith(text)


def test_without_goal_or_diagnosis_nothing_is_simulated() -> None:
    plan = plan_of(quantized(chain()))
    assert plan.fallback is None
    assert plan.layer_errors == ()


def test_returned_nodes_of_before_outlive_the_twin_without_fallback() -> None:
    model = chain()
    plan = plan_of(quantized(model, min_snr_db=CLEAN_DB))
    both = replace(plan, returned_nodes={**plan.returned_nodes, "conv0": "somebody else said so"})
    assert without_fallback(both).returned_nodes == {"conv0": "somebody else said so"}


def test_calibration_of_another_batch_size_serves_as_well() -> None:
    model = conv_net()
    source = ArraySource((*normal_batches((4, 3, 8, 8), count=3).batches,))
    pass_ = QuantPass(QuantConfig(min_snr_db=200.0, threads=1))
    outcome = run_pass(pass_, ModelState(model=model), PassContext(calibration=source))
    assert integer_layers(model, plan_of(outcome)) == []
