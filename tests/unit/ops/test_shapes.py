"""Shape rules for contrib operators, held against what ONNX Runtime really gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from onnxprune.graph.canonical import canonicalize
from onnxprune.graph.io import model_from_proto
from onnxprune.ops.shapes import SHAPES

Array = npt.NDArray[Any]
RNG = np.random.default_rng(0)


def noise(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def bytes_(*shape: int) -> Array:
    return RNG.integers(0, 255, shape).astype(np.uint8)


SCALE, ZERO = np.array(0.1, np.float32), np.array(3, np.uint8)
Q = (SCALE, ZERO)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One contrib node; all inputs are fed (None: left out)."""

    op_type: str
    inputs: Sequence[Array | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    domain: str = "com.microsoft"
    label: str = ""

    @property
    def id(self) -> str:
        return f"{self.op_type}{self.label and '-'}{self.label}"


X, W = noise(2, 3, 8, 9), noise(4, 3, 3, 3)
SEQUENCE = noise(2, 5, 8)
CASES = [
    Case(op_type="FusedConv", inputs=[X, W, noise(4)], attributes={"activation": "Relu", "pads": [1, 0, 1, 0]}),
    Case(
        op_type="FusedConv",
        inputs=[X, W],
        attributes={"activation": "Relu", "strides": [2, 3], "auto_pad": "SAME_UPPER"},
        label="same",
    ),
    Case(
        op_type="FusedConv",
        inputs=[X, W],
        attributes={"activation": "Relu", "dilations": [2, 3], "strides": [1, 2]},
        label="dilated",
    ),
    Case(
        op_type="FusedGemm",
        inputs=[noise(4, 3), noise(5, 4), noise(5)],
        attributes={"transA": 1, "transB": 1, "activation": "Relu"},
    ),
    Case(op_type="FusedMatMul", inputs=[noise(2, 4, 3), noise(2, 5, 4)], attributes={"transA": 1, "transB": 1}),
    Case(op_type="FusedMatMul", inputs=[noise(4, 2, 3), noise(2, 3, 5)], attributes={"transBatchA": 1}, label="batch"),
    Case(op_type="FusedMatMul", inputs=[noise(2, 4, 3), noise(3)], label="vector"),
    *(Case(op_type=op, inputs=[SEQUENCE]) for op in ("Gelu", "FastGelu", "QuickGelu")),
    Case(op_type="BiasGelu", inputs=[SEQUENCE, noise(8)]),
    Case(op_type="SkipLayerNormalization", inputs=[SEQUENCE, SEQUENCE, noise(8), noise(8)]),
    Case(op_type="SkipSimplifiedLayerNormalization", inputs=[SEQUENCE, SEQUENCE, noise(8)]),
    Case(op_type="SimplifiedLayerNormalization", inputs=[SEQUENCE, noise(8)], domain="", attributes={"axis": -1}),
    Case(
        op_type="EmbedLayerNormalization",
        inputs=[np.ones((2, 5), np.int32), None, noise(9, 8), noise(9, 8), None, noise(8), noise(8)],
        outputs=2,
    ),
    Case(op_type="Attention", inputs=[SEQUENCE, noise(8, 24), noise(24)], attributes={"num_heads": 2}),
    Case(
        op_type="Attention",
        inputs=[SEQUENCE, noise(8, 20), noise(20)],
        attributes={"num_heads": 2, "qkv_hidden_sizes": [8, 8, 4]},
        label="sizes",
    ),
    Case(op_type="MultiHeadAttention", inputs=[SEQUENCE, noise(2, 7, 8), noise(2, 7, 8)], attributes={"num_heads": 2}),
    Case(
        op_type="GroupQueryAttention",
        inputs=[
            noise(1, 5, 32),
            noise(1, 5, 16),
            noise(1, 5, 16),
            None,
            None,
            np.array([4], np.int32),
            np.array(5, np.int32),
        ],
        attributes={"num_heads": 4, "kv_num_heads": 2},
        outputs=3,
    ),
    Case(
        op_type="RotaryEmbedding",
        inputs=[noise(2, 5, 8), np.zeros((2, 5), np.int64), noise(10, 2), noise(10, 2)],
        attributes={"num_heads": 2},
    ),
    Case(op_type="QLinearAdd", inputs=[bytes_(2, 3, 4), *Q, bytes_(3, 1), *Q, *Q]),
    Case(op_type="QLinearMul", inputs=[bytes_(2, 3, 4), *Q, bytes_(4), *Q, *Q]),
    Case(op_type="QLinearConcat", inputs=[*Q, bytes_(2, 3, 4), *Q, bytes_(2, 5, 4), *Q], attributes={"axis": 1}),
    Case(op_type="QLinearSigmoid", inputs=[bytes_(2, 3), *Q, *Q]),
    Case(op_type="QLinearLeakyRelu", inputs=[bytes_(2, 3), *Q, *Q]),
    Case(op_type="QLinearSoftmax", inputs=[bytes_(2, 3), *Q, *Q], attributes={"opset": 13}),
    Case(op_type="QLinearWhere", inputs=[np.array([[True], [False]]), bytes_(3), *Q, bytes_(1), *Q, *Q]),
    Case(
        op_type="QLinearAveragePool",
        inputs=[bytes_(2, 3, 8, 9), *Q, *Q],
        attributes={"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 0], "ceil_mode": 1},
    ),
    Case(
        op_type="QLinearGlobalAveragePool",
        inputs=[bytes_(2, 3, 8, 9), *Q, *Q],
        attributes={"channels_last": 1},
        label="last",
    ),
    Case(op_type="QLinearGlobalAveragePool", inputs=[bytes_(2, 3, 8, 9), *Q, *Q], label="first"),
    Case(op_type="NhwcMaxPool", inputs=[bytes_(2, 8, 9, 3)], attributes={"kernel_shape": [2, 3], "strides": [2, 1]}),
    Case(op_type="QuantizeLinear", inputs=[noise(2, 3), *Q]),
    Case(op_type="DequantizeLinear", inputs=[bytes_(2, 3), *Q]),
    Case(op_type="QGemm", inputs=[bytes_(2, 3), *Q, bytes_(3, 5), *Q, None, None, None], label="float"),
    Case(
        op_type="QGemm", inputs=[bytes_(2, 3), *Q, bytes_(5, 3), *Q, None, *Q], attributes={"transB": 1}, label="bytes"
    ),
    Case(op_type="DynamicQuantizeMatMul", inputs=[noise(2, 4, 3), bytes_(3, 5), SCALE, ZERO]),
    Case(op_type="MatMulIntegerToFloat", inputs=[bytes_(2, 4, 3), bytes_(3, 5), SCALE, SCALE]),
    Case(
        op_type="MatMulNBits",
        inputs=[noise(2, 4, 32), bytes_(5, 1, 16), noise(5)],
        attributes={"K": 32, "N": 5, "bits": 4, "block_size": 32},
    ),
    Case(
        op_type="QAttention",
        inputs=[bytes_(2, 5, 8), bytes_(8, 24), noise(24), SCALE, SCALE, None, ZERO, ZERO],
        attributes={"num_heads": 2},
    ),
    Case(
        op_type="DynamicQuantizeLSTM",
        inputs=[noise(5, 2, 6), bytes_(1, 6, 16), bytes_(1, 4, 16), None, None, None, None, None]
        + [np.full(1, 0.1, np.float32), np.zeros(1, np.uint8)] * 2,
        attributes={"hidden_size": 4},
        outputs=3,
    ),
]


def model_of(case: Case) -> onnx.ModelProto:
    names = ["" if array is None else f"i{index}" for index, array in enumerate(case.inputs)]
    outputs = [f"o{index}" for index in range(case.outputs)]
    node = helper.make_node(case.op_type, names, outputs, domain=case.domain, name="node", **case.attributes)
    fed = [(name, array) for name, array in zip(names, case.inputs, strict=True) if array is not None]
    # Weights as initializers, as in real models; kernels check some of them.
    dynamic = [fed[0]]
    graph = helper.make_graph(
        [node],
        "case",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in dynamic],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in fed[1:]],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_rule_gives_the_type_and_shape_that_onnx_runtime_gives(case: Case) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    content = model_of(case).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    results = session.run(None, {"i0": next(array for array in case.inputs if array is not None)})

    proto = model_of(case)
    model = canonicalize(model_from_proto(proto, Path("model.onnx")), shape_rules=SHAPES)
    node = next(node for node in model.graph if node.name == "node")
    assert SHAPES.get(node) is not None
    for value, result in zip(node.outputs, results, strict=True):
        assert value.dtype == ir.DataType.from_numpy(result.dtype)
        if value.shape is not None:
            known = [
                dim if isinstance(dim, int) else actual for dim, actual in zip(value.shape, result.shape, strict=True)
            ]
            assert known == list(result.shape)
    # The first output is what the rest of the network hangs on.
    first = node.outputs[0].shape
    assert first is not None
    assert first.is_static()


@pytest.mark.parametrize(("attributes", "bins"), [({}, 9), ({"onesided": 0}, 16)], ids=["default", "both-sides"])
def test_short_time_transform_is_one_sided_unless_it_says_otherwise(attributes: Mapping[str, int], bins: int) -> None:
    node = helper.make_node("STFT", ["x", "step", "", "length"], ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "stft",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 128, 1])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(8), "step"), numpy_helper.from_array(np.array(16), "length")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    model = canonicalize(model_from_proto(proto, Path("model.onnx")), shape_rules=SHAPES)
    (expected,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": noise(2, 128, 1)})
    shape = model.graph.outputs[0].shape
    assert shape is not None
    assert [str(dim) for dim in shape] == ["N", *map(str, expected.shape[1:])]
    assert shape[2] == bins


def test_symbolic_dimensions_go_through_rules_by_name() -> None:
    case = Case(op_type="QLinearAdd", inputs=[bytes_(2, 3), *Q, bytes_(1, 3), *Q, *Q])
    proto = model_of(case)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    model = canonicalize(model_from_proto(proto, Path("model.onnx")), shape_rules=SHAPES)
    assert str(model.graph.outputs[0].shape) == "[batch,3]"


def test_dimension_name_that_is_an_endless_formula_costs_nothing() -> None:
    # onnx_ir would compute 9**9**9**9 if a rule did arithmetic on it.
    case = Case(op_type="NhwcMaxPool", inputs=[bytes_(2, 8, 9, 3)], attributes={"kernel_shape": [2, 3]})
    proto = model_of(case)
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "9**9**9**9"
    model = canonicalize(model_from_proto(proto, Path("model.onnx")), shape_rules=SHAPES)
    assert str(model.graph.outputs[0].shape) == "[2,None,7,3]"


def test_unknown_rank_of_an_input_stays_unknown_behind_every_rule() -> None:
    for case in CASES:
        proto = model_of(case)
        proto.graph.input[0].type.tensor_type.ClearField("shape")
        model = canonicalize(model_from_proto(proto, Path("model.onnx")), shape_rules=SHAPES)
        assert model.graph.outputs[0].dtype is not None


@pytest.mark.parametrize("opset", [18, 21, 22])
@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool"])
def test_window_of_ceil_mode_that_lies_in_the_padding_alone_is_none_in_any_opset(op_type: str, opset: int) -> None:
    node = onnx.helper.make_node(op_type, ["x"], ["y"], kernel_shape=[2], strides=[2], pads=[1, 1], ceil_mode=1)
    graph = onnx.helper.make_graph(
        [node],
        "pool",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 2, 7])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)

    model = canonicalize(ir.from_proto(proto), shape_rules=SHAPES)

    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": np.zeros((3, 2, 7), np.float32)})
    assert str(model.graph.outputs[0].shape) == f"[n,{expected.shape[1]},{expected.shape[2]}]"
