"""Which factor each channel of each site gets.

With r the largest weight of a channel in the producer, c that in the consumers, and a the largest magnitude of the
channel's numbers, the channel is divided by

    weights         s = sqrt(r / c)        both layers' weights have the range sqrt(r c) then (Nagel et al. 2019)
    activations     s = sqrt(a / c)        activations and consumers' weights meet in the middle (as in SmoothQuant)
    depthwise       s = a                  all channels of the tensor fill its range

A weight that stands in two sites is rescaled by both, so sites are gone over again until nothing moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.graph.weights import constant_array
from onnxprune.passes.equalize.sites import Site
from onnxprune.passes.layerwise.channels import (
    input_magnitudes,
    is_depthwise,
    layer_weight,
    output_magnitudes,
    scale_inputs,
    scale_outputs,
)

__all__ = ["Ranges", "site_factors"]

Ranges = Literal["weights", "activations", "depthwise"]
Array = npt.NDArray[Any]

MAX_SWEEPS = 40
_CONVERGED = 1e-4
# A channel that hardly says anything must not be blown up without bound: float32 has its limits too.
_LARGEST_RATIO = 2.0**12
# Below this a site is balanced already.
_SMALLEST_CHANGE = 0.01


def site_factors(sites: Sequence[Site], magnitudes: Mapping[str, Array], ranges: Ranges) -> dict[str, Array]:
    """The factors of every site that they change by more than one percent, by producer, in the order given.

    Args:
        sites: In graph order.
        magnitudes: Of each channel of each site's `tensor`; only read where activations count.
        ranges: See above.
    """
    weights: dict[ir.Value, Array] = {}
    for site in sites:
        for node in (site.producer, *site.consumers):
            value = layer_weight(node)
            array = constant_array(value)
            if value is not None and array is not None:
                weights[value] = array.astype(np.float64)
    chosen = [site for site in sites if ranges != "depthwise" or all(map(is_depthwise, site.consumers))]
    totals = [np.ones(site.channels) for site in chosen]
    for _ in range(MAX_SWEEPS):
        moved = 0.0
        for position, site in enumerate(chosen):
            step = _step(site, weights, magnitudes, ranges, totals[position])
            bounded = np.clip(totals[position] * step, 1 / _LARGEST_RATIO, _LARGEST_RATIO)
            step = bounded / totals[position]
            moved = max(moved, float(np.abs(np.log(step)).max(initial=0.0)))
            totals[position] = bounded
            _rescale(site, weights, step)
        if moved < _CONVERGED:
            break
    return {
        site.producer.name or "": total
        for site, total in zip(chosen, totals, strict=True)
        if np.abs(np.log(total)).max(initial=0.0) > _SMALLEST_CHANGE
    }


def _step(
    site: Site, weights: Mapping[ir.Value, Array], magnitudes: Mapping[str, Array], ranges: Ranges, total: Array
) -> Array:
    before = output_magnitudes(site.producer, weights[_weight(site.producer)])
    behind = np.max([input_magnitudes(node, weights[_weight(node)]) for node in site.consumers], axis=0)
    if ranges != "weights":
        # What was measured, as it is after the factors so far.
        before = magnitudes[site.tensor] / total
    if ranges == "depthwise":
        behind = 1.0 / np.where(before > 0, before, 1.0)
    alive = (before > 0) & (behind > 0)
    if not alive.any():
        return np.ones(site.channels)
    found = np.where(alive, np.sqrt(np.where(alive, before, 1.0) / np.where(alive, behind, 1.0)), 1.0)
    # One factor common to all channels changes nothing; without it numbers keep their size.
    found[alive] /= np.exp(np.mean(np.log(found[alive])))
    return found


def _rescale(site: Site, weights: dict[ir.Value, Array], step: Array) -> None:
    own = _weight(site.producer)
    weights[own] = scale_outputs(site.producer, weights[own], 1.0 / step)
    for node in site.consumers:
        value = _weight(node)
        weights[value] = scale_inputs(node, weights[value], step)


def _weight(node: ir.Node) -> ir.Value:
    value = layer_weight(node)
    if value is None:
        raise ValueError(f"'{node.name}' is no layer.")
    return value
