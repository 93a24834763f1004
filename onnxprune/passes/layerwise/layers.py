"""The layers that a quantization plan makes integer, and where the bias of each one is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import QuantizationPlan
from onnxprune.errors import PassError
from onnxprune.graph.names import UniqueNames
from onnxprune.graph.shapes import confirm_shapes
from onnxprune.graph.weights import add_initializer, constant_array, replace_weight
from onnxprune.ops.planned import PlannedNode, planned_nodes
from onnxprune.ops.quant import QUANT, bias_input
from onnxprune.passes.layerwise.matrices import output_channels
from onnxprune.passes.quant.weights import LARGEST_BIAS_INTEGER

__all__ = [
    "BiasPlace",
    "add_to_bias",
    "bias_limits",
    "bias_of",
    "find_bias",
    "node_of_plan",
    "nodes_by_name",
    "planned_layers",
]

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasPlace:
    """Input `position` of node `holder` is, or can be, the bias of a layer with `channels` outputs."""

    holder: str
    position: int
    channels: int
    factor: float = 1.0
    """Gemm multiplies its bias by beta."""


def planned_layers(model: ir.Model, plan: QuantizationPlan) -> tuple[PlannedNode, ...]:
    """Nodes with a constant weight that `plan` has all scales for, in graph order."""
    return tuple(item for item in planned_nodes(model, plan) if item.weight is not None and item.row.is_compute)


def nodes_by_name(model: ir.Model) -> dict[str, ir.Node]:
    """The nodes of the main graph."""
    return {node.name or "": node for node in model.graph}


def node_of_plan(nodes: Mapping[str, ir.Node], name: str, *, pass_name: str) -> ir.Node:
    """The node that a plan names.

    Raises:
        PassError: There is none: the plan was made for another model.
    """
    if name not in nodes:
        raise PassError(
            f"The plan for pass '{pass_name}' names the node '{name}', which this model does not have.",
            "Use a plan that was made for this model.",
        )
    return nodes[name]


def find_bias(node: ir.Node) -> BiasPlace | str:
    """Where a number for each output channel of layer `node` is added, or why there is no such place.

    A Conv, ConvTranspose or Gemm has an input for it, used or not. A MatMul has none: an Add of a constant that is its
    only reader stands in for it.
    """
    channels = output_channels(node)
    if channels is None:
        return "its weight has no axis for output channels"
    if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
        row = QUANT.get(node)
        given = bias_input(node, row) if row is not None else None
        factor = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
        if given is not None:
            array = constant_array(given[1])
            if array is None:
                return "its bias is computed at run time"
            if factor == 0.0 or array.size not in (1, channels) or array.shape[-1:] not in ((), (1,), (channels,)):
                return "its bias is not one number for each output channel"
        return BiasPlace(holder=node.name or "", position=2, channels=channels, factor=factor or 1.0)
    return _following_add(node, channels)


def _following_add(node: ir.Node, channels: int) -> BiasPlace | str:
    output = node.outputs[0]
    uses = output.uses()
    none = f"{node.op_type} has no bias, and no Add of a constant alone reads it"
    if len(uses) != 1 or output.is_graph_output():
        return none
    add, position = next(iter(uses))
    if add.op_type != "Add" or len(add.inputs) != 2:
        return none
    operand = add.inputs[1 - position]
    array = constant_array(operand)
    if operand is None or array is None or array.size != channels or array.shape[-1] != channels:
        return none
    return BiasPlace(holder=add.name or "", position=1 - position, channels=channels)


def bias_of(model_nodes: dict[str, ir.Node], place: BiasPlace) -> Vector:
    """What is added to each output channel now; zeros where a layer has no bias."""
    node = model_nodes[place.holder]
    value = node.inputs[place.position] if place.position < len(node.inputs) else None
    array = constant_array(value)
    if array is None:
        return np.zeros(place.channels)
    return np.broadcast_to(array.astype(np.float64).reshape(-1) * place.factor, (place.channels,)).copy()


def bias_limits(item: PlannedNode, plan: QuantizationPlan, channels: int) -> Vector:
    """The largest bias that the int32 of each channel can hold beside the products added to it."""
    given = plan.activations.get(item.inputs[0].name or "")
    scales = np.asarray(plan.weights[item.weight.name or ""].scales if item.weight is not None else (1.0,), np.float64)
    if given is None or scales.size not in (1, channels):
        return np.full(channels, np.inf)
    return np.broadcast_to(LARGEST_BIAS_INTEGER * given.scale * scales, (channels,)).copy()


def add_to_bias(model: ir.Model, place: BiasPlace, correction: Vector) -> None:
    """Add `correction`, one number for each output channel, in place; a layer without a bias gets one.

    Raises:
        PassError: The model has no such place.
    """
    node = nodes_by_name(model).get(place.holder)
    if node is None or correction.shape != (place.channels,):
        raise PassError(
            f"The plan corrects the bias at '{place.holder}', which this model does not have in that size.",
            "Use a plan that was made for this model.",
        )
    value = node.inputs[place.position] if place.position < len(node.inputs) else None
    old = constant_array(value)
    if value is None or old is None:
        _attach(model, node, place, (correction / place.factor).astype(np.float32))
        return
    added = (old.astype(np.float64).reshape(-1) + correction / place.factor).astype(np.float32)
    shape = old.shape if old.size == place.channels else (place.channels,)
    replace_weight(value, added.reshape(shape))


def _attach(model: ir.Model, node: ir.Node, place: BiasPlace, array: npt.NDArray[np.float32]) -> None:
    if node.graph is None or not isinstance(node.graph, ir.Graph):
        raise PassError(f"'{node.name}' belongs to no graph.")
    value = add_initializer(node.graph, f"{node.name}.bias", array, UniqueNames.of_values(model))
    if place.position >= len(node.inputs):
        node.resize_inputs(place.position + 1)
    node.replace_input_with(place.position, value)
    # Behind a Loop, whose result has no known shape, nothing tells the convolution's but its history.
    confirm_shapes(node)
