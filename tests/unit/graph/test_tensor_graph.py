"""Which node computes and reads which tensor of an ONNX model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper

from onnxprune.graph.tensor_graph import GraphTensor, tensor_graph
from tests.builders import proto_of


def test_nodes_and_tensors_have_what_a_comparison_needs() -> None:
    proto = proto_of(
        [
            helper.make_node("Mul", ["x", "k"], ["a"], name="double"),
            helper.make_node("Add", ["a", "a"], ["y"], name="add"),
            helper.make_node("Shape", ["a"], ["s"], name="shape"),
        ],
        inputs={"x": (2, 3)},
        outputs={"y": (2, 3)},
        weights={"k": np.array(2.0, np.float32)},
    )
    proto.graph.value_info.append(helper.make_tensor_value_info("s", TensorProto.INT64, [2]))
    graph = tensor_graph(ir.from_proto(proto).graph)
    assert [(node.name, node.op_type, node.onnx_type, node.reads, node.writes) for node in graph.nodes] == [
        ("double", "Mul", "Mul", ("x", "k"), ("a",)),
        ("add", "Add", "Add", ("a", "a"), ("y",)),
        ("shape", "Shape", "Shape", ("a",), ("s",)),
    ]
    assert list(graph.computed) == ["a", "y", "s"]
    assert [node.name for node in graph.readers["a"]] == ["add", "shape"]
    assert "y" not in graph.readers
    assert graph.tensors["y"] == GraphTensor(name="y", num_elements=6, is_output=True)
    assert graph.tensors["k"].is_constant
    assert not graph.tensors["s"].may_be_float


def test_what_a_branch_reads_from_outside_is_read_by_the_if() -> None:
    def branch(name: str) -> object:
        return helper.make_graph(
            [helper.make_node("Neg", ["a"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])],
        )

    proto = proto_of(
        [
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node("If", ["c"], ["y"], name="if", then_branch=branch("t"), else_branch=branch("e")),
        ],
        inputs={"x": (2,)},
        outputs={"y": (2,)},
        weights={"c": np.array(True)},
    )
    graph = tensor_graph(ir.from_proto(proto).graph)
    assert [node.name for node in graph.readers["a"]] == ["if"]
    assert graph.nodes[1].reads == ("c", "a")


def test_sizes_that_are_not_known_are_none() -> None:
    proto = proto_of([helper.make_node("Relu", ["x"], ["y"])], inputs={"x": ("N", 3)}, outputs={"y": ("N", 3)})
    assert tensor_graph(ir.from_proto(proto).graph).tensors["y"].num_elements is None
