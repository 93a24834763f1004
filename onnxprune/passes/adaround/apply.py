"""Carrying a plan out: every weight becomes exactly integer times scale, so that rounding to nearest finds it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from onnxprune.contracts import QuantizationPlan
from onnxprune.errors import PassError
from onnxprune.graph.weights import constant_array, replace_weight
from onnxprune.ops.affine import largest_symmetric_integer, quantize_array
from onnxprune.passes.adaround.plan import LayerRounding
from onnxprune.passes.layerwise.layers import add_to_bias
from onnxprune.passes.layerwise.packing import unpack_integers

__all__ = ["apply_layers"]


def apply_layers(
    model: ir.Model, layers: Iterable[LayerRounding], quantization: QuantizationPlan, *, suffix: str = ""
) -> None:
    """Round the weights of `layers` in `model`, in place, and correct their biases.

    Args:
        model: The float model, or its simulation, whose weights are rounded to nearest already.
        layers: What was decided.
        quantization: Scales.
        suffix: Of the weights' names in `model`.

    Raises:
        PassError: The plan was made for another model or another quantization.
    """
    for layer in layers:
        value = model.graph.initializers.get(layer.weight + suffix)
        planned = quantization.weights.get(layer.weight)
        array = constant_array(value)
        if value is None or array is None or planned is None or array.shape != layer.shape:
            raise PassError(
                f"The plan rounds the weight '{layer.weight}' of shape {list(layer.shape)}, which this model or its "
                "quantization does not have.",
                "Use a plan that was made for this model.",
            )
        largest = largest_symmetric_integer(planned.num_bits)
        integers = quantize_array(
            np.asarray(array, np.float32),
            planned.scales,
            axis=planned.axis,
            smallest=-largest,
            largest=largest,
            dtype=np.int16,
        )
        integers = np.clip(integers + unpack_integers(layer.steps, layer.shape), -largest, largest)
        scales = np.asarray(planned.scales, dtype=np.float32)
        if planned.axis is not None:
            scales = scales.reshape([-1 if axis == planned.axis else 1 for axis in range(array.ndim)])
        replace_weight(value, integers.astype(np.float32) * scales)
        if layer.place is not None and layer.correction:
            add_to_bias(model, layer.place, np.asarray(layer.correction))
