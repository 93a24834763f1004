"""The pass `sparsify`: what becomes zero, what doesn't, and what it says."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from onnxprune.contracts import Iteration, ModelState, PassContext
from onnxprune.errors import PassError, UsageError
from onnxprune.graph.io import load_model, save_model
from onnxprune.graph.weights import constant_array
from onnxprune.passes.harness import plan_from_json, plan_to_json, run_pass
from onnxprune.passes.sparsify import ScopeRule, SparsifyConfig, SparsifyPass
from onnxprune.passes.sparsify import apply as apply_module

PATTERNS = ["unstructured", "2:4", "1:3", "4x1", "1x4", "2x3", "unit"]

TWO_CONVS = """g (float[1,6,8,8] x) => (float[1,5,8,8] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r = Relu(a)
    y = Conv(r, w2)
}"""


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


@pytest.fixture
def two_convs(make_model):
    weights = {"w1": normal(8, 6, 3, 3), "b1": normal(8) * 1e-3, "w2": normal(5, 8, 1, 1)}
    return make_model(TWO_CONVS, weights, modules={"a": "backbone.conv", "y": "head.conv"})


def sparsify(**config):
    return SparsifyPass(SparsifyConfig(**config))


def weights_of(outcome):
    return {name: constant_array(value) for name, value in outcome.state.model.graph.initializers.items()}


def zeros(array):
    return int(np.count_nonzero(array == 0))


# --- which weights, and how many ------------------------------------------------------------------------------


def test_exactly_the_smallest_magnitudes_of_all_tensors_become_zero(two_convs, run_verified):
    after = weights_of(run_verified(sparsify(sparsity=0.35), two_convs))
    before = weights_of_model(two_convs)
    together = np.concatenate([np.abs(before[name]).ravel() for name in ("w1", "w2")])
    wanted = round(0.35 * together.size)
    assert zeros(after["w1"]) + zeros(after["w2"]) == wanted
    limit = np.sort(together)[wanted - 1]
    for name in ("w1", "w2"):
        np.testing.assert_array_equal(after[name], np.where(np.abs(before[name]) <= limit, 0, before[name]))


def test_iterations_of_a_block_come_to_the_sparsity_along_the_schedule(two_convs, run_verified):
    original = ModelState(model=two_convs)
    model, reached = two_convs, []
    for number in (1, 2, 3):
        iteration = Iteration(number=number, times=3, original=original, schedule="geometric")
        outcome = run_verified(sparsify(sparsity=0.488), model, context=PassContext(iteration=iteration))
        model = outcome.state.model
        after = weights_of(outcome)
        reached.append(zeros(after["w1"]) + zeros(after["w2"]))
    units = 8 * 6 * 9 + 5 * 8
    # 0.8 of what is left stays each time, and 0.8 ** 3 = 0.512 in the end.
    assert reached == [round(0.2 * units), round(0.36 * units), round(0.488 * units)]


def weights_of_model(model):
    return {name: constant_array(value) for name, value in model.graph.initializers.items()}


def test_scope_layer_reaches_the_level_in_each_tensor(two_convs, run_verified):
    after = weights_of(run_verified(sparsify(sparsity=0.3, scope="layer"), two_convs))
    assert zeros(after["w1"]) == round(0.3 * after["w1"].size)
    assert zeros(after["w2"]) == round(0.3 * after["w2"].size)


def test_biases_stay_although_they_are_the_smallest(two_convs, run_verified):
    after = weights_of(run_verified(sparsify(sparsity=0.9), two_convs))
    np.testing.assert_array_equal(after["b1"], weights_of_model(two_convs)["b1"])


def test_zeros_that_are_there_already_count(make_model, run_verified):
    weight = normal(4, 6, 1, 1)
    weight.ravel()[:6] = 0
    model = make_model("g (float[1,6,4,4] x) => (float[1,4,4,4] y) { y = Conv(x, w) }", {"w": weight})
    outcome = run_verified(sparsify(sparsity=0.5), model)
    assert zeros(weights_of(outcome)["w"]) == 12
    assert outcome.plan.tensors[0].zero_before == 6


def test_equal_magnitudes_go_in_index_order_first_tensor_first(make_model, run_verified):
    model = make_model(
        TWO_CONVS, {"w1": np.ones((8, 6, 3, 3), np.float32), "b1": normal(8), "w2": -np.ones((5, 8, 1, 1), np.float32)}
    )
    after = weights_of(run_verified(sparsify(sparsity=0.5), model))
    wanted = round(0.5 * (432 + 40))
    np.testing.assert_array_equal(after["w1"].ravel() == 0, np.arange(432) < wanted)
    assert zeros(after["w2"]) == 0


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_second_run_changes_nothing(two_convs, run_verified, pattern):
    pass_ = sparsify(sparsity=0.4, pattern=pattern, scope="layer")
    first = run_verified(pass_, two_convs)
    assert first.state.model is not two_convs
    second = run_verified(pass_, first.state.model)
    assert second.state.model is first.state.model
    assert {change.what for change in second.report.changes} == {"was sparse enough"}


@pytest.mark.parametrize(
    ("name", "dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16), ("double", np.float64)]
)
def test_other_float_types_keep_their_type_and_the_bits_of_what_stays(make_model, name, dtype):
    weight = normal(4, 6, dtype=dtype)
    model = make_model(f"g ({name}[2,4] x) => ({name}[2,6] y) {{ y = MatMul(x, w) }}", {"w": weight})
    after = weights_of(run_pass(sparsify(sparsity=0.5), ModelState(model=model), PassContext()))["w"]
    assert after.dtype == weight.dtype
    order = np.argsort(np.abs(weight.astype(np.float64)).ravel(), kind="stable")
    expected = weight.ravel().copy()
    expected[order[:12]] = 0
    np.testing.assert_array_equal(after.ravel(), expected)


def test_weights_that_are_cast_to_another_type_are_found_behind_the_cast(make_model, run_verified):
    # Large, so that the canonical form does not fold the Cast.
    model = make_model(
        "g (float[1,800] x) => (float[1,800] y) { c = Cast<to=1>(w)  y = MatMul(x, c) }",
        {"w": normal(800, 800, dtype=np.float16)},
    )
    outcome = run_verified(sparsify(sparsity=0.5), model)
    assert zeros(weights_of(outcome)["w"]) >= 320_000  # some were zero before


# --- patterns -------------------------------------------------------------------------------------------------


def test_n_m_leaves_at_most_n_non_zeros_in_m_consecutive_inputs(make_model, run_verified):
    model = make_model(
        "g (float[1,10,4,4] x) => (float[1,3,4,4] y) { y = Conv<pads=[1,1,1,1]>(x, w) }", {"w": normal(3, 10, 3, 3)}
    )
    outcome = run_verified(sparsify(pattern="2:4"), model)
    after = weights_of(outcome)["w"]
    for start, stop, zeroed in ((0, 4, 2), (4, 8, 2), (8, 10, 0)):
        group = after[:, start:stop]
        np.testing.assert_array_equal((group == 0).sum(axis=1), np.full((3, 3, 3), zeroed))
    assert any("is not reached" in note for note in outcome.report.notes)


def test_n_m_keeps_the_largest_of_each_group(make_model, run_verified):
    weight = np.array([[4, 1, 3, 2, -5, 8, 7, 6]], np.float32).T  # (K, N) = (8, 1): inputs run along axis 0
    model = make_model("g (float[1,8] x) => (float[1,1] y) { y = MatMul(x, w) }", {"w": weight})
    after = weights_of(run_verified(sparsify(pattern="2:4"), model))["w"]
    assert after.ravel().tolist() == [4, 0, 3, 0, 0, 8, 7, 0]


def test_blocks_vanish_as_a_whole_and_those_at_the_edge_are_smaller(make_model, run_verified):
    weight = np.ones((5, 4), np.float32)  # Gemm with transB: (outputs, inputs)
    weight[2:4, 2:4] = 0.1
    weight[4, 0:2] = 0.2
    model = make_model("g (float[1,4] x) => (float[1,5] y) { y = Gemm<transB=1>(x, w) }", {"w": weight})
    outcome = run_verified(sparsify(pattern="2x2", sparsity=2 / 6), model)
    expected = weight.copy()
    expected[2:4, 2:4] = 0
    expected[4, 0:2] = 0
    np.testing.assert_array_equal(weights_of(outcome)["w"], expected)
    assert (outcome.plan.tensors[0].units, outcome.plan.tensors[0].zeroed) == (6, 2)


def test_unit_zeroes_the_filters_of_smallest_norm(make_model, run_verified):
    weight = normal(6, 4, 3, 3) * np.array([5, 1, 4, 2, 6, 3], np.float32)[:, None, None, None]
    model = make_model("g (float[1,4,5,5] x) => (float[1,6,3,3] y) { y = Conv(x, w) }", {"w": weight})
    after = weights_of(run_verified(sparsify(pattern="unit", sparsity=0.5), model))["w"]
    norms = np.sqrt((weight.astype(np.float64) ** 2).sum(axis=(1, 2, 3)))
    smallest = set(np.argsort(norms)[:3].tolist())
    assert {i for i in range(6) if not after[i].any()} == smallest


def test_unit_follows_the_output_axis_of_conv_transpose(make_model, run_verified):
    weight = normal(3, 4, 2, 2)  # (in, out, kH, kW)
    weight[:, 1] *= 0.01
    model = make_model("g (float[1,3,4,4] x) => (float[1,4,5,5] y) { y = ConvTranspose(x, w) }", {"w": weight})
    after = weights_of(run_verified(sparsify(pattern="unit", sparsity=0.25), model))["w"]
    assert [bool(after[:, i].any()) for i in range(4)] == [True, False, True, True]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pattern=st.sampled_from(PATTERNS),
    scope=st.sampled_from(["global", "layer"]),
    levels=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    seed=st.integers(0, 5),
)
def test_levels_nest_and_are_exact_for_every_pattern(make_model, pattern, scope, levels, seed):
    model = make_model(
        TWO_CONVS,
        {"w1": normal(8, 6, 3, 3, seed=seed).round(1), "b1": normal(8), "w2": normal(5, 8, 1, 1, seed=seed).round(1)},
    )
    largest = {"2:4": 0.5, "1:3": 2 / 3}.get(pattern, 1.0)
    masks = []
    for level in sorted(levels):
        pass_ = sparsify(sparsity=level * largest, pattern=pattern, scope=scope)
        outcome = run_pass(pass_, ModelState(model=model), PassContext())
        after = weights_of(outcome)
        masks.append(np.concatenate([(after[name] == 0).ravel() for name in ("w1", "w2")]))
        for group in [outcome.plan.tensors] if scope == "global" else [[t] for t in outcome.plan.tensors]:
            units, zeroed = sum(t.units for t in group), sum(t.zeroed for t in group)
            wanted = round(level * largest * units)
            # n:m may not have enough to choose from where groups are incomplete.
            assert zeroed == wanted or (":" in pattern and zeroed < wanted)
    assert not (masks[0] & ~masks[1]).any()


# --- scopes ---------------------------------------------------------------------------------------------------


def test_backbone_and_head_get_different_ratios(two_convs, run_verified):
    rules = (ScopeRule(module="backbone", sparsity=0.5), ScopeRule(module="head", sparsity=0.25))
    outcome = run_verified(sparsify(rules=rules), two_convs)
    after = weights_of(outcome)
    assert zeros(after["w1"]) == round(0.5 * 432)
    assert zeros(after["w2"]) == round(0.25 * 40)
    assert [tensor.group for tensor in outcome.plan.tensors] == ["rules[0]", "rules[1]"]


def test_with_rules_and_no_sparsity_the_rest_stays(two_convs, run_verified):
    outcome = run_verified(sparsify(rules=(ScopeRule(name="w2", sparsity=0.5),)), two_convs)
    after = weights_of(outcome)
    assert (zeros(after["w1"]), zeros(after["w2"])) == (0, 20)
    assert outcome.plan.skipped == {"w1": "its sparsity is 0 (default)"}


def test_the_first_rule_that_matches_counts(two_convs, run_verified):
    rules = (ScopeRule(module="head*", op_type="Conv", sparsity=0.1), ScopeRule(op_type="Conv", sparsity=0.6))
    outcome = run_verified(sparsify(rules=rules), two_convs)
    assert [tensor.sparsity for tensor in outcome.plan.tensors] == [0.6, 0.1]


def test_skipped_weights_stay_and_the_report_says_why(two_convs, run_verified):
    outcome = run_verified(sparsify(sparsity=0.5, skip=("head",)), two_convs)
    assert zeros(weights_of(outcome)["w2"]) == 0
    assert [(skip.where, skip.reason) for skip in outcome.report.skips] == [("w2", "excluded by skip 'head'")]


def test_a_rule_that_matches_nothing_is_an_error_that_lists_what_there_is(two_convs):
    rules = (ScopeRule(module="hedd", sparsity=0.5),)
    with pytest.raises(UsageError, match=r"hedd.*matches no weight.*'w1', 'w2'.*'backbone', 'head'"):
        run_pass(sparsify(rules=rules), ModelState(model=two_convs), PassContext())


def test_a_skip_pattern_that_means_nothing_is_an_error_with_the_nearest_module(two_convs):
    message = r"'hedd' in `skip` of pass 'sparsify' matches no node, weight or module .* Did you mean 'head'\?"
    with pytest.raises(UsageError, match=message):
        run_pass(sparsify(skip=("hedd",)), ModelState(model=two_convs), PassContext())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sparsity": 1.5}, "less than or equal to 1"),
        ({"pattern": "2:4", "sparsity": 0.6}, "above 0.5, all that pattern '2:4' can zero"),
        ({"pattern": "4:2"}, "must keep at least one and fewer than all"),
        ({"pattern": "1x1"}, "must hold at least two weights"),
        ({"pattern": "blocks"}, "unknown pattern 'blocks'"),
        ({"sparsty": 0.5}, "Extra inputs are not permitted"),
        ({"rules": ({"sparsity": 0.5},)}, "at least one of 'name', 'op_type' and 'module'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_configuration_that_makes_no_sense_is_refused(config, message):
    with pytest.raises(ValidationError, match=message):
        SparsifyConfig.model_validate(config)


# --- where it must not act ------------------------------------------------------------------------------------


def test_a_weight_that_something_else_reads_as_well_stays(make_model):
    model = make_model(
        "g (float[1,4] x) => (float[1,4] y, float[4,4] z) { y = MatMul(x, w)  z = Mul(w, x) }", {"w": normal(4, 4)}
    )
    share_one_weight(model)
    assert SparsifyPass(SparsifyConfig()).plan(ModelState(model=model), PassContext()).skipped == {
        "w": "'z' (Mul) reads it as well, and not as a weight"
    }


def test_a_weight_that_two_layers_share_takes_the_lower_of_their_levels_once(make_model):
    model = make_model(
        "g (float[1,4] x) => (float[1,4] y) { a = MatMul(x, w)  r = Relu(a)  y = MatMul(r, w) }",
        {"w": normal(4, 4)},
        modules={"a": "first", "y": "second"},
    )
    share_one_weight(model)
    rules = (ScopeRule(module="first", sparsity=0.75), ScopeRule(module="second", sparsity=0.25))
    plan = sparsify(rules=rules).plan(ModelState(model=model), PassContext())
    assert [(tensor.tensor, tensor.sparsity, tensor.zeroed) for tensor in plan.tensors] == [("w", 0.25, 4)]


def share_one_weight(model):
    """Undo what the canonical form does: let all that read a copy of 'w' read 'w' itself."""
    weight = model.graph.initializers["w"]
    for name, value in list(model.graph.initializers.items()):
        if name != "w":
            value.replace_all_uses_with(weight)
            del model.graph.initializers[name]


def test_weights_inside_an_if_body_are_sparsified_too(make_model, run_verified):
    model = make_model(
        """g (float[1,4] x, bool c) => (float[1,4] y) {
            y = If(c) <
                then_branch = t () => (float[1,4] a) { a = MatMul(x, w1) },
                else_branch = e () => (float[1,4] b) { b = MatMul(x, w2) }
            >
        }""",
        {"w1": normal(4, 4, seed=1), "w2": normal(4, 4, seed=2)},
    )
    outcome = run_verified(sparsify(sparsity=0.5, scope="layer"), model)
    assert [tensor.zeroed for tensor in outcome.plan.tensors] == [8, 8]


def test_integer_weights_are_left_with_a_reason(make_model, run_verified):
    model = make_model(
        """g (float[1,4] x) => (float[1,4] y) {
            f = DequantizeLinear(q, s)
            y = MatMul(x, f)
        }""",
        {"q": np.arange(16, dtype=np.int8).reshape(4, 4), "s": np.array(0.1, np.float32)},
    )
    outcome = run_verified(sparsify(sparsity=0.5), model)
    assert outcome.state.model is model
    assert outcome.report.summary == "no weight is within reach"


def test_a_weight_that_makes_an_output_directly_is_sparsified_and_the_output_keeps_its_name(make_model, run_verified):
    model = make_model("g (float[1,4] x) => (float[1,3] y) { y = MatMul(x, w) }", {"w": normal(4, 3)})
    outcome = run_verified(sparsify(sparsity=0.5), model)
    assert [value.name for value in outcome.state.model.graph.outputs] == ["y"]
    assert zeros(weights_of(outcome)["w"]) == 6


def test_nan_in_a_weight_is_refused_with_the_name_and_the_way_out(make_model):
    weight = normal(4, 4)
    weight[1, 1] = np.nan
    model = make_model("g (float[1,4] x) => (float[1,4] y) { y = MatMul(x, w) }", {"w": weight})
    with pytest.raises(PassError, match=r"'y' \(MatMul, weight 'w' 4x4\).*NaN.*skip = \['w'\]"):
        run_pass(sparsify(), ModelState(model=model), PassContext())


# --- plan, report, large models -------------------------------------------------------------------------------


def test_the_plan_survives_json_and_repeats_the_run_exactly(two_convs):
    pass_ = sparsify(sparsity=0.37)
    first = run_pass(pass_, ModelState(model=two_convs), PassContext())
    plan = plan_from_json(pass_, json.loads(json.dumps(plan_to_json(pass_, first.plan))))
    assert plan == first.plan
    # Another configuration on purpose: a plan that is given decides.
    again = run_pass(sparsify(sparsity=0.9), ModelState(model=two_convs), PassContext(), plan=plan)
    for name, array in weights_of(first).items():
        np.testing.assert_array_equal(weights_of(again)[name], array)


def test_a_plan_for_another_model_is_refused(two_convs, make_model):
    pass_ = sparsify()
    plan = run_pass(pass_, ModelState(model=two_convs), PassContext()).plan
    other = make_model("g (float[1,4] x) => (float[1,4] y) { y = MatMul(x, w) }", {"w": normal(4, 4)})
    with pytest.raises(UsageError, match="names the weight 'w1', which this model does not have"):
        run_pass(pass_, ModelState(model=other), PassContext(), plan=plan)


def test_the_report_counts_and_says_that_zeros_alone_save_nothing(two_convs, run_verified):
    report = run_verified(sparsify(sparsity=0.5), two_convs).report
    assert report.summary == "236 of 472 weights in 2 tensors are zero (50.0%); 2 tensors changed"
    assert report.figures["weights_zeroed"] == 236
    assert report.figures["dense_bytes"] == 472 * 4
    assert report.figures["coo_bytes"] == 236 * 12
    assert report.figures["bitmap_bytes"] == 236 * 4 + 472 // 8
    assert "neither smaller nor faster on ONNX Runtime" in report.notes[0]
    assert "2,832 as coo" in report.notes[1]
    assert report.changes[0].where == "'a' (Conv, weight 'w1' 8x6x3x3)"


def test_a_tensor_of_which_nothing_is_left_is_pointed_out(make_model, run_verified):
    model = make_model(TWO_CONVS, {"w1": normal(8, 6, 3, 3), "b1": normal(8), "w2": normal(5, 8, 1, 1) * 1e-6})
    report = run_verified(sparsify(sparsity=0.5), model).report
    assert any(note.startswith("Nothing is left of 'w2'") for note in report.notes)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_weights_beyond_the_memory_limit_are_made_when_read_and_come_out_the_same(two_convs, monkeypatch, pattern):
    pass_ = sparsify(pattern=pattern)
    at_once = weights_of(run_pass(pass_, ModelState(model=two_convs), PassContext()))
    monkeypatch.setattr(apply_module, "MAX_COPIED_BYTES", 0)
    lazily = weights_of(run_pass(pass_, ModelState(model=two_convs), PassContext()))
    for name, array in at_once.items():
        np.testing.assert_array_equal(lazily[name], array)


def test_weights_that_are_made_when_read_are_written_window_by_window_as_they_are(two_convs, monkeypatch, tmp_path):
    at_once = weights_of(run_pass(sparsify(), ModelState(model=two_convs), PassContext()))
    monkeypatch.setattr(apply_module, "MAX_COPIED_BYTES", 0)
    lazily = run_pass(sparsify(), ModelState(model=two_convs), PassContext())
    save_model(lazily.state.model, tmp_path / "sparse.onnx", external_data=True)
    assert (tmp_path / "sparse.onnx.data").stat().st_size > 0
    written = load_model(tmp_path / "sparse.onnx")
    for name, array in at_once.items():
        np.testing.assert_array_equal(constant_array(written.graph.initializers[name]), array)
