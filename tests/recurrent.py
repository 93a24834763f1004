"""A small network of embeddings, an LSTM and a matrix product, for tests of weights in all places."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxprune.contracts import CanonicalModel
from tests.builders import canonical


def embedding_lstm_head(*, direction: str = "forward", steps: int = 12) -> CanonicalModel:
    """`ids` (steps, 1) int64 -> Gather from 200 rows -> LSTM of 32 units -> MatMul and bias -> `y`."""
    rng = np.random.default_rng(21)
    directions = 2 if direction == "bidirectional" else 1

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.3).astype(np.float32)

    constants = {
        # Rows of very different magnitudes.
        "table": weight(200, 48) * np.exp(rng.standard_normal((200, 1))).astype(np.float32),
        "W": weight(directions, 128, 48),
        "R": weight(directions, 128, 32),
        "B": weight(directions, 256),
        "head": weight(32, 48),
        "bias": weight(48),
        "axis": np.array([1], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], name="embedding"),
        helper.make_node("LSTM", ["e", "W", "R", "B"], ["h", "last"], name="lstm", hidden_size=32, direction=direction),
        helper.make_node("ReduceSum", ["h", "axis"], ["s"], name="sum", keepdims=0),
        helper.make_node("MatMul", ["s", "head"], ["m"], name="product"),
        helper.make_node("Add", ["m", "bias"], ["y"], name="add"),
    ]
    graph = helper.make_graph(
        nodes,
        "recurrent",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [steps, 1])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [steps, 1, 48]),
            helper.make_tensor_value_info("last", TensorProto.FLOAT, [directions, 1, 32]),
        ],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return canonical(proto)
