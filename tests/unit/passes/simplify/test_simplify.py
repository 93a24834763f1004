"""The pass `simplify` as a whole: order, checks, roll-back, foreign tools, report."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from pydantic import ValidationError

from onnxprune.contracts import ModelState, PassContext
from onnxprune.graph.foreign import ForeignToolError
from onnxprune.graph.metadata import module_path
from onnxprune.graph.weights import constant_array
from onnxprune.passes.harness import plan_from_json, plan_to_json, run_pass
from onnxprune.passes.simplify import SimplifyConfig, SimplifyPass, stages
from onnxprune.passes.simplify import simplify as simplify_module

BACKBONE = """g (float[N,3,8,8] x) => (float[N,5] y) {
    p = Pad(x, pads)
    c = Conv(p, w, b)
    n = BatchNormalization(c, gamma, beta, mean, var)
    r = Relu(n)
    s1 = Sigmoid(r)
    s2 = Sigmoid(r)
    m = Mul(s1, s2)
    d = Mul(m, one)
    a = GlobalAveragePool(d)
    f = Flatten(a)
    fc = MatMul(f, fw)
    y = Add(fc, fb)
}"""


def normal(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


@pytest.fixture
def backbone(make_model):
    weights = {
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
        "w": normal(4, 3, 3, 3),
        "b": normal(4),
        "gamma": np.abs(normal(4)) + 0.5,
        "beta": normal(4),
        "mean": normal(4),
        "var": np.abs(normal(4)) + 0.5,
        "one": np.ones(1, np.float32),
        "fw": normal(4, 5),
        "fb": normal(5),
    }
    return make_model(BACKBONE, weights, modules={"c": "backbone.conv", "fc": "head.fc"})


def with_stages(monkeypatch, *extra):
    """Let the pass know further stages, and return their names."""
    table = (*stages.STAGES, *extra)
    monkeypatch.setattr(simplify_module, "STAGES", table)
    return tuple(stage.name for stage in extra)


def run_only(names, model):
    """Run a pass with exactly these stages, whatever the configuration knows."""
    pass_ = SimplifyPass(SimplifyConfig())
    plan = dataclasses.replace(pass_.plan(ModelState(model=model), PassContext()), stages=tuple(names))
    return run_pass(pass_, ModelState(model=model), PassContext(), plan=plan)


def test_our_own_stages_leave_the_smallest_graph_and_the_module_paths(backbone, simplified, op_types):
    outcome = simplified(backbone, batch=2)
    assert op_types(outcome) == ["Conv", "Relu", "Sigmoid", "Mul", "GlobalAveragePool", "Flatten", "Gemm"]
    paths = {node.op_type: module_path(node) for node in outcome.state.model.graph}
    assert (paths["Conv"], paths["Gemm"]) == ("backbone.conv", "head.fc")


def test_a_second_run_changes_nothing(backbone, simplified):
    first = simplified(backbone)
    assert simplified(first.state.model).state.model is first.state.model


def test_the_report_says_what_each_stage_did(backbone, simplified):
    report = simplified(backbone).report
    did = {change.where: change.what for change in report.changes}
    assert did["stage 'batchnorm'"] == "removed 1 BatchNormalization"
    assert did["stage 'matmul-add'"] == "removed 1 Add, 1 MatMul, added 1 Gemm"
    assert did["stage 'duplicates'"] == "removed 1 Sigmoid"
    assert report.summary == "12 nodes before, 7 after"
    assert report.figures == {"nodes_before": 12, "nodes_after": 7}
    assert report.notes == ()


def test_stages_that_are_skipped_do_not_run(backbone, simplified, op_types):
    assert "BatchNormalization" in op_types(simplified(backbone, "no-ops", "duplicates"))


def test_an_unknown_stage_is_refused_with_the_known_ones():
    with pytest.raises(ValidationError, match=r"unknown stage 'onnxsin'\. Did you mean 'onnxsim'"):
        SimplifyConfig(skip_stages=("onnxsin",))


def test_the_plan_survives_json(backbone):
    pass_ = SimplifyPass(SimplifyConfig(skip_stages=("onnxsim", "onnxscript")))
    plan = pass_.plan(ModelState(model=backbone), PassContext())
    assert plan_from_json(pass_, plan_to_json(pass_, plan)) == plan
    assert plan.stages[0] == "dead-code"


# --- checks ---------------------------------------------------------------------------------------------------


def remove_relu(model):
    """A wrong rewrite: fewer nodes, other outputs."""
    (relu,) = [node for node in model.graph if node.op_type == "Relu"]
    relu.outputs[0].replace_all_uses_with(relu.inputs[0])
    model.graph.remove(relu, safe=True)
    return 1


def test_a_stage_that_changes_outputs_is_rolled_back_with_a_note(backbone, monkeypatch):
    names = with_stages(monkeypatch, stages.OwnStage(name="wrong", rewrite=remove_relu))
    outcome = run_only(names, backbone)
    assert outcome.state.model is backbone
    (note,) = outcome.report.notes
    assert note.startswith("Stage 'wrong' was rolled back: output 'y' is off by")
    assert outcome.report.skips[0].where == "stage 'wrong'"


def test_other_stages_go_on_after_one_was_rolled_back(backbone, monkeypatch, op_types):
    names = with_stages(monkeypatch, stages.OwnStage(name="wrong", rewrite=remove_relu))
    outcome = run_only((*names, "duplicates"), backbone)
    assert op_types(outcome).count("Sigmoid") == 1
    assert op_types(outcome).count("Relu") == 1


def tool_stage(name, run):
    """A foreign tool's stage whose tool is a function of this test."""

    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class Fake(stages.ToolStage):
        def run(self, model, limits):
            return run(model.clone())

    return Fake(name=name, function="unused:unused")


def test_a_tool_that_dies_costs_its_stage_and_not_the_run(backbone, monkeypatch):
    def die(model):
        raise ForeignToolError("dying", "died of signal SIGSEGV")

    outcome = run_only(with_stages(monkeypatch, tool_stage("dying", die)), backbone)
    assert outcome.state.model is backbone
    assert "died of signal SIGSEGV" in outcome.report.notes[0]


def test_a_tool_that_folds_quantized_weights_is_rolled_back(make_model, monkeypatch):
    model = make_model(
        "g (float[1,4] x) => (float[1,4] y) { f = DequantizeLinear(q, s)  y = MatMul(x, f) }",
        {"q": np.arange(16, dtype=np.int8).reshape(4, 4), "s": np.array(0.1, np.float32)},
    )

    def fold(copy):
        node = copy.graph[0]
        weight = np.arange(16, dtype=np.float32).reshape(4, 4) * np.float32(0.1)
        value = ir.Value(name="folded", const_value=ir.tensor(weight, name="folded"))
        value.shape, value.type = ir.Shape([4, 4]), ir.TensorType(ir.DataType.FLOAT)
        copy.graph.register_initializer(value)
        node.outputs[0].replace_all_uses_with(value)
        copy.graph.remove(node, safe=True)
        return copy

    outcome = run_only(with_stages(monkeypatch, tool_stage("folding", fold)), model)
    assert outcome.state.model is model
    assert "changed QuantizeLinear or DequantizeLinear" in outcome.report.notes[0]


def test_a_tool_that_makes_nothing_smaller_is_not_heeded(backbone, monkeypatch):
    def rename(copy):
        for node in copy.graph:
            node.name = f"{node.name}_renamed"
        return copy

    outcome = run_only(with_stages(monkeypatch, tool_stage("renaming", rename)), backbone)
    assert outcome.state.model is backbone
    assert outcome.report.notes == ()


def test_a_tool_that_fixes_the_batch_size_is_found_out(make_model, monkeypatch):
    model = make_model("g (float[N,4] x) => (float[N,4] y) { r = Relu(x)  s = Shape(r)  y = Reshape(r, s) }", {})

    def fix(copy):
        shape = next(node for node in copy.graph if node.op_type == "Shape")
        value = ir.Value(name="fixed", const_value=ir.tensor(np.array([1, 4], np.int64), name="fixed"))
        value.shape, value.type = ir.Shape([2]), ir.TensorType(ir.DataType.INT64)
        copy.graph.register_initializer(value)
        shape.outputs[0].replace_all_uses_with(value)
        copy.graph.remove(shape, safe=True)
        return copy

    outcome = run_only(with_stages(monkeypatch, tool_stage("fixing", fix)), model)
    assert outcome.state.model is model
    assert "rolled back" in outcome.report.notes[0]


def test_a_model_that_can_not_be_run_gets_our_own_stages_only_and_a_note(make_model):
    model = make_model(
        """g (float[1,4] x) => (float[1,4] y) <float[1,4] b> {
            a = Mul(x, one)  b = com.microsoft.NoSuchOperator(a)  c = Mul(b, one)  y = Relu(c)
        }""",
        {"one": np.ones(1, np.float32)},
    )
    outcome = run_pass(SimplifyPass(SimplifyConfig()), ModelState(model=model), PassContext())
    assert "onnxsim" in {skip.where.split("'")[1] for skip in outcome.report.skips}
    assert any("Outputs were not compared after each stage" in note for note in outcome.report.notes)


# --- the real tools -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["onnxsim", "onnxscript"])
def test_a_foreign_tool_simplifies_and_keeps_names_paths_and_ir_version(backbone, simplified, tool):
    outcome = simplified(backbone, tool, batch=2)
    model = outcome.state.model
    assert outcome.report.notes == ()
    assert outcome.report.figures["nodes_after"] < outcome.report.figures["nodes_before"]
    assert "backbone.conv" in {module_path(node) for node in model.graph}
    assert model.ir_version <= 13
    assert dict(model.metadata_props) == dict(backbone.metadata_props)


def test_all_stages_together_reach_a_graph_that_a_second_run_leaves_alone(backbone, run_verified):
    pass_ = SimplifyPass(SimplifyConfig())
    first = run_verified(pass_, backbone)
    second = run_verified(pass_, first.state.model)
    assert second.state.model is first.state.model


def test_weights_that_no_stage_touches_are_shared_and_not_copied(backbone, simplified):
    after = simplified(backbone).state.model
    assert after.graph.initializers["fw"].const_value is backbone.graph.initializers["fw"].const_value


def test_a_folded_weight_does_not_reach_back_to_the_callers_model(backbone, simplified):
    before = constant_array(backbone.graph.initializers["w"]).copy()
    after = simplified(backbone).state.model
    assert not np.array_equal(constant_array(after.graph.initializers["w"]), before)
    np.testing.assert_array_equal(constant_array(backbone.graph.initializers["w"]), before)
