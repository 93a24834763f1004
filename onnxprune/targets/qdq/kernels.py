"""Which operators ONNX Runtime's CPU provider computes in integers, and how they are written.

Tried with onnxruntime 1.31: every row was run from its spelled form, and the optimized graph looked at. What they cost
stands in `cost_table.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxprune.graph.weights import constant_array
from onnxprune.ops.quant import pools_everything
from onnxprune.ops.table import OpTable
from onnxprune.targets.qdq import rewrites
from onnxprune.targets.qdq.rewrites import Rewrite
from onnxprune.targets.qdq.transposed import refuse_conv_transpose

__all__ = ["FUSED_BUT_SLOW", "KERNELS", "Kernel"]

FUSED_BUT_SLOW = frozenset({"AveragePool", "Softmax"})
"""Operators that ONNX Runtime makes integer wherever they stand between DequantizeLinear and QuantizeLinear, with
kernels so slow (9 to 15 and 3 ns an element) that converting to float and back is faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One operator with an integer kernel."""

    rewrite: Rewrite = rewrites.keep_operator
    refuses: Callable[[ir.Node], str | None] = lambda _node: None
    """Why the kernel can't serve this very node; None: it can."""


KERNELS: OpTable[Kernel] = OpTable("integer kernels of ONNX Runtime")


def _constant(node: ir.Node, position: int) -> np.ndarray | None:
    return constant_array(node.inputs[position]) if position < len(node.inputs) else None


def _refuse_conv(node: ir.Node) -> str | None:
    weight = node.inputs[1]
    rank = None if weight is None or weight.shape is None else len(weight.shape)
    return None if rank in (3, 4, 5) else f"QLinearConv takes 1 to 3 spatial axes, not a weight of rank {rank}"


def _refuse_gemm(node: ir.Node) -> str | None:
    if node.attributes.get_int("transA", 0):
        return "QGemm with a transposed activation is not supported"
    if node.attributes.get_float("alpha", 1.0) != 1.0:
        return "its alpha is not 1"
    if _constant(node, 2) is not None and node.attributes.get_float("beta", 1.0) != 1.0:
        return "its beta is not 1"
    return None


def _refuse_variable_operand(node: ir.Node) -> str | None:
    operand = _constant(node, 1)
    if operand is None:
        return f"ONNX Runtime has no integer {node.op_type} of two activations"
    if node.op_type == "Div" and (not np.all(operand) or not np.isfinite(1.0 / operand).all()):
        return "its divisor has no finite reciprocal"
    return None


def _refuse_resize(node: ir.Node) -> str | None:
    if node.attributes.get_string("mode", "nearest") != "nearest":
        return "ONNX Runtime's integer interpolation truncates instead of rounding"
    return None


def _refuse_average_pool(node: ir.Node) -> str | None:
    if pools_everything(node):
        return None
    if node.attributes.get_int("ceil_mode", 0):
        return "its last windows may reach beyond the padding (ceil_mode)"
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "its padding depends on the input (auto_pad)"
    if any(node.attributes.get_ints("pads", ())) and not node.attributes.get_int("count_include_pad", 0):
        return "its windows at the border divide by another count (count_include_pad=0)"
    value = node.inputs[0]
    if value is None or value.shape is None or len(value.shape) < 3 or not isinstance(value.shape[1], int):
        return "the number of its channels is unknown"
    return None


def _refuse_long_sum(node: ir.Node) -> str | None:
    return None if len(node.inputs) == 2 else "ONNX Runtime has no integer Sum of other than two tensors"


def _refuse_unknown_rank(node: ir.Node) -> str | None:
    value = node.inputs[0]
    if value is None or value.shape is None or len(value.shape) < 3:
        return "the rank of its input is unknown or below 3"
    return None


def _refuse_hard_sigmoid(node: ir.Node) -> str | None:
    return None if node.attributes.get_float("alpha", 0.2) > 0 else "its slope is not positive"


def _register() -> None:
    KERNELS.add(Kernel(rewrite=rewrites.convolution, refuses=_refuse_conv), "Conv")
    transposed = Kernel(rewrite=rewrites.conv_transpose_as_conv, refuses=refuse_conv_transpose)
    KERNELS.add(transposed, "ConvTranspose")
    KERNELS.add(Kernel(refuses=_refuse_gemm), "Gemm")
    KERNELS.add(Kernel(), "MatMul")

    KERNELS.add(Kernel(), "Add")
    KERNELS.add(Kernel(rewrite=rewrites.sum_as_add, refuses=_refuse_long_sum), "Sum")
    KERNELS.add(Kernel(), "Mul")
    subtract = Kernel(rewrite=rewrites.subtract_as_add, refuses=_refuse_variable_operand)
    KERNELS.add(subtract, "Sub")
    divide = Kernel(rewrite=rewrites.divide_as_multiply, refuses=_refuse_variable_operand)
    KERNELS.add(divide, "Div")
    batch_norm = Kernel(rewrite=rewrites.batch_norm_as_depthwise_conv, refuses=_refuse_unknown_rank)
    KERNELS.add(batch_norm, "BatchNormalization")

    # One that no neighbour absorbed: x + 0, where the saturation of the result clips.
    KERNELS.add(Kernel(rewrite=rewrites.clip_as_add), "Relu", "Clip")
    KERNELS.add(Kernel(), "Sigmoid")
    KERNELS.add(Kernel(), "LeakyRelu")
    KERNELS.add(Kernel(), "Softmax")
    hard_sigmoid = Kernel(rewrite=rewrites.hard_sigmoid_as_add, refuses=_refuse_hard_sigmoid)
    KERNELS.add(hard_sigmoid, "HardSigmoid")
    KERNELS.add(Kernel(rewrite=rewrites.hard_swish_as_add_and_mul), "HardSwish")

    KERNELS.add(Kernel(), "GlobalAveragePool")
    KERNELS.add(Kernel(rewrite=rewrites.reduce_mean_as_global_pool), "ReduceMean")
    KERNELS.add(Kernel(), "ReduceMax")
    global_max = Kernel(rewrite=rewrites.global_max_pool_as_reduce_max, refuses=_refuse_unknown_rank)
    KERNELS.add(global_max, "GlobalMaxPool")
    KERNELS.add(Kernel(), "MaxPool")
    # QLinearAveragePool itself takes 13 ns, so it is written otherwise.
    average = Kernel(rewrite=rewrites.average_pool_as_depthwise_conv, refuses=_refuse_average_pool)
    KERNELS.add(average, "AveragePool")

    KERNELS.add(Kernel(), "Concat")
    KERNELS.add(Kernel(), "Split")
    KERNELS.add(Kernel(), "Transpose")
    KERNELS.add(Kernel(), "Slice", "Gather", "GatherElements", "Expand", "Tile")
    KERNELS.add(Kernel(), "Reshape", "Flatten", "Squeeze", "Unsqueeze")
    KERNELS.add(Kernel(rewrite=rewrites.resize_as_gathers, refuses=_refuse_resize), "Resize")
    KERNELS.add(Kernel(), "DepthToSpace")
    # These two have integer kernels that ONNX Runtime does not find behind DequantizeLinear.
    KERNELS.add(Kernel(rewrite=rewrites.keep_on_integers), "SpaceToDepth")
    KERNELS.add(Kernel(rewrite=rewrites.pad_on_integers), "Pad")


_register()
