"""Scales of weights: symmetric, one for each output channel where the operator has such an axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import ActivationQuantization, WeightQuantization
from onnxprune.errors import PassError
from onnxprune.graph.weights import constant_array
from onnxprune.ops.affine import symmetric_scales
from onnxprune.ops.quant import bias_input, weight_channel_axis
from onnxprune.passes.quant.candidates import Candidate, Candidates
from onnxprune.passes.quant.weight_search import least_squares_scales

__all__ = ["LARGEST_BIAS_INTEGER", "WeightMethod", "weight_scales"]

WeightMethod: TypeAlias = Literal["minmax", "mse"]

LARGEST_BIAS_INTEGER = 2**30
"""A bias is an int32 with scale input * weight. Half of the type's range is left to the products added to it."""


def weight_scales(
    candidates: Candidates,
    activations: Mapping[str, ActivationQuantization],
    *,
    num_bits: int,
    per_channel: bool,
    method: WeightMethod = "minmax",
) -> dict[str, WeightQuantization]:
    """Scales for every constant weight of `candidates`, by initializer name.

    By "minmax", a channel's scale is its largest magnitude over 127 (for 8 bits); by "mse", the scale up to that one
    with the smallest squared error. It is larger only where the channel's bias would not fit into int32 otherwise
    (channels that pruning or training left near zero). Nodes that share a weight share its scales; where they disagree
    about the channel axis, there is one scale for the whole weight.

    Raises:
        PassError: A weight or bias holds a number that is not finite.
    """
    users: dict[ir.Value, list[Candidate]] = {}
    for item in candidates.nodes:
        if item.weight is not None:
            users.setdefault(item.weight, []).append(item)
    scales: dict[str, WeightQuantization] = {}
    for weight, items in users.items():
        array = _finite(weight, items[0])
        if array.size == 0:
            continue
        axes = {weight_channel_axis(item.node, item.row) if per_channel else None for item in items}
        axis = axes.pop() if len(axes) == 1 else None
        magnitudes = _largest_magnitudes(array, axis)
        if method == "mse":
            found = least_squares_scales(array, magnitudes, axis, num_bits)
        else:
            found = symmetric_scales(magnitudes, num_bits)
        zero_channels = magnitudes == 0
        for item in items:
            found = _widened_for_bias(found, zero_channels, item, activations)
        scales[weight.name or ""] = WeightQuantization(
            scales=tuple(float(scale) for scale in found), axis=axis, num_bits=num_bits
        )
    return scales


def _finite(value: ir.Value, item: Candidate) -> npt.NDArray[np.float32]:
    array = constant_array(value)
    if array is None or not np.isfinite([array.min(initial=0.0), array.max(initial=0.0)]).all():
        raise PassError(
            f"Cannot quantize '{item.name}' ({item.node.op_type}): its constant '{value.name}' holds NaN or infinity.",
            "Repair the model, or keep the node in float with `quant.exclude`.",
        )
    return np.asarray(array, dtype=np.float32)


def _largest_magnitudes(array: npt.NDArray[np.float32], axis: int | None) -> npt.NDArray[np.float32]:
    """One for each index of `axis`, or one in all; without a copy of the array."""
    others = tuple(dim for dim in range(array.ndim) if dim != axis) if axis is not None else None
    return np.atleast_1d(np.maximum(array.max(axis=others), -array.min(axis=others)))


def _widened_for_bias(
    scales: npt.NDArray[np.float32],
    zero_channels: npt.NDArray[np.bool_],
    item: Candidate,
    activations: Mapping[str, ActivationQuantization],
) -> npt.NDArray[np.float32]:
    bias = bias_input(item.node, item.row)
    data = item.node.inputs[0]
    given = activations.get(data.name or "") if data is not None else None
    if bias is None or given is None:
        return scales
    magnitudes = np.abs(_finite(bias[1], item)).reshape(-1).astype(np.float64)
    if scales.size == 1:
        magnitudes = np.atleast_1d(magnitudes.max(initial=0.0))
    if magnitudes.size not in (1, scales.size):
        return scales
    smallest = np.broadcast_to(magnitudes / (LARGEST_BIAS_INTEGER * given.scale), scales.shape)
    # A channel without weights is its bias alone: the finest scale that holds it.
    wanted = np.where(zero_channels & (smallest > 0), smallest, np.maximum(scales, smallest))
    return np.maximum(wanted, np.finfo(np.float32).tiny).astype(np.float32)
