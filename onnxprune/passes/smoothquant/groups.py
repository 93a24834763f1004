r"""Layers that read one tensor, and where a division of its channels can be folded into what makes it.

    LayerNormalization (gamma, beta) --> x --> MatMul q
                                          \--> MatMul k
                                           \-> MatMul v

x / s comes out of gamma / s and beta / s; the layers' weights are multiplied by s. Between the layers and the fold
there may be operators that let a factor through: additions of a constant (which is divided too), Relu, and a product of
two activations, one of which takes the factor (gated MLPs: silu(gate) * up, where `up` is a layer). Everything that is
divided must have one reader; x itself only layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxprune.graph.metadata import module_path
from onnxprune.graph.scope import first_match, weight_names
from onnxprune.graph.weights import constant_array
from onnxprune.passes.layerwise.channels import layer_weight
from onnxprune.passes.layerwise.layers import BiasPlace, find_bias
from onnxprune.passes.layerwise.matrices import output_channels
from onnxprune.passes.smoothquant.plan import Fold

__all__ = ["Group", "find_groups"]

# Positions of what is multiplied and added for each channel of the last axis.
_NORMS: dict[tuple[str, str], tuple[int, ...]] = {
    ("", "LayerNormalization"): (1, 2),
    ("", "RMSNormalization"): (1,),
    ("", "SimplifiedLayerNormalization"): (1,),
    ("com.microsoft", "SimplifiedLayerNormalization"): (1,),
}
_MAX_DEPTH = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """`layers` are those that read `tensor` and take part; without `folds` only a Mul can divide it."""

    tensor: str
    layers: tuple[ir.Node, ...]
    channels: int
    folds: tuple[Fold, ...]


def find_groups(
    model: ir.Model, *, exclude: Sequence[str] = (), insert_mul: bool
) -> tuple[tuple[Group, ...], dict[str, str]]:
    """All groups in graph order, and for every other matrix product why it is in none."""
    groups: list[Group] = []
    skipped: dict[str, str] = {}
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm") or layer_weight(node) is None or node.inputs[0] is None:
            continue
        reason = _refuse_layer(node, exclude)
        if reason is None:
            readers.setdefault(node.inputs[0], []).append(node)
        else:
            skipped[node.name or ""] = reason
    for tensor, layers in readers.items():
        channels = _input_channels(layers[0])
        others = [reader for reader, _ in tensor.uses() if reader not in layers]
        if others or tensor.is_graph_output():
            who = f"'{others[0].name}' ({others[0].op_type})" if others else "the model's caller"
            found: tuple[Fold, ...] | str = f"{who} reads '{tensor.name}' too"
        else:
            found = _folds(tensor, channels, 0)
        if isinstance(found, str) and not (insert_mul and tensor.producer() is not None):
            skipped.update({node.name or "": found for node in layers})
            continue
        folds = () if isinstance(found, str) else found
        groups.append(Group(tensor=tensor.name or "", layers=tuple(layers), channels=channels, folds=folds))
    return tuple(groups), skipped


def _refuse_layer(node: ir.Node, exclude: Sequence[str]) -> str | None:
    glob = first_match(exclude, node.name, *weight_names(node), module_paths=(module_path(node),))
    return f"excluded by '{glob}'" if glob else None


def _input_channels(node: ir.Node) -> int:
    array = constant_array(layer_weight(node))
    outputs = output_channels(node)
    return array.size // outputs if array is not None and outputs else 0


def _folds(value: ir.Value, channels: int, depth: int) -> tuple[Fold, ...] | str:
    """Where the channels of `value` can be divided, or why they can't be."""
    node = value.producer()
    if node is None:
        return f"'{value.name}' is an input of the model"
    if depth > _MAX_DEPTH:
        return f"nothing within {_MAX_DEPTH} operators before '{value.name}' takes the division"
    name, domain = node.name or "", "" if node.domain == "ai.onnx" else node.domain
    positions = _NORMS.get((domain, node.op_type))
    if positions is not None:
        return _norm_folds(node, positions, channels)
    if layer_weight(node) is not None and node.op_type in ("Gemm", "MatMul"):
        place = find_bias(node)
        own_bias = isinstance(place, BiasPlace) and place.holder == name
        if node.op_type == "Gemm" and not own_bias:
            return f"the bias of '{name}' is not one number for each channel"
        return (Fold(node=name, position=1, is_layer=True),)
    if node.op_type in ("Mul", "Add", "Relu") and not domain:
        return _element_wise(node, channels, depth)
    return f"'{name}' ({node.op_type}) before it can't take the division"


def _norm_folds(node: ir.Node, positions: Sequence[int], channels: int) -> tuple[Fold, ...] | str:
    rank = node.outputs[0].shape.rank() if node.outputs[0].shape is not None else None
    axis = node.attributes.get_int("axis", -1)
    if axis != -1 and axis + 1 != rank:
        return f"'{node.name}' normalizes more than the last axis"
    given = [position for position in positions if position < len(node.inputs) and node.inputs[position] is not None]
    if any(not _is_vector(node.inputs[position], channels) for position in given) or 1 not in given:
        return f"the parameters of '{node.name}' are not one constant number for each channel"
    return tuple(Fold(node=node.name or "", position=position) for position in given)


def _element_wise(node: ir.Node, channels: int, depth: int) -> tuple[Fold, ...] | str:
    """Of a product one side takes the division; of a sum both do, and one of them must be a constant."""
    constants = [position for position, value in enumerate(node.inputs) if _is_vector(value, channels)]
    if node.op_type == "Mul" and constants:
        return (Fold(node=node.name or "", position=constants[0]),)
    if node.op_type == "Add" and not constants:
        return f"'{node.name}' (Add) before it adds two activations"
    reasons = []
    for position, value in enumerate(node.inputs):
        if position in constants or value is None:
            continue
        if len(value.uses()) != 1 or value.is_graph_output() or not _has_channels(value, channels):
            reasons.append(f"'{value.name}' has other readers, or other channels")
            continue
        found = _folds(value, channels, depth + 1)
        if not isinstance(found, str):
            return (*found, *(Fold(node=node.name or "", position=one) for one in constants))
        reasons.append(found)
    return reasons[-1] if reasons else f"'{node.name}' ({node.op_type}) before it can't take the division"


def _is_vector(value: ir.Value | None, channels: int) -> bool:
    """True for a constant with one number for each channel of the last axis."""
    array = constant_array(value)
    return array is not None and array.size == channels and array.ndim > 0 and array.shape[-1] == channels


def _has_channels(value: ir.Value, channels: int) -> bool:
    return value.shape is not None and len(value.shape) > 0 and value.shape[-1] == channels
