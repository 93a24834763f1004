"""Weights are replaced together with their shape and type."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxprune.errors import VerificationError
from onnxprune.graph.names import UniqueNames
from onnxprune.graph.weights import add_tensor, constant_array, replace_weight, replace_weight_lazily, weight_bytes


def model_with_weight() -> ir.Model:
    weight = ir.Value(
        name="w",
        shape=ir.Shape([4, 3]),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(np.ones((4, 3), np.float32), name="w"),
    )
    x = ir.Value(name="x", shape=ir.Shape(["N", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("MatMul", [x, weight], name="mm")
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


def test_a_tensor_that_two_initializers_share_counts_once() -> None:
    model = model_with_weight()
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    assert weight_bytes(model) == 4 * 3 * 4
    add_tensor(model.graph, "again", tensor, UniqueNames.of_values(model))
    assert weight_bytes(model) == 4 * 3 * 4
    add_tensor(model.graph, "other", ir.tensor(np.ones(5, np.int8)), UniqueNames.of_values(model))
    assert weight_bytes(model) == 4 * 3 * 4 + 5


def test_shape_and_type_follow_the_new_weight() -> None:
    value = model_with_weight().graph.initializers["w"]
    replace_weight(value, np.zeros((4, 2), np.float16))
    assert value.shape == ir.Shape([4, 2])
    assert value.dtype == ir.DataType.FLOAT16
    assert value.const_value is not None
    assert value.const_value.name == "w"


def test_replacing_a_weight_of_a_clone_leaves_the_type_of_the_original() -> None:
    # onnx_ir's clones share type objects; assigning `value.dtype` would change both.
    model = model_with_weight()
    replace_weight(model.clone().graph.initializers["w"], np.zeros((4, 2), np.float16))
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT


def test_only_initializers_can_be_replaced() -> None:
    model = model_with_weight()
    with pytest.raises(VerificationError, match="'x' is not an initializer"):
        replace_weight(model.graph.inputs[0], np.zeros(3))


def test_lazy_weight_is_computed_at_each_reading() -> None:
    value = model_with_weight().graph.initializers["w"]
    calls = []

    def make() -> np.ndarray:
        calls.append(1)
        return np.full((2, 2), 7.0, np.float32)

    replace_weight_lazily(value, (2, 2), ir.DataType.FLOAT, make)
    assert value.shape == ir.Shape([2, 2])
    assert calls == []
    for expected_calls in (1, 2):
        array = constant_array(value)
        assert array is not None
        assert (array == 7.0).all()
        assert len(calls) == expected_calls


def test_lazy_weight_of_another_shape_or_type_than_announced_is_refused() -> None:
    value = model_with_weight().graph.initializers["w"]
    replace_weight_lazily(value, (2, 2), ir.DataType.FLOAT, lambda: np.zeros((2, 3), np.float32))
    with pytest.raises(VerificationError, match=r"shape \[2, 3\], but \[2, 2\]"):
        constant_array(value)
    replace_weight_lazily(value, (2, 2), ir.DataType.FLOAT, lambda: np.zeros((2, 2), np.float64))
    with pytest.raises(VerificationError, match="is float64, but FLOAT was announced"):
        constant_array(value)


def test_computed_and_missing_values_have_no_array() -> None:
    model = model_with_weight()
    assert constant_array(None) is None
    assert constant_array(model.graph.inputs[0]) is None
    assert constant_array(model.graph.outputs[0]) is None
