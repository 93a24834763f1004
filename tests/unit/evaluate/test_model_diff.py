"""Two models compared: which tensors correspond, where error arises, and what can't be compared."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from onnxprune.errors import BadDataError, UsageError
from onnxprune.evaluate.model_diff import ComparedModel, ModelComparison, compare_models, corresponding_tensors
from onnxprune.graph.tensor_graph import tensor_graph
from onnxprune.runtime.sessions import ort_runner_from_model
from onnxprune.runtime.tensors import OrtTensors
from tests.builders import conv_net_proto, proto_of

BATCHES = [{"x": np.random.default_rng(seed).standard_normal((1, 3, 8, 8)).astype(np.float32)} for seed in range(3)]


def opened(proto: onnx.ModelProto, name: str = "model.onnx") -> ComparedModel:
    model = ir.from_proto(proto)
    return ComparedModel(
        name=name, runner=ort_runner_from_model(model), graph=tensor_graph(model.graph), tensors=OrtTensors(model=model)
    )


def with_weight(name: str, *, noise: float) -> onnx.ModelProto:
    """The convolutional net with noise on one weight."""
    proto = conv_net_proto(batch=1)
    (tensor,) = [tensor for tensor in proto.graph.initializer if tensor.name == name]
    array = numpy_helper.to_array(tensor)
    spoilt = array + np.random.default_rng(9).standard_normal(array.shape).astype(np.float32) * noise
    tensor.CopyFrom(numpy_helper.from_array(spoilt.astype(np.float32), name))
    return proto


def compared(actual: onnx.ModelProto, *, per_tensor: bool = True) -> ModelComparison:
    return compare_models(
        opened(conv_net_proto(batch=1)),
        opened(actual, "other.onnx"),
        BATCHES,
        data="test",
        num_samples=len(BATCHES),
        per_tensor=per_tensor,
    )


def test_a_model_against_itself_is_equal_everywhere() -> None:
    found = compared(conv_net_proto(batch=1))
    assert [layer.tensor.name for layer in found.layers] == ["c1", "r1", "c2", "a1", "r2", "p", "f", "y"]
    assert {layer.tensor.snr_db for layer in found.layers} == {math.inf}
    assert found.outputs.snr_db == math.inf
    assert found.first_off is None


def test_a_spoilt_weight_is_where_the_error_arises_and_what_is_before_it_is_equal() -> None:
    found = compared(with_weight("block.weight", noise=0.1))
    by_name = {layer.tensor.name: layer for layer in found.layers}
    assert by_name["r1"].tensor.snr_db == math.inf
    assert found.most_added is not None
    assert (found.most_added.node, found.most_added.op_type) == ("block/conv", "Conv")
    assert found.first_off is not None
    assert found.first_off.tensor.name == "c2"
    # What only passes the error on adds none of its own.
    assert by_name["f"].added_db == math.inf
    assert by_name["c2"].added_db == pytest.approx(by_name["c2"].tensor.snr_db, rel=1e-12)


def test_without_tensors_only_outputs_are_compared() -> None:
    found = compared(with_weight("block.weight", noise=0.1), per_tensor=False)
    assert (found.layers, found.not_compared, found.first_off, found.most_added) == ((), None, None, None)
    assert found.outputs.snr_db < 30


def test_a_tensor_that_only_a_quantize_linear_reads_is_compared_as_the_next_layer_gets_it() -> None:
    scale, zero = np.array(0.5, np.float32), np.array(0, np.int8)
    plain = proto_of(
        [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Neg", ["a"], ["y"])],
        inputs={"x": (1, 4)},
        outputs={"y": (1, 4)},
    )
    quantized = proto_of(
        [
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node("QuantizeLinear", ["a", "scale", "zero"], ["a_QuantizeLinear_Output"]),
            helper.make_node(
                "DequantizeLinear", ["a_QuantizeLinear_Output", "scale", "zero"], ["a_DequantizeLinear_Output"]
            ),
            helper.make_node("Neg", ["a_DequantizeLinear_Output"], ["y"]),
        ],
        inputs={"x": (1, 4)},
        outputs={"y": (1, 4)},
        weights={"scale": scale, "zero": zero},
    )
    pairs = corresponding_tensors(*(tensor_graph(ir.from_proto(proto).graph) for proto in (plain, quantized)))
    assert [(pair.reference, pair.actual) for pair in pairs] == [("a", "a_DequantizeLinear_Output"), ("y", "y")]
    found = compare_models(
        opened(plain),
        opened(quantized),
        [{"x": np.array([[0.3, 1.0, -1.0, 2.2]], np.float32)}],
        data="test",
        num_samples=1,
        per_tensor=True,
    )
    # 0.3 -> 0.5 and 2.2 -> 2.0
    assert found.layers[0].tensor.max_abs == pytest.approx(0.2, rel=1e-5)


def test_name_of_a_layer_that_a_batch_normalization_was_folded_into_stands_for_its_result() -> None:
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((4, 3, 1, 1)).astype(np.float32)
    scale, shift = np.array([1.0, 2.0, 0.5, 3.0], np.float32), np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    tail = helper.make_node("Neg", ["r"], ["y"], name="tail")
    normalized = proto_of(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
            helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"], name="norm", epsilon=0.0),
            helper.make_node("Sigmoid", ["n"], ["r"], name="gate"),
            tail,
        ],
        inputs={"x": (1, 3, 8, 8)},
        outputs={"y": (1, 4, 8, 8)},
        weights={"w": kernel, "s": scale, "b": shift, "m": zeros, "v": ones},
    )
    folded = proto_of(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv"),
            helper.make_node("Sigmoid", ["c"], ["r"], name="gate"),
            tail,
        ],
        inputs={"x": (1, 3, 8, 8)},
        outputs={"y": (1, 4, 8, 8)},
        weights={"w": kernel * scale[:, None, None, None], "b": shift},
    )
    found = compare_models(opened(normalized), opened(folded), BATCHES, data="test", num_samples=3, per_tensor=True)
    assert [(layer.tensor.name, layer.tensor.actual_name, layer.node) for layer in found.layers] == [
        ("n", "c", "norm"),
        ("r", "r", "gate"),
        ("y", "y", "tail"),
    ]
    assert min(layer.tensor.snr_db for layer in found.layers) > 100


def test_other_interfaces_are_refused_with_the_names() -> None:
    other = conv_net_proto(batch=1)
    other.graph.input[0].name = "picture"
    other.graph.node[0].input[0] = "picture"
    with pytest.raises(UsageError, match=r"the inputs of the first are 'x', those of the second 'picture'"):
        compared(other)


def test_a_format_that_hides_its_tensors_is_refused_with_what_to_do() -> None:
    one = opened(conv_net_proto(batch=1))
    hidden = replace(one, name="model.ort", tensors=None, graph=None)
    with pytest.raises(UsageError, match=r"'model\.ort' can't be asked.*Build target 'onnx'"):
        compare_models(one, hidden, BATCHES, data="test", num_samples=3, per_tensor=True)


def test_of_another_network_with_the_same_interface_the_output_is_compared() -> None:
    other = proto_of(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["y"]),
        ],
        inputs={"x": (1, 3, 8, 8)},
        outputs={"y": (1, 10)},
        weights={"w": np.ones((3, 10), np.float32)},
    )
    found = compared(other)
    assert [layer.tensor.name for layer in found.layers] == ["y"]


def test_no_samples_are_an_error() -> None:
    one = opened(conv_net_proto(batch=1))
    with pytest.raises(BadDataError, match="no samples"):
        compare_models(one, one, [], data="test", num_samples=0, per_tensor=True)


def test_tensor_that_only_the_second_model_computes_is_named_and_conversions_are_not() -> None:
    plain = proto_of(
        [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Neg", ["a"], ["y"])],
        inputs={"x": (1, 4)},
        outputs={"y": (1, 4)},
    )
    scale, zero = np.array(0.5, np.float32), np.array(0, np.int8)
    other = proto_of(
        [
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node("QuantizeLinear", ["a", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
            helper.make_node("Abs", ["d"], ["own"]),
            helper.make_node("Neg", ["own"], ["y"]),
        ],
        inputs={"x": (1, 4)},
        outputs={"y": (1, 4)},
        weights={"scale": scale, "zero": zero},
    )
    batches = [{"x": np.ones((1, 4), np.float32)}]
    found = compare_models(opened(plain), opened(other), batches, data="test", num_samples=1, per_tensor=True)
    assert found.not_compared == {"own": "'model.onnx' has no tensor of that name"}
