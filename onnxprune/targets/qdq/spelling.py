"""How the integers of a quantization plan are written for one kind of processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import ActivationQuantization, WeightQuantization
from onnxprune.errors import UsageError, did_you_mean
from onnxprune.ops.affine import largest_symmetric_integer
from onnxprune.targets.qdq.saturation import unsaturated_scales

__all__ = ["SPELLINGS", "TFLITE", "Spelling", "SpellingName", "find_spelling"]

SpellingName = Literal["x86-vnni", "x86", "arm64", "tflite"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """One way to write the same integers.

    `unsigned_activations` shifts integer and zero point by 128. `adds_pairs_in_16_bits` widens the scales of weights
    that could saturate there: the one exception from "the same integers everywhere". `max_weight_bits` is what any
    weight can have, whoever reads it. `runtime` is "" where the
    spelling's name says it. `keeps_operators` writes every operator as itself between DequantizeLinear and
    QuantizeLinear, for a reader that has kernels of its own.
    """

    name: SpellingName
    runtime: str = "onnxruntime"
    unsigned_activations: bool
    max_weight_bits: int = 8
    adds_pairs_in_16_bits: bool = False
    keeps_operators: bool = False
    reason: str

    @property
    def placement_target(self) -> str:
        """What placements for this spelling call their target."""
        return f"{self.runtime}-{self.name}" if self.runtime else self.name

    @property
    def activation_dtype(self) -> type[np.uint8 | np.int8]:
        """Element type of activations."""
        return np.uint8 if self.unsigned_activations else np.int8

    def zero_point(self, quantization: ActivationQuantization) -> int:
        """The plan's signed zero point in this spelling's element type."""
        return quantization.zero_point + (2 ** (quantization.num_bits - 1) if self.unsigned_activations else 0)

    def weight_bits(self, quantization: WeightQuantization) -> int:
        """Bits that this spelling gives to weights planned with `quantization`."""
        return min(quantization.num_bits, self.max_weight_bits)

    def weight_scales(self, quantization: WeightQuantization) -> npt.NDArray[np.float32]:
        """The plan's scales, widened where this spelling has fewer bits."""
        widening = largest_symmetric_integer(quantization.num_bits) / largest_symmetric_integer(
            self.weight_bits(quantization)
        )
        return (np.asarray(quantization.scales, dtype=np.float64) * widening).astype(np.float32)

    def weight_form(
        self, quantization: WeightQuantization, weight: ir.Value, array: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], int]:
        """Scales and bits for the very numbers of a weight: finer than `weight_scales` where its readers allow that.

        Args:
            quantization: What the plan has for the weight.
            weight: The weight; the nodes that read it say how its numbers meet.
            array: Its numbers.
        """
        if not self.adds_pairs_in_16_bits:
            return self.weight_scales(quantization), self.weight_bits(quantization)
        planned = np.asarray(quantization.scales, dtype=np.float32)
        bits = quantization.num_bits
        return unsaturated_scales(weight, array, planned, axis=quantization.axis, num_bits=bits), bits


SPELLINGS: dict[str, Spelling] = {
    "x86-vnni": Spelling(
        name="x86-vnni",
        unsigned_activations=True,
        reason="VPDPBUSD multiplies uint8 by int8 into 32 bits; int8 activations have no fast kernel on x86",
    ),
    "x86": Spelling(
        name="x86",
        unsigned_activations=True,
        # Two products of 255 * 127 overflow 16 bits; two of 255 * 64 don't.
        max_weight_bits=7,
        adds_pairs_in_16_bits=True,
        reason="without VNNI, VPMADDUBSW adds pairs of products in 16 bits: weights whose pairs could exceed them get "
        "wider scales, up to twice as wide",
    ),
    "arm64": Spelling(
        name="arm64",
        unsigned_activations=False,
        reason="SDOT and SMMLA multiply int8 by int8 into 32 bits",
    ),
}
"""Those of ONNX Runtime."""

TFLITE = Spelling(
    name="tflite",
    runtime="",
    unsigned_activations=False,
    keeps_operators=True,
    reason="TFLite's specification: int8 activations, symmetric int8 weights in [-127, 127], int32 biases, and fixed "
    "scales of LOGISTIC, SOFTMAX and TANH (`tflite.py` lists where a plan breaks it)",
)


def find_spelling(name: str) -> Spelling:
    """The spelling called `name`.

    Raises:
        UsageError: There is none.
    """
    known = {**SPELLINGS, TFLITE.name: TFLITE}
    spelling = known.get(name)
    if spelling is None:
        raise UsageError(f"Unknown int8 spelling '{name}'.", did_you_mean(name, list(known)))
    return spelling
