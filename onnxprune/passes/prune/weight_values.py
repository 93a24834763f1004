"""The real numbers that a weight stands for, whatever it is stored as."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.errors import ModelError
from onnxprune.graph.names import printable
from onnxprune.graph.weights import constant_array

__all__ = ["real_values", "scales_others"]


def real_values(weight: ir.Value) -> npt.NDArray[Any]:
    """The content of an initializer; integers behind a DequantizeLinear as the real numbers that it makes of them.

    Raises:
        ModelError: The weight has no content, or holds NaN or infinity, so that nothing can be ranked.
    """
    array = constant_array(weight)
    if array is None:
        raise ModelError(f"Weight '{printable(weight.name or '')}' has no content.")
    array = _dequantized(weight, array)
    with np.errstate(invalid="ignore"):
        # Extremes show a NaN, and need no array of flags as large as the weight.
        is_finite = array.size == 0 or bool(np.isfinite(array.min()) and np.isfinite(array.max()))
    if not is_finite:
        raise ModelError(
            f"Cannot rank the channels of '{printable(weight.name or '')}': it holds values that are NaN or infinite.",
            "Look at how the model was trained or exported; pruning can't repair it.",
        )
    return array


def scales_others(weight: ir.Value) -> bool:
    """True for scales and zero points: what they are belongs to the weight that they scale."""
    uses = weight.uses()
    return bool(uses) and all(use.node.op_type in ("QuantizeLinear", "DequantizeLinear") and use.idx for use in uses)


def _dequantized(weight: ir.Value, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(q - zero_point) * scale; `array` itself where it is not quantized by constants."""
    node = next((use.node for use in weight.uses() if use.node.op_type == "DequantizeLinear" and use.idx == 0), None)
    if node is None:
        return array
    scale = constant_array(node.inputs[1])
    zero_point = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None or (zero_point is None and len(node.inputs) > 2 and node.inputs[2] is not None):
        return array
    axis = node.attributes.get_int("axis", 1)
    block = node.attributes.get_int("block_size", 0)
    real = array.astype(np.float32)
    if zero_point is not None:
        real -= _spread(zero_point, real.shape, axis, block).astype(np.float32)
    real *= _spread(scale, real.shape, axis, block).astype(np.float32)
    return real


def _spread(factors: npt.NDArray[Any], shape: tuple[int, ...], axis: int, block: int) -> npt.NDArray[Any]:
    """Scales as an array that broadcasts against `shape`: one for all, one per index of `axis`, or one per block."""
    if factors.size == 1:
        return factors.reshape(())
    if block:
        repeated = np.repeat(factors, block, axis=axis)
        return np.take(repeated, np.arange(shape[axis]), axis=axis)
    broadcast = [1] * len(shape)
    broadcast[axis] = -1
    return factors.reshape(broadcast)
