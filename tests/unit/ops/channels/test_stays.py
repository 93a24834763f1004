"""Where channels must stay though their neighbours may go, and what the reason says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.passes.prune import analyze_channels
from tests.builders import canonical, proto_of
from tests.patterns import network

RNG = np.random.default_rng(0)
Node = onnx.NodeProto


def weight(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def node(op_type: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> Node:
    return helper.make_node(op_type, list(inputs), list(outputs), name=f"the_{op_type.lower()}", **attributes)


def reasons(
    nodes: Sequence[Node],
    weights: dict[str, np.ndarray],
    inputs: dict[str, Any],
    *,
    outputs: Sequence[str] = ("y",),
    opset: int = 20,
) -> dict[str, str | None]:
    """Frozen reason by the id of each group of a canonical model."""
    proto = proto_of(nodes, inputs=inputs, outputs=dict.fromkeys(outputs), weights=weights, opset=opset)
    for domain in sorted({each.domain for each in nodes} - {""}):
        proto.opset_import.append(helper.make_opsetid(domain, 1))
    model: ir.Model = canonical(proto)
    return {group.id: group.frozen_reason for group in analyze_channels(model).groups}


def between(nodes: Sequence[Node], weights: dict[str, np.ndarray] | None = None) -> str | None:
    """The reason for the 16 channels of h (N, 16, 8, 8), which `nodes` turn into m; m is summed over at the end."""
    last = [helper.make_node("ReduceSum", ["m"], ["y"], name="last")]
    first = [helper.make_node("Conv", ["x", "a"], ["h"], name="first")]
    given = {"a": weight(16, 3, 1, 1), **(weights or {})}
    return reasons([*first, *nodes, *last], given, {"x": ["N", 3, 8, 8]})["a[0]"]


# --- recurrent layers -----------------------------------------------------------------------------------------


def test_hidden_units_whose_first_state_is_fed_are_frozen() -> None:
    nodes = [
        node("LSTM", ["x", "w", "r", "", "", "state"], "out", hidden_size=4),
        helper.make_node("ReduceSum", ["out"], ["y"]),
    ]
    given = {"w": weight(1, 16, 3), "r": weight(1, 16, 4)}
    found = reasons(nodes, given, {"x": [5, "N", 3], "state": [1, "N", 4]})
    assert found["w[1]"] == "meets 'state', whose channels are fixed, in 'the_lstm' (LSTM)"


def test_hidden_units_that_reach_an_output_are_frozen() -> None:
    nodes = [node("GRU", ["x", "w", "r"], "", "y", hidden_size=4)]
    found = reasons(nodes, {"w": weight(1, 12, 3), "r": weight(1, 12, 4)}, {"x": [5, "N", 3]})
    assert found["w[1]"] == "reaches the model's output 'y'"


# --- cutting and indexing -------------------------------------------------------------------------------------


def test_channels_cut_with_a_step_together_with_another_axis_are_frozen() -> None:
    slices = node("Slice", ["h", "starts", "ends", "axes", "steps"], "m")
    numbers = {"starts": [0, 0], "ends": [16, 8], "axes": [1, 2], "steps": [2, 2]}
    found = between([slices], {name: np.array(values) for name, values in numbers.items()})
    assert found == "is cut with a step, and on other axes, too, by 'the_slice' (Slice)"


def test_channels_that_are_picked_by_their_index_are_frozen_and_positions_leave_them_alone() -> None:
    def gather(axis: int) -> str | None:
        shape = {"shape": np.array([1, 16, 8, 8])}
        nodes = [
            helper.make_node("ArgMax", ["h"], ["at"], axis=axis, keepdims=1),
            node("GatherElements", ["h", "at"], "m", axis=axis),
        ]
        return between(nodes, shape)

    assert gather(3) is None
    assert gather(1) is not None


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([node("NonZero", ["h"], "i"), node("Cast", ["i"], "m", to=1)], "has its place counted by 'the_nonzero'"),
        ([node("Einsum", ["t"], "m", equation="nccw->ncw")], "is on a diagonal in 'the_einsum'"),
        ([node("ScatterND", ["t", "places", "some"], "m")], "is overwritten by its index by 'the_scatternd'"),
        ([node("Trilu", ["t"], "m")], "is a row or column of a triangle that is cut out by 'the_trilu'"),
        ([node("Compress", ["h", "flags"], "m", axis=1)], "is picked by a condition by 'the_compress'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_operator_that_looks_at_places_freezes_the_axis_it_looks_at(nodes: list[Node], reason: str) -> None:
    orders = {"Einsum": None, "ScatterND": [1, 0, 2, 3], "Trilu": [0, 2, 3, 1]}
    order = next((orders[each.op_type] for each in nodes if each.op_type in orders), None)
    ahead = [helper.make_node("Transpose", ["h"], ["t"], perm=order or [0, 1, 2, 3])]
    if nodes[0].op_type == "Einsum":
        # (N, 16, 64) laid out as (N, 16, 16, 4)
        ahead = [helper.make_node("Reshape", ["h", "square"], ["t"])]
    given = {
        "square": np.array([0, 16, 16, 4]),
        "places": np.array([[3]]),
        "flags": np.array([True, False, True]),
        "some": weight(1, 1, 8, 8),
    }
    used = {name for each in (*ahead, *nodes) for name in each.input}
    found = between([*ahead, *nodes], {name: array for name, array in given.items() if name in used})
    assert found is not None
    assert found.startswith(reason)


# --- attention ------------------------------------------------------------------------------------------------


def attention(operator: Node, *, extra: dict[str, Any] | None = None, outputs: Sequence[str] = ("y",)) -> Any:
    """Reasons for Q, K and V (N, 6, 32), which a node reads, and one that sums up what it makes."""
    projections = [helper.make_node("MatMul", ["x", name], [name.lower()]) for name in "QKV"]
    nodes = [*projections, operator, helper.make_node("ReduceSum", ["a"], ["y"])]
    given = {name: weight(16, 32) for name in "QKV"}
    return reasons(nodes, given, {"x": ["N", 6, 16], **(extra or {})}, outputs=outputs, opset=23)


def test_heads_and_widths_of_a_cache_that_is_fed_are_frozen() -> None:
    operator = node(
        *("Attention", ["q", "k", "v", "", "past_key", "past_value"]),
        *("a", "new_key", "new_value"),
        q_num_heads=4,
        kv_num_heads=4,
    )
    cache = {name: ["N", 4, "P", 8] for name in ("past_key", "past_value")}
    found = attention(operator, extra=cache, outputs=("y", "new_key", "new_value"))
    assert all(found[f"{name}[1]"] for name in "QKV")


def test_the_width_of_heads_that_are_turned_by_position_is_frozen_and_heads_are_not() -> None:
    found = {
        heads: [reason for reason in (g.frozen_reason for g in analyze_channels(network([name])).groups) if reason]
        for heads, name in ((4, "rotary_positions"),)
    }
    assert all("output" in reason or "width" in reason or "grid" in reason for reason in found[4])


def test_attention_whose_queries_are_fed_keeps_its_heads() -> None:
    operator = node("MultiHeadAttention", ["fed", "k", "v"], "a", num_heads=4, domain="com.microsoft")
    found = attention(operator, extra={"fed": ["N", 6, 32]})
    assert found["K[1]"] is not None
    # What the values hold may still go from every head alike.
    assert found["V[1]"] is None


def test_a_mask_that_is_fed_for_each_head_freezes_the_heads() -> None:
    operator = node("Attention", ["q", "k", "v", "mask"], "a", q_num_heads=4, kv_num_heads=4)
    model_reasons = attention(operator, extra={"mask": ["N", 4, 6, 6]})
    # Four heads would go as a whole; their width goes instead.
    assert [model_reasons[f"{name}[1]"] for name in "QV"] == [None, None]


# --- numbers --------------------------------------------------------------------------------------------------


def test_scales_of_blocks_freeze_the_axis_they_run_along() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="first"),
        node("DequantizeLinear", ["coded", "scales"], "w", axis=0, block_size=4),
        helper.make_node("MatMul", ["h", "w"], ["t"], name="second"),
        helper.make_node("ReduceSum", ["t"], ["y"]),
    ]
    coded = RNG.integers(-99, 99, (16, 8)).astype(np.int8)
    found = reasons(nodes, {"a": weight(3, 16), "coded": coded, "scales": weight(4, 8)}, {"x": ["N", 3]}, opset=21)
    assert found["coded[1]"] is None
    assert found["a[1]"] == "shares a scale with others of its block in 'the_dequantizelinear' (DequantizeLinear)"


def test_data_that_are_expanded_do_not_show_up_among_the_channels() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "rest"], ["shape"], axis=0),
        helper.make_node("Expand", ["table", "shape"], ["wide"]),
        helper.make_node("Add", ["x", "wide"], ["y"]),
    ]
    given = {"table": weight(1, 6, 16), "rest": np.array([6, 16])}
    found = reasons(nodes, given, {"x": ["N", 6, 16]})
    assert [name for name in found if name.startswith("table")] == []
