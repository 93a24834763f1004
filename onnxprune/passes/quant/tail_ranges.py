"""Range analysis at the end of a model: last layers whose channels don't share a scale, and what meets in the tail."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxprune.contracts import CalibrationSource
from onnxprune.passes.calibration import run_samples
from onnxprune.passes.quant.accumulate import ChannelRanges, TensorRange
from onnxprune.passes.quant.candidates import Candidate, Candidates
from onnxprune.passes.quant.tail_readers import are_channels_read_one_by_one
from onnxprune.runtime.sessions import ort_runner_from_model

__all__ = ["MIN_STEPS_OF_CHANNEL", "channel_axes", "reasons_with_ranges", "without_mixed_last_layers"]

MIN_STEPS_OF_CHANNEL = 16
"""A last layer stays float when one of its channels would be left with fewer of the 255 steps of the common scale: four
bits. The offsets of a box beside class scores, all from one convolution, are such channels."""

# A map of places, each with its own numbers. The scores of a classifier have one place and are compared with each
# other: there a channel's range says how often its class came up.
_MIN_POSITIONS = 16

# Of 255: ranges that leave more to the narrower one are no news.
_NOTABLE_STEPS = 32.0


def channel_axes(candidates: Candidates) -> dict[str, int]:
    """The outputs of the last layers, and which of their axes counts channels."""
    return {value.name or "": _channel_axis(item) for item in candidates.last_layers for value in item.outputs}


def _channel_axis(item: Candidate) -> int:
    return 1 if item.node.op_type in ("Conv", "ConvTranspose") else -1


def without_mixed_last_layers(
    candidates: Candidates, channels: Mapping[str, ChannelRanges], *, num_bits: int
) -> Candidates:
    """`candidates` without the last layers whose output has channels too different for one scale.

    Further back such channels matter less: the next layer sums over them, and its weights have learned to. A last
    layer's channels are read one by one, unless something compares or sums them (`tail_readers.py`).

    Args:
        candidates: All candidates.
        channels: The extremes of each channel of the outputs that `channel_axes` names.
        num_bits: Of activations.
    """
    reasons: dict[str, str] = {}
    for item in candidates.last_layers:
        (output,) = item.outputs
        reason = _mixed(channels.get(output.name or ""), 2**num_bits - 1)
        if reason is not None and are_channels_read_one_by_one(output, _channel_axis(item)):
            nodes = [item.node] if item.absorbed is None else [item.node, item.absorbed]
            reasons.update({node.name or "": reason for node in nodes})
    return replace(
        candidates,
        nodes=tuple(item for item in candidates.nodes if item.name not in reasons),
        last_layers=tuple(item for item in candidates.last_layers if item.name not in reasons),
        excluded_nodes={**candidates.excluded_nodes, **reasons},
    )


def _mixed(found: ChannelRanges | None, num_steps: int) -> str | None:
    if found is None or found.num_positions < _MIN_POSITIONS or len(found.lows) < 2:
        return None
    spreads = found.highs.astype(np.float64) - found.lows
    width = max(float(found.highs.max()), 0.0) - min(float(found.lows.min()), 0.0)
    # A channel that never changes has nothing to lose.
    narrow = int(np.argmin(np.where(spreads > 0, spreads, np.inf)))
    wide = int(np.argmax(spreads))
    if width == 0.0 or spreads[narrow] == 0.0:
        return None
    steps = num_steps * spreads[narrow] / width
    if steps >= MIN_STEPS_OF_CHANNEL:
        return None
    return (
        f"its channels are read one by one and can't share a scale: channel {narrow} {_span(found, narrow)} would keep "
        f"{steps:.1f} of {num_steps} steps beside channel {wide} {_span(found, wide)}"
    )


def _span(found: ChannelRanges, channel: int) -> str:
    return f"[{found.lows[channel]:.3g}, {found.highs[channel]:.3g}]"


def reasons_with_ranges(
    model: ir.Model,
    candidates: Candidates,
    source: CalibrationSource,
    *,
    num_bits: int,
    custom_op_libraries: Sequence[Path] = (),
) -> dict[str, str]:
    """Why each excluded node of the tail stays float, with the ranges that meet around it in the first batch.

    Nodes that hang together have one reason: the narrowest and the widest tensor among what they read and write. One
    run of the model, with the tensors of the tail as outputs; what is not finite (a masked score) is left out.
    """
    tail = [node for node in candidates.tail if any(_is_float(value) for value in node.outputs)]
    if sum(node.name in candidates.excluded_nodes for node in tail) < 2:
        return {}
    outputs = [value.name or "" for node in tail for value in node.outputs if _is_float(value)]
    inputs = [value for node in tail for value in node.inputs if value is not None and _is_computed(value)]
    names = dict.fromkeys([*(value.name or "" for value in inputs if value.producer() is not None), *outputs])
    runner = ort_runner_from_model(
        model, optimization="disabled", extra_outputs=list(names), custom_op_libraries=custom_op_libraries
    )
    ranges: dict[str, TensorRange] = {}
    for name, array in run_samples(runner, next(iter(source)), 0).items():
        finite = array[np.isfinite(array)] if name in names else np.empty(0)
        if finite.size:
            ranges[name] = TensorRange(low=float(finite.min()), high=float(finite.max()))
    reasons: dict[str, str] = {}
    for region in _regions(tail):
        meeting = _meeting(region, ranges, 2**num_bits - 1)
        names_of_region = [node.name or "" for node in region]
        excluded = [name for name in names_of_region if _is_told(candidates.excluded_nodes.get(name))]
        reasons.update({name: candidates.excluded_nodes[name] + meeting for name in excluded})
    return reasons


def _is_told(reason: str | None) -> bool:
    """False for nodes that are not excluded, or by the user, whose word is reason enough."""
    return reason is not None and not reason.startswith("excluded by")


def _is_float(value: ir.Value) -> bool:
    return bool(value.name) and value.dtype is ir.DataType.FLOAT


def _is_computed(value: ir.Value) -> bool:
    return _is_float(value) and value.const_value is None


def _regions(tail: Sequence[ir.Node]) -> list[list[ir.Node]]:
    """The nodes of `tail` in groups: those that read each other's outputs, or the same tensor."""
    members = set(tail)
    region_of: dict[ir.Node, list[ir.Node]] = {}
    for node in tail:
        neighbours: Iterable[ir.Node | None] = (value.producer() for value in node.inputs if value is not None)
        region = [node]
        region_of[node] = region
        for neighbour in neighbours:
            if neighbour not in members or neighbour is None or region_of[neighbour] is region:
                continue
            other = region_of[neighbour]
            other.extend(region)
            region_of.update(dict.fromkeys(region, other))
            region = other
    return list({id(region): region for region in region_of.values()}.values())


def _meeting(region: Sequence[ir.Node], ranges: Mapping[str, TensorRange], num_steps: int) -> str:
    names = [value.name or "" for node in region for value in (*node.inputs, *node.outputs) if value is not None]
    widths = {name: _width(ranges[name]) for name in dict.fromkeys(names) if name in ranges}
    widths = {name: width for name, width in widths.items() if width > 0}
    if len(widths) < 2:
        return ""
    narrow, wide = min(widths, key=widths.__getitem__), max(widths, key=widths.__getitem__)
    if 255 * widths[narrow] > _NOTABLE_STEPS * widths[wide]:
        return ""
    steps = num_steps * widths[narrow] / widths[wide]
    return (
        f": '{narrow}' {_range_text(ranges[narrow])} meets '{wide}' {_range_text(ranges[wide])} there; in one scale it "
        f"would keep {steps:.1f} of {num_steps} steps"
    )


def _width(found: TensorRange) -> float:
    width = max(found.high, 0.0) - min(found.low, 0.0)
    return width if math.isfinite(width) else 0.0


def _range_text(found: TensorRange) -> str:
    return f"[{found.low:.3g}, {found.high:.3g}]"
