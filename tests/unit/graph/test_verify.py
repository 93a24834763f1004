"""Each rule of the canonical form is broken once, and the message names node and value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from onnxprune.errors import VerificationError
from onnxprune.graph.canonical import CanonicalModel, canonicalize
from onnxprune.graph.io import model_from_proto
from onnxprune.graph.verify import verify
from onnxprune.ops.shapes import SHAPES

_TEXT = """<ir_version: 10, opset_import: ["": 20]>
g (float[N,3] x) => (float[N,3] y) { a = MatMul(x, w) b = Relu(a) y = Add(b, bias) }"""


@pytest.fixture
def model() -> CanonicalModel:
    proto = onnx.parser.parse_model(_TEXT)
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((3, 3), np.float32), "w"))
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "bias"))
    return canonicalize(model_from_proto(proto, Path("model.onnx")), shape_rules=SHAPES)


def set_opset(model: ir.Model) -> None:
    model.opset_imports[""] = 17


def set_ir_version(model: ir.Model) -> None:
    model.ir_version = 14


def repeat_node_name(model: ir.Model) -> None:
    model.graph[1].name = model.graph[0].name


def forget_node_name(model: ir.Model) -> None:
    model.graph[1].name = None


def repeat_value_name(model: ir.Model) -> None:
    model.graph[1].outputs[0].name = "a"


def forget_value_name(model: ir.Model) -> None:
    model.graph[1].outputs[0].name = None


def put_control_characters(model: ir.Model) -> None:
    model.graph[1].outputs[0].name = "bell\x07"


def share_initializer(model: ir.Model) -> None:
    model.graph[2].replace_input_with(0, model.graph.initializers["bias"])


def leave_stale_shape(model: ir.Model) -> None:
    model.graph.initializers["bias"].const_value = ir.tensor(np.ones(4, np.float32), name="bias")


def leave_stale_type(model: ir.Model) -> None:
    model.graph.initializers["bias"].const_value = ir.tensor(np.ones(3, np.float64), name="bias")


def drop_tensor(model: ir.Model) -> None:
    model.graph.initializers["bias"].const_value = None


def make_initializer_an_input(model: ir.Model) -> None:
    model.graph.inputs.append(model.graph.initializers["bias"])


def insert(model: ir.Model, node: ir.Node) -> None:
    node.name, node.outputs[0].name = "new", "new_output"
    model.graph.insert_before(model.graph[1], node)
    model.graph[2].replace_input_with(0, node.outputs[0])


def insert_identity(model: ir.Model) -> None:
    insert(model, ir.node("Identity", [model.graph[0].outputs[0]]))


def insert_dropout(model: ir.Model) -> None:
    insert(model, ir.node("Dropout", [model.graph[0].outputs[0]]))


def insert_constant(model: ir.Model) -> None:
    insert(model, ir.node("Constant", [], {"value": ir.tensor(np.ones((1, 3), np.float32))}))


def move_to_the_front(model: ir.Model) -> None:
    node = model.graph[2]
    model.graph.remove(node)
    model.graph.insert_before(model.graph[0], node)


def use_what_nobody_makes(model: ir.Model) -> None:
    model.graph[1].replace_input_with(0, ir.Value(name="ghost"))


def remove_producer_of_output(model: ir.Model) -> None:
    model.graph.remove(model.graph[2])


def drop_attribute(model: ir.Model) -> None:
    model.graph[1].op_type = "Cast"


@pytest.mark.parametrize(
    ("break_rule", "said"),
    [
        (set_opset, "opset 17 is outside 18 to 24"),
        (set_ir_version, "IR version 14 is above 13"),
        (repeat_node_name, "two nodes are named 'MatMul_0'"),
        (forget_node_name, "a node of type Relu has no name"),
        (repeat_value_name, "two values are named 'a'"),
        (forget_value_name, "a value of output of 'Relu_1' has no name"),
        (put_control_characters, r"the value name 'bell\\x07' holds control characters"),
        (share_initializer, "initializer 'bias' has 2 users instead of one"),
        (leave_stale_shape, r"initializer 'bias' is declared \[3\] but its tensor is \[4\]"),
        (leave_stale_type, "initializer 'bias' is declared FLOAT but its tensor is DOUBLE"),
        (drop_tensor, "initializer 'bias' has no tensor"),
        (make_initializer_an_input, "initializer 'bias' is an input of its graph"),
        (insert_identity, "node 'new' is an Identity that does nothing"),
        (insert_dropout, "node 'new' is a Dropout that does nothing"),
        (insert_constant, "node 'new' is a Constant, not an initializer"),
        (move_to_the_front, "node 'Add_2' uses 'b', which is not defined before it"),
        (use_what_nobody_makes, r"node 'Relu_1' uses 'ghost', which is not defined before it \(no producer\)"),
        (remove_producer_of_output, "output 'y' is not defined by any node"),
        (drop_attribute, "ONNX's checker: .*'to'|ONNX's checker: .*Cast"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_rule_is_found_and_named(
    model: CanonicalModel, break_rule: Callable[[ir.Model], None], said: str
) -> None:
    verify(model)
    break_rule(model)
    with pytest.raises(VerificationError, match=said):
        verify(model)


def test_function_that_was_not_inlined_is_found(model: CanonicalModel) -> None:
    inner = ir.Value(name="v")
    node = ir.node("Relu", [inner])
    graph = ir.Graph([inner], node.outputs, nodes=[node], opset_imports={"": 20})
    model.functions["local", "F", ""] = ir.Function("local", "F", graph=graph, attributes=[])
    with pytest.raises(VerificationError, match="function 'F' is not inlined"):
        verify(model)


def test_broken_rules_inside_a_branch_are_found() -> None:
    text = """<ir_version: 10, opset_import: ["": 20]>
    g (float[N] x, bool c) => (float[N] y) {
        y = If(c) <
            then_branch = t () => (float[N] p) { h = Neg(x) p = Relu(h) },
            else_branch = e () => (float[N] q) { q = Neg(x) }
        >
    }"""
    model = canonicalize(model_from_proto(onnx.parser.parse_model(text), Path("model.onnx")), shape_rules=SHAPES)
    branch = next(iter(model.graph.subgraphs()))
    branch[1].replace_input_with(0, ir.Value(name="ghost"))
    with pytest.raises(VerificationError, match="uses 'ghost'"):
        verify(model)


def test_operator_of_onnx_runtime_in_onnx_own_domain_is_accepted() -> None:
    # ONNX's checker knows no SimplifiedLayerNormalization; exporters of language models write it.
    text = """<ir_version: 10, opset_import: ["": 20]>
    g (float[N,4] x, float[4] s) => (float[N,4] y) { a = SimplifiedLayerNormalization(x, s) y = Relu(a) }"""
    model = canonicalize(model_from_proto(onnx.parser.parse_model(text), Path("model.onnx")), shape_rules=SHAPES)
    verify(model)
    assert str(model.graph[0].outputs[0].shape) == "[N,4]"
