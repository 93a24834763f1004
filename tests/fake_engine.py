"""A quantization engine for tests: a script that behaves as FAKE_ENGINE says, and a small QDQ writer.

It is run as onnx-neural-compressor's child script is, and imports only what every environment of ours has.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

SCALE = 0.05
PROBE = {
    "python": "3.11.0",
    "missing": [],
    "versions": {"onnx-neural-compressor": "1.0", "onnxruntime": "1.31.1"},
    "files": [],
    "max_opset": 24,
    "max_ir_version": 11,
}


def qdq_of(
    model: onnx.ModelProto,
    *,
    op_types: Sequence[str] = ("Conv", "Gemm", "Add", "GlobalAveragePool", "Flatten", "Concat", "MaxPool"),
    removed: Sequence[str] = ("Relu",),
    weight_type: Any = np.int8,
    weight_axis: int | None = 0,
    scale: float = SCALE,
) -> onnx.ModelProto:
    """`model` with a pair of QuantizeLinear and DequantizeLinear around everything that `op_types` reads and makes."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    integers = {value.name for value in graph.input} & set()
    renamed: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    kinds = [("scale", np.array(scale, np.float32)), ("zero", np.array(128, np.uint8))]
    graph.initializer.extend(numpy_helper.from_array(array, f"all_{kind}") for kind, array in kinds)

    def pair(source: str, target: str) -> list[onnx.NodeProto]:
        stored = f"{target}_stored"
        return [
            helper.make_node("QuantizeLinear", [source, "all_scale", "all_zero"], [stored]),
            helper.make_node("DequantizeLinear", [stored, "all_scale", "all_zero"], [target]),
        ]

    for original in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        node.input[:] = [renamed.get(name, name) for name in node.input]
        if node.op_type in removed and node.input[0] in integers:
            renamed[node.output[0]] = node.input[0]
            continue
        if node.op_type in op_types:
            for position, name in enumerate(list(node.input)):
                if name in constants and position == 1 and constants[name].ndim > 1:
                    nodes.append(_weight(graph, name, constants[name], weight_type, weight_axis))
                    node.input[position] = nodes[-1].output[0]
                elif name not in constants and name not in integers:
                    nodes.extend(pair(name, f"{name}_{node.name}_rounded"))
                    node.input[position] = f"{name}_{node.name}_rounded"
            made = node.output[0]
            node.output[0], node.name = f"{made}_raw", f"{node.name}_quant"
            nodes.extend([node, *pair(node.output[0], made)])
            integers.add(made)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    for value in graph.output:
        if value.name in renamed:
            nodes.append(helper.make_node("Identity", [renamed[value.name]], [value.name]))
            graph.node.append(nodes[-1])
    return result


def _weight(graph: onnx.GraphProto, name: str, array: Any, weight_type: Any, axis: int | None) -> onnx.NodeProto:
    others = None if axis is None else tuple(dim for dim in range(array.ndim) if dim != axis)
    largest = np.abs(array).max(axis=others, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1.0).astype(np.float32)
    zero = 0 if weight_type == np.int8 else 128
    parts = {
        "stored": (np.round(array / scales) + zero).astype(weight_type),
        "scales": scales.reshape(-1) if axis is not None else scales.reshape(()),
        "zeros": np.full(scales.size if axis is not None else (), zero, weight_type),
    }
    graph.initializer.extend(numpy_helper.from_array(part, f"{name}_{kind}") for kind, part in parts.items())
    attributes = {} if axis is None else {"axis": axis}
    return helper.make_node("DequantizeLinear", [f"{name}_{kind}" for kind in parts], [f"{name}_dq"], **attributes)


def _quantize(behaviour: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    (folder / "job_seen.json").write_text(json.dumps(job))
    print("noise on standard output")
    model = onnx.load(folder / "model.onnx")
    if behaviour == "crash":
        ctypes.string_at(0)
    if behaviour == "hang":
        time.sleep(600)
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "fails at a node":
        message = f"failed: ValueError: no parameters for {model.graph.node[1].name} and {model.graph.input[0].name}"
        return {"error": {"type": "", "message": message, "hint": ""}}
    if behaviour == "memory":
        return {"error": {"type": "", "message": "ran out of memory", "hint": ""}}
    if behaviour == "no model":
        return {"value": {}}
    if behaviour == "no onnx":
        (folder / "quantized.onnx").write_bytes(b"not a model")
        return {"value": {}}
    if behaviour == "nan":
        onnx.save(qdq_of(model, scale=float("nan")), folder / "quantized.onnx")
        return {"value": {}}
    onnx.save(qdq_of(model), folder / "quantized.onnx")
    return {"value": {"samples": len(list((folder / "samples").iterdir()))}}


def main(folder: Path) -> None:
    """Answer the job of `folder`."""
    behaviour = os.environ.get("FAKE_ENGINE", "")
    job = json.loads((folder / "job.json").read_text())
    if job["task"] == "probe":
        changes = {
            "lacks": {"missing": ["scipy"], "versions": {}},
            "other version": {"versions": {"onnx-neural-compressor": "2.1"}},
            "old": {"max_opset": 0},
            "nonsense": {"python": 3},
        }
        answer: Any = {"value": {**PROBE, **changes.get(behaviour, {})}}
    else:
        answer = _quantize(behaviour, job, folder)
    if behaviour == "garbage":
        (folder / "answer.json").write_text("{")
        return
    if behaviour == "unknown error":
        answer = {"error": {"type": "difflib", "message": "odd", "hint": ""}}
    (folder / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
