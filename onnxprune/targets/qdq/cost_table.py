"""What operators and conversions cost by the table: nanoseconds on one core, for the choice between float and integers.

    time = NODE_NS for each operator that ONNX Runtime runs + figure * elements (of the largest tensor)

The fixed part decides small tensors: whatever an operator does, it took 2 to 3 us up to some 2,000 elements. Figures
were measured with onnxruntime 1.31 at 50,000 and 800,000 elements, in the layouts that the optimizer chooses.

    x86-vnni   x86 server with AVX-512 VNNI
    x86        x86 server with AVX2
    arm64      no figures of its own: those of x86

Operators with weights have none: they are what int8 is there for, and are integer wherever they can be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxprune.ops.planned import PlannedNode
from onnxprune.targets.qdq.gelu import is_bias_of_gelu
from onnxprune.targets.qdq.spelling import SpellingName, find_spelling

__all__ = ["FIGURES", "Figure", "Figures", "TableCosts", "num_elements"]

NODE_NS = 2500.0
# Integers round each result to 8 bits, and the figures are no more exact than this: a draw goes to float. So the
# residual sums of transformers, which cost the same either way, stay exact.
INTEGER_HANDICAP = 1.15


@dataclass(frozen=True, slots=True)
class Figure:
    """Nanoseconds an element in float and in integers, and how many operators the integer form takes."""

    float_ns: float
    int_ns: float
    int_nodes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The figures of one kind of processor."""

    quantize_ns: float
    dequantize_ns: float
    operators: Mapping[str, Figure]


# Reshape and its like only rename the memory, and take no time worth counting.
_MOVES_NOTHING = dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), Figure(0, 0, 0))
_SELECTS = ("Slice", "Gather", "GatherElements", "Expand", "Tile")

_AVX2 = Figures(
    quantize_ns=0.30,
    dequantize_ns=0.16,
    operators={
        **dict.fromkeys(("Add", "Sum", "Sub"), Figure(0.19, 0.18)),
        **dict.fromkeys(("Mul", "Div"), Figure(0.20, 0.28)),
        "BatchNormalization": Figure(0.17, 0.5),
        **dict.fromkeys(("Relu", "Clip"), Figure(0.18, 0.12)),
        "Sigmoid": Figure(0.37, 0.33),
        "LeakyRelu": Figure(0.21, 0.33),
        "Softmax": Figure(0.76, 3.0),
        "HardSigmoid": Figure(0.18, 0.18),
        "HardSwish": Figure(0.35, 0.46, 2),
        "GlobalAveragePool": Figure(0.25, 0.10),
        "ReduceMean": Figure(0.14, 0.10),
        **dict.fromkeys(("ReduceMax", "GlobalMaxPool"), Figure(0.12, 0.05)),
        # The integer MaxPool is fast only in the channels-last form that ONNX Runtime gives it next to convolutions
        # (6 ns otherwise).
        "MaxPool": Figure(0.34, 0.19),
        "AveragePool": Figure(0.9, 0.86),
        "Concat": Figure(0.35, 0.11),
        "Split": Figure(0.18, 0.06),
        "Transpose": Figure(0.18, 0.08),
        **dict.fromkeys(_SELECTS, Figure(0.10, 0.04)),
        "Resize": Figure(0.7, 1.2),
        "DepthToSpace": Figure(2.2, 1.4),
        "SpaceToDepth": Figure(0.40, 0.48),
        "Pad": Figure(0.33, 0.27),
        **_MOVES_NOTHING,
    },
)

_AVX512_VNNI = Figures(
    quantize_ns=0.12,
    dequantize_ns=0.11,
    operators={
        **_AVX2.operators,
        **dict.fromkeys(("Add", "Sum", "Sub"), Figure(0.16, 0.15)),
        **dict.fromkeys(("Mul", "Div"), Figure(0.16, 0.22)),
        # As a depthwise convolution of 1x1.
        "BatchNormalization": Figure(0.12, 0.18),
        **dict.fromkeys(("Relu", "Clip"), Figure(0.10, 0.10)),
        "Sigmoid": Figure(0.30, 0.25),
        "LeakyRelu": Figure(0.17, 0.25),
        "Softmax": Figure(0.76, 3.0),
        "HardSigmoid": Figure(0.15, 0.10),
        "HardSwish": Figure(0.30, 0.32, 2),
        "GlobalAveragePool": Figure(0.16, 0.04),
        "ReduceMean": Figure(0.11, 0.04),
        **dict.fromkeys(("ReduceMax", "GlobalMaxPool"), Figure(0.08, 0.03)),
        "AveragePool": Figure(0.50, 0.43),
        "Concat": Figure(0.23, 0.06),
        "Split": Figure(0.10, 0.04),
        "Transpose": Figure(0.20, 0.06),
        **dict.fromkeys(_SELECTS, Figure(0.05, 0.03)),
        "Resize": Figure(0.30, 0.10, 2),
        "DepthToSpace": Figure(1.85, 1.10),
    },
)

FIGURES: dict[SpellingName, Figures] = {"x86-vnni": _AVX512_VNNI, "x86": _AVX2, "arm64": _AVX2}


class TableCosts:
    """Costs of a planned node and of conversions on the processor of one spelling; infinite forbids."""

    def __init__(self, spelling: SpellingName) -> None:
        self._figures = FIGURES[find_spelling(spelling).name]

    def float_ns(self, planned: PlannedNode) -> float:
        """The node, and what it absorbs, in float; infinite for an operator with weights.

        A bias before a float GELU costs nothing: ONNX Runtime takes it into the GELU.
        """
        if planned.row.is_compute:
            return math.inf
        if is_bias_of_gelu(planned.node):
            return 0.0
        figure = self._figures.operators[planned.node.op_type]
        activation_nodes = 0 if planned.absorbed is None else 1
        fixed_ns = NODE_NS * ((1 if figure.int_nodes else 0) + activation_nodes)
        return fixed_ns + figure.float_ns * _node_elements(planned)

    def integer_ns(self, planned: PlannedNode) -> float:
        """The same in integers, without conversions, and with the handicap."""
        if planned.row.is_compute:
            return 0.0
        figure = self._figures.operators[planned.node.op_type]
        time_ns = NODE_NS * figure.int_nodes + figure.int_ns * _node_elements(planned)
        return INTEGER_HANDICAP * time_ns

    def quantize_ns(self, value: ir.Value) -> float:
        """One QuantizeLinear of a tensor."""
        return NODE_NS + self._figures.quantize_ns * num_elements(value)

    def dequantize_ns(self, value: ir.Value) -> float:
        """One DequantizeLinear of a tensor."""
        return NODE_NS + self._figures.dequantize_ns * num_elements(value)


def num_elements(value: ir.Value) -> int:
    """Elements of one sample; 1 where the shape is not known."""
    if value.shape is None:
        return 1
    return math.prod(dim for dim in value.shape if isinstance(dim, int)) or 1


def _node_elements(planned: PlannedNode) -> int:
    return max(num_elements(value) for value in (*planned.inputs, *planned.outputs))
