"""How the integers of a quantization plan are written for one kind of processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from onnxprune.contracts import ActivationQuantization, WeightQuantization
from onnxprune.errors import UsageError, did_you_mean
from onnxprune.ops.affine import largest_symmetric_integer

__all__ = ["SPELLINGS", "Spelling", "SpellingName", "find_spelling"]

SpellingName = Literal["x86-vnni", "x86", "arm64"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """One way to write the same integers.

    `unsigned_activations` shifts integer and zero point by 128. `max_weight_bits` below the plan's widens the weights'
    scales: the one exception from "the same integers everywhere".
    """

    name: SpellingName
    unsigned_activations: bool
    max_weight_bits: int
    reason: str

    @property
    def placement_target(self) -> str:
        """What placements for this spelling call their target."""
        return f"onnxruntime-{self.name}"

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


SPELLINGS: dict[str, Spelling] = {
    "x86-vnni": Spelling(
        name="x86-vnni",
        unsigned_activations=True,
        max_weight_bits=8,
        reason="VPDPBUSD multiplies uint8 by int8 into 32 bits; int8 activations have no fast kernel on x86",
    ),
    "x86": Spelling(
        name="x86",
        unsigned_activations=True,
        # Two products of 255 * 127 overflow the 16 bits that VPMADDUBSW adds them in; two of 255 * 64 don't.
        max_weight_bits=7,
        reason="without VNNI, VPMADDUBSW adds pairs of products in 16 bits, so weights get 7 bits to stay exact",
    ),
    "arm64": Spelling(
        name="arm64",
        unsigned_activations=False,
        max_weight_bits=8,
        reason="SDOT and SMMLA multiply int8 by int8 into 32 bits",
    ),
}


def find_spelling(name: str) -> Spelling:
    """The spelling called `name`.

    Raises:
        UsageError: There is none.
    """
    spelling = SPELLINGS.get(name)
    if spelling is None:
        raise UsageError(f"Unknown int8 spelling '{name}'.", did_you_mean(name, list(SPELLINGS)))
    return spelling
