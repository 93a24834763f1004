r"""Writing integer operators into a graph as QuantizeLinear -> DequantizeLinear around float operators.

For a tensor `x` that an integer operator computes:

    operator -> "x_raw" -> QuantizeLinear -> "x_quantized" -> DequantizeLinear -> "x" -> all former consumers

and for one that a float operator, or the caller, provides:

    "x" -> former float consumers
     \-> QuantizeLinear -> "x_quantized" -> DequantizeLinear -> "x_dequantized" -> integer consumers

So names of tensors, and of the model's outputs, stay what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import ActivationQuantization, QuantizationPlan
from onnxprune.errors import TargetError
from onnxprune.graph.weights import constant_array
from onnxprune.ops.affine import affine_parameters, largest_symmetric_integer, quantize_array, symmetric_scales
from onnxprune.targets.qdq.spelling import Spelling

__all__ = ["IntegerUnit", "IntegerWriter"]

# Biases saturate here; the plan keeps them well below.
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerUnit:
    """A node that becomes integer, with the Relu or Clip that disappears into it."""

    node: ir.Node
    absorbed: ir.Node | None
    outputs: tuple[ir.Value, ...]
    """The tensors that leave the unit as integers."""


class IntegerWriter:
    """Writes the nodes of one spelling into a graph, in topological order."""

    def __init__(self, model: ir.Model, plan: QuantizationPlan, spelling: Spelling) -> None:
        self._graph = model.graph
        self._plan = plan
        self._spelling = spelling
        self._names = {value.name for node in model.graph.all_nodes() for value in node.outputs}
        for graph in model.graphs():
            self._names |= {value.name for value in (*graph.inputs, *graph.initializers.values())}
        self._node_names = {node.name for node in model.graph.all_nodes()}
        self._position: ir.Node | None = None
        # Real tensor (the output of a DequantizeLinear) -> its integers.
        self._integers: dict[ir.Value, ir.Value] = {}
        # Float tensor -> its real twin that went through integers.
        self._twins: dict[ir.Value, ir.Value] = {}
        # Scales and zero points recur: each is stored once.
        self._scalars: dict[tuple[float, str], ir.Value] = {}
        self._zero_vectors: dict[tuple[int, str], ir.Value] = {}
        self._weights: dict[ir.Value, ir.Value] = {}

    @property
    def spelling(self) -> Spelling:
        """The spelling that is being written."""
        return self._spelling

    def start(self, unit: IntegerUnit) -> None:
        """Write before `unit.node` from now on."""
        self._position = unit.node

    # --- reading operands ---------------------------------------------------------------------------------------

    def quantization(self, value: ir.Value) -> ActivationQuantization:
        """The plan's entry for a tensor.

        Raises:
            TargetError: There is none; the placement does not fit the plan.
        """
        found = self._plan.activations.get(value.name or "")
        if found is None:
            raise TargetError(
                f"The placement makes tensor '{value.name}' integer, but the quantization plan has no scale for it.",
                "Make plan and placement anew by running without `--plan`.",
            )
        return found

    def operand(self, value: ir.Value) -> ir.Value:
        """The real twin of `value` that comes out of DequantizeLinear, for use by an integer operator."""
        if value in self._integers:
            return value
        if value not in self._twins:
            name = value.name or "tensor"
            if value.const_value is not None:
                self._twins[value] = self.constant(np.asarray(constant_array(value)), name, self.quantization(value))
            else:
                quantization = self.quantization(value)
                integers = self.quantize(value, quantization.scale, quantization.zero_point, name)
                self._twins[value] = self.dequantize(
                    integers, quantization.scale, quantization.zero_point, f"{name}_dequantized"
                )
        return self._twins[value]

    def integers(self, value: ir.Value) -> ir.Value:
        """The integer tensor behind `value`."""
        return self._integers[self.operand(value)]

    def zero_point(self, value: ir.Value) -> ir.Value:
        """The zero point of `value` as an initializer: what the number 0 is in its integers."""
        quantization = self.quantization(value)
        return self._scalar(self._shifted(quantization.zero_point), self._spelling.activation_dtype, "zero_point")

    def constant(
        self, array: npt.NDArray[Any], name: str, quantization: ActivationQuantization | None = None
    ) -> ir.Value:
        """A constant operand, stored in the element type of activations; its range is its own unless given."""
        if quantization is None:
            scale, zero_point = affine_parameters(float(array.min()), float(array.max()), 8)
        else:
            scale, zero_point = quantization.scale, quantization.zero_point
        limits = np.iinfo(self._spelling.activation_dtype)
        integers = quantize_array(
            array.astype(np.float32),
            (scale,),
            zero_point=self._shifted(zero_point),
            smallest=int(limits.min),
            largest=int(limits.max),
            dtype=self._spelling.activation_dtype,
        )
        stored = self._initializer(integers, f"{name}_quantized")
        return self.dequantize(stored, scale, zero_point, f"{name}_dequantized")

    def planned_weight(self, value: ir.Value) -> tuple[ir.Value, npt.NDArray[np.float32]]:
        """A weight as int8 behind DequantizeLinear, and its scales.

        Raises:
            TargetError: The plan has no entry for it.
        """
        planned = self._plan.weights.get(value.name or "")
        array = constant_array(value)
        if planned is None or array is None:
            raise TargetError(
                f"The placement needs the weight '{value.name}' as integers, but the quantization plan has no scale "
                "for it.",
                "Make plan and placement anew by running without `--plan`.",
            )
        scales = self._spelling.weight_scales(planned)
        if value not in self._weights:
            self._weights[value] = self.weight(
                np.asarray(array, dtype=np.float32),
                value.name or "weight",
                scales,
                planned.axis,
                self._spelling.weight_bits(planned),
            )
        return self._weights[value], scales

    def channel_weight(
        self, array: npt.NDArray[np.float32], name: str, smallest_scales: npt.NDArray[np.floating]
    ) -> tuple[ir.Value, npt.NDArray[np.float32]]:
        """A computed weight with scales for its axis 0, none below `smallest_scales`; and its scales."""
        bits = min(8, self._spelling.max_weight_bits)
        magnitudes = np.abs(array).reshape(array.shape[0], -1).max(axis=1)
        scales = np.maximum(symmetric_scales(magnitudes, bits), smallest_scales).astype(np.float32)
        return self.weight(array, name, scales, 0, bits), scales

    def uniform_weight(self, number: float, shape: Sequence[int], name: str) -> ir.Value:
        """A weight that is `number` everywhere, exactly."""
        bits = min(8, self._spelling.max_weight_bits)
        scales = symmetric_scales(np.array([abs(number)]), bits)
        return self.weight(np.full(shape, number, dtype=np.float32), name, scales, None, bits)

    def weight(
        self, array: npt.NDArray[np.float32], name: str, scales: npt.NDArray[np.float32], axis: int | None, bits: int
    ) -> ir.Value:
        """Symmetric int8 integers of `array` behind DequantizeLinear."""
        largest = largest_symmetric_integer(bits)
        integers = quantize_array(array, scales.tolist(), axis=axis, smallest=-largest, largest=largest, dtype=np.int8)
        stored = self._initializer(integers, f"{name}_quantized")
        return self._dequantize_symmetric(stored, scales, axis, f"{name}_dequantized")

    def bias(
        self, array: npt.NDArray[Any], name: str, data: ir.Value, weight_scales: npt.NDArray[np.float32]
    ) -> ir.Value:
        """One int32 for each output channel behind DequantizeLinear, with scale input * weight.

        Args:
            array: The bias, one number or one for each channel.
            name: Where it came from.
            data: The operator's first input, whose scale counts.
            weight_scales: One, or one for each channel.
        """
        scales = (np.float32(self.quantization(data).scale) * weight_scales).astype(np.float32)
        flat = array.astype(np.float64).reshape(-1)
        if scales.size > 1:
            flat = np.broadcast_to(flat, scales.shape)
        axis = 0 if scales.size > 1 else None
        integers = quantize_array(
            flat, scales.tolist(), axis=axis, smallest=-_INT32_MAX, largest=_INT32_MAX, dtype=np.int32
        )
        stored = self._initializer(integers, f"{name}_quantized")
        return self._dequantize_symmetric(stored, scales, axis, f"{name}_dequantized")

    # --- writing ------------------------------------------------------------------------------------------------

    def emit(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        like: ir.Node,
        replaces: bool = False,
    ) -> ir.Value:
        """The output of a new one-output operator with the metadata of `like`; `replaces` gives it its name as well."""
        name = self._take_name(like) if replaces else self._fresh_node_name(f"{like.name}_{op_type}")
        node = ir.node(
            op_type,
            inputs,
            attributes=attributes or {},
            name=name,
            metadata_props=dict(like.metadata_props),
        )
        self._insert(node)
        return self._named(node.outputs[0], f"{node.name}_output")

    def copy_operator(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> tuple[ir.Value, ...]:
        """The outputs of a copy of `node` that reads `inputs`; the copy takes over the node's name."""
        name = self._take_name(node)
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            version=node.version,
            name=name,
            doc_string=node.doc_string,
            metadata_props=dict(node.metadata_props),
        )
        self._insert(copy)
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.type, new.shape = old.type, old.shape
            self._named(new, f"{old.name}_raw" if old.name else "")
        return tuple(copy.outputs)

    def quantize(self, value: ir.Value, scale: float, zero_point: int, name: str) -> ir.Value:
        """Integers of `value`; `zero_point` is signed, as in the plan."""
        dtype = self._spelling.activation_dtype
        stored_zero_point = self._scalar(self._shifted(zero_point), dtype, "zero_point")
        node = ir.node(
            "QuantizeLinear",
            [value, self._scalar(scale, np.float32, "scale"), stored_zero_point],
            name=self._fresh_node_name(f"{name}_QuantizeLinear"),
        )
        self._insert(node)
        output = self._named(node.outputs[0], f"{name}_quantized")
        output.type, output.shape = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype))), value.shape
        return output

    def dequantize(self, integers: ir.Value, scale: float, zero_point: int, name: str) -> ir.Value:
        """The real tensor called `name` behind `integers`; `zero_point` is signed, as in the plan."""
        stored_zero_point = self._scalar(self._shifted(zero_point), self._spelling.activation_dtype, "zero_point")
        output = self._dequantize(integers, [self._scalar(scale, np.float32, "scale"), stored_zero_point], {}, name)
        self._integers[output] = integers
        return output

    def finish(self, raw: ir.Value, output: ir.Value) -> None:
        """Let `raw`, quantized as the plan says for `output`, take the place of `output`."""
        quantization = self.quantization(output)
        raw.type, raw.shape = output.type, output.shape
        name = output.name or "tensor"
        self.finish_integers(self.quantize(raw, quantization.scale, quantization.zero_point, name), output)

    def finish_integers(self, integers: ir.Value, output: ir.Value) -> None:
        """Let `integers`, read as the plan says for `output`, take the place of `output`."""
        quantization = self.quantization(output)
        name = output.name or "tensor"
        integers.shape = output.shape
        real = self.dequantize(integers, quantization.scale, quantization.zero_point, f"{name}_dequantized")
        real.type, real.shape = output.type, output.shape
        real.metadata_props.update(output.metadata_props)
        output.replace_all_uses_with(real, replace_graph_outputs=True)
        self._names.discard(real.name)
        output.name = self._fresh_name(f"{name}_replaced")
        real.name = name

    def guard(self, node: ir.Node) -> None:
        """Let the quantized readers of `node` read its result through an operator that changes nothing."""
        output = node.outputs[0]
        lowest = self._scalar(float(np.finfo(np.float32).min), np.float32, "lowest")
        guard = ir.node("Max", [output, lowest], name=self._fresh_node_name(f"{node.name}_guard"))
        guarded = self._named(guard.outputs[0], f"{output.name}_guarded")
        guarded.type, guarded.shape = output.type, output.shape
        self._graph.insert_after(node, guard)
        for use in list(output.uses()):
            if use.node.op_type == "QuantizeLinear":
                use.node.replace_input_with(use.idx, guarded)

    # --- names and small constants ------------------------------------------------------------------------------

    def initializer(self, array: npt.NDArray[Any], name: str) -> ir.Value:
        """A new initializer (axes, for one)."""
        return self._initializer(array, name)

    def _dequantize(
        self, integers: ir.Value, parameters: Sequence[ir.Value], attributes: Mapping[str, int], name: str
    ) -> ir.Value:
        node = ir.node(
            "DequantizeLinear",
            [integers, *parameters],
            attributes=attributes,
            name=self._fresh_node_name(f"{name}_DequantizeLinear"),
        )
        self._insert(node)
        output = self._named(node.outputs[0], name)
        output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), integers.shape
        return output

    def _dequantize_symmetric(
        self, stored: ir.Value, scales: npt.NDArray[np.float32], axis: int | None, name: str
    ) -> ir.Value:
        dtype = np.int32 if stored.dtype == ir.DataType.INT32 else np.int8
        # A zero point says nothing new here, but without one ONNX Runtime doesn't find QGemm.
        if axis is None:
            zero_point = self._scalar(0, dtype, "zero_point")
            return self._dequantize(stored, [self._scalar(float(scales[0]), np.float32, "scale"), zero_point], {}, name)
        scale = self._initializer(scales, f"{stored.name}_scale")
        return self._dequantize(stored, [scale, self._zeros(scales.size, dtype)], {"axis": axis}, name)

    def _shifted(self, signed_zero_point: int) -> int:
        return signed_zero_point + (128 if self._spelling.unsigned_activations else 0)

    def _scalar(self, number: float, dtype: type[np.generic], kind: str) -> ir.Value:
        key = (float(number), np.dtype(dtype).name)
        if key not in self._scalars:
            self._scalars[key] = self._initializer(np.array(number, dtype=dtype), f"quantization_{kind}")
        return self._scalars[key]

    def _zeros(self, size: int, dtype: type[np.generic]) -> ir.Value:
        key = (size, np.dtype(dtype).name)
        if key not in self._zero_vectors:
            self._zero_vectors[key] = self._initializer(np.zeros(size, dtype=dtype), "quantization_zero_points")
        return self._zero_vectors[key]

    def _initializer(self, array: npt.NDArray[Any], name: str) -> ir.Value:
        name = self._fresh_name(name)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _insert(self, node: ir.Node) -> None:
        if self._position is None:
            raise ValueError("`start` must be called before anything is written.")
        self._graph.insert_before(self._position, node)

    def _named(self, value: ir.Value, name: str) -> ir.Value:
        value.name = self._fresh_name(name) if name else ""
        return value

    def _take_name(self, node: ir.Node) -> str:
        name = node.name or node.op_type
        node.name = self._fresh_node_name(f"{name}_replaced")
        return name

    def _fresh_name(self, wanted: str) -> str:
        name = _fresh(wanted, self._names)
        self._names.add(name)
        return name

    def _fresh_node_name(self, wanted: str) -> str:
        name = _fresh(wanted, self._node_names)
        self._node_names.add(name)
        return name


def _fresh(wanted: str, taken: set[str | None]) -> str:
    if wanted not in taken:
        return wanted
    number = 1
    while f"{wanted}_{number}" in taken:
        number += 1
    return f"{wanted}_{number}"
