"""Two models with one interface, compared: their outputs, and the tensors inside that both have.

Tensors correspond by name. In a quantized graph a name may stand for the numbers *before* they are rounded; where all
that reads them is a QuantizeLinear, what comes out of the DequantizeLinear behind it is compared, because that is what
the next layer gets. So artifacts of target `onnx` can be compared, whose tensors keep the names of the float model, and
QDQ models that other tools made. A `.tflite` file's integers are compared as the floats that they stand for, in the
ONNX model's axes where the file says which those are. Where a node of the reference was folded into the one before it
(BatchNormalization, Relu, arithmetic with a constant), the name of its input stands for its output now, and that is
what is compared.

For each tensor, `added_db` is about the error that arises there: with N noise over signal,

    added_db = -10 log10(N(tensor) - max N(tensors that its node reads))        infinite where nothing is added

which takes the errors of input and layer for independent, and the layer for one that keeps the ratio of its input.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from onnxprune.contracts import Batch, NullProgress, OutputDifference, Progress, Runner
from onnxprune.errors import UsageError, quoted_list
from onnxprune.evaluate.fidelity import fidelity
from onnxprune.evaluate.tensor_diff import (
    UNKNOWN_TENSOR_BYTES,
    TensorDifference,
    TensorPair,
    TensorSource,
    compare_tensors,
    noise_ratio,
)
from onnxprune.graph.tensor_graph import GraphTensor, TensorGraph

__all__ = ["OFF_DB", "ComparedModel", "LayerDifference", "ModelComparison", "compare_models", "corresponding_tensors"]

_FOLDED = frozenset({"Add", "BatchNormalization", "Clip", "Div", "Mul", "Relu", "Sub"})

OFF_DB = 20.0
"""Below this a tensor is called off: its error has more than a tenth of its own size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedModel:
    """A model as it is run, and, where its tensors can be asked for, its graph and where they come from."""

    name: str
    runner: Runner
    graph: TensorGraph | None = None
    tensors: TensorSource | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDifference:
    """One tensor, and the node of the reference that computes it ("" for an input)."""

    tensor: TensorDifference
    node: str
    op_type: str
    added_db: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelComparison:
    """How far `actual` is from `reference`.

    `outputs` holds the worst of all samples. `layers` are in the order of the reference's graph; empty where tensors
    were not compared. `not_compared` says why not of tensors that have the same name in both, and of those that only
    `actual` computes.
    """

    reference: str
    actual: str
    outputs: OutputDifference
    num_samples: int
    data: str
    layers: tuple[LayerDifference, ...] = ()
    not_compared: Mapping[str, str] | None = None

    @property
    def first_off(self) -> LayerDifference | None:
        """The first tensor that falls below `OFF_DB`."""
        return next((layer for layer in self.layers if layer.tensor.snr_db < OFF_DB), None)

    @property
    def most_added(self) -> LayerDifference | None:
        """Where most of the error arises."""
        return min(self.layers, key=lambda layer: layer.added_db, default=None)


def compare_models(
    reference: ComparedModel,
    actual: ComparedModel,
    batches: Iterable[Batch],
    *,
    data: str,
    num_samples: int,
    per_tensor: bool,
    progress: Progress | None = None,
) -> ModelComparison:
    """The differences over all batches.

    Args:
        reference: What is held to be right.
        actual: The other one.
        batches: Samples; iterated several times.
        data: Where they come from, for the report.
        num_samples: How many there are, for the report.
        per_tensor: Compare the tensors inside as well.
        progress: Follows the samples.

    Raises:
        UsageError: The interfaces differ, or tensors can't be asked for, or none has the same name in both.
        VerificationError: An output has another kind of type or another shape.
        BadDataError: There are no samples.
    """
    progress = progress or NullProgress()
    _check_interfaces(reference, actual)
    if per_tensor:
        for model in (reference, actual):
            if model.tensors is None:
                raise UsageError(
                    f"'{model.name}' can't be asked for the tensors inside it: its format gives the outputs alone.",
                    "Build target 'onnx' from the same recipe, and compare its .onnx file with --per-tensor.",
                )
    outputs = fidelity(reference.runner, actual.runner, progress.track(batches, "Comparing outputs"))
    layers: tuple[LayerDifference, ...] = ()
    not_compared: Mapping[str, str] | None = None
    if per_tensor and reference.graph is not None and actual.graph is not None:
        layers, not_compared = _compare_layers(reference, actual, batches, progress)
    return ModelComparison(
        reference=reference.name,
        actual=actual.name,
        outputs=outputs,
        num_samples=num_samples,
        data=data,
        layers=layers,
        not_compared=not_compared,
    )


def corresponding_tensors(reference: TensorGraph, actual: TensorGraph) -> list[TensorPair]:
    """Pairs of float tensors that nodes of both main graphs compute, in the order of the reference; see the top."""
    pairs = []
    for name, tensor in reference.computed.items():
        other = actual.computed.get(name)
        if other is None or not (tensor.may_be_float and other.may_be_float):
            continue
        pairs.append(
            TensorPair(
                reference=_what_it_became(name, reference, actual),
                actual=_as_readers_see(name, actual),
                size_bytes=_size_bytes(tensor),
            )
        )
    return pairs


def _compare_layers(
    reference: ComparedModel, actual: ComparedModel, batches: Iterable[Batch], progress: Progress
) -> tuple[tuple[LayerDifference, ...], Mapping[str, str]]:
    if reference.graph is None or actual.graph is None or reference.tensors is None or actual.tensors is None:
        return (), {}
    pairs = corresponding_tensors(reference.graph, actual.graph)
    if not pairs:
        raise UsageError(
            f"No tensor has the same name in '{reference.name}' and '{actual.name}'.",
            "Compare an artifact with the model that it was made from, or leave --per-tensor out.",
        )
    found = compare_tensors(reference.tensors, actual.tensors, pairs, batches, progress=progress)
    not_compared = {**found.not_compared, **_without_twin(reference, actual.graph, pairs)}
    return _with_layers(reference.graph, {one.name: one for one in found.tensors}), not_compared


def _without_twin(reference: ComparedModel, actual: TensorGraph, pairs: Collection[TensorPair]) -> dict[str, str]:
    """Float tensors that only the second model has, but for those that quantizing and dequantizing bring along."""
    if reference.graph is None:
        return {}
    compared = {pair.actual for pair in pairs}
    return {
        name: f"'{reference.name}' has no tensor of that name"
        for node in actual.nodes
        if node.onnx_type not in ("QuantizeLinear", "DequantizeLinear")
        for name in node.writes
        if actual.tensors[name].may_be_float
        and not actual.tensors[name].is_constant
        and name not in compared
        and name not in reference.graph.tensors
    }


def _with_layers(graph: TensorGraph, found: Mapping[str, TensorDifference]) -> tuple[LayerDifference, ...]:
    layers = []
    # Noise over signal; what was not compared has that of what it is made from.
    noise: dict[str, float] = {}
    for node in graph.nodes:
        before = max((noise.get(name, 0.0) for name in node.reads), default=0.0)
        for name in node.writes:
            one = found.get(name)
            if one is None:
                noise[name] = before
                continue
            # What was folded into a node is compared under the name of the last of them.
            noise[name] = noise_ratio(one.snr_db)
            layers.append(
                LayerDifference(
                    tensor=one, node=node.name, op_type=node.op_type, added_db=_added_db(noise[name], before)
                )
            )
    return tuple(layers)


def _added_db(after: float, before: float) -> float:
    if math.isinf(after):
        return math.inf if math.isinf(before) else -math.inf
    added = after - before
    return -10.0 * math.log10(added) if added > 0.0 else math.inf


def _what_it_became(name: str, reference: TensorGraph, actual: TensorGraph) -> str:
    """The tensor of the reference that `name` stands for in `actual`: behind nodes that were folded into its node."""
    kept = _types_of_readers(name, actual)
    unfolded = name
    while not reference.tensors[name].is_output:
        readers = reference.readers.get(name, ())
        if len(readers) != 1 or readers[0].reads.count(name) != 1:
            return name
        (node,) = readers
        behind = node.writes[0] if node.writes else ""
        is_folded = (
            node.onnx_type in _FOLDED
            and node.onnx_type not in kept
            and behind in reference.tensors
            and behind not in actual.computed
            and all(_is_constant(item, reference) for item in node.reads if item != name)
        )
        if not is_folded:
            # One operator may do what several nodes of the reference do behind `unfolded`, as a convolution by channels
            # does a BatchNormalization and a Relu: then nothing was folded into what is in front of it.
            at_once = node.onnx_type in _FOLDED and any(
                behind in one.writes and one.onnx_type not in _FOLDED for one in actual.readers.get(unfolded, ())
            )
            return unfolded if at_once else name
        name = behind
    return name


def _types_of_readers(name: str, graph: TensorGraph) -> set[str]:
    """The ONNX types of what reads `name`, looked at through quantizing and dequantizing."""
    found: set[str] = set()
    for node in graph.readers.get(name, ()):
        if node.onnx_type in ("QuantizeLinear", "DequantizeLinear") and node.writes:
            found |= _types_of_readers(node.writes[0], graph)
        else:
            found.add(node.onnx_type)
    return found


def _is_constant(name: str, graph: TensorGraph) -> bool:
    return name in graph.tensors and graph.tensors[name].is_constant


def _as_readers_see(name: str, graph: TensorGraph) -> str:
    """What comes out of quantizing and dequantizing `name`, where nobody reads anything else of it."""
    readers = graph.readers.get(name, ())
    if graph.tensors[name].is_output or len(readers) != 1 or readers[0].onnx_type != "QuantizeLinear":
        return name
    behind = graph.readers.get(readers[0].writes[0], ())
    if not behind or any(node.onnx_type != "DequantizeLinear" for node in behind):
        return name
    return behind[0].writes[0]


def _size_bytes(tensor: GraphTensor) -> int:
    return 2 * UNKNOWN_TENSOR_BYTES if tensor.num_elements is None else 8 * tensor.num_elements


def _check_interfaces(reference: ComparedModel, actual: ComparedModel) -> None:
    for what, one, other in (
        ("inputs", reference.runner.inputs, actual.runner.inputs),
        ("outputs", reference.runner.outputs, actual.runner.outputs),
    ):
        first, second = [spec.name for spec in one], [spec.name for spec in other]
        if set(first) != set(second):
            raise UsageError(
                f"'{reference.name}' and '{actual.name}' can't be compared: the {what} of the first are "
                f"{_names(first)}, those of the second {_names(second)}.",
                "Compare models with the same interface, such as an artifact and its source.",
            )


def _names(names: Collection[str]) -> str:
    return quoted_list(names) or "none"
