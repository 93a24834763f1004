"""Models with more nodes behind each other than Python has stack frames, and formulas that are not found twice."""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

pytest.importorskip("ai_edge_litert")

from onnxprune.targets.tflite.emit import emit
from onnxprune.targets.tflite.layout import forms
from tests.tflite_runs import emitted, kinds

MORE_THAN_FRAMES = sys.getrecursionlimit() + 200


def model(nodes: list[onnx.NodeProto], **weights: np.ndarray) -> onnx.ModelProto:
    """`x` (1, 2, 2, 2) -> `y`."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 2, 2, 2])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def activations_between_flattening_and_product() -> onnx.ModelProto:
    """The columns of the weight are looked for behind all of the activations."""
    nodes = [helper.make_node("Conv", ["x", "kernel"], ["conv"]), helper.make_node("Flatten", ["conv"], ["t0"])]
    nodes += [
        helper.make_node(("Tanh", "Relu")[step % 2], [f"t{step}"], [f"t{step + 1}"]) for step in range(MORE_THAN_FRAMES)
    ]
    nodes.append(helper.make_node("Gemm", [f"t{MORE_THAN_FRAMES}", "weight"], ["y"]))
    return model(nodes, kernel=np.ones((3, 2, 1, 1), np.float32), weight=np.ones((12, 5), np.float32))


def products() -> onnx.ModelProto:
    """The factors of HARD_SWISH are looked for in all of the products."""
    nodes = [helper.make_node("Tanh", ["x"], ["t0"])]
    nodes += [helper.make_node("Mul", [f"t{step}", "x"], [f"t{step + 1}"]) for step in range(MORE_THAN_FRAMES)]
    nodes.append(helper.make_node("HardSigmoid", ["x"], ["gate"], alpha=1 / 6))
    nodes.append(helper.make_node("Mul", [f"t{MORE_THAN_FRAMES}", "gate"], ["y"]))
    return model(nodes)


@pytest.mark.parametrize("build", [activations_between_flattening_and_product, products])
def test_model_of_more_nodes_than_stack_frames_is_emitted(build: Callable[[], onnx.ModelProto]) -> None:
    assert len(kinds(emitted(build()))) > MORE_THAN_FRAMES


def test_powers_of_powers_are_not_multiplied_out_in_search_of_a_formula() -> None:
    # 3^40 products: this test would not end.
    nodes = [helper.make_node("Tanh", ["x"], ["t0"])]
    nodes += [helper.make_node("Pow", [f"t{step}", "three"], [f"t{step + 1}"]) for step in range(40)]
    nodes.append(helper.make_node("HardSigmoid", ["x"], ["gate"], alpha=1 / 6))
    nodes.append(helper.make_node("Mul", ["t40", "gate"], ["y"]))

    assert "HARD_SWISH" not in kinds(emitted(model(nodes, three=np.array(3, np.float32))))


def test_tensor_that_all_layers_read_is_offered_to_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    offered: list[int] = []

    def count(heap: list[object], offer: object) -> None:
        offered[-1] += 1
        heapq.heappush(heap, offer)

    monkeypatch.setattr(forms, "heappush", count)
    for layers in (20, 40):
        offered.append(0)
        nodes = []
        for layer in range(layers):
            before, after = f"t{layer}" if layer else "x", f"t{layer + 1}" if layer < layers - 1 else "y"
            nodes.append(helper.make_node("Conv", [before, "kernel"], [f"c{layer}"]))
            nodes.append(helper.make_node("Mul", [f"c{layer}", "shared"], [f"m{layer}"]))
            nodes.append(helper.make_node("Add", [f"m{layer}", "shared"], [f"a{layer}"]))
            nodes.append(helper.make_node("Relu", [f"a{layer}"], [after]))
        weights = {"kernel": np.ones((2, 2, 1, 1), np.float32), "shared": np.full((1, 2, 1, 1), 2, np.float32)}
        # As it is: the canonical form has no product that follows a convolution.
        emit(ir.from_proto(onnx.shape_inference.infer_shapes(model(nodes, **weights))))

    assert offered[1] <= 2 * offered[0] + 20
