"""Matrix products by int8 weights that stay int8 in memory: MatMulNBits of ONNX Runtime (1.22 or newer).

    x -> MatMulNBits (8 bits, blocks of 128 along the summed axis) (-> Add bias)

The kernel rounds each row of x to int8 by its own range in each block (accuracy_level 4), which follows outliers far
better than one range for the tensor, and reads a quarter of the bytes. All blocks of a column have the column's scale,
so the integers are those of every other form. ONNX Runtime finds this operator by itself for DequantizeLinear ->
MatMul, with blocks of 32: those took 1.1 to 1.6 times as long.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxprune.graph.weights import constant_array
from onnxprune.ops.quant import QUANT, bias_input
from onnxprune.targets.qdq.data_free_costs import block_wise_pays
from onnxprune.targets.qdq.dynamic import matrix_refusal
from onnxprune.targets.qdq.graph_writer import GraphWriter
from onnxprune.targets.qdq.spelling import Spelling

__all__ = ["BLOCK_SIZE", "block_wise_refusal", "write_block_wise"]

BLOCK_SIZE = 128
_INT8_ACTIVATIONS = 4
"""The accuracy_level that multiplies int8 by int8; the others unpack to float32 and take five to ten times as long."""


def block_wise_refusal(node: ir.Node, spelling: Spelling) -> str | None:
    """Why `node` does not multiply by int8 weights block by block; None: it does."""
    if node.op_type not in ("MatMul", "Gemm"):
        return f"ONNX Runtime has no {node.op_type} by int8 weights that does without ranges"
    refusal = matrix_refusal(node)
    if refusal is not None:
        return refusal
    weight = node.inputs[1]
    shape = weight.shape.numpy() if weight is not None and weight.shape is not None else (0, 0)
    summed, columns = shape[::-1] if node.attributes.get_int("transB", 0) else shape
    if block_wise_pays(summed=summed, columns=columns, spelling=spelling.name):
        return None
    if spelling.name != "x86-vnni":
        return f"whether MatMulNBits is faster than float was not measured for '{spelling.name}'"
    return "MatMulNBits would not be faster than float"


def write_block_wise(writer: GraphWriter, node: ir.Node) -> None:
    """Put MatMulNBits in the place of a MatMul or Gemm."""
    data, weight = node.inputs[0], node.inputs[1]
    if data is None or weight is None:
        raise ValueError(f"'{node.name}' lacks an input.")
    name = weight.name or "weight"
    integers, scales = writer.integers(weight, writer.plan.weights[name], for_arithmetic=True)
    # (columns, summed): blocks lie along the summed axis.
    rows = integers if node.attributes.get_int("transB", 0) else integers.T
    columns, summed = rows.shape
    num_blocks = -(-summed // BLOCK_SIZE)
    # Stored unsigned around 128, which the operator takes for granted; what fills the last block is 0.
    unsigned = np.full((columns, num_blocks * BLOCK_SIZE), 128, dtype=np.uint8)
    unsigned[:, :summed] = (rows.astype(np.int16) + 128).astype(np.uint8)
    blocks = writer.constant(unsigned.reshape(columns, num_blocks, BLOCK_SIZE), f"{name}_blocks")
    each = np.repeat(np.broadcast_to(scales, (columns,)), num_blocks).astype(np.float32)
    scale = writer.constant(each.reshape(columns, num_blocks), f"{name}_scale")
    inputs: list[ir.Value | None] = [data, blocks, scale]
    row = QUANT.get(node)
    bias = bias_input(node, row) if row is not None else None
    array = constant_array(bias[1]) if bias is not None else None
    if bias is not None and array is not None:
        full = np.ascontiguousarray(np.broadcast_to(array.reshape(-1), (columns,)))
        inputs += [None, None, writer.constant(full, f"{bias[1].name}")]
    attributes = {
        "K": summed,
        "N": columns,
        "bits": 8,
        "block_size": BLOCK_SIZE,
        "accuracy_level": _INT8_ACTIVATIONS,
    }
    outputs = writer.emit(
        "MatMulNBits",
        inputs,
        attributes,
        names=[f"{node.outputs[0].name}_product"],
        like=node,
        domain="com.microsoft",
    )
    writer.replace(node, outputs, named=outputs[0])
