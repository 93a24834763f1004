"""More channels than the model has, where ONNX Runtime's depthwise kernel wants them in sixteens.

MLAS has a fast kernel for depthwise convolutions whose channels are a multiple of 16 (`MlasConvSymPackWSize`); any
other number takes one that is half as fast and ends in scalar code: 5x5 on 28x28, 120 channels 169 us, 128 channels
90 us (x86 with AVX-512 VNNI). So the channels get company that is never looked at:

    Conv (120 filters)  -> ... -> depthwise Conv (120) -> ... -> Conv (reads 120)
    Conv (+8 of zeros)  -> ... -> depthwise Conv (128) -> ... -> Conv (+8 columns of zeros)

All tensors in between get the same 8 channels. Whatever they hold, the last convolution multiplies it by zero, so the
integers of all other channels, and of everything behind, are the same. It works on the spelled graph, where every
scale is one number; a tensor that something else reads or makes stays as it is, and its depthwise convolution slow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.graph.names import UniqueNames
from onnxprune.graph.weights import add_initializer, constant_array

__all__ = ["pad_depthwise_channels"]

ALIGNMENT = 16
# ns for each product: in the fast kernel; in the other one, and there in the scalar code for what exceeds a multiple of
# 16 (3x3 and 5x5, 24 to 208 channels). Then for each element that operators in between compute, and for each product
# of a convolution at the border.
_FAST_NS, _SLOW_NS, _SCALAR_NS, _ELEMENT_NS, _PRODUCT_NS = 0.042, 0.07, 0.27, 0.25, 0.005

_ONE_BY_ONE = frozenset({"QuantizeLinear", "DequantizeLinear", "Relu", "Clip", "LeakyRelu", "Sigmoid"})
_POOLS = frozenset({"GlobalAveragePool", "MaxPool"})
_PAIRS = frozenset({"Add", "Mul"})
_WEIGHT, _BIAS = 1, 2


def pad_depthwise_channels(model: ir.Model) -> int:
    """Bring depthwise convolutions of a spelled model to multiples of 16 channels where that pays.

    Args:
        model: Changed in place. Inputs, outputs and their values stay what they are.

    Returns:
        How many depthwise convolutions got channels.
    """
    edits: dict[ir.Node, _Edit] = {}
    seen: set[ir.Value] = set()
    for node in model.graph:
        data = node.inputs[0] if _is_depthwise(node) else None
        channels = _channels(data)
        if data is None or channels is None or channels % ALIGNMENT == 0 or data in seen:
            continue
        group = _TiedChannels(channels)
        is_closed = group.collect(data)
        seen |= group.values
        if is_closed and group.gain_ns() > 0:
            group.record(edits)
    if edits:
        writer = _Writer(model)
        for node, edit in edits.items():
            writer.rewrite(node, edit)
    return sum(edit.depthwise > 0 for edit in edits.values())


@dataclass(slots=True)
class _Edit:
    """Channels that a convolution gets."""

    outputs: int = 0
    inputs: int = 0
    depthwise: int = 0


@dataclass(slots=True)
class _TiedChannels:
    """The tensors that must get the same new channels, and the convolutions at their borders."""

    channels: int
    values: set[ir.Value] = field(default_factory=set)
    makers: set[ir.Node] = field(default_factory=set)
    readers: set[ir.Node] = field(default_factory=set)
    depthwise: set[ir.Node] = field(default_factory=set)

    @property
    def added(self) -> int:
        return -self.channels % ALIGNMENT

    def collect(self, start: ir.Value) -> bool:
        """Follow the channels of `start` to convolutions on all sides; False where something else has them."""
        waiting = [start]
        is_closed = True
        while waiting:
            value = waiting.pop()
            if value in self.values:
                continue
            self.values.add(value)
            if _channels(value) != self.channels or value.is_graph_output():
                is_closed = False
                continue
            tied = [self._from_maker(value), *(self._from_reader(node, place) for node, place in value.uses())]
            if None in tied:
                is_closed = False
            waiting.extend(other for others in tied for other in others or ())
        return is_closed

    def gain_ns(self) -> float:
        """Time saved in depthwise convolutions less the time that other operators take for more channels."""
        per_channel = sum(_products(node) for node in self.depthwise) / self.channels
        whole, rest = self.channels // ALIGNMENT * ALIGNMENT, self.channels % ALIGNMENT
        saved_ns = whole * _SLOW_NS + rest * _SCALAR_NS - (self.channels + self.added) * _FAST_NS
        elements = sum(_size(value) for value in self.values if _is_computed_between(value))
        lost_ns = elements / self.channels * _ELEMENT_NS
        lost_ns += sum(_products(node) for node in (*self.makers, *self.readers)) / self.channels * _PRODUCT_NS
        return per_channel * saved_ns - lost_ns * self.added

    def record(self, edits: dict[ir.Node, _Edit]) -> None:
        """Note the channels that each convolution gets, and give the tensors their new shape."""
        for node in self.makers:
            edits.setdefault(node, _Edit()).outputs = self.added
        for node in self.readers:
            edits.setdefault(node, _Edit()).inputs = self.added
        for node in self.depthwise:
            edits.setdefault(node, _Edit()).depthwise = self.added
        for value in self.values:
            if value.shape is not None:
                dims = list(value.shape)
                dims[1] = self.channels + self.added
                value.shape = ir.Shape(dims)

    def _from_maker(self, value: ir.Value) -> list[ir.Value] | None:
        node = value.producer()
        if node is None:
            return None
        if _is_depthwise(node):
            self.depthwise.add(node)
            return [_given(node)]
        if _is_whole_convolution(node):
            self.makers.add(node)
            return []
        return self._through(node)

    def _from_reader(self, node: ir.Node, place: int) -> list[ir.Value] | None:
        if _is_depthwise(node) and place == 0:
            self.depthwise.add(node)
            return [node.outputs[0]]
        if _is_whole_convolution(node) and place == 0:
            self.readers.add(node)
            return []
        return self._through(node)

    def _through(self, node: ir.Node) -> list[ir.Value] | None:
        """The tensors that an operator in between ties together."""
        if len(node.outputs) != 1 or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type in _POOLS or (node.op_type in _ONE_BY_ONE and _has_scalar_parameters(node)):
            return [_given(node), node.outputs[0]]
        if node.op_type not in _PAIRS:
            return None
        operands = [value for value in node.inputs if value is not None and not _is_scalar(value)]
        return [*operands, node.outputs[0]]


def _given(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    if value is None:
        raise ValueError(f"'{node.name}' has no first input.")
    return value


def _channels(value: ir.Value | None) -> int | None:
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    channels = value.shape[1]
    return channels if isinstance(channels, int) else None


def _size(value: ir.Value) -> int:
    return math.prod(dim for dim in value.shape or () if isinstance(dim, int))


def _products(node: ir.Node) -> int:
    weight = _stored(node, _WEIGHT)
    return 0 if weight is None else _size(node.outputs[0]) * math.prod(weight.shape[1:])


def _is_computed_between(value: ir.Value) -> bool:
    # QuantizeLinear and DequantizeLinear disappear into the integer operators.
    node = value.producer()
    return node is not None and node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Conv")


def _is_scalar(value: ir.Value) -> bool:
    """True for a constant of one number, behind DequantizeLinear or not."""
    node = value.producer()
    stored = node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else value
    return stored is not None and stored.const_value is not None and stored.const_value.size == 1


def _has_scalar_parameters(node: ir.Node) -> bool:
    return all(
        value is None or (value.const_value is not None and value.const_value.size == 1) for value in node.inputs[1:]
    )


def _stored(node: ir.Node, position: int) -> npt.NDArray[np.generic] | None:
    """The integers of a weight or bias behind DequantizeLinear."""
    value = node.inputs[position] if position < len(node.inputs) else None
    maker = None if value is None else value.producer()
    if maker is None or maker.op_type != "DequantizeLinear":
        return None
    return constant_array(maker.inputs[0])


def _is_integer_convolution(node: ir.Node) -> bool:
    weight = _stored(node, _WEIGHT) if node.op_type == "Conv" and node.domain in ("", "ai.onnx") else None
    has_bias = len(node.inputs) > _BIAS and node.inputs[_BIAS] is not None
    return weight is not None and weight.ndim == 4 and (not has_bias or _stored(node, _BIAS) is not None)


def _is_depthwise(node: ir.Node) -> bool:
    if not _is_integer_convolution(node):
        return False
    weight = _stored(node, _WEIGHT)
    groups = node.attributes.get_int("group", 1)
    return weight is not None and groups > 1 and weight.shape[:2] == (groups, 1)


def _is_whole_convolution(node: ir.Node) -> bool:
    return _is_integer_convolution(node) and node.attributes.get_int("group", 1) == 1


class _Writer:
    """Gives convolutions weights and biases with zeros for their new channels."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._names = UniqueNames.of_values(model)
        self._node_names = UniqueNames.of_nodes(model)

    def rewrite(self, node: ir.Node, edit: _Edit) -> None:
        """Let `node` have the channels of `edit`."""
        outputs = edit.outputs + edit.depthwise
        self._replace_stored(node, _WEIGHT, outputs, edit.inputs)
        if len(node.inputs) > _BIAS and node.inputs[_BIAS] is not None:
            self._replace_stored(node, _BIAS, outputs, 0)
        if edit.depthwise:
            groups = node.attributes.get_int("group", 1) + edit.depthwise
            node.attributes["group"] = ir.AttrInt64("group", groups)

    def _replace_stored(self, node: ir.Node, position: int, outputs: int, inputs: int) -> None:
        """Give `node` a weight or bias of its own with zeros for the new channels."""
        value = node.inputs[position]
        old = value.producer() if value is not None else None
        if value is None or old is None:
            raise ValueError(f"'{node.name}' has no integers at input {position}.")
        integers = _padded(_constant(old.inputs[0]), outputs, inputs, with_number=0)
        parameters = [self._wider_parameter(parameter, outputs) for parameter in old.inputs[1:]]
        stored = add_initializer(self._graph, f"{value.name}_padded", integers, self._names)
        new = ir.Node(
            "",
            "DequantizeLinear",
            [stored, *parameters],
            list(old.attributes.values()),
            name=self._node_names.claim(f"{node.name}_{position}_padded"),
        )
        self._graph.insert_before(node, new)
        new.outputs[0].name = self._names.claim(f"{node.name}_{position}_padded_dequantized")
        new.outputs[0].type = value.type
        new.outputs[0].shape = ir.Shape(integers.shape)
        node.replace_input_with(position, new.outputs[0])
        if not value.uses():
            self._graph.remove(old, safe=True)

    def _wider_parameter(self, parameter: ir.Value | None, outputs: int) -> ir.Value | None:
        """Scales or zero points for more channels: one number stays one number."""
        if parameter is None or not outputs:
            return parameter
        array = _constant(parameter)
        if array.ndim == 0:
            return parameter
        # The scale of a channel of zeros may be any: the first one keeps them all in one range.
        wider = _padded(array, outputs, 0, with_number=array.flat[0])
        return add_initializer(self._graph, f"{parameter.name}_padded", wider, self._names)


def _padded(
    array: npt.NDArray[np.generic], outputs: int, inputs: int, *, with_number: object
) -> npt.NDArray[np.generic]:
    widths = [(0, outputs), (0, inputs), *[(0, 0)] * array.ndim][: array.ndim]
    return np.pad(array, widths, constant_values=np.asarray(with_number, dtype=array.dtype))


def _constant(value: ir.Value | None) -> npt.NDArray[np.generic]:
    array = constant_array(value)
    if array is None:
        raise ValueError("A constant was expected.")
    return array
