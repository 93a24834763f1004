"""Plans without calibration data: integer weights, and ranges of activations that each run finds itself, or none.

    mode "dynamic"       weights have scales; where a target computes a layer in integers, each run takes the range of
                         the layer's input from the numbers at hand
    mode "weight-only"   weights have scales; layers compute in float, or in what the runtime makes of integer weights

Both plan the same weights: those of `ops.stored_weights` (convolutions, matrix products, recurrent layers, tables of
embeddings) that are worth it. A weight stays float32, with the reason, when it is small (its integers, scales and the
operators behind them would take as much of the file), is not float32, or the user excludes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import QuantizationMode, QuantizationPlan, WeightQuantization
from onnxprune.errors import PassError
from onnxprune.graph.metadata import module_path
from onnxprune.graph.scope import first_match, weight_names
from onnxprune.graph.weights import constant_array
from onnxprune.ops.affine import symmetric_scales
from onnxprune.ops.stored_weights import StoredWeight, stored_weights

__all__ = ["MIN_STORED_ELEMENTS", "data_free_plan"]

MIN_STORED_ELEMENTS = 1024
"""Weights with fewer numbers stay float32: 3 KB is the most that one could save, and depthwise kernels and
classifiers of two classes, which are so small, lose most by rounding."""

# A scale is a float32; two operators and three names stand between integers and their reader.
_SCALE_BYTES = 4
_OPERATOR_BYTES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    num_bits: int
    per_channel: bool
    exclude: tuple[str, ...]


def data_free_plan(
    model: ir.Model, *, mode: QuantizationMode, num_bits: int, per_channel: bool, exclude: tuple[str, ...]
) -> QuantizationPlan:
    """Symmetric scales for the weights of the main graph, and a reason for every weight that stays float32.

    A channel's scale is its largest magnitude over 127 (for 8 bits).

    Args:
        model: Canonical, float32.
        mode: "dynamic" or "weight-only"; kept in the plan, which is otherwise the same.
        num_bits: Bits that weights use, 4 to 8.
        per_channel: One scale for each output channel, unit of a gate, or row of a table; False: one for each weight.
        exclude: Globs of nodes, weights and modules that stay float.

    Raises:
        PassError: A weight holds a number that is not finite.
    """
    settings = _Settings(num_bits=num_bits, per_channel=per_channel, exclude=exclude)
    weights: dict[str, WeightQuantization] = {}
    excluded: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for node in model.graph:
        found = stored_weights(node)
        if not found:
            continue
        names = (node.name, *weight_names(node))
        if glob := first_match(settings.exclude, *names, module_paths=(module_path(node),)):
            excluded[node.name or ""] = f"excluded by '{glob}'"
            continue
        planned = {item.value.name or "": _quantization(node, item, settings) for item in found}
        weights.update({name: entry for name, entry in planned.items() if isinstance(entry, WeightQuantization)})
        reasons = {name: entry for name, entry in planned.items() if isinstance(entry, str)}
        if len(reasons) == len(planned):
            excluded[node.name or ""] = next(iter(reasons.values()))
        else:
            skipped.update(reasons)
    return QuantizationPlan(
        activations={},
        weights=weights,
        method="largest magnitude",
        calibration_hash="",
        num_samples=0,
        mode=mode,
        skipped=skipped,
        excluded_nodes=excluded,
    )


def _quantization(node: ir.Node, item: StoredWeight, settings: _Settings) -> WeightQuantization | str:
    """The scales of a weight, or the reason why it stays float32."""
    tensor = item.value.const_value
    if tensor is None or tensor.dtype is not ir.DataType.FLOAT:
        found = "unknown" if tensor is None else tensor.dtype.name.lower()
        return f"its weight has element type {found}, not float"
    if tensor.size < MIN_STORED_ELEMENTS:
        return f"its weight has fewer than {MIN_STORED_ELEMENTS} numbers"
    axis = item.axis if settings.per_channel else None
    num_scales = 1 if axis is None else int(tensor.shape.numpy()[axis])
    if 3 * tensor.size <= _SCALE_BYTES * num_scales + _OPERATOR_BYTES:
        return f"{num_scales} scales for {tensor.size} numbers would take more than the integers save"
    array = np.asarray(constant_array(item.value))
    magnitudes = _largest_magnitudes(array, axis)
    if not np.isfinite(magnitudes).all():
        raise PassError(
            f"Cannot store the weights of '{node.name}' ({node.op_type}) as integers: '{item.value.name}' holds NaN or "
            "infinity.",
            "Repair the model, or keep the node in float with `quant.exclude`.",
        )
    scales = symmetric_scales(magnitudes, settings.num_bits)
    return WeightQuantization(scales=tuple(scales.tolist()), axis=axis, num_bits=settings.num_bits)


def _largest_magnitudes(array: npt.NDArray[np.float32], axis: int | None) -> npt.NDArray[np.float32]:
    """One for each index of `axis`, or one in all; NaN where there is one. Without a copy of the array."""
    others = tuple(dim for dim in range(array.ndim) if dim != axis) if axis is not None else None
    return np.atleast_1d(np.maximum(array.max(axis=others), -array.min(axis=others)))
