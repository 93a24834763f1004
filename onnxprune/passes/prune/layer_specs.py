"""The layers of a model as functions of their widths, ready to be timed alone.

A *width* counts the classes that are kept of some set of classes. Dimensions over the same classes follow the same
width, each with the number of positions that a class has on it: after a Flatten of 7x7, dim = 49 * width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import Batch
from onnxprune.ops.channels import LabelArray
from onnxprune.ops.macs import MACS
from onnxprune.passes.prune.analysis import ChannelClasses
from onnxprune.runtime.latency_table import Dim, LayerSpec, OperandSpec
from onnxprune.runtime.sessions import OrtRunner, ort_runner_from_model

__all__ = ["Layer", "Widths", "actual_shapes", "find_layers"]

# Layers with MACs that can be rebuilt from the shapes of their inputs; others are scaled by their MACs.
_TIMED_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN"})
_RECURRENT_OPS = frozenset({"LSTM", "GRU", "RNN"})
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """A node, its spec, and the number in `Widths` of each of the spec's width variables."""

    node: ir.Node
    spec: LayerSpec
    widths: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Widths:
    """All widths of a model: `members[i]` are the classes that width i counts, `full[i]` how many there are."""

    members: list[LabelArray] = field(default_factory=list)
    _ids: dict[bytes, int] = field(default_factory=dict)
    _joined: LabelArray | None = None

    def number(self, classes: LabelArray) -> tuple[int, int]:
        """The number of the width that an axis with these classes follows, and its positions per class."""
        distinct, counts = np.unique(classes, return_counts=True)
        is_even = bool((counts == counts[0]).all())
        own, multiple = (distinct, int(counts[0])) if is_even else (np.sort(classes), 1)
        key = own.tobytes()
        if key not in self._ids:
            self._ids[key] = len(self.members)
            self.members.append(own)
            self._joined = None
        return self._ids[key], multiple

    def find(self, classes: LabelArray) -> tuple[int, int] | None:
        """As `number`, but None where no such width is known."""
        distinct, counts = np.unique(classes, return_counts=True)
        if not (counts == counts[0]).all() or distinct.tobytes() not in self._ids:
            return None
        return self._ids[distinct.tobytes()], int(counts[0])

    @property
    def full(self) -> tuple[int, ...]:
        """Every width of the unpruned model."""
        return tuple(len(members) for members in self.members)

    def at(self, keeps: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Every width when the flagged classes stay."""
        if not self.members:
            return np.zeros(0, dtype=np.int64)
        if self._joined is None:
            self._joined = np.concatenate(self.members)
        starts = np.cumsum([0, *(len(members) for members in self.members)])[:-1]
        return np.asarray(np.add.reduceat(keeps[self._joined].astype(np.int64), starts))


def actual_shapes(model: ir.Model, runner: OrtRunner, feeds: Batch) -> dict[ir.Value, tuple[int, ...]]:
    """The shape of every input and output of nodes with MACs, for these feeds.

    Dynamic dimensions come from the feeds; what does not follow from their names is looked up in one run.
    """
    symbols = {
        dim.value: size
        for value in model.graph.inputs
        if value.shape is not None and value.name and value.name in feeds
        for dim, size in zip(value.shape, feeds[value.name].shape, strict=True)
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None
    }
    shapes: dict[ir.Value, tuple[int, ...]] = {}
    unknown: list[ir.Value] = []
    for node in model.graph:
        if MACS.get(node) is None:
            continue
        for value in (*node.inputs, *node.outputs):
            if value is None or value in shapes:
                continue
            shape = _static(value, symbols)
            if shape is not None:
                shapes[value] = shape
            elif not value.is_initializer() and value.producer() is not None:
                unknown.append(value)
    if unknown:
        names = list(dict.fromkeys(value.name or "" for value in unknown))
        known = {spec.name for spec in runner.outputs}
        wider = ort_runner_from_model(
            model, optimization="basic", extra_outputs=[name for name in names if name not in known]
        )
        found = wider.run(feeds)
        shapes |= {value: found[value.name].shape for value in unknown if value.name and value.name in found}
    return shapes


def _static(value: ir.Value, symbols: Mapping[str, int]) -> tuple[int, ...] | None:
    if value.shape is None:
        return None
    dims = [dim if isinstance(dim, int) else symbols.get(dim.value or "") for dim in value.shape]
    return None if None in dims else tuple(dim for dim in dims if dim is not None)


def find_layers(
    model: ir.Model, classes: ChannelClasses, shapes: Mapping[ir.Value, tuple[int, ...]]
) -> tuple[tuple[Layer, ...], Widths]:
    """The layers that can be timed alone, and the widths of the model."""
    widths = Widths()
    removable = np.zeros(classes.num_classes, dtype=np.bool_)
    for group in classes.groups:
        removable[group.classes] = group.frozen_reason is None
    opset = model.opset_imports.get("", 18)
    reader = _Reader(classes, removable, shapes, widths)
    layers = []
    for node in model.graph:
        if node.op_type in _TIMED_OPS and node.domain in ("", "ai.onnx"):
            layer = reader.layer(node, opset)
            if layer is not None:
                layers.append(layer)
    return tuple(layers), widths


@dataclass(frozen=True, slots=True, eq=False)
class _Reader:
    classes: ChannelClasses
    removable: npt.NDArray[np.bool_]
    shapes: Mapping[ir.Value, tuple[int, ...]]
    widths: Widths

    def layer(self, node: ir.Node, opset: int) -> Layer | None:
        """The layer of a node, or None where something about it is not known."""
        local: dict[int, int] = {}  # number of a width -> variable of the spec
        operands: list[OperandSpec | None] = []
        for value in node.inputs:
            if value is None:
                operands.append(None)
                continue
            operand = self._operand(value, local)
            if operand is None:
                return None
            operands.append(operand)
        attributes = _attributes(node)
        output = self._operand(node.outputs[0], local)
        if output is None or attributes is None:
            return None
        input_shape = self.shapes.get(node.inputs[0], ()) if node.inputs[0] is not None else ()
        num_channels = input_shape[1] if len(input_shape) > 1 else 1
        counts = dict(_counts(node, operands, attributes, num_channels))
        for name in counts:
            attributes.pop(name, None)
        spec = LayerSpec(
            op_type=node.op_type,
            opset=opset,
            attributes=json.dumps(attributes, sort_keys=True),
            operands=tuple(operands),
            num_outputs=len(node.outputs),
            counts=tuple(sorted(counts.items())),
            output=output,
        )
        return Layer(node=node, spec=spec, widths=tuple(local))

    def _operand(self, value: ir.Value, local: dict[int, int]) -> OperandSpec | None:
        shape = self.shapes.get(value)
        if shape is None or value.dtype is None:
            return None
        if value.dtype not in _FLOATS:
            return None
        axes = dict(enumerate(self.classes.labelling.values.get(value, ())))
        axes.update(self.classes.labelling.weights.get(value, {}))
        dims = []
        for axis, size in enumerate(shape):
            labels = axes.get(axis)
            dims.append(self._dim(size, labels, local))
        is_weight = value.is_initializer() or _is_decoded_weight(value)
        return OperandSpec(dtype=value.dtype.numpy().name, dims=tuple(dims), is_weight=is_weight)

    def _dim(self, size: int, labels: LabelArray | None, local: dict[int, int]) -> Dim:
        if labels is None or len(labels) != size:
            return Dim(size)
        own = self.classes.classes_at(labels)
        if not self.removable[own].any():
            return Dim(size)
        number, multiple = self.widths.number(own)
        return Dim(multiple, local.setdefault(number, len(local)))


def _is_decoded_weight(value: ir.Value) -> bool:
    producer = value.producer()
    source = producer.inputs[0] if producer is not None and producer.op_type == "DequantizeLinear" else None
    return source is not None and source.is_initializer()


def _attributes(node: ir.Node) -> dict[str, object] | None:
    """Attributes as plain values, or None where one is a tensor or a graph."""
    found: dict[str, object] = {}
    for name, attribute in node.attributes.items():
        if attribute.is_ref() or attribute.type not in _PLAIN_ATTRIBUTES:
            return None
        value = attribute.value
        found[name] = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
    return found


_PLAIN_ATTRIBUTES = frozenset(
    {
        ir.AttributeType.INT,
        ir.AttributeType.INTS,
        ir.AttributeType.FLOAT,
        ir.AttributeType.FLOATS,
        ir.AttributeType.STRING,
        ir.AttributeType.STRINGS,
    }
)


def _counts(
    node: ir.Node, operands: Sequence[OperandSpec | None], attributes: Mapping[str, object], num_channels: int
) -> Iterator[tuple[str, Dim]]:
    """Integer attributes that follow a width; `num_channels` is the size of axis 1 of the first input."""
    if node.op_type in _RECURRENT_OPS and len(operands) > 2 and operands[2] is not None:
        yield "hidden_size", operands[2].dims[-1]  # R is (directions, gates * hidden, hidden)
    group = attributes.get("group", 1)
    if node.op_type not in ("Conv", "ConvTranspose") or group == 1 or operands[0] is None or operands[1] is None:
        return
    channels, per_group = operands[0].dims[1], operands[1].dims[1]
    # Where the weight's second axis keeps its size, whole groups go (depthwise); else each group loses channels.
    if channels.variable is None or per_group.variable is not None:
        return
    in_group = num_channels // int(str(group))
    if channels.size % in_group == 0:
        yield "group", Dim(channels.size // in_group, channels.variable)
