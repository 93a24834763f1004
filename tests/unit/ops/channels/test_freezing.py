"""What is frozen, and what the reason says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from onnxprune.ops.channels import ChannelPolicy
from onnxprune.passes.prune import analyze_channels
from tests.builders import canonical, proto_of

RNG = np.random.default_rng(0)


def weight(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def conv(data: str, filters: str, out: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node("Conv", [data, filters], [out], name=f"{out}_conv", **attributes)


def reasons(model: ir.Model, policy: ChannelPolicy | None = None) -> dict[str, str | None]:
    """Frozen reason by the id of each group."""
    return {group.id: group.frozen_reason for group in analyze_channels(model, policy).groups}


def model_of(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    *,
    inputs: dict[str, Any] | None = None,
    outputs: Sequence[str] = ("y",),
    **changes: Any,
) -> ir.Model:
    given = inputs or {"x": ["N", 3, 8, 8]}
    return canonical(proto_of(nodes, inputs=given, outputs=dict.fromkeys(outputs), weights=weights, **changes))


def test_filters_that_reach_an_output_are_frozen_and_those_before_them_are_not() -> None:
    model = model_of([conv("x", "a", "h"), conv("h", "b", "y")], {"a": weight(16, 3, 1, 1), "b": weight(8, 16, 1, 1)})
    assert reasons(model) == {"a[0]": None, "b[0]": "reaches the model's output 'y'"}


def test_a_residual_with_the_model_input_is_frozen() -> None:
    nodes = [conv("x", "a", "h"), helper.make_node("Add", ["h", "x"], ["s"], name="add"), conv("s", "b", "y")]
    model = model_of(nodes, {"a": weight(3, 3, 1, 1), "b": weight(8, 3, 1, 1)})
    assert reasons(model)["a[0]"] == "meets 'x', whose channels are fixed, in 'add' (Add)"


def test_unknown_operator_freezes_its_neighbours_instead_of_guessing() -> None:
    nodes = [
        conv("x", "a", "h"),
        helper.make_node("Mystery", ["h"], ["m"], name="what", domain="com.example"),
        conv("h", "b", "y"),
    ]
    proto = proto_of(
        nodes,
        inputs={"x": ["N", 3, 8, 8]},
        outputs={"y": None, "m": ["N", 16, 8, 8]},
        weights={"a": weight(16, 3, 1, 1), "b": weight(8, 16, 1, 1)},
    )
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    assert reasons(canonical(proto))["a[0]"] == "reaches 'what' (Mystery), an operator without a channel rule"


def test_channels_that_the_body_of_an_if_uses_are_frozen() -> None:
    def body(name: str, op_type: str) -> onnx.GraphProto:
        node = helper.make_node(op_type, ["h"], [name], name=f"{name}_node")
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])

    nodes = [
        conv("x", "a", "h"),
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Cast", ["total"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["i"], name="if", then_branch=body("t", "Relu"), else_branch=body("e", "Tanh")),
        conv("i", "b", "y"),
    ]
    model = model_of(nodes, {"a": weight(16, 3, 1, 1), "b": weight(8, 16, 1, 1)})
    assert reasons(model)["a[0]"] == "is used in the body of 'if' (If)"


def test_softmax_over_channels_freezes_them_where_exact_results_are_wanted() -> None:
    def with_axis(axis: int, policy: ChannelPolicy | None = None) -> str | None:
        nodes = [conv("x", "a", "h"), helper.make_node("Softmax", ["h"], ["s"], name="soft", axis=axis)]
        model = model_of([*nodes, conv("s", "b", "y")], {"a": weight(16, 3, 1, 1), "b": weight(8, 16, 1, 1)})
        return reasons(model, policy)["a[0]"]

    exact = ChannelPolicy(is_exact=True)
    assert with_axis(1, exact) == "is compared with others by 'soft' (Softmax)"
    assert with_axis(1) is None
    assert with_axis(-1, exact) is None


def test_a_mean_over_channels_is_approximate_and_frozen_where_exact_results_are_wanted() -> None:
    nodes = [
        conv("x", "a", "h"),
        helper.make_node("ReduceMean", ["h", "axes"], ["m"], name="mean"),
        helper.make_node("Mul", ["h", "m"], ["g"]),
        conv("g", "b", "y"),
    ]
    weights = {"a": weight(16, 3, 1, 1), "b": weight(8, 16, 1, 1), "axes": np.array([1])}
    model = model_of(nodes, weights)
    assert reasons(model, ChannelPolicy(is_exact=True))["a[0]"] == "is reduced over by 'mean' (ReduceMean)"
    group = next(group for group in analyze_channels(model).groups if group.id == "a[0]")
    assert group.frozen_reason is None
    assert group.approximate == ("is reduced over by 'mean' (ReduceMean)",)


def test_a_channel_count_that_the_graph_computes_with_freezes_the_channels() -> None:
    nodes = [
        conv("x", "a", "h"),
        helper.make_node("Shape", ["h"], ["shape"], name="shape", start=1, end=2),
        helper.make_node("Cast", ["shape"], ["width"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Div", ["h", "width"], ["d"], name="divide"),
        conv("d", "b", "y"),
    ]
    # A dynamic batch alone would let the shape be folded: the channel count is a constant then.
    model = ir.from_proto(
        onnx.shape_inference.infer_shapes(
            proto_of(
                nodes,
                inputs={"x": ["N", 3, 8, 8]},
                outputs={"y": None},
                weights={"a": weight(16, 3, 1, 1), "b": weight(8, 16, 1, 1)},
            )
        )
    )
    assert reasons(model)["a[0]"] == "is a number that 'cast' (Cast) computes with"


def test_a_shape_that_is_computed_at_run_time_freezes_what_it_reshapes() -> None:
    nodes = [
        conv("x", "a", "h"),
        helper.make_node("Reshape", ["h", "target"], ["r"], name="reshape"),
        helper.make_node("Conv", ["r", "b"], ["y"], name="last"),
    ]
    proto = proto_of(
        nodes,
        inputs={"x": ["N", 3, 8, 8]},
        outputs={"y": None},
        weights={"a": weight(16, 3, 1, 1), "b": weight(8, 16, 1, 1)},
    )
    proto.graph.input.append(helper.make_tensor_value_info("target", TensorProto.INT64, [4]))
    assert reasons(canonical(proto))["a[0]"] == (
        "is reshaped to a shape that is computed at run time by 'reshape' (Reshape)"
    )


def test_indices_of_max_pool_freeze_the_channels_they_count() -> None:
    nodes = [
        conv("x", "a", "h"),
        helper.make_node("MaxPool", ["h"], ["p", "i"], name="pool", kernel_shape=[2, 2]),
        conv("p", "b", "y"),
        helper.make_node("Cast", ["i"], ["j"], to=TensorProto.FLOAT),
    ]
    model = model_of(nodes, {"a": weight(16, 3, 1, 1), "b": weight(8, 16, 1, 1)}, outputs=("y", "j"))
    assert reasons(model)["a[0]"] == "has its place counted in the indices of 'pool' (MaxPool)"


def test_a_weight_used_without_channels_elsewhere_is_frozen() -> None:
    nodes = [
        conv("x", "a", "h"),
        conv("h", "b", "y"),
        helper.make_node("ReduceMax", ["a"], ["largest"], name="max", keepdims=0),
    ]
    proto = proto_of(
        nodes,
        inputs={"x": ["N", 3, 8, 8]},
        outputs={"y": None, "largest": None},
        weights={"a": weight(16, 3, 1, 1), "b": weight(8, 16, 1, 1)},
    )
    # Not canonical on purpose: canonicalize would give each use a copy of its own.
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    frozen = reasons(model)["a[0]"]
    assert frozen == "its weight 'a' is also used by 'max' (ReduceMax), where it has no channels"


def test_spatial_axes_that_carry_channels_are_frozen_at_a_convolution() -> None:
    nodes = [
        conv("x", "a", "h"),
        helper.make_node("Transpose", ["h"], ["t"], name="turn", perm=[0, 2, 1, 3]),
        conv("t", "b", "y", pads=[1, 1, 1, 1]),
    ]
    model = model_of(nodes, {"a": weight(16, 3, 1, 1), "b": weight(8, 8, 3, 3)})
    assert reasons(model)["a[0]"] == "is a spatial axis of 'y_conv' (Conv)"


def test_constant_indices_shorter_than_the_data_freeze_the_channels_beside_them() -> None:
    nodes = [
        conv("x", "a", "h"),
        helper.make_node("GatherElements", ["h", "indices"], ["g"], name="gather", axis=3),
        conv("g", "b", "y"),
    ]
    weights = {"a": weight(8, 3, 1, 1), "b": weight(8, 4, 1, 1), "indices": np.zeros((1, 4, 4, 2), np.int64)}
    model = canonical(proto_of(nodes, inputs={"x": [1, 3, 8, 8]}, outputs={"y": None}, weights=weights))
    assert reasons(model)["a[0]"] == "meets an axis of another length in 'gather' (GatherElements)"


def test_indices_of_a_max_pool_count_what_stands_on_the_batch_axis_as_well() -> None:
    nodes = [
        conv("x", "a", "h"),
        helper.make_node("Transpose", ["h"], ["t"], name="turn", perm=[1, 0, 2, 3]),
        helper.make_node("MaxPool", ["t"], ["p", "i"], name="pool", kernel_shape=[2, 2]),
        helper.make_node("Cast", ["i"], ["j"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["j"], ["largest"], name="max", keepdims=0),
    ]
    model = model_of(nodes, {"a": weight(16, 3, 1, 1)}, outputs=("largest",))
    assert reasons(model)["a[0]"] == "has its place counted in the indices of 'pool' (MaxPool)"
