"""Carrying a plan out: weights and biases are rescaled, Clips that never clip become Relu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.errors import PassError
from onnxprune.graph.cleanup import remove_dead_code
from onnxprune.graph.weights import constant_array, replace_weight
from onnxprune.passes.equalize.plan import SitePlan
from onnxprune.passes.layerwise.channels import layer_weight, scale_inputs, scale_outputs, summed_kernel
from onnxprune.passes.layerwise.layers import BiasPlace, add_to_bias, bias_of, find_bias, node_of_plan, nodes_by_name

__all__ = ["apply_sites"]

Array = npt.NDArray[Any]

_NAME = "equalize"


def apply_sites(model: ir.Model, sites: Sequence[SitePlan]) -> None:
    """Rescale `model`, in place.

    Raises:
        PassError: The plan was made for another model.
    """
    nodes = nodes_by_name(model)
    for site in sites:
        factors = np.asarray(site.factors)
        producer = node_of_plan(nodes, site.producer, pass_name=_NAME)
        _rescale(producer, factors, is_producer=True)
        place = find_bias(producer)
        if isinstance(place, BiasPlace) and place.holder == site.producer:
            bias = bias_of(nodes, place)
            if bias.any():
                add_to_bias(model, place, bias / factors - bias)
        for name in site.consumers:
            _rescale(node_of_plan(nodes, name, pass_name=_NAME), factors, is_producer=False)
        for name in site.clips:
            _make_relu(node_of_plan(nodes, name, pass_name=_NAME))
        if site.absorbed:
            _absorb(model, nodes, site)
    if any(site.clips for site in sites):
        # The bounds of Clips that became Relu.
        remove_dead_code(model)


def _rescale(node: ir.Node, factors: Array, *, is_producer: bool) -> None:
    value = layer_weight(node)
    array = constant_array(value)
    if value is None or array is None or array.size % factors.size:
        raise PassError(
            f"The plan for pass 'equalize' rescales {factors.size} channels of '{node.name}', which has others.",
            "Use a plan that was made for this model.",
        )
    exact = array.astype(np.float64)
    scaled = scale_outputs(node, exact, 1.0 / factors) if is_producer else scale_inputs(node, exact, factors)
    replace_weight(value, scaled.astype(np.float32))


def _make_relu(clip: ir.Node) -> None:
    clip.op_type = "Relu"
    clip.resize_inputs(1)


def _absorb(model: ir.Model, nodes: dict[str, ir.Node], site: SitePlan) -> None:
    shift = np.asarray(site.absorbed)
    places = [(nodes[name], find_bias(nodes[name])) for name in (site.producer, *site.consumers)]
    for position, (node, place) in enumerate(places):
        array = constant_array(layer_weight(node))
        if isinstance(place, str) or array is None:
            raise PassError(f"'{node.name}' can't take a bias: {place}.", "Use a plan that was made for this model.")
        if position == 0:
            add_to_bias(model, place, -shift)
            continue
        alpha = node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0
        add_to_bias(model, place, alpha * summed_kernel(node, array, shift))
