"""Operators that ONNX Runtime writes into the models it optimizes, where they are plain compositions.

Documented in onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Tensor
from onnxprune.targets.tflite.ops.contraction import product, scaled
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

__all__: list[str] = []

_DOMAIN = "com.microsoft"


@TFLITE.register("FusedMatMul", "TransposeMatMul", domain=_DOMAIN)
def fused_matmul(node: NodeView, build: Builder) -> Tensor:
    """A product of matrices, either side transposed, times alpha."""
    left, right = node.input(0), node.input(1)
    if node.integer("transBatchA") or node.integer("transBatchB"):
        raise UnsupportedError("its batch axes are transposed")
    if min(left.rank, right.rank) < 2:
        raise UnsupportedError("one of its operands is a vector")
    if node.integer("transA"):
        left = build.transposed(left, (*range(left.rank - 2), left.rank - 1, left.rank - 2))
    alpha = node.number("alpha", 1.0)
    if right.constant is not None:
        right, alpha = scaled(build, right, alpha), 1.0
    y = product(build, left, right, is_right_transposed=bool(node.integer("transB")))
    return scaled(build, y, alpha)


@TFLITE.register("Gelu", "BiasGelu", domain=_DOMAIN)
def gelu(node: NodeView, build: Builder) -> Tensor:
    """GELU of the input and the bias, by the error function."""
    return build.op("GELU", [_with_bias(node, build)], approximate=False)


@TFLITE.register("FastGelu", domain=_DOMAIN)
def fast_gelu(node: NodeView, build: Builder) -> Tensor:
    """GELU of the input and the bias, by the hyperbolic tangent."""
    return build.op("GELU", [_with_bias(node, build)], approximate=True)


@TFLITE.register("QuickGelu", domain=_DOMAIN)
def quick_gelu(node: NodeView, build: Builder) -> Tensor:
    """The input times LOGISTIC of alpha times the input."""
    x = node.input(0)
    return build.binary("MUL", x, build.op("LOGISTIC", [scaled(build, x, node.number("alpha", 1.702))]))


def _with_bias(node: NodeView, build: Builder) -> Tensor:
    bias = node.optional(1)
    return node.input(0) if bias is None else build.binary("ADD", node.input(0), bias)
