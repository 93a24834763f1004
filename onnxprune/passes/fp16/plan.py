"""What the user asks of `fp16`, and what it has decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnxprune.contracts import PassConfig

__all__ = ["Fp16Config", "Fp16Plan", "RoundedTensor"]

Mode = Literal["weights", "full"]


class Fp16Config(PassConfig):
    """What becomes float16."""

    mode: Mode = "weights"
    """"weights": half the size, the same float32 arithmetic. "full": arithmetic in float16 too, for hardware that has
    it (on CPUs without float16 kernels ONNX Runtime casts back and forth, which is slower)."""
    keep_io: bool = True
    """Inputs and outputs stay float32. Without it, and with mode "full", they become float16."""
    skip: tuple[str, ...] = ()
    """Globs of what stays float32: names of nodes and weights, modules with all inside them, operators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedTensor:
    """One weight that becomes float16, and what rounding does to it.

    `max_error` is absolute; `lost` counts numbers other than zero that become zero.
    """

    name: str
    max_error: float
    lost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp16Plan:
    """`float32_weights`, `float32_nodes` and `float32_io` (inputs and outputs) say why something stays.

    `float16_nodes` is empty in mode "weights".
    """

    mode: Mode
    weights: tuple[RoundedTensor, ...]
    float32_weights: dict[str, str]
    float16_nodes: tuple[str, ...]
    float32_nodes: dict[str, str]
    float32_io: dict[str, str]
