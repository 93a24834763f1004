"""Layer by layer, which integers the weights become, and whether that helps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import PassContext, QuantizationPlan
from onnxprune.errors import PreconditionError
from onnxprune.graph.metadata import module_path
from onnxprune.graph.scope import first_match, require_scopes, weight_names
from onnxprune.graph.weights import constant_array
from onnxprune.ops.affine import largest_symmetric_integer
from onnxprune.ops.planned import PlannedNode
from onnxprune.ops.quant import bias_input, clip_bounds
from onnxprune.passes.adaround.apply import apply_layers
from onnxprune.passes.adaround.case import LayerCase, build_case
from onnxprune.passes.adaround.config import AdaRoundConfig
from onnxprune.passes.adaround.gptq import descend, fitted_target, gptq, nearest, second_moments
from onnxprune.passes.adaround.learned import learn_rounding
from onnxprune.passes.adaround.plan import AdaRoundPlan, LayerRounding
from onnxprune.passes.layerwise.gain import judge_step
from onnxprune.passes.layerwise.layers import (
    BiasPlace,
    bias_limits,
    bias_of,
    find_bias,
    nodes_by_name,
    planned_layers,
)
from onnxprune.passes.layerwise.matrices import LayerMatrix, layer_matrix
from onnxprune.passes.layerwise.packing import pack_integers
from onnxprune.passes.layerwise.samples import split_samples
from onnxprune.passes.layerwise.stepwise import StepwiseModel, samples_that_fit
from onnxprune.passes.quant.simulate import simulated

__all__ = ["MAX_INPUTS", "decide"]

Array = npt.NDArray[Any]

MAX_INPUTS = 6144
"""A layer with more inputs would need gigabytes for its second moments; it is rounded to nearest."""

RIDGES = (1.0, 0.1)
"""Ridges for the target, relative to H's mean diagonal; the float weight is a target too, and the best counts."""


def decide(
    model: ir.Model, quantization: QuantizationPlan, config: AdaRoundConfig, context: PassContext
) -> AdaRoundPlan:
    """Roundings for every integer layer that can be written as a matrix product.

    Raises:
        PreconditionError: The run has no calibration data.
    """
    if context.calibration is None:
        raise PreconditionError("Rounding is fitted to calibration data, but the run has none.")
    require_scopes(model, config.exclude, of="`exclude` of pass 'adaround'")
    skipped: dict[str, str] = {}
    layers: list[tuple[PlannedNode, LayerMatrix]] = []
    for item in planned_layers(model, quantization):
        found = _geometry(item, config)
        if isinstance(found, str):
            skipped[item.node.name or ""] = found
        else:
            layers.append((item, found))
    split = split_samples(context.calibration, max_samples=samples_that_fit(model, config.num_samples))
    rounder = _Rounder(model, quantization, config, context)
    rounder.start(split.fit)
    roundings = [
        rounder.round(item, matrix) for item, matrix in context.progress.track(layers, "Rounding weights", len(layers))
    ]
    plan = AdaRoundPlan(method=config.method, layers=tuple(roundings), skipped=skipped)
    if not roundings:
        return plan
    changed = model.clone()
    apply_layers(changed, roundings, quantization)
    gain = judge_step(model, changed, quantization, split.judge, context, measured_on=split.judged_on)
    return replace(plan, gain=gain, is_undone=gain.is_worse, layers=() if gain.is_worse else plan.layers)


def _geometry(item: PlannedNode, config: AdaRoundConfig) -> LayerMatrix | str:
    node = item.node
    glob = first_match(config.exclude, node.name, *weight_names(node), module_paths=(module_path(node),))
    if glob:
        return f"excluded by '{glob}'"
    found = layer_matrix(node)
    if isinstance(found, LayerMatrix) and found.inputs > MAX_INPUTS:
        return f"it has {found.inputs} inputs, more than the {MAX_INPUTS} that rounding is fitted for"
    return found


class _Rounder:
    """The float model and its integer twin, side by side, one layer after the other."""

    def __init__(
        self, model: ir.Model, quantization: QuantizationPlan, config: AdaRoundConfig, context: PassContext
    ) -> None:
        self._quantization = quantization
        self._config = config
        self._libraries = context.custom_op_libraries
        self._model = model
        self._rng = context.rng()
        self._rounded = simulated(model, quantization)
        self._nodes = nodes_by_name(model)
        self._twins = nodes_by_name(self._rounded)

    def start(self, batches: Any) -> None:
        self._exact = StepwiseModel(self._model, batches, custom_op_libraries=self._libraries)
        self._integer = StepwiseModel(self._rounded, batches, custom_op_libraries=self._libraries)
        self._rows_each = max(1, self._config.max_rows // len(batches))

    def round(self, item: PlannedNode, matrix: LayerMatrix) -> LayerRounding:
        """The best rounding of one layer, done in the integer twin as well."""
        name, weight_name = item.node.name or "", item.weight.name or "" if item.weight is not None else ""
        planned = self._quantization.weights[weight_name]
        found = find_bias(item.node) if self._config.correct_bias else "not asked for"
        place = found if isinstance(found, BiasPlace) else None
        case = build_case(
            matrix,
            np.asarray(constant_array(item.weight), np.float32),
            matrix.scales(planned),
            largest_symmetric_integer(planned.num_bits),
            self._own_bias(item, matrix),
            self._tensors(item.node, self._twins[name]),
            rows_each=self._rows_each,
            is_centred=place is not None,
            rng=self._rng,
        )
        start = nearest(case.weight, case.scales, case.largest)
        variant, integers = self._best(case, start, self._bounds(item))
        steps = integers - start
        layer = LayerRounding(
            layer=name,
            weight=weight_name,
            shape=matrix.weight_shape,
            steps=pack_integers(matrix.from_matrix(steps).astype(np.int8)),
            changed=int(np.count_nonzero(steps)),
            variant=variant,
            snr_nearest_db=case.noise(start).snr_db,
            snr_db=case.noise(integers).snr_db,
        )
        if place is not None:
            layer = replace(layer, place=place, correction=self._correction(item, place, case, integers))
        apply_layers(self._rounded, [layer], self._quantization, suffix="_rounded")
        return layer

    def _tensors(self, node: ir.Node, twin: ir.Node) -> Iterator[tuple[Array, Array]]:
        self._exact.advance(_name_of_input(node))
        given = self._integer.advance(_name_of_input(twin))
        return zip(given, self._exact.peek(node.outputs[0].name or ""), strict=True)

    def _own_bias(self, item: PlannedNode, matrix: LayerMatrix) -> Array:
        """What the node itself adds in the integer model: not what an Add behind it does."""
        shape = (matrix.groups, matrix.outputs)
        place = find_bias(item.node)
        if bias_input(item.node, item.row) is None or isinstance(place, str):
            return np.zeros(shape)
        return bias_of(self._nodes, place).reshape(shape)

    def _bounds(self, item: PlannedNode) -> tuple[float, float] | None:
        return clip_bounds(item.absorbed) if item.absorbed is not None else None

    def _best(self, case: LayerCase, start: Array, bounds: tuple[float, float] | None) -> tuple[str, Array]:
        """The candidate with the smallest error on rows that it was not fitted to."""
        moments = second_moments(case.rows)
        targets = {"float weight": case.weight.astype(np.float64)}
        for ridge in RIDGES:
            targets[f"ridge {ridge:g}"] = fitted_target(case.weight, case.rows, case.wanted, moments, ridge)
        best, least, chosen = "nearest", case.noise(start).noise, start
        for name, target in targets.items():
            if self._config.method == "adaround":
                integers = self._learned(case, target, bounds)
            else:
                integers = gptq(target, moments, case.scales, case.largest)
                integers = descend(integers, target, moments, case.scales, case.largest)
            noise = case.noise(integers).noise
            if noise < least:
                best, least, chosen = name, noise, integers
            if self._config.method == "adaround":
                break
        # Differences are stored in a byte; more than that is no rounding any more.
        return best, np.clip(chosen, start - 127, start + 127)

    def _learned(self, case: LayerCase, target: Array, bounds: tuple[float, float] | None) -> Array:
        bias = case.bias
        if case.is_centred:
            # Rows lack their means here, and the activation function must not miss them.
            bias = case.bias + case.mean_wanted[:, 0]
        return learn_rounding(
            target,
            case.scales,
            case.largest,
            case.rows,
            case.wanted,
            bias,
            bounds,
            iterations=self._config.iterations,
            rng=self._rng,
        )

    def _correction(self, item: PlannedNode, place: BiasPlace, case: LayerCase, integers: Array) -> tuple[float, ...]:
        change = case.bias_after(integers).reshape(-1)
        limits = bias_limits(item, self._quantization, place.channels)
        after = bias_of(self._nodes, place) + change
        return tuple(float(np.float32(number)) for number in np.where(np.abs(after) <= limits, change, 0.0))


def _name_of_input(node: ir.Node) -> str:
    value = node.inputs[0]
    return value.name or "" if value is not None else ""
