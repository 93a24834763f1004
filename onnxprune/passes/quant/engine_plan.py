"""An engine's numbers -> a `QuantizationPlan` that keeps the rules all targets rely on.

What an engine gives need not fit: the output of a Sigmoid may have a range of its own, the inputs of a Concat three
scales, a weight a zero point. Its numbers are taken as ranges, and go through the same rules as our own calibration's:
tied tensors get the hull of their ranges, fixed ranges stay fixed, ranges end where a Relu or Clip does. Where nothing
ties a tensor, that gives back exactly the engine's scale and zero point; every other one is listed in `plan.adjusted`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import ActivationQuantization, QuantizationPlan, WeightQuantization
from onnxprune.errors import BadDataError, PassError
from onnxprune.graph.weights import constant_array
from onnxprune.ops.affine import SMALLEST_SCALE, representable_range
from onnxprune.ops.quant import ScaleRule, activation_inputs, bias_input, clip_bounds, scale_rule_of
from onnxprune.passes.quant.accumulate import ChannelRanges, TensorRange
from onnxprune.passes.quant.candidates import Candidate, Candidates, find_candidates
from onnxprune.passes.quant.engine_answer import EngineNumbers, TensorNumbers, WeightNumbers
from onnxprune.passes.quant.scales import activation_scales
from onnxprune.passes.quant.tail_ranges import without_mixed_last_layers
from onnxprune.passes.quant.weights import LARGEST_BIAS_INTEGER, weight_scales

__all__ = ["NUM_BITS", "Provenance", "plan_from_engine"]

NUM_BITS = 8
SAME_SCALE_RATIO = 1e-6
"""Scales that differ by less are the same number, rounded to float32 on another way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where an engine's numbers come from."""

    engine: str
    method: str
    calibration_hash: str
    num_samples: int


def plan_from_engine(
    model: ir.Model,
    numbers: EngineNumbers,
    provenance: Provenance,
    *,
    exclude: Sequence[str] = (),
    per_channel: bool = True,
    channels: Mapping[str, ChannelRanges] | None = None,
) -> QuantizationPlan:
    """The plan that `numbers` make of `model`; what the engine left in float is excluded, with that reason.

    Args:
        model: The float model.
        numbers: What the engine gave for it.
        provenance: Where that comes from.
        exclude: The user's globs.
        per_channel: For weights whose scales must be made anew.
        channels: The extremes of each channel of the last layers' outputs: layers whose channels can't share a scale
            (boxes beside scores) stay float, as with our own calibration. None: not looked at.

    Raises:
        PassError: Nothing is left to quantize, or a weight is not finite.
        BadDataError: The range of a tensor is not finite.
    """
    engine = provenance.engine
    own = find_candidates(model, exclude=exclude)
    kept_float = {
        name: f"{engine} left it in float: {numbers.float_nodes[name]}"
        for item in own.nodes
        for name in (item.name, *((item.absorbed.name or "",) if item.absorbed is not None else ()))
        if name in numbers.float_nodes
    }
    candidates = find_candidates(model, exclude=exclude, kept_float=kept_float)
    candidates = without_mixed_last_layers(candidates, channels or {}, num_bits=NUM_BITS)
    if not any(item.row.is_compute for item in candidates.nodes):
        examples = "; ".join(f"'{name}': {reason}" for name, reason in list(candidates.excluded_nodes.items())[:5])
        raise PassError(
            f"Nothing to quantize: {engine} quantized no Conv, Gemm or MatMul"
            + (f" ({examples})." if examples else "."),
            "Name more operators in `quant.engine_op_types`, or use `quant.engine = 'onnxprune'`.",
        )
    skipped: dict[str, str] = {}
    ranges = _ranges(candidates, numbers.activations, skipped, engine)
    scales = activation_scales(candidates, ranges, num_bits=NUM_BITS)
    adjusted = _adjusted_activations(candidates, numbers.activations, scales.activations)
    weights = weight_scales(candidates, scales.activations, num_bits=NUM_BITS, per_channel=per_channel)
    for item in candidates.nodes:
        name = (item.weight.name or "") if item.weight is not None else ""
        if name in weights:
            weights[name], reason = _weight(item, weights[name], numbers.weights.get(name), scales.activations)
            if reason:
                adjusted[name] = reason
    return QuantizationPlan(
        activations=scales.activations,
        weights=weights,
        method=provenance.method,
        calibration_hash=provenance.calibration_hash,
        num_samples=provenance.num_samples,
        skipped={**scales.skipped, **skipped},
        excluded_nodes={**candidates.excluded_nodes, **scales.excluded_nodes},
        adjusted=adjusted,
    )


def _ranges(
    candidates: Candidates, given: Mapping[str, TensorNumbers], skipped: dict[str, str], engine: str
) -> dict[str, TensorRange]:
    ranges: dict[str, TensorRange] = {}
    for value in candidates.calibrated:
        name = value.name or ""
        numbers = given.get(name)
        if numbers is None:
            skipped[name] = f"{engine} gives it no scale"
            continue
        if not math.isfinite(numbers.scale):
            raise BadDataError(
                f"The calibration data make tensor '{name}' not finite: {engine} gives it the scale {numbers.scale}.",
                "Remove the sample, or repair the preprocessing or the weights that lead to it.",
            )
        if numbers.scale < SMALLEST_SCALE:
            skipped[name] = f"{engine} gives it the scale {numbers.scale:g}"
            continue
        low, high = representable_range(numbers.scale, numbers.zero_point, NUM_BITS)
        ranges[name] = TensorRange(low=low, high=high)
    return ranges


def _adjusted_activations(
    candidates: Candidates, given: Mapping[str, TensorNumbers], planned: Mapping[str, ActivationQuantization]
) -> dict[str, str]:
    makers = {value.name or "": item for item in candidates.nodes for value in item.outputs}
    tied_by = {
        value.name or "": item.node
        for item in candidates.nodes
        if scale_rule_of(item.node, item.row) is not ScaleRule.FREE
        for value in (*activation_inputs(item.node, item.row), *item.outputs)
    }
    adjusted: dict[str, str] = {}
    for name, found in planned.items():
        numbers = given.get(name)
        if numbers is None:
            continue
        if _is_same(found.scale, numbers.scale) and found.zero_point == numbers.zero_point:
            continue
        adjusted[name] = (
            f"the engine's scale {numbers.scale:g} and zero point {numbers.zero_point} became {found.scale:g} and "
            f"{found.zero_point}: {_why(numbers, makers.get(name), tied_by.get(name))}"
        )
    return adjusted


def _why(numbers: TensorNumbers, maker: Candidate | None, tied_by: ir.Node | None) -> str:
    if maker is not None and maker.row.fixed is not None:
        return f"a {maker.node.op_type} has a range that is known"
    if maker is not None:
        clip = maker.absorbed or maker.node
        bounds = clip_bounds(clip) or maker.row.output_bounds(maker.node)
        low, high = representable_range(numbers.scale, numbers.zero_point, NUM_BITS)
        if bounds is not None and (low < bounds[0] or high > bounds[1]):
            return f"the range ends where '{clip.name}' does"
    if tied_by is not None:
        return f"'{tied_by.name}' ({tied_by.op_type}) ties its tensors to one scale"
    return "a tensor tied to it has another range"


def _is_same(one: float, other: float) -> bool:
    return abs(one - other) <= SAME_SCALE_RATIO * max(abs(one), abs(other))


def _weight(
    item: Candidate,
    own: WeightQuantization,
    given: WeightNumbers | None,
    activations: Mapping[str, ActivationQuantization],
) -> tuple[WeightQuantization, str]:
    """The engine's scales for a weight, or ours with the reason."""
    if given is None:
        return own, "the engine gives it no scales: they are its largest magnitudes over 127"
    if not given.is_symmetric_int8:
        return own, "the engine's integers are not symmetric int8: the scales are its largest magnitudes over 127"
    if given.axis not in (None, own.axis):
        return own, f"the engine has a scale for each index of axis {given.axis}, which are not its output channels"
    if not (np.isfinite(given.scales).all() and (given.scales >= SMALLEST_SCALE).all()):
        return own, "the engine's scales are not all finite and positive: they are its largest magnitudes over 127"
    scales, reason = _with_room_for_bias(item, given, own, activations)
    return replace(own, scales=tuple(float(scale) for scale in scales), axis=given.axis), reason


def _with_room_for_bias(
    item: Candidate, given: WeightNumbers, own: WeightQuantization, activations: Mapping[str, ActivationQuantization]
) -> tuple[npt.NDArray[np.float32], str]:
    """The engine's scales, changed where a channel's bias would not fit into int32 or would be rounded coarsely."""
    scales, ours = given.scales, np.asarray(own.scales, dtype=np.float32)
    reasons = []
    array = constant_array(item.weight)
    if given.axis is not None and given.axis == own.axis and array is not None:
        # For a channel of zeros the engine takes the scale 1, which then is the step of its bias too.
        empty = ~np.asarray(array != 0).any(axis=tuple(dim for dim in range(array.ndim) if dim != given.axis))
        if (empty & (scales != ours)).any():
            scales = np.where(empty, ours, scales).astype(np.float32)
            reasons.append(f"{int(empty.sum())} channels of zeros got the scale that holds their bias")
    bias = bias_input(item.node, item.row)
    data = activations.get(item.node.inputs[0].name or "") if item.node.inputs[0] is not None else None
    numbers = constant_array(bias[1]) if bias is not None else None
    if numbers is not None and data is not None:
        magnitudes = np.abs(np.asarray(numbers, dtype=np.float64)).reshape(-1)
        if scales.size == 1:
            magnitudes = np.atleast_1d(magnitudes.max(initial=0.0))
        if magnitudes.size in (1, scales.size):
            widened = np.maximum(scales, magnitudes / (LARGEST_BIAS_INTEGER * data.scale)).astype(np.float32)
            grown = int((widened > scales * (1 + SAME_SCALE_RATIO)).sum())
            if grown:
                scales = widened
                reasons.append(f"{grown} scales were widened so that the bias fits into int32")
    return scales, "; ".join(reasons)
