r"""Every node that a plan has scales for, as QuantizeLinear and DequantizeLinear around it, whatever kernels there are.

For runtimes other than ONNX Runtime's CPU provider, which read such graphs and have integer hardware of their own: NPUs
behind QNN and its like, and compilers. Operators stay what they are; nothing is written in the way that suits the
kernels of one runtime. 8 and 16 bits may be mixed:

- A tensor has the bits that the plan gives it, and a node those of its first output.
- An input with other bits than the node's is converted in front of it, for this node and all others that need the same:

      tensor (16 bits) -> DequantizeLinear -> QuantizeLinear (8 bits) -> DequantizeLinear -> node of 8 bits

  The conversion's scale covers the tensor's calibrated range; that of a node which only moves numbers is the scale of
  its output.
- With 16 bits a Relu or Clip behind a layer stays in the graph, inside the layer's group: the zero point is 0, so that
  saturation clips nothing. With 8 bits it disappears into the layer.
- 16-bit integers are written by operators of ONNX from opset 21 on, and of com.microsoft below.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import ActivationQuantization, Placement, QuantizationPlan, WeightQuantization
from onnxprune.errors import TargetError, quoted_list
from onnxprune.graph.weights import constant_array
from onnxprune.ops.affine import activation_parameters, quantize_array
from onnxprune.ops.planned import PlannedNode, planned_node, planned_nodes
from onnxprune.ops.quant import ScaleRule, bias_input, scale_rule_of
from onnxprune.targets.qdq.graph_writer import GraphWriter
from onnxprune.targets.qdq.placements import reasons_inside_bodies
from onnxprune.targets.qdq.qoperator import is_dilated_pool
from onnxprune.targets.qdq.spelling import SpellingName, find_spelling
from onnxprune.targets.qdq.unread import drop_unread_initializers

__all__ = ["everywhere_target", "place_everywhere", "spell_everywhere"]

DILATED_REASON = "ONNX Runtime makes an integer operator of it that has no dilations, and refuses the model"

_INT32_MAX = 2**31 - 1
_FIRST_OPSET_WITH_16_BITS = 21


def everywhere_target(spelling: SpellingName) -> str:
    """What placements made here call their target."""
    return f"everywhere-{find_spelling(spelling).name}"


def place_everywhere(model: ir.Model, plan: QuantizationPlan, spelling: SpellingName) -> Placement:
    """Make every node integer that `plan` has all scales for; the others say why they are float.

    Args:
        model: The float model that `plan` was made for. It is not changed.
        plan: In the mode "static".
        spelling: Decides whether activations are signed.
    """
    dilated = {node.name or "": DILATED_REASON for node in model.graph if is_dilated_pool(node)}
    plan = replace(plan, returned_nodes={**dilated, **plan.returned_nodes})
    chosen = [name for item in planned_nodes(model, plan) for name in item.names]
    integer = set(chosen)
    reasons = reasons_inside_bodies(model)
    for node in model.graph:
        if node.name not in integer:
            found = planned_node(node, plan)
            reasons[node.name or ""] = found if isinstance(found, str) else "the plan has no scales for it"
    return Placement(target=everywhere_target(spelling), integer_nodes=tuple(chosen), float_nodes=reasons)


def spell_everywhere(model: ir.Model, plan: QuantizationPlan, placement: Placement, spelling: SpellingName) -> ir.Model:
    """A copy of `model` with the integer nodes of `placement` between DequantizeLinear and QuantizeLinear.

    Inputs, outputs and tensors keep their names. Weights are int8, biases int32 with scale input * weight.

    Args:
        model: The float model, canonical.
        plan: Scales, of 8 or 16 bits for each tensor.
        placement: From `place_everywhere`, or from an earlier run.
        spelling: Whether activations are signed.

    Raises:
        TargetError: The placement does not fit plan and model.
    """
    spelled = model.clone()
    integer = set(placement.integer_nodes)
    left = {node.name or "": "" for node in spelled.graph if node.name not in integer}
    items = planned_nodes(spelled, replace(plan, returned_nodes={**plan.returned_nodes, **left}))
    lost = integer - {name for item in items for name in item.names}
    if lost:
        raise TargetError(
            f"The placement makes {quoted_list(sorted(lost))} integer, but model and plan have no such node with "
            "scales.",
            "Make plan and placement anew by running without `--plan`.",
        )
    writer = _Everywhere(spelled, plan, spelling)
    # All that is looked up by a tensor's name must be read before one of them changes its maker.
    for group in [_Group.of(item, plan) for item in items]:
        writer.write(group)
    writer.finish()
    return spelled


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """A planned node with the quantization of its inputs, by position, and of its outputs."""

    item: PlannedNode
    inputs: dict[int, ActivationQuantization]
    outputs: tuple[ActivationQuantization, ...]

    @classmethod
    def of(cls, item: PlannedNode, plan: QuantizationPlan) -> _Group:
        outputs = tuple(plan.activations[value.name or ""] for value in item.outputs)
        width = outputs[0].num_bits
        moves = scale_rule_of(item.node, item.row) is ScaleRule.SAME
        inputs = {}
        for position, value in enumerate(item.node.inputs):
            if value is None or value not in item.inputs:
                continue
            given = plan.activations[value.name or ""]
            if given.num_bits != width:
                given = outputs[0] if moves else _with_bits(given, width)
            inputs[position] = given
        return cls(item=item, inputs=inputs, outputs=outputs)


class _Everywhere:
    def __init__(self, model: ir.Model, plan: QuantizationPlan, spelling: SpellingName) -> None:
        self._graph = model.graph
        self._plan = plan
        self._spelling = find_spelling(spelling)
        self._writer = GraphWriter(model, plan, self._spelling)
        has_wide = model.graph.opset_imports.get("", 1) >= _FIRST_OPSET_WITH_16_BITS
        self._wide_domain = "" if has_wide else "com.microsoft"
        # Real tensors that come out of DequantizeLinear, with what they were quantized with.
        self._made: dict[ir.Value, ActivationQuantization] = {}
        self._twins: dict[tuple[ir.Value, float, int, int], ir.Value] = {}
        self._weights: dict[ir.Value, tuple[ir.Value, npt.NDArray[np.float32]]] = {}
        self._unread: list[ir.Node] = []
        # What is being written; its name and metadata go to the conversions around it.
        self._node = model.graph[0]

    def write(self, group: _Group) -> None:
        """Put the integers around one node."""
        node = self._node = group.item.node
        self._writer.start(node)
        for position, wanted in group.inputs.items():
            value = node.inputs[position]
            if value is not None:
                node.replace_input_with(position, self._operand(value, wanted))
        if group.item.weight is not None:
            self._write_weight(group.item, group.item.weight, group.inputs[0].scale)
        self._write_outputs(group)

    def finish(self) -> None:
        """Guard what would be fused wrongly, and remove what nobody reads any more."""
        self._guard_dilated_pools()
        for node in self._unread:
            if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
                self._graph.remove(node, safe=True)
        drop_unread_initializers(self._graph)

    def _guard_dilated_pools(self) -> None:
        """Let the integers of such a pool's result be made of the result of Max with the lowest float: the same."""
        for node in list(self._graph):
            readers = [use for use in node.outputs[0].uses() if use.node.op_type == "QuantizeLinear"]
            if not is_dilated_pool(node) or not readers:
                continue
            output = node.outputs[0]
            self._writer.continue_behind(node)
            lowest = self._writer.scalar(np.array(np.finfo(np.float32).min, dtype=np.float32), "lowest")
            (guarded,) = self._writer.emit("Max", [output, lowest], names=[f"{output.name}_guarded"], like=node)
            guarded.type, guarded.shape = output.type, output.shape
            for use in readers:
                use.node.replace_input_with(use.idx, guarded)

    def _operand(self, value: ir.Value, wanted: ActivationQuantization) -> ir.Value:
        """The twin of `value` that went through integers of `wanted`."""
        if self._made.get(value) == wanted:
            return value
        key = (value, wanted.scale, wanted.zero_point, wanted.num_bits)
        if key not in self._twins:
            name = value.name or "tensor"
            array = constant_array(value)
            if array is None:
                integers = self._quantize(value, wanted, name)
            else:
                integers = self._writer.constant(self._rounded(array, wanted), f"{name}_quantized")
            self._twins[key] = self._dequantize(integers, wanted, f"{name}_dequantized", value)
        return self._twins[key]

    def _write_weight(self, item: PlannedNode, weight: ir.Value, data_scale: float) -> None:
        node = item.node
        planned = self._plan.weights[weight.name or ""]
        bias = bias_input(node, item.row)
        if weight not in self._weights:
            name = weight.name or "weight"
            integers, scales = self._writer.integers(weight, planned, for_arithmetic=True)
            self._weights[weight] = self._symmetric(integers, scales, planned.axis, name), scales
        real, scales = self._weights[weight]
        for position, value in enumerate(node.inputs):
            if value is weight:
                node.replace_input_with(position, real)
        array = constant_array(bias[1]) if bias is not None else None
        if bias is not None and array is not None:
            node.replace_input_with(bias[0], self._bias(array, scales, planned, data_scale, bias[1].name or "bias"))

    def _bias(
        self,
        array: npt.NDArray[np.float32],
        weight_scales: npt.NDArray[np.float32],
        planned: WeightQuantization,
        data_scale: float,
        name: str,
    ) -> ir.Value:
        scales = (np.float32(data_scale) * weight_scales).astype(np.float32)
        # A Gemm's bias may be one number, or have a row for each sample: then one scale has to do.
        is_per_channel = planned.axis is not None and array.size == scales.size and array.ndim == 1
        if not is_per_channel:
            scales = scales.max(keepdims=True)
        integers = quantize_array(
            array.astype(np.float64),
            scales.tolist(),
            axis=0 if is_per_channel else None,
            smallest=-_INT32_MAX,
            largest=_INT32_MAX,
            dtype=np.int32,
        )
        return self._symmetric(integers, scales, 0 if is_per_channel else None, name)

    def _write_outputs(self, group: _Group) -> None:
        node, activation = group.item.node, group.item.absorbed
        if activation is not None and group.outputs[0].num_bits == 8:
            self._take_place(activation.outputs[0], node.outputs[0], group.outputs[0], node)
            self._graph.remove(activation, safe=True)
            return
        for output, planned in zip(group.item.outputs, group.outputs, strict=True):
            self._take_place(output, output, planned, activation or node)

    def _take_place(self, output: ir.Value, raw: ir.Value, planned: ActivationQuantization, maker: ir.Node) -> None:
        """Let the integers of `raw` go by the name of `output`, for all readers and the caller."""
        name = output.name or "tensor"
        readers = list(output.uses())
        is_output = output.is_graph_output()
        self._writer.continue_behind(maker)
        integers = self._quantize(raw, planned, name)
        real = self._dequantize(integers, planned, f"{name}_dequantized", output)
        if is_output:
            for position, value in enumerate(self._graph.outputs):
                if value is output:
                    self._graph.outputs[position] = real
        for use in readers:
            use.node.replace_input_with(use.idx, real)
        output.name = self._writer.free_name(f"{name}_raw")
        real.name = name

    def _quantize(self, value: ir.Value, wanted: ActivationQuantization, name: str) -> ir.Value:
        scale, zero_point = self._parameters(wanted)
        (integers,) = self._writer.emit(
            "QuantizeLinear",
            [value, scale, zero_point],
            names=[f"{name}_quantized"],
            like=self._node,
            domain=self._domain(wanted),
        )
        integers.type, integers.shape = ir.TensorType(ir.DataType.from_numpy(self._dtype(wanted))), value.shape
        return integers

    def _dequantize(self, integers: ir.Value, wanted: ActivationQuantization, name: str, like: ir.Value) -> ir.Value:
        (real,) = self._writer.emit(
            "DequantizeLinear",
            [integers, *self._parameters(wanted)],
            names=[name],
            like=self._node,
            domain=self._domain(wanted),
        )
        real.type, real.shape = like.type, like.shape
        self._made[real] = wanted
        node = real.producer()
        if node is not None:
            self._unread.append(node)
        return real

    def _symmetric(
        self, integers: npt.NDArray[np.integer], scales: npt.NDArray[np.float32], axis: int | None, name: str
    ) -> ir.Value:
        stored = self._writer.constant(integers, f"{name}_quantized")
        shape = scales.shape if axis is not None else ()
        scale = self._writer.constant(scales.reshape(shape), f"{name}_scale")
        zero_point = self._writer.constant(np.zeros(shape, dtype=integers.dtype), f"{name}_zero_point")
        attributes = {"axis": axis} if axis is not None else {}
        inputs = [stored, scale, zero_point]
        (real,) = self._writer.emit(
            "DequantizeLinear", inputs, attributes, names=[f"{name}_dequantized"], like=self._node
        )
        real.type, real.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(integers.shape)
        return real

    def _parameters(self, wanted: ActivationQuantization) -> tuple[ir.Value, ir.Value]:
        scale = self._writer.scalar(np.array(wanted.scale, dtype=np.float32), "quantization_scale")
        shifted = np.array(self._spelling.zero_point(wanted), dtype=self._dtype(wanted))
        return scale, self._writer.scalar(shifted, "quantization_zero_point")

    def _rounded(self, array: npt.NDArray[np.float32], wanted: ActivationQuantization) -> npt.NDArray[np.integer]:
        limits = np.iinfo(self._dtype(wanted))
        return quantize_array(
            array,
            (wanted.scale,),
            zero_point=self._spelling.zero_point(wanted),
            smallest=int(limits.min),
            largest=int(limits.max),
            dtype=self._dtype(wanted),
        )

    def _dtype(self, wanted: ActivationQuantization) -> np.dtype[np.integer]:
        kind = "u" if self._spelling.unsigned_activations else ""
        return np.dtype(f"{kind}int{wanted.num_bits}")

    def _domain(self, wanted: ActivationQuantization) -> str:
        return self._wide_domain if wanted.num_bits > 8 else ""


def _with_bits(given: ActivationQuantization, num_bits: int) -> ActivationQuantization:
    """The calibrated range of `given` in other bits."""
    low, high = min(given.range_min, 0.0), max(given.range_max, 0.0)
    scale, zero_point = activation_parameters(low, high, num_bits)
    return replace(given, scale=scale, zero_point=zero_point, num_bits=num_bits)
