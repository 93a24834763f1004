"""What a transposition costs."""

from __future__ import annotations

import math

from onnxprune.targets.tflite.graph import Shape
from onnxprune.targets.tflite.layout.axes import Permutation, identity

__all__ = ["is_reshape", "transposition_cost"]

# Of an operator more, in elements moved: a kernel's start, and passing over cached memory.
_TRANSPOSE_COST = 4096.0
_RESHAPE_COST = 64.0


def is_reshape(shape: Shape, permutation: Permutation) -> bool:
    """True when transposing `shape` moves axes of length 1 only."""
    moved = [axis for axis in permutation if shape[axis] != 1]
    return moved == sorted(moved)


def transposition_cost(shape: Shape, permutation: Permutation) -> float:
    """In elements moved; unknown dimensions count 1."""
    if permutation == identity(len(permutation)):
        return 0.0
    if is_reshape(shape, permutation):
        return _RESHAPE_COST
    return _TRANSPOSE_COST + math.prod(max(dim, 1) for dim in shape)
