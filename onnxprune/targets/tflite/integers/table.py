"""Which operators LiteRT computes in integers, and what it asks of their scales.

Sources: the LiteRT 8-bit quantization specification; what the kernels check when they are prepared; each row has been
run (`tests/unit/targets/tflite/test_integers.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from onnxprune.targets.tflite.graph import Quantization, TensorType

__all__ = ["ARITHMETIC", "MONOTONE", "MOVES", "IntegerKind"]

OutputScale: TypeAlias = Literal["own", "of the input"]

_BOTH: tuple[TensorType, ...] = ("INT8", "INT16")
_INT8: tuple[TensorType, ...] = ("INT8",)


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerKind:
    """An operator that computes. Positions are of its inputs.

    `data` are activations (or constants that stand for some); all of them and the output have one of `types`. `scale`
    of the output is its own, or must be that of the input. `fixed` is the only quantization that the output may have.
    `weight` has 8 bits and zero point 0, with one scale, or one for each index of `weight_axis`.
    """

    data: tuple[int, ...] = (0,)
    types: tuple[TensorType, ...] = _BOTH
    scale: OutputScale = "own"
    fixed: Mapping[TensorType, Quantization] = field(default_factory=dict)
    weight: int | None = None
    weight_axis: int = 0
    bias: int | None = None
    equal_scales: bool = False
    """The inputs have the scale of the output as well."""


def _fixed(scale_8: float, zero_point_8: int, scale_16: float) -> Mapping[TensorType, Quantization]:
    return {
        "INT8": Quantization(scales=(scale_8,), zero_points=(zero_point_8,)),
        "INT16": Quantization(scales=(scale_16,), zero_points=(0,)),
    }


ARITHMETIC: Mapping[str, IntegerKind] = {
    "CONV_2D": IntegerKind(weight=1, bias=2),
    "DEPTHWISE_CONV_2D": IntegerKind(weight=1, weight_axis=3, bias=2),
    "TRANSPOSE_CONV": IntegerKind(data=(2,), weight=1, bias=3),
    "FULLY_CONNECTED": IntegerKind(weight=1, bias=2),
    "BATCH_MATMUL": IntegerKind(data=(0, 1)),
    "ADD": IntegerKind(data=(0, 1)),
    "SUB": IntegerKind(data=(0, 1)),
    "MUL": IntegerKind(data=(0, 1)),
    "SQUARED_DIFFERENCE": IntegerKind(data=(0, 1), types=_INT8),
    "MEAN": IntegerKind(),
    "AVERAGE_POOL_2D": IntegerKind(scale="of the input"),
    "RESIZE_BILINEAR": IntegerKind(scale="of the input"),
    "LOGISTIC": IntegerKind(fixed=_fixed(1 / 256, -128, 1 / 32768)),
    "SOFTMAX": IntegerKind(fixed=_fixed(1 / 256, -128, 1 / 32768)),
    "TANH": IntegerKind(fixed=_fixed(1 / 128, 0, 1 / 32768)),
    "RELU": IntegerKind(),
    "RELU6": IntegerKind(),
    "RELU_N1_TO_1": IntegerKind(types=_INT8),
    "RELU_0_TO_1": IntegerKind(types=_INT8),
    "LEAKY_RELU": IntegerKind(),
    "PRELU": IntegerKind(data=(0, 1), types=_INT8),
    "HARD_SWISH": IntegerKind(types=_INT8),
    "ELU": IntegerKind(types=_INT8),
    "GELU": IntegerKind(types=_INT8),
    "EXP": IntegerKind(),
    "ABS": IntegerKind(),
    "RSQRT": IntegerKind(),
    "MAXIMUM": IntegerKind(data=(0, 1), equal_scales=True),
    "MINIMUM": IntegerKind(data=(0, 1), equal_scales=True),
}
"""By kind. What is missing computes in float32: SUM, for one, whose reference kernel gave results 151 steps off."""

MOVES: Mapping[str, tuple[int, ...] | None] = {
    "BATCH_TO_SPACE_ND": (0,),
    "BROADCAST_TO": (0,),
    "CONCATENATION": None,
    "DEPTH_TO_SPACE": (0,),
    "EXPAND_DIMS": (0,),
    "GATHER": (0,),
    "GATHER_ND": (0,),
    "MAX_POOL_2D": (0,),
    "MIRROR_PAD": (0,),
    "PACK": None,
    "PAD": (0,),
    "PADV2": (0, 2),
    "REDUCE_MAX": (0,),
    "REDUCE_MIN": (0,),
    "RESHAPE": (0,),
    "RESIZE_NEAREST_NEIGHBOR": (0,),
    "REVERSE_V2": (0,),
    "SELECT_V2": (1, 2),
    "SLICE": (0,),
    "SPACE_TO_BATCH_ND": (0,),
    "SPACE_TO_DEPTH": (0,),
    "SPLIT": (1,),
    "SPLIT_V": (0,),
    "SQUEEZE": (0,),
    "STRIDED_SLICE": (0,),
    "TILE": (0,),
    "TRANSPOSE": (0,),
    "UNPACK": (0,),
}
"""Operators that move or select numbers, with the inputs that carry them (None: all). Integers pass as they are."""

MONOTONE: Mapping[str, tuple[int, ...]] = {
    "MAXIMUM": (0, 1),
    "MINIMUM": (0, 1),
    "RELU": (0,),
    "RELU6": (0,),
    "RELU_0_TO_1": (0,),
    "RELU_N1_TO_1": (0,),
}
"""Operators that rounding can be done before instead of behind: max(round(x), round(c)) = round(max(x, c))."""
