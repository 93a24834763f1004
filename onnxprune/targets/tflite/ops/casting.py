"""Conversions between element types, and operators that hand their input on."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Tensor, TensorType
from onnxprune.targets.tflite.ops.carriers import bitcast
from onnxprune.targets.tflite.ops.formulas import Term
from onnxprune.targets.tflite.ops.generation import drawn
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView, computed_type

_DROPPED_RATIO = 0.5
"""Of a Dropout that gives none."""


@TFLITE.register("Cast")
def cast(node: NodeView, build: Builder) -> Tensor:
    """CAST; nothing between floating-point types, which are all computed as FLOAT32."""
    wanted = computed_type(ir.DataType(node.integer("to")), "attribute 'to'")
    return cast_to(build, node.input(0), wanted)


@TFLITE.register("CastLike")
def cast_like(node: NodeView, build: Builder) -> Tensor:
    """CAST to the element type of the second input."""
    return cast_to(build, node.input(0), node.input(1).type)


def cast_to(build: Builder, tensor: Tensor, type_: TensorType) -> Tensor:
    """As another element type; UINT64, which CAST lacks, by way of its bits."""
    if tensor.constant is not None or tensor.type == type_ or "UINT64" not in (tensor.type, type_):
        return build.cast(tensor, type_)
    if type_ == "FLOAT32":
        return _float_of_uint64(build, tensor)
    if tensor.type == "FLOAT32":
        raise UnsupportedError("CAST has no UINT64, and INT64 does not hold all its numbers")
    if type_ == "UINT64":
        return bitcast(build, build.cast(tensor, "INT64"), "UINT64", tensor.shape)
    signed = bitcast(build, tensor, "INT64", tensor.shape)
    # CAST to BOOL compares with zero, to narrower integers it drops bits: both alike for either sign.
    return build.cast(signed, type_)


def _float_of_uint64(build: Builder, tensor: Tensor) -> Tensor:
    # Two words, the lower one first.
    words = build.cast(bitcast(build, tensor, "UINT32", (*tensor.shape, 2)), "FLOAT32")
    weights = build.constant(np.array([1, 2**32], np.float32).reshape((1,) * tensor.rank + (2,)))
    axis = build.constant(np.array([tensor.rank], np.int32))
    return build.op("SUM", [(Term(build, words) * Term(build, weights)).tensor, axis], shape=tensor.shape)


@TFLITE.register("Identity")
def identity(node: NodeView, build: Builder) -> Tensor:
    """Nothing."""
    del build
    return node.input(0)


@TFLITE.register("Dropout")
def dropout(node: NodeView, build: Builder) -> list[Tensor | None]:
    """Nothing; in training mode a MUL with what RANDOM_UNIFORM keeps, other numbers than ONNX Runtime's."""
    x, ratio = node.input(0), 0.0
    if node.has(2) and node.required_array(2, "training mode").any():
        ratio = float(node.required_array(1, "dropped ratio").reshape(())) if node.has(1) else _DROPPED_RATIO
    if not ratio:
        return [x, _true_everywhere(build, x) if node.is_read(1) else None]
    kept = Term(build, drawn(node, build, "RANDOM_UNIFORM", build.shape_of(x), x.shape)).compared(
        "GREATER_EQUAL", ratio
    )
    factor = kept.cast("FLOAT32") * (1 / (1 - ratio))
    return [(Term(build, x) * factor).tensor, kept.tensor]


def _true_everywhere(build: Builder, x: Tensor) -> Tensor:
    if x.is_static:
        return build.constant(np.ones(x.shape, np.bool_))
    return build.op("FILL", [build.shape_of(x), build.constant(np.ones((), np.bool_))], shape=x.shape, type_="BOOL")
