"""Layers that shall stay float beside integer ones, written so that ONNX Runtime leaves them alone.

ONNX Runtime (WeightBiasQuantization, since 1.22) takes any Conv, ConvTranspose or Gemm with float weights behind a
DequantizeLinear for one that was forgotten: it rounds weight and bias to int8 with one scale for the whole tensor, and
fuses the layer into an integer kernel where a QuantizeLinear follows. MatMul and Add become a Gemm before. The rule
asks for a DequantizeLinear with a single scale. So such a layer reads its input through one of its own with a scale
for each channel, all of them equal: the same numbers at the same cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxprune.graph.weights import constant_array
from onnxprune.targets.qdq.writer import IntegerWriter

__all__ = ["keep_float_layers_float"]

_ROUNDED_BY_RUNTIME = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def keep_float_layers_float(graph: ir.Graph, writer: IntegerWriter) -> None:
    """Every layer with float weights behind a DequantizeLinear reads one that ONNX Runtime's rule does not match.

    Where no axis has a known size above 1, the input passes through Max with the lowest float instead, which changes
    nothing and takes one pass over the tensor.
    """
    for node in list(graph):
        if node.op_type not in _ROUNDED_BY_RUNTIME or node.domain not in ("", "ai.onnx"):
            continue
        value = node.inputs[0]
        dequantize = value.producer() if value is not None else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or not _has_float_weight(node):
            continue
        scale = constant_array(dequantize.inputs[1])
        if scale is None or scale.size != 1:
            continue
        writer.start_at(node)
        axis = _widest_block_axis(dequantize.inputs[0])
        node.replace_input_with(0, writer.shield(dequantize, axis))


def _has_float_weight(node: ir.Node) -> bool:
    weight = node.inputs[1]
    return weight is not None and weight.const_value is not None and weight.dtype is ir.DataType.FLOAT


def _widest_block_axis(value: ir.Value | None) -> int | None:
    """The first axis of known size above 1: behind it lie the longest runs of numbers with one scale."""
    dims: Sequence[int | ir.SymbolicDim] = () if value is None or value.shape is None else tuple(value.shape)
    return next((axis for axis, dim in enumerate(dims) if isinstance(dim, int) and dim > 1), None)
