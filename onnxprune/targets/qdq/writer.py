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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import ActivationQuantization, QuantizationPlan, WeightQuantization
from onnxprune.errors import TargetError
from onnxprune.graph.names import UniqueNames
from onnxprune.graph.weights import add_initializer, constant_array
from onnxprune.ops.affine import affine_parameters, largest_symmetric_integer, quantize_array, symmetric_scales
from onnxprune.targets.qdq.convolutions import WiderConvolution
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
        self._weight_forms: dict[ir.Value, tuple[npt.NDArray[np.float32], int]] = {}
        self._names = UniqueNames.of_values(model)
        self._node_names = UniqueNames.of_nodes(model)
        self._position: ir.Node | None = None
        # Real tensor (the output of a DequantizeLinear) -> its integers.
        self._integers: dict[ir.Value, ir.Value] = {}
        # Float tensor -> its real twin that went through integers.
        self._twins: dict[ir.Value, ir.Value] = {}
        # Scales and zero points recur: each is stored once.
        self._scalars: dict[tuple[float, str], ir.Value] = {}
        self._zero_vectors: dict[tuple[int, str], ir.Value] = {}
        self._weights: dict[tuple[ir.Value, WiderConvolution | None], ir.Value] = {}

    @property
    def spelling(self) -> Spelling:
        """The spelling that is being written."""
        return self._spelling

    def start(self, unit: IntegerUnit) -> None:
        """Write before `unit.node` from now on."""
        self.start_at(unit.node)

    def start_at(self, node: ir.Node) -> None:
        """Write before `node` from now on."""
        self._position = node

    # --- reading operands ---------------------------------------------------------------------------------------

    def quantization(self, value: ir.Value) -> ActivationQuantization:
        """The plan's entry for a tensor.

        Raises:
            TargetError: There is none, or one that is not of 8 bits; the placement does not fit the plan.
        """
        found = self._plan.activations.get(value.name or "")
        if found is None:
            raise TargetError(
                f"The placement makes tensor '{value.name}' integer, but the quantization plan has no scale for it.",
                "Make plan and placement anew by running without `--plan`.",
            )
        if found.num_bits != 8:
            raise TargetError(
                f"The placement makes tensor '{value.name}' integer, but the quantization plan has {found.num_bits} "
                f"bits for it, and the spelling '{self._spelling.name}' writes activations of 8 bits.",
                "Make the placement anew by running without `--plan`; placement 'everywhere' writes 16 bits.",
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

    def planned_weight(
        self, value: ir.Value, wider: WiderConvolution | None = None
    ) -> tuple[ir.Value, npt.NDArray[np.float32]]:
        """A weight as int8 behind DequantizeLinear, and its scales; `wider` adds zeros and keeps the scales.

        Raises:
            TargetError: The plan has no entry for it.
        """
        numbers, scales, planned = self.weight_and_scales(value)
        if (value, wider) not in self._weights:
            self._weights[value, wider] = self.weight(
                numbers if wider is None else wider.weight(numbers),
                value.name or "weight",
                scales,
                planned.axis,
                planned.num_bits,
            )
        return self._weights[value, wider], scales

    def weight_and_scales(
        self, value: ir.Value
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], WeightQuantization]:
        """The numbers of a weight, this spelling's scales for it, and what the plan says, with this spelling's bits.

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
        numbers = np.asarray(array, dtype=np.float32)
        scales, bits = self._weight_form(value, numbers, planned)
        return numbers, scales, replace(planned, num_bits=bits)

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
        name = self._take_name(like) if replaces else self._node_names.claim(f"{like.name}_{op_type}")
        node = ir.node(
            op_type,
            inputs,
            attributes=attributes or {},
            name=name,
            metadata_props=dict(like.metadata_props),
        )
        self._insert(node)
        return self._named(node.outputs[0], f"{node.name}_output")

    def copy_operator(
        self, node: ir.Node, inputs: Sequence[ir.Value | None], changed: Mapping[str, int] | None = None
    ) -> tuple[ir.Value, ...]:
        """The outputs of a copy of `node` that reads `inputs` and takes over its name; `changed` are its attributes."""
        name = self._take_name(node)
        attributes = dict(node.attributes)
        attributes.update({key: ir.AttrInt64(key, number) for key, number in (changed or {}).items()})
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(attributes.values()),
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
            name=self._node_names.claim(f"{name}_QuantizeLinear"),
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
        output.name = self._names.claim(f"{name}_replaced")
        real.name = name

    def guard(self, node: ir.Node) -> None:
        """Let the quantized readers of `node` read its result through an operator that changes nothing."""
        output = node.outputs[0]
        lowest = self._scalar(float(np.finfo(np.float32).min), np.float32, "lowest")
        guard = ir.node("Max", [output, lowest], name=self._node_names.claim(f"{node.name}_guard"))
        guarded = self._named(guard.outputs[0], f"{output.name}_guarded")
        guarded.type, guarded.shape = output.type, output.shape
        self._graph.insert_after(node, guard)
        for use in list(output.uses()):
            if use.node.op_type == "QuantizeLinear":
                use.node.replace_input_with(use.idx, guarded)

    def shield(self, dequantize: ir.Node, axis: int | None) -> ir.Value:
        """The result of `dequantize` (one scale) once more, with that scale repeated along `axis`; None: by Max."""
        real = dequantize.outputs[0]
        name = f"{real.name}_shielded"
        integers, scale, zero_point = dequantize.inputs[:3]
        size = None if axis is None or integers is None or integers.shape is None else integers.shape[axis]
        if integers is None or axis is None or not isinstance(size, int):
            lowest = self._scalar(float(np.finfo(np.float32).min), np.float32, "lowest")
            node = ir.node("Max", [real, lowest], name=self._node_names.claim(name))
            self._insert(node)
            shielded = self._named(node.outputs[0], name)
        else:
            parameters = [self._repeated(scale, size), self._repeated(zero_point, size)]
            shielded = self._dequantize(integers, parameters, {"axis": axis}, name)
        shielded.type, shielded.shape = real.type, real.shape
        return shielded

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
            name=self._node_names.claim(f"{name}_DequantizeLinear"),
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

    def _weight_form(
        self, value: ir.Value, array: npt.NDArray[np.float32], planned: WeightQuantization
    ) -> tuple[npt.NDArray[np.float32], int]:
        """Scales and bits of a weight, found when its first reader is written, while all readers can still be asked."""
        if value not in self._weight_forms:
            self._weight_forms[value] = self._spelling.weight_form(planned, value, array)
        return self._weight_forms[value]

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

    def _repeated(self, scalar: ir.Value | None, size: int) -> ir.Value:
        array = constant_array(scalar)
        if scalar is None or array is None:
            raise ValueError("Scale and zero point were expected to be constants.")
        return self._initializer(np.full(size, array.reshape(-1)[0]), f"{scalar.name}_repeated")

    def _initializer(self, array: npt.NDArray[Any], name: str) -> ir.Value:
        return add_initializer(self._graph, name, array, self._names)

    def _insert(self, node: ir.Node) -> None:
        if self._position is None:
            raise ValueError("`start` must be called before anything is written.")
        self._graph.insert_before(self._position, node)

    def _named(self, value: ir.Value, name: str) -> ir.Value:
        value.name = self._names.claim(name) if name else ""
        return value

    def _take_name(self, node: ir.Node) -> str:
        name = node.name or node.op_type
        node.name = self._node_names.claim(f"{name}_replaced")
        return name
