"""Small models for tests, by name of what they exercise. Weights are seeded; append, don't change.

Models are plain ONNX (opset 20, IR 10) until `canonical` makes them canonical.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from onnxprune.graph.canonical import CanonicalModel, canonicalize
from onnxprune.ops.shapes import SHAPES

Shape = Sequence[int | str | None]


def proto_of(
    nodes: Sequence[onnx.NodeProto],
    *,
    inputs: Mapping[str, Shape | None],
    outputs: Mapping[str, Shape | None],
    weights: Mapping[str, npt.NDArray[Any]] | None = None,
    input_type: int = TensorProto.FLOAT,
    output_type: int = TensorProto.FLOAT,
    opset: int = 20,
) -> onnx.ModelProto:
    """A model of these nodes; every input has `input_type`, every output `output_type`."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, input_type, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, output_type, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def canonical(proto: onnx.ModelProto) -> CanonicalModel:
    """The canonical form of `proto`."""
    return canonicalize(ir.from_proto(proto), shape_rules=SHAPES)


def conv_net_proto(*, dtype: Any = np.float32, batch: int | str = "N") -> onnx.ModelProto:
    """Stem, residual block and classifier: x [N,3,8,8] -> Conv+Relu -> Conv+Add -> pool -> Gemm -> y [N,10]."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> npt.NDArray[Any]:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(dtype)

    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    proto = proto_of(
        [
            helper.make_node("Conv", ["x", "stem.weight", "stem.bias"], ["c1"], name="stem/conv", pads=[1] * 4),
            helper.make_node("Relu", ["c1"], ["r1"], name="stem/relu"),
            helper.make_node(
                "Conv", ["r1", "block.weight", "block.bias"], ["c2"], name="block/conv", pads=[1, 1, 1, 1]
            ),
            helper.make_node("Add", ["c2", "r1"], ["a1"], name="block/add"),
            helper.make_node("Relu", ["a1"], ["r2"], name="block/relu"),
            helper.make_node("GlobalAveragePool", ["r2"], ["p"], name="head/pool"),
            helper.make_node("Flatten", ["p"], ["f"], name="head/flatten"),
            helper.make_node("Gemm", ["f", "head.weight", "head.bias"], ["y"], name="head/gemm", transB=1),
        ],
        inputs={"x": [batch, 3, 8, 8]},
        outputs={"y": [batch, 10]},
        weights={
            "stem.weight": weight(16, 3, 3, 3),
            "stem.bias": weight(16),
            "block.weight": weight(16, 16, 3, 3),
            "block.bias": weight(16),
            "head.weight": weight(10, 16),
            "head.bias": weight(10),
        },
        input_type=element,
        output_type=element,
    )
    helper.set_model_props(proto, {"author": "somebody", "labels": "a,b,c"})
    return proto


def conv_net(*, dtype: Any = np.float32, batch: int | str = "N") -> CanonicalModel:
    """`conv_net_proto` in canonical form."""
    return canonical(conv_net_proto(dtype=dtype, batch=batch))
