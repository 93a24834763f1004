"""Carrying a plan out: constants before a tensor are divided, weights behind it multiplied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.errors import PassError
from onnxprune.graph.names import UniqueNames
from onnxprune.graph.weights import add_initializer, constant_array, replace_weight
from onnxprune.passes.layerwise.channels import layer_weight, scale_inputs, scale_outputs
from onnxprune.passes.layerwise.layers import BiasPlace, add_to_bias, bias_of, find_bias, node_of_plan, nodes_by_name
from onnxprune.passes.smoothquant.plan import Fold, GroupPlan

__all__ = ["apply_groups"]

Array = npt.NDArray[Any]

_NAME = "smoothquant"


def apply_groups(model: ir.Model, groups: Iterable[GroupPlan]) -> None:
    """Smooth `model`, in place.

    Raises:
        PassError: The plan was made for another model.
    """
    nodes = nodes_by_name(model)
    for group in groups:
        factors = np.asarray(group.factors)
        layers = [node_of_plan(nodes, name, pass_name=_NAME) for name in group.layers]
        for fold in group.folds:
            _divide(model, nodes, fold, factors)
        if not group.folds:
            _insert_mul(model, layers, group, factors)
        for node in layers:
            value = layer_weight(node)
            array = constant_array(value)
            if value is None or array is None or array.size % factors.size:
                raise _other_model(node.name or "")
            replace_weight(value, scale_inputs(node, array.astype(np.float64), factors).astype(np.float32))


def _divide(model: ir.Model, nodes: dict[str, ir.Node], fold: Fold, factors: Array) -> None:
    node = node_of_plan(nodes, fold.node, pass_name=_NAME)
    value = node.inputs[fold.position] if fold.position < len(node.inputs) else None
    array = constant_array(value)
    if value is None or array is None or array.size % factors.size:
        raise _other_model(fold.node)
    if fold.is_layer:
        place = find_bias(node)
        if isinstance(place, BiasPlace) and place.holder == fold.node:
            bias = bias_of(nodes, place)
            if bias.any():
                add_to_bias(model, place, bias / factors - bias)
        replace_weight(value, scale_outputs(node, array.astype(np.float64), 1.0 / factors).astype(np.float32))
        return
    replace_weight(value, (array.astype(np.float64) / factors).astype(np.float32))


def _insert_mul(model: ir.Model, layers: list[ir.Node], group: GroupPlan, factors: Array) -> None:
    tensor = layers[0].inputs[0]
    if tensor is None or tensor.name != group.tensor:
        raise _other_model(group.layers[0])
    names = UniqueNames.of_values(model)
    constant = add_initializer(model.graph, f"{group.tensor}_smoothing", (1.0 / factors).astype(np.float32), names)
    node_names = UniqueNames.of_nodes(model)
    mul = ir.node("Mul", [tensor, constant], name=node_names.claim(f"{layers[0].name}_smoothing"))
    output = mul.outputs[0]
    output.name, output.type, output.shape = names.claim(f"{group.tensor}_smoothed"), tensor.type, tensor.shape
    model.graph.insert_before(layers[0], [mul])
    for node in layers:
        node.replace_input_with(0, output)


def _other_model(name: str) -> PassError:
    return PassError(
        f"The plan for pass 'smoothquant' names '{name}', which this model does not have in that size.",
        "Use a plan that was made for this model.",
    )
