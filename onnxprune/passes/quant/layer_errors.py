r"""Where error arises and where it has piled up, layer by layer, in the simulation of a plan.

The error that *arises* in a layer is that of its output when it alone is rounded and its inputs are exact. To see all
of them in one run, each layer gets a twin beside it that reads the float tensors, and only the twins are rounded:

    x -> layer -> y -> ...
     \-> twin  -> "y_own"           rounded inputs, weight and output
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from onnxprune.contracts import (
    EXACT_DB,
    ActivationQuantization,
    Batch,
    LayerError,
    NullProgress,
    Progress,
    QuantizationPlan,
)
from onnxprune.evaluate.tensor_diff import UNKNOWN_TENSOR_BYTES, TensorPair, compare_tensors
from onnxprune.graph.names import UniqueNames
from onnxprune.ops.planned import PlannedNode, planned_nodes
from onnxprune.passes.quant.simulate import simulated
from onnxprune.passes.quant.units import layers_of
from onnxprune.runtime.tensors import OrtTensors

__all__ = ["OwnTwins", "finite_db", "layer_errors", "with_own_twins"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnTwins:
    """A float model in which each layer has a rounded twin; `outputs` maps a layer's output to its twin's."""

    model: ir.Model
    outputs: Mapping[str, str]

    @property
    def made(self) -> frozenset[str]:
        """Names of what the twins make."""
        return frozenset(self.outputs.values())


def layer_errors(
    model: ir.Model,
    plan: QuantizationPlan,
    batches: Iterable[Batch],
    *,
    output_noise: Mapping[str, float] | None = None,
    threads: int = 1,
    custom_op_libraries: tuple[Path, ...] = (),
    progress: Progress | None = None,
) -> tuple[LayerError, ...]:
    """What rounding costs in each layer that `plan` lets be integer, in graph order.

    Of a layer with several outputs the worst counts. Takes two runs of the float model and one of the simulated one
    for each batch, where all tensors fit into memory together.

    Args:
        model: The float model.
        plan: Its plan.
        batches: A few samples; iterated several times.
        output_noise: From `onnxprune.passes.quant.sensitivity`, where that was measured.
        threads: Threads of the models.
        custom_op_libraries: For models with custom operators.
        progress: Follows the samples.
    """
    progress = progress or NullProgress()
    layers = layers_of(model, plan)
    twins = with_own_twins(model, plan, layers)
    in_float = OrtTensors(model=model, threads=threads, custom_op_libraries=custom_op_libraries)
    in_integers = replace(in_float, model=simulated(model, plan))
    alone = replace(in_float, model=twins.model)
    values = [value for layer in layers for value in layer.outputs]
    own_pairs = [_pair(value, twins.outputs[value.name or ""]) for value in values]
    same_names = [_pair(value, value.name or "") for value in values]
    own = compare_tensors(alone, alone, own_pairs, batches, with_histograms=False, progress=progress)
    piled_up = compare_tensors(in_float, in_integers, same_names, batches, with_histograms=False, progress=progress)
    own_db = {found.name: found.snr_db for found in own.tensors}
    accumulated_db = {found.name: found.snr_db for found in piled_up.tensors}
    return tuple(
        LayerError(
            node=layer.node.name or "",
            op_type=layer.node.op_type,
            own_db=_worst(layer, own_db),
            accumulated_db=_worst(layer, accumulated_db),
            output_db=_decibel_of_noise(output_noise[layer.node.name or ""]) if output_noise is not None else None,
        )
        for layer in layers
    )


def with_own_twins(
    model: ir.Model, plan: QuantizationPlan, layers: Sequence[PlannedNode], *, with_activations: bool = True
) -> OwnTwins:
    """`model` with a rounded twin of each of `layers`, which nobody reads; `model` itself is not changed.

    `with_activations` False rounds the weights of the twins alone.
    """
    copy = model.clone()
    wanted = {layer.node.name for layer in layers}
    names, node_names = UniqueNames.of_values(copy), UniqueNames.of_nodes(copy)
    activations: dict[str, ActivationQuantization] = dict(plan.activations)
    outputs: dict[str, str] = {}
    twins: list[str] = []
    for item in planned_nodes(copy, plan):
        if item.node.name not in wanted:
            continue
        node = _twin(item.node, list(item.node.inputs), names, node_names)
        new = [node]
        if item.absorbed is not None:
            new.append(_twin(item.absorbed, [node.outputs[0], *item.absorbed.inputs[1:]], names, node_names))
        copy.graph.insert_after(item.absorbed or item.node, new)
        twins.extend(twin.name or "" for twin in new)
        made = dict(zip((item.absorbed or item.node).outputs, new[-1].outputs, strict=True))
        for value in item.outputs:
            name = value.name or ""
            outputs[name] = made[value].name or ""
            activations[outputs[name]] = plan.activations[name]
    rounded = simulated(
        copy, replace(plan, activations=activations), only_nodes=twins, with_activations=with_activations
    )
    return OwnTwins(model=rounded, outputs=outputs)


def finite_db(snr_db: float) -> float:
    """`snr_db`, with `EXACT_DB` for infinitely many: plans are JSON, which has no infinity."""
    return -EXACT_DB if math.isnan(snr_db) else min(max(snr_db, -EXACT_DB), EXACT_DB)


def _twin(node: ir.Node, inputs: Sequence[ir.Value | None], names: UniqueNames, node_names: UniqueNames) -> ir.Node:
    twin = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        overload=node.overload,
        num_outputs=len(node.outputs),
        version=node.version,
        name=node_names.claim(f"{node.name}_own"),
    )
    for value, original in zip(twin.outputs, node.outputs, strict=True):
        # An output that is left out has no name.
        value.name = names.claim(f"{original.name}_own") if original.name else ""
        value.type, value.shape = original.type, original.shape
    return twin


def _pair(value: ir.Value, actual: str) -> TensorPair:
    if value.shape is None or not value.shape.is_static():
        return TensorPair(reference=value.name or "", actual=actual, size_bytes=2 * UNKNOWN_TENSOR_BYTES)
    return TensorPair(reference=value.name or "", actual=actual, size_bytes=8 * math.prod(value.shape.numpy()))


def _worst(layer: PlannedNode, found: Mapping[str, float]) -> float:
    known = [found[value.name or ""] for value in layer.outputs if (value.name or "") in found]
    return finite_db(min(known, default=math.inf))


def _decibel_of_noise(noise: float) -> float:
    if noise == 0.0:
        return EXACT_DB
    return -EXACT_DB if not math.isfinite(noise) else finite_db(-10.0 * math.log10(noise))
