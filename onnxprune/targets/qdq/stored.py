"""int8 weights of layers that compute in float.

    form "folded"   int8 -> Cast -> Mul with the scales -> layer.  ONNX Runtime computes this once, when it loads the
                    model, and then has the float model: the file is a quarter, latency and memory are those of float.
    form "kept"     int8 -> DequantizeLinear -> layer.  ONNX Runtime never folds this operator: it runs each time, and
                    the layer loses the layouts that constant weights are brought into (0.4x to 1.3x on single
                    convolutions). For files that are optimized before they are stored, where the other form would be
                    folded into float32 again.

Rows of a table are picked as integers and only those are multiplied, in both forms:

    Gather(int8 table) -> Cast -> Mul with Gather(scales)
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import onnx_ir as ir

from onnxprune.contracts import WeightQuantization
from onnxprune.ops.stored_weights import StoredWeight, stored_weights
from onnxprune.targets.qdq.graph_writer import GraphWriter

__all__ = ["StorageForm", "store_weights"]

StorageForm: TypeAlias = Literal["folded", "kept"]


def store_weights(writer: GraphWriter, node: ir.Node, form: StorageForm) -> None:
    """Let `node` read every weight that the plan has scales for from int8 integers; it computes in float as before."""
    for weight in stored_weights(node):
        planned = writer.plan.weights.get(weight.value.name or "")
        if planned is None:
            continue
        if node.op_type == "Gather":
            _pick_integers(writer, node, weight, planned)
            return
        real = _folded(writer, node, weight, planned) if form == "folded" else _kept(writer, node, weight, planned)
        real.type, real.shape = weight.value.type, weight.value.shape
        for position, value in enumerate(node.inputs):
            if value is weight.value:
                node.replace_input_with(position, real)


def _folded(writer: GraphWriter, node: ir.Node, weight: StoredWeight, planned: WeightQuantization) -> ir.Value:
    name = weight.value.name or "weight"
    integers, scales = writer.integers(weight.value, planned, for_arithmetic=False)
    shape = [1] * integers.ndim
    if planned.axis is not None:
        shape[planned.axis] = -1
    stored = writer.constant(integers, f"{name}_quantized")
    real = writer.to_float(stored, f"{name}_float", like=node)
    scale = writer.constant(scales.reshape(shape), f"{name}_scale")
    (scaled,) = writer.emit("Mul", [real, scale], names=[f"{name}_dequantized"], like=node)
    return scaled


def _kept(writer: GraphWriter, node: ir.Node, weight: StoredWeight, planned: WeightQuantization) -> ir.Value:
    name = weight.value.name or "weight"
    integers, scales = writer.integers(weight.value, planned, for_arithmetic=False)
    stored = writer.constant(integers, f"{name}_quantized")
    scale = writer.constant(scales if planned.axis is not None else scales.reshape(()), f"{name}_scale")
    attributes = {"axis": planned.axis} if planned.axis is not None else {}
    (real,) = writer.emit("DequantizeLinear", [stored, scale], attributes, names=[f"{name}_dequantized"], like=node)
    return real


def _pick_integers(writer: GraphWriter, node: ir.Node, weight: StoredWeight, planned: WeightQuantization) -> None:
    name = weight.value.name or "table"
    integers, scales = writer.integers(weight.value, planned, for_arithmetic=False)
    rows = node.inputs[1]
    table = writer.constant(integers, f"{name}_quantized")
    (picked,) = writer.emit("Gather", [table, rows], names=[f"{name}_picked"], like=node)
    real = writer.to_float(picked, f"{name}_float", like=node)
    if planned.axis is None:
        scale = writer.constant(scales.reshape(()), f"{name}_scale")
    else:
        # One scale for each row of the table: (rows, 1, ...), so that what is picked broadcasts over the row.
        columns = writer.constant(scales.reshape(-1, *[1] * (integers.ndim - 1)), f"{name}_scale")
        (scale,) = writer.emit("Gather", [columns, rows], names=[f"{name}_picked_scale"], like=node)
    scaled = writer.emit("Mul", [real, scale], names=[f"{name}_dequantized"], like=node)
    writer.replace(node, scaled, named=picked)
