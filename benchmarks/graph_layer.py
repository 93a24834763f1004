"""The graph layer's share of every pass: refreshing shapes, against the number of nodes (goal: linear)."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
from networks import write_light_network
from onnx import helper, numpy_helper

from onnxprune.convert.onnx_file import load_onnx
from onnxprune.graph.canonical import canonicalize
from onnxprune.graph.io import model_from_proto
from onnxprune.graph.shapes import refresh_shapes
from onnxprune.ops.shapes import SHAPES

LENGTHS = (50, 200, 800, 3200)


def chain(length: int, op_type: str, domain: str) -> ir.Model:
    """`length` pairs of a MatMul and an operator that ONNX infers (domain "") or does not."""
    nodes = []
    for index in range(length):
        nodes.append(helper.make_node("MatMul", [f"v{index}", f"w{index}"], [f"m{index}"]))
        nodes.append(helper.make_node(op_type, [f"m{index}"], [f"v{index + 1}"], domain=domain))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("v0", 1, ["N", 64])],
        [helper.make_tensor_value_info(f"v{length}", 1, ["N", 64])],
        [numpy_helper.from_array(np.zeros((64, 64), np.float32), f"w{index}") for index in range(length)],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return canonicalize(model_from_proto(proto, Path("model.onnx")), shape_rules=SHAPES)


def seconds(model: ir.Model) -> float:
    """Processor time of the fastest of three refreshes."""
    times = []
    for _ in range(3):
        start = time.process_time()
        refresh_shapes(model, SHAPES)
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    for op_type, domain in (("Relu", ""), ("FastGelu", "com.microsoft")):
        base = None
        for length in LENGTHS:
            taken = seconds(chain(length, op_type, domain))
            base = base or taken
            print(
                f"{op_type:9} {2 * length:5} nodes  {taken:.3f} s  {taken / base:5.1f}x for {length / LENGTHS[0]:.0f}x"
            )
    with tempfile.TemporaryDirectory() as folder:
        model = load_onnx(write_light_network("resnet50", Path(folder) / "resnet50.onnx"))
        print(f"ResNet-50 {seconds(model):.3f} s")


if __name__ == "__main__":
    main()
