"""What `run_pass` requires of a run, and what it does with passes that break their contract."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from onnxprune.contracts import (
    ModelState,
    Pass,
    PassConfig,
    PassContext,
    PassOutcome,
    PassReport,
    QuantizationPlan,
    Requirement,
)
from onnxprune.errors import OnnxPruneError, PluginError, PreconditionError, UsageError, VerificationError
from onnxprune.graph.weights import constant_array, replace_weight
from onnxprune.passes.harness import check_requirements, plan_from_json, plan_to_json, run_pass
from onnxprune.passes.quant import QuantConfig, QuantPass


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScalePlan:
    weights: tuple[str, ...]
    factor: float


class ScaleConfig(PassConfig):
    factor: float = 2.0


class ScalePass(Pass[ScaleConfig, ScalePlan]):
    """Multiplies all weights: a pass as it should be; the tests below break one thing each."""

    name: ClassVar[str] = "scale"
    summary: ClassVar[str] = "multiplies weights"
    config_type: ClassVar[type[ScaleConfig]] = ScaleConfig
    plan_type: ClassVar[type[ScalePlan]] = ScalePlan

    def plan(self, state, context):
        return ScalePlan(weights=tuple(state.model.graph.initializers), factor=self.config.factor)

    def apply(self, state, plan, context):
        if plan.factor != 1:
            for name in plan.weights:
                value = state.model.graph.initializers[name]
                replace_weight(value, constant_array(value) * np.float32(plan.factor))
        return PassOutcome(state=state, report=PassReport(pass_id="?", pass_name="?", summary="scaled"))


# Our own passes live in the package; the harness tells ours from others' by that.
ScalePass.__module__ = "onnxprune.passes.scale"


def variant(**overrides):
    """A pass of our own with some methods or class variables replaced."""
    made = type("Variant", (ScalePass,), overrides)
    made.__module__ = "onnxprune.passes.variant"
    return made


@pytest.fixture(autouse=True)
def dumps_go_to(tmp_path, monkeypatch):
    """Dumps are written under the test's own folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def model(make_model):
    return make_model(
        "g (float[1,4] x) => (float[1,3] y) { a = MatMul(x, w)  y = Add(a, b) }",
        {"w": np.eye(4, 3, dtype=np.float32), "b": np.ones(3, np.float32)},
    )


def run(pass_, model, **context):
    return run_pass(pass_, ModelState(model=model), PassContext(**context))


def test_the_result_is_changed_and_the_callers_model_is_not(model, run_verified):
    outcome = run_verified(ScalePass(ScaleConfig()), model)
    assert constant_array(outcome.state.model.graph.initializers["b"]).tolist() == [2, 2, 2]
    assert constant_array(model.graph.initializers["b"]).tolist() == [1, 1, 1]


def test_a_pass_that_changes_nothing_hands_back_the_very_same_model(model):
    assert run(ScalePass(ScaleConfig(factor=1)), model).state.model is model


def test_the_report_carries_pass_id_configuration_and_duration(model):
    report = run(ScalePass(ScaleConfig(factor=3), pass_id="scale#2"), model).report
    assert (report.pass_id, report.pass_name, report.config) == ("scale#2", "scale", {"factor": 3.0})
    assert report.duration_s > 0


def test_a_plan_that_is_given_is_carried_out_instead_of_a_new_one(model):
    plan = ScalePlan(weights=("b",), factor=5.0)
    outcome = run_pass(ScalePass(ScaleConfig()), ModelState(model=model), PassContext(), plan=plan)
    assert constant_array(outcome.state.model.graph.initializers["b"]).tolist() == [5, 5, 5]
    assert outcome.plan == plan


# --- requirements ---------------------------------------------------------------------------------------------


def test_missing_calibration_data_names_the_pass_and_the_option(model):
    needing = variant(requirements=frozenset({Requirement.CALIBRATION}))
    with pytest.raises(PreconditionError, match=r"Pass 'scale' needs calibration data.*--calibration FOLDER"):
        run(needing(ScaleConfig()), model)


def test_all_passes_that_lack_an_evaluator_are_named_at_once():
    needing = variant(requirements=frozenset({Requirement.EVALUATOR}))
    passes = [needing(ScaleConfig(), pass_id=name) for name in ("one", "two")]
    with pytest.raises(PreconditionError, match=r"Passes 'one', 'two' need an evaluator.*--eval"):
        check_requirements(passes, has_calibration=True, has_evaluator=False)


def test_a_pass_after_quantization_that_would_make_its_plan_wrong_is_refused_early():
    quantizer = variant(produces_quantization=True, keeps_quantization=True)(ScaleConfig(), pass_id="quant")
    with pytest.raises(PreconditionError, match=r"'scale' stands after 'quant'.*Put 'scale' before 'quant'"):
        check_requirements([quantizer, ScalePass(ScaleConfig())], has_calibration=True, has_evaluator=True)


def test_two_passes_that_quantize_are_refused() -> None:
    passes = [QuantPass(QuantConfig()), QuantPass(QuantConfig(), pass_id="quant#2")]
    with pytest.raises(PreconditionError, match=r"'quant' and 'quant#2' both quantize.*Drop one of them"):
        check_requirements(passes, has_calibration=True, has_evaluator=True)


def test_a_state_with_a_quantization_plan_is_refused_by_a_pass_that_does_not_keep_it(model):
    plan = QuantizationPlan(activations={}, weights={}, method="minmax", calibration_hash="", num_samples=1)
    with pytest.raises(PreconditionError, match="would make the quantization plan of an earlier pass wrong"):
        run_pass(ScalePass(ScaleConfig()), ModelState(model=model, quantization=plan), PassContext())


# --- passes that break their contract -------------------------------------------------------------------------


def plan_that_writes(self, state, context):
    replace_weight(state.model.graph.initializers["b"], np.zeros(3, np.float32))
    return ScalePlan(weights=(), factor=1.0)


def apply_that_renames_an_output(self, state, plan, context):
    state.model.graph.outputs[0].name = "other"
    return ScalePass.apply(self, state, plan, context)


def apply_that_changes_a_shape(self, state, plan, context):
    state.model.graph.inputs[0].shape = ir.Shape([2, 4])
    return ScalePass.apply(self, state, plan, context)


def apply_that_changes_a_type(self, state, plan, context):
    state.model.graph.inputs[0].type = ir.TensorType(ir.DataType.DOUBLE)
    return ScalePass.apply(self, state, plan, context)


def apply_that_breaks_arithmetic(self, state, plan, context):
    replace_weight(state.model.graph.initializers["b"], np.full(3, np.nan, np.float32))
    return ScalePass.apply(self, state, dataclasses.replace(plan, factor=1), context)


def apply_that_duplicates_a_node_name(self, state, plan, context):
    nodes = list(state.model.graph)
    nodes[0].name = nodes[1].name
    return ScalePass.apply(self, state, plan, context)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"plan": lambda self, state, context: "a string"}, "its plan is a 'str', not the declared 'ScalePlan'"),
        ({"plan": plan_that_writes}, "`plan` changed the model"),
        ({"apply": lambda self, state, plan, context: None}, "`apply` returned a 'NoneType'"),
        ({"apply": apply_that_renames_an_output}, r"changed the outputs from \['y'\] to \['other'\]"),
        ({"apply": apply_that_changes_a_shape}, "changed the shape of input 'x'"),
        ({"apply": apply_that_changes_a_type}, "changed the element type of input 'x'"),
        ({"apply": apply_that_breaks_arithmetic}, "output 'y' is not finite"),
        ({"apply": apply_that_duplicates_a_node_name}, "its result is not canonical"),
        ({"produces_quantization": True}, "declares to produce a quantization plan and returned none"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_contract_is_a_fault_of_the_author_with_a_dump(model, overrides, message):
    with pytest.raises(VerificationError, match=f"Pass 'scale' is at fault: .*{message}") as caught:
        run(variant(**overrides)(ScaleConfig()), model)
    folder = Path(re.search(r"'(\S*onnxprune-dump-scale-\S*?)'", caught.value.message)[1])
    assert (folder / "before.onnx").is_file()
    assert "bug of onnxprune" in caught.value.hint


def test_apply_must_not_reach_back_to_the_callers_model(model):
    original = ModelState(model=model)

    def apply(self, state, plan, context):
        return ScalePass.apply(self, original, plan, context)

    with pytest.raises(VerificationError, match="changed the caller's model"):
        run_pass(variant(apply=apply)(ScaleConfig()), original, PassContext())


def test_a_third_partys_error_is_said_to_be_theirs(model):
    def apply(self, state, plan, context):
        raise KeyError("conv9")

    theirs = variant(apply=apply)
    theirs.__module__ = "acme.passes"
    with pytest.raises(PluginError, match=r"'scale' of 'acme.passes' failed in `apply`: KeyError: 'conv9'"):
        run(theirs(ScaleConfig()), model)


def test_our_own_errors_are_bugs_and_show_their_traceback(model):
    def apply(self, state, plan, context):
        raise KeyError("conv9")

    with pytest.raises(KeyError):
        run(variant(apply=apply)(ScaleConfig()), model)


def test_a_third_partys_broken_contract_is_a_plug_in_error(model):
    theirs = variant(apply=apply_that_renames_an_output)
    theirs.__module__ = "acme.passes"
    with pytest.raises(PluginError, match=r"author of 'acme\.passes'"):
        run(theirs(ScaleConfig()), model)


def test_a_model_that_could_not_be_run_before_is_not_held_against_the_pass(make_model):
    nan = make_model(
        "g (float[1,4] x) => (float[1,4] y) { y = Add(x, b) }", {"b": np.array([1, 2, np.nan, 4], np.float32)}
    )
    assert run(ScalePass(ScaleConfig()), nan).report.summary == "scaled"


def test_a_model_that_is_not_canonical_is_refused_before_the_pass_sees_it(model):
    nodes = list(model.graph)
    nodes[0].name = nodes[1].name
    with pytest.raises(VerificationError, match="The model given to pass 'scale' is not canonical"):
        run(ScalePass(ScaleConfig()), model)


# --- plans as JSON --------------------------------------------------------------------------------------------


def test_a_plan_comes_back_from_json_as_it_was():
    pass_ = ScalePass(ScaleConfig())
    plan = ScalePlan(weights=("w", "b"), factor=0.1)
    assert plan_from_json(pass_, plan_to_json(pass_, plan)) == plan


def test_a_plan_that_does_not_fit_names_every_wrong_place():
    with pytest.raises(UsageError, match=r"for pass 'scale' does not fit: weights: .*; factor: ") as caught:
        plan_from_json(ScalePass(ScaleConfig()), {"weights": "w", "factor": "much"})
    assert isinstance(caught.value, OnnxPruneError)
    assert caught.value.exit_code == 2


class TimingPass(ScalePass):
    requirements = frozenset({Requirement.TIMING})


def test_a_pass_that_times_is_refused_where_timings_of_this_machine_do_not_count() -> None:
    with pytest.raises(PreconditionError, match=r"'scale' needs latencies measured on the target, but nobody measures"):
        check_requirements(
            [TimingPass(ScaleConfig())], has_calibration=True, has_evaluator=True, untimed_reason="nobody measures"
        )


def test_a_pass_that_times_runs_where_this_machine_is_the_target() -> None:
    check_requirements([TimingPass(ScaleConfig())], has_calibration=False, has_evaluator=False)
