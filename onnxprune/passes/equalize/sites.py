r"""Where a factor for each channel can be moved from one layer into the next ones without changing what comes out.

    producer --> [Relu, pooling ...] --> consumer 1
                                    \-> consumer 2

A site is a layer whose output reaches, through operators that let factors through, nothing but layers. A tensor that
anything else reads (a residual Add, a Concat, the model's caller) would show the factor, so that layer is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxprune.graph.metadata import module_path
from onnxprune.graph.scope import first_match, weight_names
from onnxprune.graph.weights import constant_array
from onnxprune.ops.homogeneous import HOMOGENEOUS, passes_channel_factors
from onnxprune.ops.quant import clip_bounds
from onnxprune.passes.layerwise.channels import input_magnitudes, layer_weight
from onnxprune.passes.layerwise.layers import BiasPlace, find_bias
from onnxprune.passes.layerwise.matrices import output_channels

__all__ = ["Site", "find_sites"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """`tensor` is what is stored as integers behind the producer, `raw` what the producer itself gives.

    `ceilings` maps the Clips on the way, which must become Relu, to what they clip to. `is_direct` says that nothing
    but one Relu, or nothing at all, stands between. `bias` is None for a MatMul, which has none.
    """

    producer: ir.Node
    consumers: tuple[ir.Node, ...]
    tensor: str
    raw: str
    channels: int
    ceilings: Mapping[str, float]
    is_direct: bool
    bias: BiasPlace | None


def find_sites(model: ir.Model, *, exclude: Sequence[str] = ()) -> tuple[tuple[Site, ...], dict[str, str]]:
    """All sites in graph order, and for every other layer why it is none."""
    sites: list[Site] = []
    skipped: dict[str, str] = {}
    for node in model.graph:
        weight = layer_weight(node)
        if weight is None:
            continue
        found = _site(node, exclude)
        if isinstance(found, Site):
            sites.append(found)
        else:
            skipped[node.name or ""] = found
    return tuple(sites), skipped


def _site(producer: ir.Node, exclude: Sequence[str]) -> Site | str:
    refusal = _refuse_layer(producer, exclude)
    if refusal is not None:
        return refusal
    channels, place = output_channels(producer), find_bias(producer)
    if channels is None:
        return "its weight has no axis for output channels"
    if isinstance(place, str) and producer.op_type != "MatMul":
        return place
    if isinstance(place, BiasPlace) and place.holder != (producer.name or ""):
        return "an Add of a constant stands behind it"
    consumers: dict[ir.Node, None] = {}
    ceilings: dict[str, float] = {}
    between: list[ir.Node] = []
    waiting = [producer.outputs[0]]
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return f"its output '{value.name}' is an output of the model"
        if not value.uses():
            return "nothing reads its output"
        for reader, position in value.uses():
            reason = _follow(producer, reader, position, channels, exclude)
            if reason is not None:
                return reason
            if layer_weight(reader) is not None:
                consumers[reader] = None
                continue
            bounds = clip_bounds(reader)
            if reader.op_type == "Clip" and bounds is not None and np.isfinite(bounds[1]):
                ceilings[reader.name or ""] = bounds[1]
            between.append(reader)
            waiting.append(reader.outputs[0])
    ordered = tuple(node for node in producer.graph or () if node in consumers)
    return Site(
        producer=producer,
        consumers=ordered,
        tensor=_stored(producer),
        raw=producer.outputs[0].name or "",
        channels=channels,
        ceilings=ceilings,
        is_direct=not between or (len(between) == 1 and between[0].op_type == "Relu"),
        bias=place if isinstance(place, BiasPlace) else None,
    )


def _refuse_layer(node: ir.Node, exclude: Sequence[str]) -> str | None:
    glob = first_match(exclude, node.name, *weight_names(node), module_paths=(module_path(node),))
    return f"excluded by '{glob}'" if glob else None


def _follow(producer: ir.Node, reader: ir.Node, position: int, channels: int, exclude: Sequence[str]) -> str | None:
    """Why the factor may not reach `reader`; None: it may."""
    name = f"'{reader.name}' ({reader.op_type})"
    if reader.graph is not producer.graph or position != 0:
        return f"{name} reads its output"
    weight = layer_weight(reader)
    if weight is not None:
        refusal = _refuse_layer(reader, exclude)
        if refusal is not None:
            return f"{name} behind it: {refusal}"
        array = constant_array(weight)
        if array is None or input_magnitudes(reader, array).size != channels:
            return f"{name} sees other channels than it gives"
        return None
    bounds = clip_bounds(reader)
    if reader.op_type == "Clip" and bounds is not None and bounds[0] == 0.0:
        return None
    reason = passes_channel_factors(reader)
    return f"{name} reads its output: {reason}" if reason else None


def _stored(producer: ir.Node) -> str:
    """The tensor behind the activation function, if that alone reads the layer's output."""
    value = producer.outputs[0]
    uses = value.uses()
    if len(uses) == 1:
        reader = next(iter(uses))[0]
        row = HOMOGENEOUS.get(reader)
        if reader.op_type == "Clip" or (row is not None and row.is_activation):
            return reader.outputs[0].name or ""
    return value.name or ""
