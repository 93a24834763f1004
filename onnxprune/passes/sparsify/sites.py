"""Which initializers are weights that `sparsify` may zero, and how their axes are to be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxprune.graph.metadata import module_path
from onnxprune.ops.layout import weight_axes
from onnxprune.passes.sparsify.patterns import UnitAxes

__all__ = ["WeightSite", "WeightSites", "find_weights"]

FLOAT_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})

_RECURRENCES = frozenset({"LSTM", "GRU", "RNN"})
# W is input 1, R input 2; both are (directions, gates * hidden, ...).
_RECURRENCE_WEIGHT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSite:
    """One initializer and the nodes that use it as their weight, in graph order."""

    value: ir.Value
    tensor: ir.TensorProtocol
    """The weights as they were found; stays the same when the initializer is given others."""
    nodes: tuple[ir.Node, ...]
    axes: UnitAxes
    axes_agree: bool
    """False where two nodes read the same tensor with different output axes."""

    @property
    def name(self) -> str:
        """Name of the initializer."""
        return self.value.name or ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the initializer; always known."""
        return tuple(self.tensor.shape.numpy())

    @property
    def dtype(self) -> ir.DataType:
        """Element type of the initializer."""
        return self.tensor.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        return int(self.tensor.nbytes)

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(self.tensor.size)

    def module_path(self, position: int) -> str:
        """Module path of the node at `position`, or "" where unknown."""
        return module_path(self.nodes[position])

    @property
    def module_paths(self) -> tuple[str, ...]:
        """Module paths of all nodes that have one."""
        return tuple(path for node in self.nodes if (path := module_path(node)))

    @property
    def mixes_units(self) -> bool:
        """True where one index of the output axis belongs to several neurons or filters."""
        return any(
            node.op_type in _RECURRENCES
            or (node.op_type == "ConvTranspose" and node.attributes.get_int("group", 1) != 1)
            for node in self.nodes
        )

    def describe(self) -> str:
        """For messages: node, operator, tensor and shape."""
        node = self.nodes[0]
        return f"'{node.name}' ({node.op_type}, weight '{self.name}' {'x'.join(map(str, self.shape))})"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSites:
    """All weights in graph order, and for each constant that was considered and is none, why."""

    sites: tuple[WeightSite, ...]
    refused: dict[str, str]


def find_weights(model: ir.Model) -> WeightSites:
    """The weights of convolutions, matrix products and recurrences, in all graphs; biases and norms are none."""
    uses: dict[ir.Value, list[tuple[ir.Node, UnitAxes]]] = {}
    for node in model.graph.all_nodes():
        for position, axes in _weight_positions(node):
            weight = _initializer_behind(node.inputs[position])
            if weight is not None:
                uses.setdefault(weight, []).append((node, axes))

    sites = []
    refused = {}
    for weight, consumers in uses.items():
        other_reader = next(_other_readers(weight, {node for node, _ in consumers}), None)
        if weight.dtype not in FLOAT_TYPES:
            refused[weight.name or ""] = f"its element type is {weight.dtype}; only float weights have magnitudes"
            continue
        if other_reader is not None:
            refused[weight.name or ""] = (
                f"'{other_reader.name}' ({other_reader.op_type}) reads it as well, and not as a weight"
            )
            continue
        tensor = weight.const_value
        if tensor is None:
            continue
        first_axes = consumers[0][1]
        sites.append(
            WeightSite(
                value=weight,
                tensor=tensor,
                nodes=tuple(dict.fromkeys(node for node, _ in consumers)),
                axes=first_axes,
                axes_agree=all(axes == first_axes for _, axes in consumers),
            )
        )
    return WeightSites(sites=tuple(sites), refused=refused)


def _weight_positions(node: ir.Node) -> Iterator[tuple[int, UnitAxes]]:
    """Inputs of `node` that hold weights with outputs and inputs (an embedding table has no inputs)."""
    axes = weight_axes(node)
    if axes is None or axes.out_axis is None or axes.in_axis is None:
        return
    yield axes.weight_input, UnitAxes(out_axis=axes.out_axis, in_axis=axes.in_axis)
    if node.op_type in _RECURRENCES:
        yield _RECURRENCE_WEIGHT, UnitAxes(out_axis=axes.out_axis, in_axis=axes.in_axis)


def _initializer_behind(value: ir.Value | None) -> ir.Value | None:
    """The initializer that `value` is, or is cast from (weights stored as float16)."""
    while value is not None and not value.is_initializer():
        producer = value.producer()
        if producer is None or producer.op_type != "Cast":
            return None
        value = producer.inputs[0]
    return value


def _other_readers(value: ir.Value, weight_readers: set[ir.Node]) -> Iterator[ir.Node]:
    for node in value.consumers():
        if node in weight_readers:
            continue
        if node.op_type == "Cast":
            yield from _other_readers(node.outputs[0], weight_readers)
        else:
            yield node
