"""Two models with one interface, compared: their outputs, and the tensors inside that both have.

Tensors correspond by name. In a quantized graph a name may stand for the numbers *before* they are rounded; where all
that reads them is a QuantizeLinear, what comes out of the DequantizeLinear behind it is compared, because that is what
the next layer gets. So artifacts of target `onnx` can be compared, whose tensors keep the names of the float model, and
QDQ models that other tools made. Where a node of the reference was folded into the one before it (BatchNormalization,
Relu, arithmetic with a constant), the name of its input stands for its output now, and that is what is compared.

For each tensor, `added_db` is about the error that arises there: with N noise over signal,

    added_db = -10 log10(N(tensor) - max N(tensors that its node reads))        infinite where nothing is added

which takes the errors of input and layer for independent, and the layer for one that keeps the ratio of its input.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

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
from onnxprune.graph.inference import captured_values

__all__ = ["OFF_DB", "ComparedModel", "LayerDifference", "ModelComparison", "compare_models", "corresponding_tensors"]

_FOLDED = frozenset({"Add", "BatchNormalization", "Clip", "Div", "Mul", "Relu", "Sub"})

OFF_DB = 20.0
"""Below this a tensor is called off: its error has more than a tenth of its own size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedModel:
    """A model as it is run, and, where its tensors can be asked for, its graph and where they come from."""

    name: str
    runner: Runner
    graph: ir.Graph | None = None
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
    were not compared. `not_compared` says why of tensors that have the same name in both.
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


def corresponding_tensors(reference: ir.Graph, actual: ir.Graph) -> list[TensorPair]:
    """Pairs of float tensors that nodes of both main graphs compute, in the order of the reference; see the top."""
    others = {value.name: value for node in actual for value in node.outputs if value.name}
    pairs = []
    for node in reference:
        for value in node.outputs:
            other = others.get(value.name or "")
            if not value.name or other is None or not (_may_be_float(value) and _may_be_float(other)):
                continue
            meant = _what_it_became(value, other, others)
            seen = _as_readers_see(other)
            pairs.append(TensorPair(reference=meant.name or "", actual=seen.name or "", size_bytes=_size_bytes(value)))
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
    return _with_layers(reference.graph, {one.name: one for one in found.tensors}), found.not_compared


def _with_layers(graph: ir.Graph, found: Mapping[str, TensorDifference]) -> tuple[LayerDifference, ...]:
    layers = []
    # Noise over signal; what was not compared has that of what it is made from.
    noise: dict[ir.Value, float] = {}
    for node in graph:
        read = (*node.inputs, *captured_values(node))
        before = max((noise.get(value, 0.0) for value in read if value is not None), default=0.0)
        for value in node.outputs:
            one = found.get(value.name or "")
            if one is None:
                noise[value] = before
                continue
            # What was folded into a node is compared under the name of the last of them.
            noise[value] = noise_ratio(one.snr_db)
            layers.append(
                LayerDifference(
                    tensor=one, node=node.name or "", op_type=node.op_type, added_db=_added_db(noise[value], before)
                )
            )
    return tuple(layers)


def _added_db(after: float, before: float) -> float:
    if math.isinf(after):
        return math.inf if math.isinf(before) else -math.inf
    added = after - before
    return -10.0 * math.log10(added) if added > 0.0 else math.inf


def _what_it_became(value: ir.Value, other: ir.Value, others: Collection[str]) -> ir.Value:
    """The tensor of the reference that `other` stands for: behind nodes that were folded into the one before them."""
    readers = {node.op_type for node in _readers(other)}
    while not value.is_graph_output():
        consumers = value.consumers()
        if len(consumers) != 1 or len(value.uses()) != 1:
            return value
        (node,) = consumers
        behind = node.outputs[0]
        is_folded = (
            node.op_type in _FOLDED
            and node.op_type not in readers
            and behind.name not in others
            and all(_is_constant(item) for item in node.inputs if item is not value)
        )
        if not is_folded:
            return value
        value = behind
    return value


def _readers(value: ir.Value) -> list[ir.Node]:
    """What reads `value`, looked at through quantizing and dequantizing."""
    found: list[ir.Node] = []
    for node in value.consumers():
        is_conversion = node.op_type in ("QuantizeLinear", "DequantizeLinear")
        found.extend(_readers(node.outputs[0]) if is_conversion else [node])
    return found


def _is_constant(value: ir.Value | None) -> bool:
    if value is None or value.is_initializer():
        return True
    producer = value.producer()
    return producer is not None and producer.op_type == "Constant"


def _as_readers_see(value: ir.Value) -> ir.Value:
    """What comes out of quantizing and dequantizing `value`, where nobody reads anything else of it."""
    readers = value.consumers()
    if value.is_graph_output() or len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
        return value
    behind = readers[0].outputs[0].consumers()
    if not behind or any(node.op_type != "DequantizeLinear" for node in behind):
        return value
    return behind[0].outputs[0]


def _may_be_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _size_bytes(value: ir.Value) -> int:
    if value.shape is None or not value.shape.is_static():
        return 2 * UNKNOWN_TENSOR_BYTES
    return 8 * math.prod(value.shape.numpy())


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
