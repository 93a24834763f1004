"""Which number each bias is to be corrected by, and whether that helps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import CalibrationSource, PassContext, QuantizationPlan
from onnxprune.graph.metadata import module_path
from onnxprune.graph.scope import first_match, require_scopes, weight_names
from onnxprune.graph.weights import constant_array
from onnxprune.ops.planned import PlannedNode
from onnxprune.passes.bias_correction.config import BiasCorrectionConfig
from onnxprune.passes.bias_correction.estimate import MeanError, analytic_error, mean_after_batchnorm, rms
from onnxprune.passes.bias_correction.plan import BiasCorrectionPlan, LayerCorrection
from onnxprune.passes.layerwise.gain import judge_step
from onnxprune.passes.layerwise.layers import (
    BiasPlace,
    add_to_bias,
    bias_limits,
    bias_of,
    find_bias,
    nodes_by_name,
    planned_layers,
)
from onnxprune.passes.layerwise.matrices import channel_axis_of_output, layer_matrix
from onnxprune.passes.layerwise.samples import SampleSplit, split_samples
from onnxprune.passes.layerwise.statistics import ChannelStatistics, channel_statistics
from onnxprune.passes.layerwise.stepwise import StepwiseModel, samples_that_fit
from onnxprune.passes.quant.simulate import round_weight, simulated

__all__ = ["decide"]

Vector = npt.NDArray[np.float64]

_ROUNDED_ALREADY = "its weight is on the grid already (`adaround` rounds weights and corrects biases in one)"
_NO_MEANS = (
    "nothing is known about the mean of its input: there are no calibration data, and no BatchNormalization stands "
    "before it"
)


def decide(
    model: ir.Model, quantization: QuantizationPlan, config: BiasCorrectionConfig, context: PassContext
) -> BiasCorrectionPlan:
    """Corrections for every integer layer that has a place for a bias."""
    require_scopes(model, config.exclude, of="`exclude` of pass 'bias-correction'")
    places: dict[str, BiasPlace] = {}
    skipped: dict[str, str] = {}
    layers = []
    for item in planned_layers(model, quantization):
        name = item.node.name or ""
        glob = first_match(config.exclude, name, *weight_names(item.node), module_paths=(module_path(item.node),))
        place = f"excluded by '{glob}'" if glob else _on_grid(item, quantization) or find_bias(item.node)
        if isinstance(place, str):
            skipped[name] = place
        else:
            places[name] = place
            layers.append(item)
    split = _split(model, context.calibration, config) if context.calibration is not None else None
    plans = [
        _judged(
            model,
            quantization,
            _plan_of(method, model, quantization, layers, places, split, context, skipped),
            split,
            context,
        )
        for method in _methods(config, split)
    ]
    best = max(plans, key=lambda plan: plan.gain.after_db if plan.gain is not None else -math.inf)
    if best.gain is None or not best.gain.is_worse:
        return best
    return replace(best, corrections=(), is_undone=True)


def _on_grid(item: PlannedNode, quantization: QuantizationPlan) -> str | None:
    """A reason to leave a layer alone whose weight rounding does not change: what it was before is not known here."""
    weight = constant_array(item.weight)
    if weight is None or item.weight is None or not weight.any():
        return None
    rounded = round_weight(weight, quantization.weights[item.weight.name or ""])
    return _ROUNDED_ALREADY if np.array_equal(weight, rounded) else None


def _methods(config: BiasCorrectionConfig, split: SampleSplit | None) -> tuple[Literal["data", "analytic"], ...]:
    if config.method != "auto":
        return (config.method,)
    return ("data", "analytic") if split is not None else ("analytic",)


def _plan_of(
    method: Literal["data", "analytic"],
    model: ir.Model,
    quantization: QuantizationPlan,
    layers: list[PlannedNode],
    places: dict[str, BiasPlace],
    split: SampleSplit | None,
    context: PassContext,
    skipped: dict[str, str],
) -> BiasCorrectionPlan:
    own_skips = dict(skipped)
    if method == "data" and split is not None:
        found = _from_data(model, quantization, layers, places, split, context)
    else:
        found = _analytic(model, quantization, layers, places, split, context, own_skips)
    return BiasCorrectionPlan(method=method, corrections=tuple(found), skipped=own_skips)


def _judged(
    model: ir.Model,
    quantization: QuantizationPlan,
    plan: BiasCorrectionPlan,
    split: SampleSplit | None,
    context: PassContext,
) -> BiasCorrectionPlan:
    if split is None or not plan.corrections:
        return plan
    corrected = model.clone()
    for layer in plan.corrections:
        add_to_bias(corrected, layer.place, np.asarray(layer.correction))
    gain = judge_step(model, corrected, quantization, split.judge, context, measured_on=split.judged_on)
    return replace(plan, gain=gain)


def _split(model: ir.Model, source: CalibrationSource, config: BiasCorrectionConfig) -> SampleSplit:
    return split_samples(source, max_samples=samples_that_fit(model, config.num_samples))


def _from_data(
    model: ir.Model,
    quantization: QuantizationPlan,
    layers: list[PlannedNode],
    places: dict[str, BiasPlace],
    split: SampleSplit,
    context: PassContext,
) -> list[LayerCorrection]:
    """Layer by layer in graph order: an error that an earlier layer's correction has removed is not seen again."""
    rounded = simulated(model, quantization)
    nodes = nodes_by_name(rounded)
    exact = StepwiseModel(model, split.fit, custom_op_libraries=context.custom_op_libraries)
    integer = StepwiseModel(rounded, split.fit, custom_op_libraries=context.custom_op_libraries)
    found = []
    for item in context.progress.track(layers, "Correcting biases", len(layers)):
        name = item.node.name or ""
        twin = nodes[name]
        exact.advance(_name_of_input(item.node))
        integer.advance(_name_of_input(twin))
        place = places[name]
        error = MeanError(place.channels)
        outputs = zip(
            exact.peek(item.node.outputs[0].name or ""), integer.peek(twin.outputs[0].name or ""), strict=True
        )
        for reference, actual in outputs:
            error.add(reference, actual, channel_axis_of_output(item.node))
        correction = _that_fits(item, quantization, model, place, error.correction)
        if correction.any():
            add_to_bias(rounded, place, correction)
            found.append(_layer_correction(name, place, correction, error.mean))
    return found


def _analytic(
    model: ir.Model,
    quantization: QuantizationPlan,
    layers: list[PlannedNode],
    places: dict[str, BiasPlace],
    split: SampleSplit | None,
    context: PassContext,
    skipped: dict[str, str],
) -> list[LayerCorrection]:
    statistics: dict[str, ChannelStatistics] = {}
    if split is not None:
        tensors = {_name_of_input(item.node): channel_axis_of_output(item.node) for item in layers}
        statistics = channel_statistics(model, tensors, split.fit, custom_op_libraries=context.custom_op_libraries)
    found = []
    for item in context.progress.track(layers, "Correcting biases", len(layers)):
        name = item.node.name or ""
        matrix = layer_matrix(item.node)
        weight = constant_array(item.weight)
        known = statistics.get(_name_of_input(item.node))
        means = known.mean if known is not None else mean_after_batchnorm(item.node.inputs[0])
        if isinstance(matrix, str) or weight is None or item.weight is None:
            skipped[name] = str(matrix)
            continue
        if means is None:
            skipped[name] = _NO_MEANS
            continue
        rounded = round_weight(weight, quantization.weights[item.weight.name or ""])
        error = analytic_error(matrix, weight, rounded, means)
        correction = _that_fits(item, quantization, model, places[name], error)
        if correction.any():
            found.append(_layer_correction(name, places[name], correction, error))
    return found


def _that_fits(
    item: PlannedNode, quantization: QuantizationPlan, model: ir.Model, place: BiasPlace, correction: Vector
) -> Vector:
    """`correction`, with 0 where the bias would not fit into int32 any more."""
    bias = bias_of(nodes_by_name(model), place)
    return np.where(np.abs(bias + correction) <= bias_limits(item, quantization, place.channels), correction, 0.0)


def _layer_correction(name: str, place: BiasPlace, correction: Vector, error: Vector) -> LayerCorrection:
    return LayerCorrection(
        layer=name,
        place=place,
        correction=tuple(float(np.float32(number)) for number in correction),
        mean_error=rms(error),
    )


def _name_of_input(node: ir.Node) -> str:
    value = node.inputs[0]
    return value.name or "" if value is not None else ""
