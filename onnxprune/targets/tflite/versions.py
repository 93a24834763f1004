"""The version of an operator: the lowest that has what the operator uses, so that old interpreters load the file.

Source: TensorFlow's `tools/versioning/op_version.cc`, which assigns the versions of its own converter. Two lines differ
on purpose. A 16-bit activation with 8-bit weights counts as 16 bits (the source asks for 16-bit weights, which no
converter writes, and so calls it version 1). A FULLY_CONNECTED with one scale for each unit is version 12 whatever its
activations are (the source says 4 to 6 for integer ones): one that refuses the file is better than one that may not
read all of its scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from onnxprune.targets.tflite.graph import Graph, Operator, OptionValue, Tensor, TensorType

__all__ = ["operator_version"]

_SMALL_RANK = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Use:
    """An operator with its tensors (None: left out)."""

    operator: Operator
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]

    def type(self, position: int = 0) -> TensorType | None:
        tensor = self.inputs[position] if position < len(self.inputs) else None
        return None if tensor is None else tensor.type

    def has(self, option: str, *, default: OptionValue = 0) -> bool:
        return bool(self.operator.option(option, default))

    @property
    def rank(self) -> int:
        first = self.inputs[0]
        return 0 if first is None else first.rank

    @property
    def is_per_axis(self) -> bool:
        """True when its weight, or the tensor it converts, has several scales."""
        tensors = [*self.inputs[:2], *self.outputs[:1]]
        return any(one is not None and one.quantization is not None and one.quantization.is_per_axis for one in tensors)

    @property
    def is_hybrid(self) -> bool:
        """Float activations, int8 weight."""
        return self.type() == "FLOAT32" and self.type(1) == "INT8" and self.outputs[0].type == "FLOAT32"

    @property
    def broadcasts_in_many_axes(self) -> bool:
        given = [tensor for tensor in self.inputs if tensor is not None]
        return given[0].shape != given[1].shape and max(tensor.rank for tensor in given) > _SMALL_RANK

    @property
    def is_quantized(self) -> bool:
        first = self.inputs[0]
        return first is not None and first.quantization is not None

    @property
    def multiplies_scales_to_one(self) -> bool:
        """The product of the inputs' scales is not below the output's."""
        scales = [
            tensor.quantization.scales[0]
            for tensor in (*self.inputs, *self.outputs)
            if tensor is not None and tensor.quantization is not None
        ]
        return len(scales) == 3 and scales[0] * scales[1] >= scales[2]


_Condition: TypeAlias = Callable[[_Use], bool]
_Rules: TypeAlias = tuple[tuple[_Condition, int], ...]
"""The first condition that holds decides; none: version 1."""


def _of(*types: TensorType, at: int = 0) -> _Condition:
    return lambda use: use.type(at) in types


def _rank_above(limit: int) -> _Condition:
    return lambda use: use.rank > limit


def _option(name: str) -> _Condition:
    return lambda use: use.has(name)


def _differs_from_one(*names: str) -> _Condition:
    return lambda use: any(use.operator.option(name, 1) != 1 for name in names)


_INT8: _Rules = ((_of("INT8"), 2),)
_INT8_AND_INT16: _Rules = ((_of("INT16"), 3), *_INT8)
_PAD: _Rules = ((_rank_above(_SMALL_RANK), 4), *_INT8_AND_INT16)
_MAXIMUM: _Rules = ((_of("INT16"), 4), (lambda use: use.broadcasts_in_many_axes, 3), *_INT8)
_BLOCKS: _Rules = ((_of("INT16"), 4), (lambda use: use.rank != _SMALL_RANK, 3), *_INT8)

_RULES: Mapping[str, _Rules] = {
    "CONV_2D": (
        (lambda use: use.type() == "INT16" and use.has("quantizedBiasType"), 8),
        # Fewer channels in the filter than in the input: groups.
        (lambda use: _channels(use.inputs[0]) != _channels(use.inputs[1]), 6),
        (_of("INT16"), 4),
        (_of("INT8"), 3),
        (lambda use: use.is_hybrid and use.is_per_axis, 5),
        (lambda use: use.is_hybrid, 2),
    ),
    "DEPTHWISE_CONV_2D": (
        (_of("INT16"), 5),
        (lambda use: use.is_hybrid and use.is_per_axis, 6),
        (lambda use: use.is_hybrid, 4),
        (_of("INT8"), 3),
        (_differs_from_one("dilationHFactor", "dilationWFactor"), 2),
    ),
    "TRANSPOSE_CONV": (
        # Its data are input 2, behind the output's shape and the filter.
        (lambda use: use.type(2) == "INT16" and use.has("quantizedBiasType"), 5),
        (lambda use: use.operator.option("fusedActivationFunction", "NONE") != "NONE", 4),
        (lambda use: use.type(3) is not None, 3),
        (_of("INT8", at=1), 2),
    ),
    "FULLY_CONNECTED": (
        (lambda use: use.type(1) == "INT8" and use.is_per_axis, 12),
        (lambda use: use.type() == "INT16" and use.has("quantizedBiasType"), 11),
        (_of("INT16"), 7),
        (lambda use: len(use.inputs) < 3, 6),
        (_option("keepNumDims"), 5),
        (_of("INT8"), 4),
        (lambda use: use.is_hybrid and use.has("asymmetricQuantizeInputs"), 9),
        (lambda use: use.is_hybrid, 3),
    ),
    "BATCH_MATMUL": (
        *_INT8_AND_INT16,
        (lambda use: use.is_hybrid and use.has("asymmetricQuantizeInputs"), 4),
    ),
    "GATHER": (
        (_of("INT16", at=1), 6),
        (_option("batchDims"), 5),
        (_of("INT16"), 4),
        (_of("BOOL"), 3),
        *_INT8,
    ),
    "GATHER_ND": ((_of("BOOL"), 5), (_of("INT16", at=1), 4), (_of("INT16"), 3), (_of("STRING"), 2)),
    "ADD": (
        (lambda use: use.type() == "INT16" and not use.is_quantized, 5),
        (_of("INT64"), 4),
        (lambda use: use.type() == "INT16" and not use.has("potScaleInt16", default=True), 3),
        *_INT8,
    ),
    "SUB": (
        (lambda use: use.type() == "INT16" and not use.has("potScaleInt16", default=True), 5),
        (_of("INT64"), 4),
        (lambda use: use.broadcasts_in_many_axes, 3),
        *_INT8,
    ),
    "MUL": (
        (lambda use: use.type() == "UINT32" or (use.type() == "INT16" and not use.is_quantized), 7),
        (_of("COMPLEX64"), 6),
        (_of("INT64"), 5),
        (_of("INT16"), 4),
        (lambda use: use.multiplies_scales_to_one, 3),
        *_INT8,
    ),
    "DIV": ((lambda use: use.broadcasts_in_many_axes, 2),),
    "MAXIMUM": _MAXIMUM,
    "MINIMUM": _MAXIMUM,
    "SIGN": ((_of("INT32"), 2),),
    "ABS": (
        (_of("INT32"), 5),
        (lambda use: use.type() == "INT16" and not use.is_quantized, 4),
        (_of("INT16"), 3),
        (_of("INT8", "UINT8"), 2),
    ),
    "FLOOR_DIV": ((_of("INT8", "INT16"), 3), (_of("FLOAT32"), 2)),
    "FLOOR_MOD": ((_of("INT8", "INT16"), 2),),
    "TRANSPOSE": (
        (_rank_above(5), 6),
        (_of("INT16"), 5),
        (_rank_above(_SMALL_RANK), 4),
        (_of("BOOL"), 3),
        *_INT8,
    ),
    "SPLIT": ((_of("INT16", at=1), 4), (_of("INT32", at=1), 3), (_of("INT8", at=1), 2)),
    "SLICE": (
        (_of("UINT32"), 6),
        (_rank_above(_SMALL_RANK), 5),
        (_of("INT16"), 4),
        (_of("STRING"), 3),
        *_INT8,
    ),
    "STRIDED_SLICE": (
        (_option("offset"), 8),
        (_of("UINT32"), 7),
        (lambda use: use.has("ellipsisMask") or use.has("newAxisMask"), 6),
        (_of("STRING"), 5),
        (_rank_above(_SMALL_RANK), 4),
        (_of("BOOL"), 3),
        *_INT8,
    ),
    "UNPACK": ((_of("INT8", "UINT8"), 2), (_of("BOOL"), 3), (_of("INT16"), 4)),
    "PACK": ((_of("INT8"), 2), (_of("INT16"), 3), (_of("UINT32"), 4)),
    "CONCATENATION": ((_of("UINT32"), 4), *_INT8_AND_INT16),
    "TILE": ((_of("INT8"), 3), (_of("STRING"), 2)),
    "SQUEEZE": ((_of("STRING"), 2),),
    "REVERSE_V2": ((_of("INT8"), 3), (_of("BOOL"), 2)),
    "DEQUANTIZE": (
        (_of("INT16", "FLOAT16"), 3),
        (lambda use: use.type() == "INT8" and use.is_per_axis, 5),
        *_INT8,
    ),
    "QUANTIZE": ((lambda use: use.is_per_axis, 3), (lambda use: use.outputs[0].type == "INT16", 2)),
    "RELU": ((_of("INT16"), 3), (_of("INT8", "UINT8"), 2)),
    "LEAKY_RELU": ((_of("INT16"), 2),),
    "GELU": ((_of("INT8", "UINT8"), 2),),
    "RESIZE_BILINEAR": ((_of("INT16"), 4), (_option("halfPixelCenters"), 3), *_INT8),
    "RESIZE_NEAREST_NEIGHBOR": (
        (_of("INT16"), 4),
        (lambda use: use.has("halfPixelCenters") or use.has("alignCorners"), 3),
        *_INT8,
    ),
    "SPARSE_TO_DENSE": ((_of("INT8", "UINT8", at=2), 3), (_of("INT64", at=2), 2)),
    "L2_NORMALIZATION": _INT8,
    "FILL": ((_of("FLOAT16", at=1), 4), (_of("INT8", "INT16", at=1), 3), (_of("BOOL", "STRING", at=1), 2)),
    "EQUAL": ((_of("INT16"), 4), (_of("STRING"), 3), *_INT8),
    "NOT_EQUAL": ((_of("STRING"), 3), *_INT8),
    "LESS": _INT8_AND_INT16,
    "GREATER_EQUAL": _INT8_AND_INT16,
    "RANGE": ((_of("INT64"), 2),),
    "ARG_MAX": ((_of("BOOL"), 3), *_INT8),
    "ARG_MIN": ((_of("BOOL"), 3), *_INT8),
    "SELECT": (
        (_of("UINT32"), 4),
        (lambda use: any(tensor is not None and tensor.rank == 5 for tensor in use.inputs), 3),
        *_INT8,
    ),
    "SELECT_V2": ((_of("UINT32"), 2),),
    "TOPK_V2": ((lambda use: use.type() == "INT16" or use.type(1) == "INT16", 3), *_INT8),
    "BROADCAST_TO": ((_of("INT8", "INT16"), 3), (lambda _use: True, 2)),
    "CAST": (
        (lambda use: use.type() == "BFLOAT16" or use.outputs[0].type == "BFLOAT16", 7),
        (lambda use: bool({use.type(), use.outputs[0].type} & {"FLOAT64", "FLOAT16"}), 5),
        (lambda use: "UINT16" in (use.type(), use.outputs[0].type), 4),
        (lambda use: "INT8" in (use.type(), use.outputs[0].type), 3),
        (lambda use: "UINT32" in (use.type(), use.outputs[0].type), 2),
    ),
    "WHERE": ((lambda use: use.type() != "BOOL", 2),),
    "PAD": _PAD,
    "PADV2": _PAD,
    "SPACE_TO_BATCH_ND": _BLOCKS,
    "BATCH_TO_SPACE_ND": _BLOCKS,
    **dict.fromkeys(("EXP", "LOG", "REDUCE_PROD"), ((_of("INT8", "INT16"), 2),)),
    **dict.fromkeys(
        (
            "AVERAGE_POOL_2D", "LOGISTIC", "MAX_POOL_2D", "MEAN", "MIRROR_PAD", "REDUCE_MAX", "REDUCE_MIN", "RELU6",
            "RSQRT", "SOFTMAX", "TANH",
        ),
        _INT8_AND_INT16,
    ),
    **dict.fromkeys(
        (
            "DEPTH_TO_SPACE", "GREATER", "LESS_EQUAL", "LOG_SOFTMAX", "SPACE_TO_DEPTH", "SPLIT_V",
            "SQUARED_DIFFERENCE", "SUM",
        ),
        _INT8,
    ),
}  # fmt: skip


def operator_version(operator: Operator, graph: Graph) -> int:
    """The version to write for `operator`, whose tensors stand in `graph`."""
    use = _Use(
        operator=operator,
        inputs=tuple(graph.tensors[name] if name else None for name in operator.inputs),
        outputs=tuple(graph.tensors[name] for name in operator.outputs),
    )
    return next((version for condition, version in _RULES.get(operator.kind, ()) if condition(use)), 1)


def _channels(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.shape[-1]
