"""The pass as a whole: what it removes, what it leaves, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from onnxprune.contracts import CanonicalModel, ModelState, PassContext, PassOutcome
from onnxprune.errors import ModelError, PassError, PreconditionError, UsageError
from onnxprune.graph.metadata import MODULE_PATH_KEY
from onnxprune.ops.channels.flow import CHANNELS, Flow
from onnxprune.ops.macs import count_macs_per_sample
from onnxprune.passes.harness import plan_from_json, plan_to_json, run_pass
from onnxprune.passes.prune import PruneConfig, PrunedGroup, PrunePass, PruningPlan, ScopeRatio
from tests.builders import canonical, conv_net, proto_of
from tests.patterns import network

RunVerified = Callable[..., PassOutcome]
RNG = np.random.default_rng(0)


def weight(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def conv(data: str, filters: str, out: str) -> onnx.NodeProto:
    return helper.make_node("Conv", [data, filters], [out], name=f"{out}_conv")


def prune(**settings: Any) -> PrunePass:
    return PrunePass(PruneConfig(**settings))


def widths(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights with more than one axis."""
    return {
        name: tuple(value.shape.numpy())
        for name, value in model.graph.initializers.items()
        if value.shape is not None and len(value.shape) > 1
    }


def chain(*channels: int) -> CanonicalModel:
    """x (N,3,8,8) -> 1x1 convolutions of these widths -> y; weights w0, w1 ..., layers h0_conv, h1_conv ..."""
    nodes, weights, source, incoming = [], {}, "x", 3
    for index, width in enumerate(channels):
        weights[f"w{index}"] = weight(width, incoming, 1, 1)
        nodes.append(conv(source, f"w{index}", f"h{index}"))
        source, incoming = f"h{index}", width
    last = source
    return canonical(proto_of(nodes, inputs={"x": ["N", 3, 8, 8]}, outputs={last: None}, weights=weights))


# --- it acts --------------------------------------------------------------------------------------------------


def test_half_of_the_filters_go_and_the_next_layer_loses_the_same_inputs(run_verified: RunVerified) -> None:
    model = chain(32, 24, 10)
    outcome = run_verified(prune(ratio=0.5), model)
    assert widths(outcome.state.model) == {"w0": (16, 3, 1, 1), "w1": (12, 16, 1, 1), "w2": (10, 12, 1, 1)}


def test_the_weakest_filters_go_and_the_others_keep_their_weights(run_verified: RunVerified) -> None:
    model = chain(16, 8)
    filters = np.array(model.graph.initializers["w0"].const_value.numpy())  # type: ignore[union-attr]
    readers = np.array(model.graph.initializers["w1"].const_value.numpy())  # type: ignore[union-attr]
    weak = [1, 5, 6, 13]
    filters[weak] *= 1e-3
    readers[:, weak] *= 1e-3
    weights = {"w0": filters, "w1": readers}
    nodes = [conv("x", "w0", "h"), conv("h", "w1", "y")]
    model = canonical(proto_of(nodes, inputs={"x": ["N", 3, 8, 8]}, outputs={"y": None}, weights=weights))
    pruned = run_verified(prune(ratio=0.25), model).state.model
    kept = [index for index in range(16) if index not in weak]
    found = pruned.graph.initializers["w0"].const_value
    assert found is not None
    np.testing.assert_array_equal(found.numpy(), filters[kept])


def test_residual_add_makes_both_branches_lose_the_same_filters(run_verified: RunVerified) -> None:
    outcome = run_verified(prune(ratio=0.5, verify_oracle=True), conv_net())
    shapes = widths(outcome.state.model)
    assert shapes["stem.weight"] == (8, 3, 3, 3)
    assert shapes["block.weight"] == (8, 8, 3, 3)
    assert shapes["head.weight"] == (10, 8)


def test_half_precision_weights_stay_half_precision(run_verified: RunVerified) -> None:
    outcome = run_verified(prune(ratio=0.5, verify_oracle=True), conv_net(dtype=np.float16))
    stem = outcome.state.model.graph.initializers["stem.weight"]
    assert (stem.dtype, tuple(stem.shape.numpy())) == (ir.DataType.FLOAT16, (8, 3, 3, 3))  # type: ignore[union-attr]


def test_a_weight_that_two_layers_share_is_cut_for_both(run_verified: RunVerified) -> None:
    nodes = [
        conv("x", "shared", "a"),
        helper.make_node("MaxPool", ["x"], ["small"], kernel_shape=[2, 2], strides=[2, 2]),
        conv("small", "shared", "b"),
        helper.make_node("GlobalAveragePool", ["a"], ["pa"]),
        helper.make_node("GlobalAveragePool", ["b"], ["pb"]),
        helper.make_node("Concat", ["pa", "pb"], ["both"], axis=1),
        conv("both", "last", "y"),
    ]
    weights = {"shared": weight(16, 3, 1, 1), "last": weight(4, 32, 1, 1)}
    proto = proto_of(nodes, inputs={"x": ["N", 3, 8, 8]}, outputs={"y": None}, weights=weights)
    outcome = run_verified(prune(ratio=0.5, verify_oracle=True), canonical(proto))
    assert {shape for name, shape in widths(outcome.state.model).items() if name != "last"} == {(8, 3, 1, 1)}
    assert widths(outcome.state.model)["last"] == (4, 16, 1, 1)


# --- it leaves alone ------------------------------------------------------------------------------------------


def test_filters_that_feed_a_graph_output_stay_and_the_report_says_why(run_verified: RunVerified) -> None:
    outcome = run_verified(prune(ratio=0.5), chain(32, 10))
    assert widths(outcome.state.model)["w1"] == (10, 16, 1, 1)
    (skip,) = outcome.report.skips
    assert (skip.where, skip.reason) == ("h1_conv", "frozen: reaches the model's output 'h1'")
    assert skip.figures["channels"] == 10


def test_an_inner_value_that_is_also_an_output_keeps_its_channels(run_verified: RunVerified) -> None:
    nodes = [conv("x", "a", "h"), conv("h", "b", "y")]
    weights = {"a": weight(16, 3, 1, 1), "b": weight(8, 16, 1, 1)}
    proto = proto_of(nodes, inputs={"x": ["N", 3, 8, 8]}, outputs={"h": None, "y": None}, weights=weights)
    model = canonical(proto)
    assert run_verified(prune(ratio=0.5), model).state.model is model


def test_what_the_body_of_an_if_reads_stays(run_verified: RunVerified) -> None:
    def body(name: str, op_type: str) -> onnx.GraphProto:
        node = helper.make_node(op_type, ["h"], [name], name=f"{name}_node")
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])

    nodes = [
        conv("x", "a", "g"),
        conv("g", "b", "h"),
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Cast", ["total"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["i"], name="if", then_branch=body("t", "Relu"), else_branch=body("e", "Tanh")),
        conv("i", "last", "y"),
    ]
    weights = {"a": weight(16, 3, 1, 1), "b": weight(16, 16, 1, 1), "last": weight(8, 16, 1, 1)}
    proto = proto_of(nodes, inputs={"x": ["N", 3, 8, 8]}, outputs={"y": None}, weights=weights)
    outcome = run_verified(prune(ratio=0.5, verify_oracle=True), canonical(proto))
    assert widths(outcome.state.model) == {"a": (8, 3, 1, 1), "b": (16, 8, 1, 1), "last": (8, 16, 1, 1)}


def test_a_ratio_of_zero_changes_nothing(run_verified: RunVerified) -> None:
    model = chain(32, 10)
    outcome = run_verified(prune(ratio=0.0), model)
    assert outcome.state.model is model
    assert outcome.report.summary == "no channel was removed"
    assert outcome.report.changes == ()


def test_a_second_run_with_a_reached_minimum_changes_nothing(run_verified: RunVerified) -> None:
    pass_ = prune(ratio=0.9, min_channels=12)
    once = run_verified(pass_, chain(32, 24, 10)).state.model
    assert widths(once)["w1"] == (12, 12, 1, 1)
    assert run_verified(pass_, once).state.model is once


def test_layers_that_skip_names_keep_their_channels(run_verified: RunVerified) -> None:
    outcome = run_verified(prune(ratio=0.5, skip=("h1_*",)), chain(32, 24, 10))
    assert widths(outcome.state.model) == {"w0": (16, 3, 1, 1), "w1": (24, 16, 1, 1), "w2": (10, 24, 1, 1)}
    assert ("h1_conv", "skip = 'h1_*'") in [(skip.where, skip.reason) for skip in outcome.report.skips]


def test_a_residual_stream_stays_when_one_of_its_layers_is_skipped(run_verified: RunVerified) -> None:
    model = conv_net()
    assert run_verified(prune(ratio=0.5, skip=("block/*",)), model).state.model is model


@pytest.mark.parametrize("glob", ["head", "w1"], ids=["module around it", "weight"])
def test_a_layer_is_skipped_by_a_module_around_it_and_by_its_weight(glob: str, run_verified: RunVerified) -> None:
    model = chain(32, 24, 10)
    for node in model.graph:
        node.metadata_props[MODULE_PATH_KEY] = "head.conv" if node.name == "h1_conv" else "backbone.conv"
    outcome = run_verified(prune(ratio=0.5, skip=(glob,)), model)
    assert widths(outcome.state.model) == {"w0": (16, 3, 1, 1), "w1": (24, 16, 1, 1), "w2": (10, 24, 1, 1)}


@pytest.mark.parametrize(
    ("config", "field"),
    [({"skip": ("h7_*",)}, "skip"), ({"scopes": (ScopeRatio(match="h7_*", ratio=0.1),)}, "scopes")],
    ids=["skip", "scopes"],
)
def test_a_glob_that_means_nothing_in_the_model_is_an_error(config: dict[str, Any], field: str) -> None:
    with pytest.raises(UsageError, match=rf"'h7_\*' in `{field}` of pass 'prune' matches no node, weight or module"):
        run_pass(prune(ratio=0.5, **config), ModelState(model=chain(32, 10)), PassContext())


# --- targets and limits ---------------------------------------------------------------------------------------


def test_every_layer_keeps_the_larger_of_eight_and_an_eighth_by_default(run_verified: RunVerified) -> None:
    outcome = run_verified(prune(ratio=0.95), chain(128, 24, 6, 10))
    assert widths(outcome.state.model) == {
        "w0": (16, 3, 1, 1),
        "w1": (8, 16, 1, 1),
        "w2": (6, 8, 1, 1),
        "w3": (10, 6, 1, 1),
    }


def test_widths_stay_multiples_of_what_is_asked_rounded_up(run_verified: RunVerified) -> None:
    outcome = run_verified(prune(ratio=0.5, channel_multiple=8), chain(40, 24, 10))
    assert widths(outcome.state.model) == {"w0": (24, 3, 1, 1), "w1": (16, 24, 1, 1), "w2": (10, 16, 1, 1)}


@pytest.mark.parametrize("ranking", ["per-layer", "global"])
@pytest.mark.parametrize("target", ["macs_ratio", "params_ratio"])
def test_a_budget_is_reached_with_hardly_more_than_is_asked(
    run_verified: RunVerified, target: str, ranking: str
) -> None:
    outcome = run_verified(prune(ranking=ranking, **{target: 0.4}), chain(64, 64, 64, 10))
    name = "macs" if target == "macs_ratio" else "parameters"
    removed = 1 - outcome.report.figures[f"{name}_after"] / outcome.report.figures[f"{name}_before"]
    # One channel of a layer of 64 is 1.6 % of it; all three layers together cross the line by at most that.
    assert 0.4 <= removed < 0.4 + 0.03


def test_figures_equal_those_counted_on_the_result(run_verified: RunVerified) -> None:
    model = network(["grouped", "concat_then_add", "depthwise", "flatten_gemm", "einsum", "channel_shuffle"])
    outcome = run_verified(prune(ratio=0.4), model)
    pruned = outcome.state.model
    assert outcome.report.figures["macs_after"] == count_macs_per_sample(pruned).total
    floats = [
        value.const_value.size
        for value in pruned.graph.initializers.values()
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None
    ]
    assert outcome.report.figures["parameters_after"] == sum(floats)


def test_a_budget_out_of_reach_is_said(run_verified: RunVerified) -> None:
    outcome = run_verified(prune(params_ratio=0.99), chain(16, 10))
    assert outcome.report.notes[0].startswith("The target params_ratio = 0.99 can't be reached")
    assert widths(outcome.state.model)["w0"] == (8, 3, 1, 1)


def test_a_scope_gets_its_own_ratio(run_verified: RunVerified) -> None:
    scopes = (ScopeRatio(match="h0_*", ratio=0.75), ScopeRatio(match="h1_*", ratio=0.0))
    outcome = run_verified(prune(ratio=0.5, scopes=scopes), chain(32, 24, 16, 10))
    assert {name: shape[0] for name, shape in widths(outcome.state.model).items()} == {
        "w0": 8,
        "w1": 24,
        "w2": 8,
        "w3": 10,
    }


def test_global_ranking_takes_more_from_the_layer_that_has_weaker_channels(run_verified: RunVerified) -> None:
    filters, readers = weight(32, 3, 1, 1), weight(32, 32, 1, 1)
    filters[:16] *= 1e-3
    readers[:, :16] *= 1e-3
    weights = {"a": filters, "b": readers, "c": weight(10, 32, 1, 1)}
    nodes = [conv("x", "a", "g"), conv("g", "b", "h"), conv("h", "c", "y")]
    model = canonical(proto_of(nodes, inputs={"x": ["N", 3, 8, 8]}, outputs={"y": None}, weights=weights))
    shapes = widths(run_verified(prune(ratio=0.25, ranking="global"), model).state.model)
    assert (shapes["a"][0], shapes["b"][0]) == (16, 32)


def test_steps_end_at_the_same_widths_as_one_step(run_verified: RunVerified) -> None:
    model = network(["residual", "conv_relu", "grouped"])
    in_steps = run_verified(prune(ratio=0.5, steps=4), model).state.model
    assert widths(in_steps) == widths(run_verified(prune(ratio=0.5), model).state.model)


def test_a_macs_target_is_refused_where_shapes_are_dynamic() -> None:
    nodes = [conv("x", "a", "h"), conv("h", "b", "y")]
    weights = {"a": weight(16, 3, 1, 1), "b": weight(8, 16, 1, 1)}
    model = canonical(proto_of(nodes, inputs={"x": ["N", 3, "H", "W"]}, outputs={"y": None}, weights=weights))
    with pytest.raises(PreconditionError, match="Fix the input with `--shape"):
        prune(macs_ratio=0.5).check(ModelState(model=model))


def test_dynamic_batch_and_space_don_t_keep_channels_from_going(run_verified: RunVerified) -> None:
    nodes = [conv("x", "a", "h"), helper.make_node("Relu", ["h"], ["r"]), conv("r", "b", "y")]
    weights = {"a": weight(16, 3, 1, 1), "b": weight(8, 16, 1, 1)}
    model = canonical(proto_of(nodes, inputs={"x": ["N", 3, "H", "W"]}, outputs={"y": None}, weights=weights))
    outcome = run_verified(prune(ratio=0.5, verify_oracle=True), model)
    assert widths(outcome.state.model)["a"] == (8, 3, 1, 1)
    assert "macs_after" not in outcome.report.figures


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    filters = weight(16, 3, 1, 1)
    filters[3] = np.nan
    nodes = [conv("x", "a", "h"), conv("h", "b", "y")]
    weights = {"a": filters, "b": weight(8, 16, 1, 1)}
    model = canonical(proto_of(nodes, inputs={"x": ["N", 3, 8, 8]}, outputs={"y": None}, weights=weights))
    with pytest.raises(ModelError, match="Cannot rank the channels of 'a'"):
        prune(ratio=0.5).plan(ModelState(model=model), PassContext())


# --- plan and report ------------------------------------------------------------------------------------------


def test_the_report_names_each_layer_with_its_widths(run_verified: RunVerified) -> None:
    report = run_verified(prune(ratio=0.5), chain(32, 10)).report
    assert [(change.what, change.where, dict(change.figures)) for change in report.changes] == [
        ("Conv narrowed", "h0_conv", {"channels_before": 32.0, "channels_after": 16.0})
    ]
    assert dict(report.figures) == {
        "channels_before": 42,
        "channels_after": 26,
        "channels_frozen": 10,
        "parameters_before": 32 * 3 + 320,
        "parameters_after": 16 * 3 + 160,
        "weight_bytes_before": 4 * (32 * 3 + 320),
        "weight_bytes_after": 4 * (16 * 3 + 160),
        "macs_before": 64 * (32 * 3 + 320),
        "macs_after": 64 * (16 * 3 + 160),
    }
    assert report.summary == "16 of 42 channels removed: parameters -50.0 %, MACs -50.0 %"


def test_parameters_that_bring_no_macs_are_said(run_verified: RunVerified) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"], name="early"),
        helper.make_node("GlobalAveragePool", ["h"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "b"], ["g"], name="wide", transB=1),
        helper.make_node("Gemm", ["g", "c"], ["y"], name="last", transB=1),
    ]
    weights = {"a": weight(16, 3, 3, 3), "b": weight(512, 16), "c": weight(10, 512)}
    model = canonical(proto_of(nodes, inputs={"x": ["N", 3, 64, 64]}, outputs={"y": None}, weights=weights))
    report = run_verified(prune(ratio=0.5, skip=("early",)), model).report
    assert report.notes[-1].startswith("Parameters fell by 48.4 %, but MACs only by 0.4 %")


def test_widths_that_fast_kernels_don_t_take_are_said(run_verified: RunVerified) -> None:
    (note,) = run_verified(prune(ratio=0.25, channel_multiple=1), chain(16, 32, 10)).report.notes
    assert note.startswith("The widths of 'h0_conv' are no longer multiples of 8")
    assert run_verified(prune(ratio=0.25), chain(16, 32, 10)).report.notes == ()
    assert run_verified(prune(ratio=0.25, channel_multiple=8), chain(16, 32, 10)).report.notes == ()


def test_the_oracle_s_difference_is_reported_when_asked_for(run_verified: RunVerified) -> None:
    report = run_verified(prune(ratio=0.5, verify_oracle=True), conv_net()).report
    # Rounding of single-precision sums.
    assert 0 <= report.figures["oracle_difference"] < 1e-5


def test_a_plan_survives_json_and_gives_the_same_model(run_verified: RunVerified) -> None:
    pass_, model = prune(ratio=0.3, criterion="random"), network(["residual", "split_sizes"])
    plan = pass_.plan(ModelState(model=model), PassContext(seed=3))
    again = plan_from_json(pass_, plan_to_json(pass_, plan))
    assert again == plan
    first = run_pass(pass_, ModelState(model=model), PassContext(seed=3))
    second = run_pass(pass_, ModelState(model=model), PassContext(seed=99), plan=again)
    assert ir.to_proto(first.state.model) == ir.to_proto(second.state.model)


def test_a_plan_for_another_model_is_refused() -> None:
    group = PrunedGroup(weight="w0", axis=0, num_channels=32, removed=(31,), layers=("h0_conv",))
    pass_ = prune(ratio=0.3)
    plan = pass_.plan(ModelState(model=chain(32, 10)), PassContext())
    other = PruningPlan(
        groups=(group,),
        reached=True,
        target="ratio",
        target_ratio=0.3,
        parameters_before=plan.parameters_before,
        parameters_after=plan.parameters_after,
        macs_before=None,
        macs_after=None,
    )
    with pytest.raises(PassError, match="The plan does not fit the model: weight 'w0' has no channels"):
        run_pass(pass_, ModelState(model=chain(16, 10)), PassContext(), plan=other)


def test_random_scores_follow_the_seed() -> None:
    pass_, state = prune(ratio=0.5, criterion="random"), ModelState(model=chain(32, 10))
    first, same, other = (pass_.plan(state, PassContext(seed=seed)) for seed in (1, 1, 2))
    assert first == same
    assert first.groups != other.groups


def test_only_the_group_that_breaks_the_model_is_put_back(
    monkeypatch: pytest.MonkeyPatch, run_verified: RunVerified
) -> None:
    def wrong(flow: Flow) -> None:
        """Passes the labels on, but binds the slope to none: Add then meets a bias of the old length."""
        flow.give(flow.labels(0))

    monkeypatch.setitem(CHANNELS._rows[("", "PRelu")], 1, wrong)
    monkeypatch.setattr("onnxprune.ops.channels.sweep._freeze_half_labelled_weights", lambda labelling: None)
    nodes = [
        conv("x", "a", "g"),
        helper.make_node("PRelu", ["g", "slope"], ["p"], name="prelu"),
        conv("p", "b", "h"),
        conv("h", "c", "y"),
    ]
    weights = {
        "a": weight(16, 3, 1, 1),
        "slope": weight(16, 1, 1),
        "b": weight(24, 16, 1, 1),
        "c": weight(8, 24, 1, 1),
    }
    model = canonical(proto_of(nodes, inputs={"x": ["N", 3, 8, 8]}, outputs={"y": None}, weights=weights))
    outcome = run_verified(prune(ratio=0.5), model)
    shapes = widths(outcome.state.model)
    assert (shapes["a"][0], shapes["b"][0]) == (16, 12)
    put_back = [skip for skip in outcome.report.skips if skip.reason.startswith("put back: ")]
    assert [skip.where for skip in put_back] == ["g_conv"]


def test_the_oracle_puts_back_what_runs_but_computes_something_else(
    monkeypatch: pytest.MonkeyPatch, run_verified: RunVerified
) -> None:
    def wrong(flow: Flow) -> None:
        """Takes a mean over channels for exact."""
        flow.give([axis if index != 1 else None for index, axis in enumerate(flow.labels(0))])

    monkeypatch.setitem(CHANNELS._rows[("", "ReduceMean")], 1, wrong)
    nodes = [
        conv("x", "a", "h"),
        helper.make_node("ReduceMean", ["h", "axes"], ["m"], name="mean"),
        conv("m", "b", "y"),
    ]
    weights = {"a": weight(16, 3, 1, 1), "b": weight(8, 1, 1, 1), "axes": np.array([1])}
    model = canonical(proto_of(nodes, inputs={"x": ["N", 3, 8, 8]}, outputs={"y": None}, weights=weights))
    assert run_verified(prune(ratio=0.5), model).state.model is not model
    outcome = run_verified(prune(ratio=0.5, verify_oracle=True), model)
    assert outcome.state.model is model
    assert outcome.report.skips[-1].reason.startswith("put back: outputs differ from the masked original by")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.5, "macs_ratio": 0.5}, "give one target, not ratio and macs_ratio"),
        ({"ratio": 1.0}, "less than 1"),
        ({"min_channels": 0}, "greater than or equal to 1"),
        ({"criterion": "l3"}, "Known: l1, l2"),
        ({"sparsity": 0.5}, "Extra inputs"),
    ],
)
def test_a_wrong_configuration_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneConfig(**settings)


def test_an_empty_tensor_beside_channels_is_no_obstacle(run_verified: RunVerified) -> None:
    nodes = [
        conv("x", "a", "h"),
        helper.make_node("Concat", ["h", "nothing"], ["c"], name="join", axis=1),
        conv("c", "b", "y"),
    ]
    weights = {"a": weight(16, 3, 1, 1), "b": weight(8, 16, 1, 1), "nothing": np.zeros((1, 0, 8, 8), np.float32)}
    model = canonical(proto_of(nodes, inputs={"x": [1, 3, 8, 8]}, outputs={"y": None}, weights=weights))
    pruned = run_verified(prune(ratio=0.5), model).state.model
    assert widths(pruned)["a"] == (8, 3, 1, 1)


def test_a_product_with_an_empty_weight_is_left_alone(run_verified: RunVerified) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="first"),
        helper.make_node("MatMul", ["h", "b"], ["y"], name="second"),
    ]
    weights = {"a": weight(3, 16), "b": weight(16, 0)}
    model = canonical(proto_of(nodes, inputs={"x": [1, 3]}, outputs={"y": None}, weights=weights))
    assert widths(run_verified(prune(ratio=0.5), model).state.model)["a"] == (3, 8)


def test_that_limits_keep_everything_is_said(run_verified: RunVerified) -> None:
    (note,) = run_verified(prune(ratio=0.5), chain(4, 4, 2)).report.notes
    assert note.startswith("Channels that may go were all kept")
