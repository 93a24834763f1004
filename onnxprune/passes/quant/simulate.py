"""A float model that computes with the numbers that integers can hold: what a plan does to a result, in any runtime.

Each tensor that is integer is divided by its scale, rounded, clipped and multiplied; each weight is rounded to its
scales. Biases stay as they are: int32 in the scale input * weight rounds them by far less than a step.
QuantizeLinear and DequantizeLinear would say the same, but ONNX Runtime's optimizer takes them for its own: it
quantizes float weights between them in its own way (seen with 1.31: 16-bit activations came to 30 dB instead of 87).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import ActivationQuantization, QuantizationPlan, WeightQuantization
from onnxprune.graph.names import UniqueNames
from onnxprune.graph.weights import add_initializer, constant_array
from onnxprune.ops.affine import largest_symmetric_integer, quantize_array
from onnxprune.ops.planned import PlannedNode, planned_nodes

__all__ = ["round_weight", "simulated"]


def simulated(
    model: ir.Model,
    plan: QuantizationPlan,
    *,
    float_nodes: Collection[str] = (),
    only_nodes: Collection[str] | None = None,
    with_activations: bool = True,
) -> ir.Model:
    """A copy of `model` that computes what `plan` computes, up to the rounding of sums.

    Names of tensors stay: one that an integer node makes holds the rounded numbers, one that only its readers round
    keeps the float ones.

    Args:
        model: The float model that `plan` was made for. It is not changed.
        plan: Scales.
        float_nodes: Names of nodes that compute in float beside those of the plan.
        only_nodes: Names of the only nodes that round; None: all that the plan has scales for.
        with_activations: False rounds weights alone.
    """
    copy = model.clone()
    nodes = planned_nodes(copy, replace(plan, returned_nodes={**plan.returned_nodes, **dict.fromkeys(float_nodes, "")}))
    nodes = _without_idle_islands(nodes)
    if only_nodes is not None:
        wanted = set(only_nodes)
        nodes = tuple(item for item in nodes if wanted.intersection(item.names))
    writer = _Simulator(copy, plan)
    for item in nodes:
        writer.round_weight_of(item)
        if with_activations:
            writer.round_activations_of(item)
    return copy


def round_weight(array: npt.NDArray[np.float32], planned: WeightQuantization) -> npt.NDArray[np.float32]:
    """The numbers that the integers of a weight stand for, in its shape."""
    largest = largest_symmetric_integer(planned.num_bits)
    integers = quantize_array(
        array, planned.scales, axis=planned.axis, smallest=-largest, largest=largest, dtype=np.int8
    )
    scales = np.asarray(planned.scales, dtype=np.float32)
    if planned.axis is not None:
        shape = [1] * array.ndim
        shape[planned.axis] = -1
        scales = scales.reshape(shape)
    return integers.astype(np.float32) * scales


def _without_idle_islands(nodes: Sequence[PlannedNode]) -> tuple[PlannedNode, ...]:
    """`nodes` without connected groups in which nothing multiplies by a weight: no target makes those integer.

    (The length of a vector, clipped to 1e-12 before something is divided by it, would round to zero.)
    """
    users: dict[ir.Value, list[int]] = {}
    for number, item in enumerate(nodes):
        for value in _tensors(item):
            users.setdefault(value, []).append(number)
    kept: set[int] = set()
    waiting = [number for number, item in enumerate(nodes) if item.row.is_compute]
    while waiting:
        number = waiting.pop()
        if number not in kept:
            kept.add(number)
            waiting.extend(user for value in _tensors(nodes[number]) for user in users[value])
    return tuple(item for number, item in enumerate(nodes) if number in kept)


def _tensors(item: PlannedNode) -> list[ir.Value]:
    return [value for value in (*item.inputs, *item.outputs) if value.const_value is None]


class _Simulator:
    def __init__(self, model: ir.Model, plan: QuantizationPlan) -> None:
        self._graph = model.graph
        self._plan = plan
        self._names = UniqueNames.of_values(model)
        self._node_names = UniqueNames.of_nodes(model)
        # The rounded twins of what float nodes and the caller provide.
        self._twins: dict[ir.Value, ir.Value] = {}
        self._rounded_values: set[ir.Value] = set()
        self._weights: dict[ir.Value, ir.Value] = {}
        self._parameters: dict[float, ir.Value] = {}

    def round_weight_of(self, item: PlannedNode) -> None:
        weight = item.weight
        if weight is None:
            return
        if weight not in self._weights:
            array = np.asarray(constant_array(weight), dtype=np.float32)
            rounded = round_weight(array, self._plan.weights[weight.name or ""])
            self._weights[weight] = add_initializer(self._graph, f"{weight.name}_rounded", rounded, self._names)
        for position, value in enumerate(item.node.inputs):
            if value is weight:
                item.node.replace_input_with(position, self._weights[weight])

    def round_activations_of(self, item: PlannedNode) -> None:
        for position, value in enumerate(item.node.inputs):
            if value is None or value not in item.inputs or value in self._rounded_values:
                continue
            if value not in self._twins:
                self._twins[value] = self._rounded(value, item.node)
            item.node.replace_input_with(position, self._twins[value])
        last = item.absorbed or item.node
        for output in item.outputs:
            self._take_place(output, last)

    def _take_place(self, output: ir.Value, maker: ir.Node) -> None:
        """Let the rounded numbers go by the name of `output`, for all readers and the caller."""
        name = output.name or ""
        output.name = self._names.claim(f"{name}_exact")
        nodes = self._rounding(output, self._plan.activations[name], name)
        twin = nodes[-1].outputs[0]
        output.replace_all_uses_with(twin, replace_graph_outputs=True)
        nodes[0].replace_input_with(0, output)
        twin.name, twin.type, twin.shape = name, output.type, output.shape
        self._graph.insert_after(maker, nodes)
        self._rounded_values.add(twin)

    def _rounded(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        name = value.name or ""
        nodes = self._rounding(value, self._plan.activations[name], name)
        self._graph.insert_before(reader, nodes)
        twin = nodes[-1].outputs[0]
        twin.type, twin.shape = value.type, value.shape
        self._rounded_values.add(twin)
        return twin

    def _rounding(self, value: ir.Value, quantization: ActivationQuantization, name: str) -> list[ir.Node]:
        """The nodes that round `value`; the last one's output is the rounded twin."""
        scale = self._scalar(quantization.scale)
        smallest = -(2 ** (quantization.num_bits - 1)) - quantization.zero_point
        largest = smallest + 2**quantization.num_bits - 1
        nodes: list[ir.Node] = []
        for op_type, operands in (
            ("Div", [scale]),
            ("Round", []),
            ("Clip", [self._scalar(smallest), self._scalar(largest)]),
            ("Mul", [scale]),
        ):
            wanted = f"{name}_simulated_{op_type}"
            node = ir.node(op_type, [value, *operands], name=self._node_names.claim(wanted))
            value = node.outputs[0]
            value.name = self._names.claim(wanted)
            nodes.append(node)
        return nodes

    def _scalar(self, number: float) -> ir.Value:
        if number not in self._parameters:
            array = np.array(number, dtype=np.float32)
            self._parameters[number] = add_initializer(
                self._graph, f"simulated_scalar_{len(self._parameters)}", array, self._names
            )
        return self._parameters[number]
