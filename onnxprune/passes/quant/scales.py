"""Ranges of single tensors -> scales that respect what operators demand of each other.

Operators that only move integers tie their input and output to one scale; Concat ties its inputs and output where
that costs little. Tied tensors form a class with one range: the hull of its members' ranges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxprune.contracts import ActivationQuantization
from onnxprune.graph.weights import constant_array
from onnxprune.ops.affine import activation_parameters, representable_range
from onnxprune.ops.quant import (
    FixedQuantization,
    ScaleRule,
    activation_inputs,
    clip_bounds,
    fixed_quantization,
    scale_rule_of,
)
from onnxprune.passes.quant.calibrate import TensorRange
from onnxprune.passes.quant.candidates import Candidate, Candidates

__all__ = ["ActivationScales", "activation_scales"]

MIN_STEPS_IN_CONCAT = 8
"""A Concat stays float when an input would be left with fewer of the steps (255 with 8 bits): boxes (0..640) beside
scores (0..1)."""

MAX_SHARED_WIDENING = 4.0
"""Concat shares its scale with an input whose range this widens by no more than this factor (two of eight bits)."""

_UNBOUNDED = (-math.inf, math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationScales:
    """Quantization of each tensor, and what was left: tensors and nodes with their reasons."""

    activations: Mapping[str, ActivationQuantization]
    skipped: Mapping[str, str]
    excluded_nodes: Mapping[str, str]
    num_classes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _ScaleClass:
    low: float
    high: float
    bounds: tuple[float, float]
    fixed: FixedQuantization | None = None
    num_bits: int = 8

    @property
    def width(self) -> float:
        return max(self.high, 0.0) - min(self.low, 0.0)


class _Classes:
    """Union-find over tensor names; the root of each class holds its range."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}
        self._classes: dict[str, _ScaleClass] = {}

    def add(self, name: str, scale_class: _ScaleClass) -> None:
        self._parents[name] = name
        self._classes[name] = scale_class

    def __contains__(self, name: str) -> bool:
        return name in self._parents

    def root(self, name: str) -> str:
        while self._parents[name] != name:
            self._parents[name] = self._parents[self._parents[name]]
            name = self._parents[name]
        return name

    def get(self, name: str) -> _ScaleClass:
        return self._classes[self.root(name)]

    def join(self, one: str, other: str) -> bool:
        """Tie two tensors; False, and nothing changed, where no one quantization serves both."""
        first, second = self.root(one), self.root(other)
        if first == second:
            return True
        merged = _merge(self._classes[first], self._classes[second])
        if merged is None:
            return False
        self._parents[second] = first
        self._classes[first] = merged
        del self._classes[second]
        return True

    def __len__(self) -> int:
        return len(self._classes)


def activation_scales(
    candidates: Candidates, calibrated: Mapping[str, TensorRange], *, num_bits: int = 8
) -> ActivationScales:
    """Scales and zero points for every tensor of `candidates` that has a range.

    Args:
        candidates: Nodes to quantize.
        calibrated: Ranges of `candidates.calibrated`. A tensor that is moved, selected or pooled from others takes over
            the hull of their ranges.
        num_bits: 8, or 16: then zero points are 0, as TFLite and NPUs want them, and outputs of Sigmoid and its like
            have the scale 1/32768.
    """
    skipped: dict[str, str] = {}
    excluded: dict[str, str] = {}
    own_ranges = dict(calibrated)
    for value in candidates.constants:
        own_ranges.update(_constant_range(value, skipped))
    _inherit_ranges(candidates, own_ranges, num_bits)
    classes = _Classes()
    for value, limits in _tensor_limits(candidates, num_bits).items():
        name = value.name or ""
        found = own_ranges.get(name)
        if found is not None:
            low, high = (min(max(bound, limits.bounds[0]), limits.bounds[1]) for bound in (found.low, found.high))
            classes.add(name, replace(limits, low=low, high=high))
        else:
            skipped.setdefault(name, "no calibration sample computed it")
    for item in candidates.nodes:
        reason = _tie(item, classes)
        if reason is not None:
            excluded[item.name] = reason
    activations: dict[str, ActivationQuantization] = {}
    for name, found in own_ranges.items():
        if name not in classes:
            continue
        quantization = _quantization(classes.get(name), found)
        if quantization is None:
            skipped[name] = f"its range [{found.low:g}, {found.high:g}] is too wide for a float32 scale"
        else:
            activations[name] = quantization
    return ActivationScales(activations=activations, skipped=skipped, excluded_nodes=excluded, num_classes=len(classes))


def _inherit_ranges(candidates: Candidates, ranges: dict[str, TensorRange], num_bits: int) -> None:
    """Give what comes out of operators with a shared scale the hull of what goes in."""
    for item in candidates.nodes:
        if scale_rule_of(item.node, item.row) is ScaleRule.FREE:
            fixed = fixed_quantization(item.row, num_bits)
            if fixed is not None:
                low, high = representable_range(fixed.scale, fixed.zero_point, num_bits)
                ranges.update({value.name or "": TensorRange(low=low, high=high) for value in item.outputs})
            continue
        given = [ranges.get(value.name or "") for value in activation_inputs(item.node, item.row)]
        known = [found for found in given if found is not None]
        if known and len(known) == len(given):
            hull = TensorRange(low=min(found.low for found in known), high=max(found.high for found in known))
            ranges.update({value.name or "": hull for value in item.outputs})


def _tensor_limits(candidates: Candidates, num_bits: int) -> dict[ir.Value, _ScaleClass]:
    """For each tensor, in graph order: what its producer says about its range."""
    nothing_known = _ScaleClass(low=0.0, high=0.0, bounds=_UNBOUNDED, num_bits=num_bits)
    limits: dict[ir.Value, _ScaleClass] = dict.fromkeys(candidates.activations, nothing_known)
    limits.update(dict.fromkeys(candidates.constants, nothing_known))
    for item in candidates.nodes:
        for value in item.outputs:
            limits[value] = replace(nothing_known, bounds=_bounds(item), fixed=fixed_quantization(item.row, num_bits))
    return limits


def _bounds(item: Candidate) -> tuple[float, float]:
    if item.absorbed is not None:
        return clip_bounds(item.absorbed) or _UNBOUNDED
    return item.row.output_bounds(item.node) or _UNBOUNDED


def _constant_range(value: ir.Value, skipped: dict[str, str]) -> dict[str, TensorRange]:
    array = constant_array(value)
    name = value.name or ""
    if array is None or array.size == 0:
        skipped[name] = "the constant is empty"
        return {}
    low, high = float(np.min(array)), float(np.max(array))
    if not (math.isfinite(low) and math.isfinite(high)):
        skipped[name] = "the constant holds numbers that are not finite"
        return {}
    return {name: TensorRange(low=low, high=high)}


def _tie(item: Candidate, classes: _Classes) -> str | None:
    """Tie the tensors of one node as its scale rule demands; the reason why the node must stay float, or None."""
    rule = scale_rule_of(item.node, item.row)
    if rule is ScaleRule.FREE:
        return None
    inputs = [value.name or "" for value in activation_inputs(item.node, item.row)]
    outputs = [value.name or "" for value in item.outputs]
    if not all(name in classes for name in (*inputs, *outputs)):
        return "one of its tensors has no range"
    if rule is ScaleRule.SAME:
        failed = [name for name in outputs if not classes.join(inputs[0], name)]
        return f"'{inputs[0]}' and '{failed[0]}' can't share one scale" if failed else None
    hull = max(classes.get(name).width for name in (*inputs, *outputs))
    narrowest = min(inputs, key=lambda name: classes.get(name).width or math.inf)
    num_steps = 2 ** classes.get(narrowest).num_bits - 1
    steps = num_steps * classes.get(narrowest).width / hull if hull > 0 else float(num_steps)
    if 0 < steps < MIN_STEPS_IN_CONCAT:
        return f"'{narrowest}' would keep {steps:.1f} of {num_steps} steps beside its neighbours, whose range is wider"
    for name in inputs:
        if classes.get(name).width * MAX_SHARED_WIDENING >= hull:
            classes.join(outputs[0], name)
    return None


def _merge(one: _ScaleClass, other: _ScaleClass) -> _ScaleClass | None:
    """The class that serves both, or None."""
    bounds = max(one.bounds[0], other.bounds[0]), min(one.bounds[1], other.bounds[1])
    low, high = min(one.low, other.low), max(one.high, other.high)
    fixed = one.fixed or other.fixed
    if fixed is None:
        # Saturation does the work of an absorbed Relu or Clip only while the range ends where it clips.
        fits = bounds[0] <= min(low, 0.0) and max(high, 0.0) <= bounds[1]
        return _ScaleClass(low=low, high=high, bounds=bounds, num_bits=one.num_bits) if fits else None
    if one.fixed is not None and other.fixed is not None and one.fixed != other.fixed:
        return None
    fixed_low, fixed_high = representable_range(fixed.scale, fixed.zero_point, one.num_bits)
    # One step of grace: a sigmoid reaches 1, its quantization 255/256.
    fits = fixed_low - fixed.scale <= low and high <= fixed_high + fixed.scale
    if not fits:
        return None
    return _ScaleClass(low=fixed_low, high=fixed_high, bounds=_UNBOUNDED, fixed=fixed, num_bits=one.num_bits)


def _quantization(scale_class: _ScaleClass, own: TensorRange) -> ActivationQuantization | None:
    num_bits = scale_class.num_bits
    if scale_class.fixed is not None:
        scale, zero_point = scale_class.fixed.scale, scale_class.fixed.zero_point
    else:
        try:
            scale, zero_point = activation_parameters(scale_class.low, scale_class.high, num_bits)
        except ValueError:
            return None
    return ActivationQuantization(
        scale=scale, zero_point=zero_point, num_bits=num_bits, range_min=own.low, range_max=own.high
    )
