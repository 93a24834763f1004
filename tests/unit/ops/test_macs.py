"""MACs against numbers worked out by hand, and against the literature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune.ops.macs import count_macs
from tests.builders import canonical, conv_net, proto_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One node: shapes of its computed inputs and of its weights, and its MACs."""

    name: str
    op_type: str
    inputs: dict[str, list[int | str | None]]
    weights: dict[str, tuple[int, ...]]
    macs: int
    attributes: dict[str, Any]
    order: tuple[str, ...]


def case(name: str, op_type: str, order: str, macs: int, **attributes: Any) -> Case:
    """`order` spells the inputs: "x:1,3,8,8 w=16,3,3,3" (":" computed, "=" a weight)."""
    inputs: dict[str, list[int | str | None]] = {}
    weights: dict[str, tuple[int, ...]] = {}
    names = []
    for part in order.split():
        is_weight = "=" in part
        label, _, text = part.partition("=" if is_weight else ":")
        shape = [int(size) for size in text.split(",")]
        names.append(label)
        if is_weight:
            weights[label] = tuple(shape)
        else:
            inputs[label] = [*shape]
    return Case(
        name=name,
        op_type=op_type,
        inputs=inputs,
        weights=weights,
        macs=macs,
        attributes=attributes,
        order=tuple(names),
    )


CASES = [
    # 1*16*6*6 outputs, each a dot product over 3*3*3
    case("conv", "Conv", "x:1,3,8,8 w=16,3,3,3 b=16", 16 * 36 * 27),
    case("conv, stride 2, batch 4", "Conv", "x:4,3,8,8 w=16,3,2,2", 4 * 16 * 16 * 12, strides=[2, 2]),
    case("conv, grouped", "Conv", "x:1,8,4,4 w=16,2,1,1", 16 * 16 * 2, group=4),
    case("conv, depthwise", "Conv", "x:1,8,4,4 w=8,1,3,3", 8 * 16 * 9, group=8, pads=[1, 1, 1, 1]),
    case("conv, 1-D", "Conv", "x:2,4,10 w=6,4,3", 2 * 6 * 8 * 12),
    # every input element meets 16 filters of 2x2
    case("conv transpose", "ConvTranspose", "x:1,3,8,8 w=3,16,2,2", 3 * 64 * 16 * 4, strides=[2, 2]),
    case("conv transpose, grouped", "ConvTranspose", "x:1,4,8,8 w=4,2,2,2", 4 * 64 * 2 * 4, group=2),
    case("gemm", "Gemm", "x:5,7 w=7,9 b=9", 5 * 7 * 9),
    case("gemm, both transposed", "Gemm", "x:7,5 w=9,7", 5 * 7 * 9, transA=1, transB=1),
    case("matmul, weight right", "MatMul", "x:2,3,5,7 w=7,9", 2 * 3 * 5 * 7 * 9),
    case("matmul, weight left", "MatMul", "w=9,7 x:2,7,5", 2 * 9 * 7 * 5),
    case("matmul of activations", "MatMul", "x:2,4,5,7 z:2,4,7,5", 2 * 4 * 5 * 7 * 5),
    case("matmul with a vector", "MatMul", "x:5,7 w=7", 5 * 7),
    case("einsum", "Einsum", "x:2,3,4 w=4,5", 2 * 3 * 4 * 5, equation="bij,jk->bik"),
    case("einsum with an ellipsis", "Einsum", "x:2,3,4 w=4,5", 2 * 3 * 4 * 5, equation="...j,jk->...k"),
    case("einsum of one operand", "Einsum", "x:3,4", 0, equation="ij->ji"),
    # 6 steps * batch 2 * (4*8*5 input weights + 4*8*8 recurrent weights)
    case("lstm", "LSTM", "x:6,2,5 w=1,32,5 r=1,32,8", 6 * 2 * (32 * 5 + 32 * 8), hidden_size=8),
    case("gru", "GRU", "x:6,2,5 w=1,24,5 r=1,24,8", 6 * 2 * (24 * 5 + 24 * 8), hidden_size=8),
    case("relu", "Relu", "x:1,3,8,8", 0),
    case("pool", "GlobalAveragePool", "x:1,3,8,8", 0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_macs_of_one_node_equal_those_worked_out_by_hand(case: Case) -> None:
    rng = np.random.default_rng(0)
    node = helper.make_node(case.op_type, case.order, ["y"], name="n", **case.attributes)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in case.weights.items()}
    model = canonical(proto_of([node], inputs=dict(case.inputs), outputs={"y": None}, weights=weights))
    counted = count_macs(model)
    assert counted.total == case.macs
    assert counted.per_node == ({"n": case.macs} if case.macs else {})
    assert counted.uncounted == ()


def test_a_dynamic_batch_leaves_the_total_unknown_until_it_gets_a_number() -> None:
    model = conv_net(batch="N")
    counted = count_macs(model)
    assert counted.total is None
    assert counted.per_node == {}
    assert counted.dynamic == ("stem/conv", "block/conv", "head/gemm")
    assert count_macs(model, dims={"N": 2}).total == 2 * (16 * 64 * 27 + 16 * 64 * 144 + 160)


def test_an_operator_without_a_row_counts_nothing_and_is_listed() -> None:
    node = helper.make_node("FlyToTheMoon", ["x"], ["y"], name="rocket", domain="com.example")
    proto = proto_of([node], inputs={"x": [1, 3]}, outputs={"y": [1, 3]})
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    counted = count_macs(canonical(proto))
    assert counted.total == 0
    assert counted.uncounted == ("rocket (FlyToTheMoon)",)


def body(output: str, weight: str) -> onnx.GraphProto:
    node = helper.make_node("MatMul", ["x", weight], [output], name=f"{output}_matmul")
    return helper.make_graph([node], output, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)])


def test_an_if_counts_its_larger_branch() -> None:
    node = helper.make_node("If", ["c"], ["y"], name="if", then_branch=body("t", "a"), else_branch=body("e", "b"))
    less = helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0)
    condition = helper.make_node("Cast", ["total"], ["c"], to=TensorProto.BOOL)
    proto = proto_of(
        [less, condition, node],
        inputs={"x": [2, 4]},
        outputs={"y": [2, None]},
        weights={"a": np.ones((4, 3), np.float32), "b": np.ones((4, 6), np.float32)},
    )
    assert count_macs(canonical(proto)).per_node == {"if": 2 * 4 * 6}


def test_a_loop_is_listed_as_not_counted() -> None:
    loop_body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["next"], name="inner"),
            helper.make_node("Identity", ["going"], ["still"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, 4]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [2, 4]),
        ],
    )
    proto = proto_of(
        [helper.make_node("Loop", ["trips", "", "x"], ["y"], name="loop", body=loop_body)],
        inputs={"x": [2, 4]},
        outputs={"y": [2, 4]},
        weights={"w": np.ones((4, 4), np.float32), "trips": np.array(3)},
    )
    counted = count_macs(canonical(proto))
    assert counted.uncounted == ("loop (Loop)",)
    assert counted.total == 0


def test_grouped_query_attention_reads_every_key_once_for_each_query_head() -> None:
    settings = ["", "", "last", "total"]
    node = helper.make_node(
        *("GroupQueryAttention", ["q", "k", "v", *settings], ["y", "key", "value"]),
        domain="com.microsoft",
        num_heads=4,
        kv_num_heads=2,
    )
    proto = proto_of(
        [node],
        inputs={"q": [2, 6, 64], "k": [2, 6, 32], "v": [2, 6, 32]},
        outputs={"y": None},
        weights={"last": np.array([5, 5], np.int32), "total": np.array(6, np.int32)},
    )
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    # 2 samples, 4 heads, 6 x 6 scores over a width of 16; and as much again to weigh the values
    assert count_macs(canonical(proto)).total == 2 * (2 * 4 * 6 * 6 * 16)
