r"""How much damage each rounding does to the model's outputs: of each tensor alone, and of each weight alone.

For each output the noise over the signal is averaged over a few samples; the output that suffers most counts. Errors
of different roundings are nearly independent, so their noise adds up; `onnxprune.passes.quant.ranking` makes of that
the order in which layers leave 8 bits.

Two sessions serve all of them: one gives the float tensors and what each layer makes with its weight rounded, the other
is the float model with a place behind each tensor where another one can be put in:

    x -> layer -> If(put_y_in) -> y -> ...      then: the input "y_put_in"; else: what the layer gives

(One simulated model for each layer instead, on a MobileNetV2 with 8 samples, took 1.8 times as long for each, because a
session has to be made for it.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import (
    ActivationQuantization,
    Batch,
    NullProgress,
    Progress,
    QuantizationPlan,
    TensorSpec,
)
from onnxprune.evaluate.fidelity import compare_outputs
from onnxprune.evaluate.tensor_diff import MAX_BYTES, UNKNOWN_TENSOR_BYTES, noise_ratio
from onnxprune.graph.names import UniqueNames
from onnxprune.ops.affine import representable_range
from onnxprune.ops.planned import PlannedNode
from onnxprune.passes.quant.layer_errors import OwnTwins, with_own_twins
from onnxprune.runtime.sessions import ort_runner_from_model
from onnxprune.runtime.tensors import OrtTensors

__all__ = ["OutputNoise", "output_noise"]

_MAX_HELD_BYTES = 256 << 20
"""Samples that are held at once; of large ones fewer are used."""


@dataclass(frozen=True, slots=True)
class _Places:
    """A float model with a place behind each tensor, and the two inputs that fill it."""

    model: ir.Model
    switches: Mapping[str, str]
    tensors: Mapping[str, str]

    def nothing_put_in(self) -> dict[str, npt.NDArray[Any]]:
        feeds: dict[str, npt.NDArray[Any]] = {name: np.zeros((), dtype=np.bool_) for name in self.switches.values()}
        return feeds | {name: np.zeros(0, dtype=np.float32) for name in self.tensors.values()}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputNoise:
    """Noise power over signal power of the outputs (0.01 is 20 dB) when one thing alone is rounded.

    `tensors` has an entry for each activation that a layer reads or writes, by name (0 for constants, which are not
    measured); `weights` one for each layer that has a weight, by the name of its node.
    """

    tensors: Mapping[str, float]
    weights: Mapping[str, float]

    def of_layer(self, layer: PlannedNode) -> float:
        """What the weight of a layer and the tensors that it reads and writes do, added up."""
        values = {value.name or "" for value in (*layer.inputs, *layer.outputs)}
        return self.weights.get(layer.node.name or "", 0.0) + sum(self.tensors[name] for name in values)


@dataclass(frozen=True, slots=True)
class _Trial:
    """One rounding. `puts` maps a tensor of the float model to the one that takes its place, before it is rounded."""

    key: str
    puts: Mapping[str, str]
    quantization: ActivationQuantization | None
    size_bytes: int


def output_noise(
    model: ir.Model,
    plan: QuantizationPlan,
    layers: Sequence[PlannedNode],
    batches: Iterable[Batch],
    *,
    threads: int = 1,
    custom_op_libraries: tuple[Path, ...] = (),
    progress: Progress | None = None,
) -> OutputNoise:
    """The damage that each tensor and each weight of `layers` does.

    Args:
        model: The float model.
        plan: Its plan.
        layers: From `layers_of`.
        batches: A few samples; fewer are used where they are large.
        threads: Threads of the models.
        custom_op_libraries: For models with custom operators.
        progress: Follows the trials.
    """
    progress = progress or NullProgress()
    tensors = {value.name or "": value for layer in layers for value in (*layer.inputs, *layer.outputs)}
    twins = with_own_twins(model, plan, layers, with_activations=False)
    weight_trials = [_weight_trial(layer, twins) for layer in layers if layer.weight is not None]
    tensor_trials = [
        _Trial(name, {name: name}, plan.activations[name], _size_bytes(value))
        for name, value in tensors.items()
        if value.const_value is None
    ]
    trials = [*tensor_trials, *weight_trials]
    totals: list[dict[str, float]] = [{} for _ in trials]
    samples = list(_held(batches))
    computed = {value.name for node in model.graph for value in node.outputs}
    places = _with_places(model, [name for name in tensors if name in computed])
    runner = ort_runner_from_model(places.model, threads=threads, custom_op_libraries=custom_op_libraries)
    source = OrtTensors(model=twins.model, threads=threads, custom_op_libraries=custom_op_libraries)
    varying = {spec.name for spec in runner.outputs if _varies(spec)}
    nothing = places.nothing_put_in()
    for group in _groups(trials):
        provider = source.runner(
            [
                name
                for number in group
                for name in trials[number].puts.values()
                if name in computed or name in twins.made
            ]
        )
        for count, batch in enumerate(samples, start=1):
            expected = runner.run({**batch, **nothing})
            given = {**batch, **provider.run(batch)}
            text = f"Measuring what each rounding does to the outputs, sample {count} of {len(samples)}"
            for number in progress.track(group, text, len(group)):
                feeds = {**batch, **nothing}
                for name, other in trials[number].puts.items():
                    put_in = _rounded(given[other], trials[number].quantization)
                    if name in places.tensors:
                        feeds |= {places.switches[name]: np.ones((), dtype=np.bool_), places.tensors[name]: put_in}
                    else:
                        feeds[name] = put_in
                found = compare_outputs(expected, runner.run(feeds), varying=varying)
                for name, one in found.per_output.items():
                    totals[number][name] = totals[number].get(name, 0.0) + noise_ratio(one.snr_db)
    noise = [max(total.values(), default=0.0) / max(len(samples), 1) for total in totals]
    found_tensors = {trial.key: one for trial, one in zip(tensor_trials, noise, strict=False)}
    return OutputNoise(
        tensors={name: found_tensors.get(name, 0.0) for name in tensors},
        weights={trial.key: one for trial, one in zip(weight_trials, noise[len(tensor_trials) :], strict=True)},
    )


def _weight_trial(layer: PlannedNode, twins: OwnTwins) -> _Trial:
    puts = {value.name or "": twins.outputs[value.name or ""] for value in layer.outputs}
    return _Trial(layer.node.name or "", puts, None, sum(_size_bytes(value) for value in layer.outputs))


def _rounded(array: npt.NDArray[Any], quantization: ActivationQuantization | None) -> npt.NDArray[Any]:
    if quantization is None:
        return array
    smallest, largest = representable_range(1.0, quantization.zero_point, quantization.num_bits)
    scale = np.float32(quantization.scale)
    rounded: npt.NDArray[Any] = np.clip(np.rint(array / scale), np.float32(smallest), np.float32(largest)) * scale
    return rounded


def _varies(spec: TensorSpec) -> bool:
    return spec.shape is None or any(not isinstance(dim, int) for dim in spec.shape)


def _held(batches: Iterable[Batch]) -> Iterator[Batch]:
    size = 0
    for batch in batches:
        size += sum(array.nbytes for array in batch.values())
        yield batch
        if size > _MAX_HELD_BYTES:
            return


def _groups(trials: Sequence[_Trial]) -> Iterator[list[int]]:
    """Trials, by their numbers, in groups whose tensors fit into `MAX_BYTES` together."""
    group: list[int] = []
    filled = 0
    for number, trial in enumerate(trials):
        if group and filled + trial.size_bytes > MAX_BYTES:
            yield group
            group, filled = [], 0
        group.append(number)
        filled += trial.size_bytes
    if group:
        yield group


def _size_bytes(value: ir.Value) -> int:
    if value.shape is None or not value.shape.is_static():
        return UNKNOWN_TENSOR_BYTES
    return 4 * math.prod(value.shape.numpy())


def _with_places(model: ir.Model, wanted: Sequence[str]) -> _Places:
    copy = model.clone()
    values = {value.name or "": (node, value) for node in copy.graph for value in node.outputs}
    names = UniqueNames.of_values(copy)
    switches: dict[str, str] = {}
    tensors: dict[str, str] = {}
    for name in wanted:
        node, value = values[name]
        switch = ir.Value(name=names.claim(f"put_{name}_in"), shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
        # No shape: where nothing is put in, nothing is fed.
        tensor = ir.Value(name=names.claim(f"{name}_put_in"), type=ir.TensorType(ir.DataType.FLOAT))
        copy.graph.inputs.extend([switch, tensor])
        value.name = names.claim(f"{name}_of_the_layer")
        chosen = ir.node(
            "If",
            [switch],
            attributes={
                "then_branch": _handing_on(tensor, value, names),
                "else_branch": _handing_on(value, value, names),
            },
            name=names.claim(f"{name}_place"),
        )
        place = chosen.outputs[0]
        inside = [branch.as_graph()[0] for branch in chosen.attributes.values()]
        value.replace_all_uses_with(place, replace_graph_outputs=True)
        inside[1].replace_input_with(0, value)
        place.name, place.type, place.shape = name, value.type, value.shape
        copy.graph.insert_after(node, [chosen])
        switches[name], tensors[name] = switch.name or "", tensor.name or ""
    return _Places(copy, switches, tensors)


def _handing_on(value: ir.Value, like: ir.Value, names: UniqueNames) -> ir.Graph:
    node = ir.node("Identity", [value])
    output = node.outputs[0]
    output.name, output.type, output.shape = names.claim(f"{value.name}_handed_on"), like.type, like.shape
    return ir.Graph([], [output], nodes=[node], name=output.name)
