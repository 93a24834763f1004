"""Layers in integers with ranges that each run finds in the layer's input.

    x -> DynamicQuantizeLinear -> MatMulInteger (int8 weight) -> Cast -> Mul with x_scale * w_scale (-> Add bias)

ONNX Runtime makes one operator of this: DynamicQuantizeMatMul, or MatMulIntegerToFloat where several layers (Q, K, V)
read one tensor and share its DynamicQuantizeLinear. That operator always gives uint8, on ARM as well; weights are int8,
with 7 bits on x86 without VNNI. A convolution has uint8 weights around the zero point 128, because ONNX Runtime's
ConvInteger by int8 takes three to four times as long. An LSTM becomes DynamicQuantizeLSTM.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxprune.graph.weights import constant_array
from onnxprune.ops.quant import QUANT, bias_input
from onnxprune.ops.stored_weights import stored_weights
from onnxprune.ops.table import OpTable
from onnxprune.targets.qdq.data_free_costs import MatrixProduct, conv_1d_pays, dynamic_pays
from onnxprune.targets.qdq.graph_writer import GraphWriter
from onnxprune.targets.qdq.kernels import KERNELS
from onnxprune.targets.qdq.spelling import Spelling

__all__ = ["dynamic_refusal", "matrix_refusal", "write_dynamic"]


Refuse = Callable[[ir.Node, Spelling], str | None]
Write = Callable[[GraphWriter, ir.Node], None]


def dynamic_refusal(node: ir.Node, spelling: Spelling) -> str | None:
    """Why `node` does not compute in integers with ranges of the run; None: it does."""
    rules = _DYNAMIC.get(node)
    if rules is None:
        return f"ONNX Runtime has no {node.op_type} that quantizes its input in each run"
    return rules[0](node, spelling)


def write_dynamic(writer: GraphWriter, node: ir.Node) -> None:
    """Put the integer form in the place of `node`."""
    rules = _DYNAMIC.get(node)
    if rules is None:
        raise ValueError(f"'{node.name}' ({node.op_type}) has no dynamic form; `dynamic_refusal` says so.")
    rules[1](writer, node)


def matrix_refusal(node: ir.Node) -> str | None:
    """Why a MatMul or Gemm is no product of an activation with one constant matrix."""
    weight = node.inputs[1]
    if constant_array(weight) is None or weight is None or weight.shape is None or len(weight.shape) != 2:
        return "its second operand is not one constant matrix"
    data = node.inputs[0]
    if data is None or data.shape is None or len(data.shape) < 2:
        return "the rank of its input is unknown or below 2"
    row, kernel = QUANT.get(node), KERNELS.get(node)
    return (row.refuses(node) if row is not None else None) or (kernel.refuses(node) if kernel is not None else None)


def _refuse_matrix(node: ir.Node, spelling: Spelling) -> str | None:
    refusal = matrix_refusal(node)
    if refusal is not None:
        return refusal
    if dynamic_pays(_product(node), spelling.name, readers=_num_sharing(node)):
        return None
    return "finding the range in each run would cost more than integers save"


def _product(node: ir.Node) -> MatrixProduct:
    data, weight = node.inputs[0], node.inputs[1]
    if data is None or data.shape is None or weight is None or weight.shape is None:
        raise ValueError(f"'{node.name}' lacks the shapes that `matrix_refusal` asks for.")
    summed, columns = weight.shape.numpy()
    if node.attributes.get_int("transB", 0):
        summed, columns = columns, summed
    rows = math.prod(dim for dim in data.shape[:-1] if isinstance(dim, int))
    return MatrixProduct(rows=rows, summed=summed, columns=columns)


def _num_sharing(node: ir.Node) -> int:
    """How many products with constant matrices read the input of `node`."""
    data = node.inputs[0]
    readers = data.consumers() if data is not None else ()
    return sum(
        reader.op_type in ("MatMul", "Gemm") and reader.inputs[0] is data and matrix_refusal(reader) is None
        for reader in readers
    )


def _write_matrix(writer: GraphWriter, node: ir.Node) -> None:
    data, weight = node.inputs[0], node.inputs[1]
    if data is None or weight is None:
        raise ValueError(f"'{node.name}' lacks an input.")
    name, output = weight.name or "weight", node.outputs[0].name
    integers, scales = writer.integers(weight, writer.plan.weights[name], for_arithmetic=True)
    if node.attributes.get_int("transB", 0):
        integers = np.ascontiguousarray(integers.T)
    quantized, data_scale, zero_point = writer.quantized_input(data)
    stored = writer.constant(integers, f"{name}_quantized")
    (product,) = writer.emit("MatMulInteger", [quantized, stored, zero_point], names=[f"{output}_integers"], like=node)
    real = _rescaled(writer, node, product, data_scale, scales if scales.size > 1 else scales.reshape(()))
    writer.replace(node, [_with_bias(writer, node, real, ())], named=product)


def _rescaled(
    writer: GraphWriter, node: ir.Node, integers: ir.Value, data_scale: ir.Value, weight_scales: np.ndarray
) -> ir.Value:
    """The real numbers behind the products of two integer tensors, in the order that ONNX Runtime fuses."""
    output = node.outputs[0].name
    real = writer.to_float(integers, f"{output}_float", like=node)
    stored = writer.constant(weight_scales, f"{node.inputs[1].name if node.inputs[1] else output}_scale")
    (scale,) = writer.emit("Mul", [data_scale, stored], names=[f"{output}_scale"], like=node)
    (scaled,) = writer.emit("Mul", [real, scale], names=[f"{output}_scaled"], like=node)
    return scaled


def _with_bias(writer: GraphWriter, node: ir.Node, real: ir.Value, trailing: tuple[int, ...]) -> ir.Value:
    """`real` with the bias of a Gemm or Conv added, which has `trailing` axes of size 1 behind its channels."""
    row = QUANT.get(node)
    bias = bias_input(node, row) if row is not None else None
    array = constant_array(bias[1]) if bias is not None else None
    if bias is None or array is None:
        return real
    stored = writer.constant(array.reshape(-1, *trailing) if array.size > 1 else array.reshape(1), f"{bias[1].name}")
    return writer.emit("Add", [real, stored], names=[f"{node.outputs[0].name}_biased"], like=node)[0]


def _refuse_conv(node: ir.Node, spelling: Spelling) -> str | None:
    weight = node.inputs[1]
    shape = weight.shape.numpy() if weight is not None and weight.shape is not None else ()
    if len(shape) != 3:
        return "an integer convolution that finds its range in each run is slower than the float one"
    summed = math.prod(shape[1:])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and bias.const_value is None:
        return "its bias is computed at run time"
    if node.attributes.get_int("group", 1) == 1 and conv_1d_pays(
        summed=summed, channels=shape[0], spelling=spelling.name
    ):
        return None
    return "finding the range in each run would cost more than integers save"


def _write_conv(writer: GraphWriter, node: ir.Node) -> None:
    data, weight = node.inputs[0], node.inputs[1]
    if data is None or weight is None:
        raise ValueError(f"'{node.name}' lacks an input.")
    name, output = weight.name or "weight", node.outputs[0].name
    integers, scales = writer.integers(weight, writer.plan.weights[name], for_arithmetic=True)
    unsigned = (integers.astype(np.int16) + 128).astype(np.uint8)
    quantized, data_scale, zero_point = writer.quantized_input(data)
    stored = writer.constant(unsigned, f"{name}_quantized")
    weight_zero_point = writer.constant(np.array(128, dtype=np.uint8), f"{name}_zero_point")
    (product,) = writer.emit(
        "ConvInteger",
        [quantized, stored, zero_point, weight_zero_point],
        dict(node.attributes),
        names=[f"{output}_integers"],
        like=node,
    )
    trailing = (1,) * (integers.ndim - 2)
    scale = scales.reshape(-1, *trailing) if scales.size > 1 else scales.reshape(())
    real = _rescaled(writer, node, product, data_scale, scale)
    writer.replace(node, [_with_bias(writer, node, real, trailing)], named=product)


def _refuse_lstm(node: ir.Node, _spelling: Spelling) -> str | None:
    if len(stored_weights(node)) != 2:
        return "its weights are computed at run time"
    return "its layout is batch-first" if node.attributes.get_int("layout", 0) else None


def _write_lstm(writer: GraphWriter, node: ir.Node) -> None:
    """DynamicQuantizeLSTM, which wants weights as (directions, input, 4 * hidden)."""
    inputs = [*node.inputs, *[None] * (8 - len(node.inputs))]
    parameters: list[ir.Value] = []
    for position in (1, 2):
        weight = node.inputs[position]
        if weight is None:
            raise ValueError(f"'{node.name}' lacks a weight.")
        name = weight.name or "weight"
        integers, scales = writer.integers(weight, writer.plan.weights[name], for_arithmetic=True)
        inputs[position] = writer.constant(np.ascontiguousarray(integers.transpose(0, 2, 1)), f"{name}_quantized")
        shape = (integers.shape[0],) if scales.size == 1 else (integers.shape[0], scales.size)
        each = np.ascontiguousarray(np.broadcast_to(scales if scales.size > 1 else scales[0], shape))
        zero_points = np.zeros(shape, dtype=np.int8)
        parameters += [writer.constant(each, f"{name}_scale"), writer.constant(zero_points, f"{name}_zero_point")]
    outputs = writer.emit(
        "DynamicQuantizeLSTM",
        [*inputs, *parameters],
        {name: value for name, value in node.attributes.items() if name != "layout"},
        names=[f"{output.name}_dynamic" if output.name else "" for output in node.outputs],
        like=node,
        domain="com.microsoft",
    )
    writer.replace(node, outputs, named=outputs[0])


_DYNAMIC: OpTable[tuple[Refuse, Write]] = OpTable("layers with ranges of each run")


def _register() -> None:
    _DYNAMIC.add((_refuse_matrix, _write_matrix), "MatMul", "Gemm")
    _DYNAMIC.add((_refuse_conv, _write_conv), "Conv")
    _DYNAMIC.add((_refuse_lstm, _write_lstm), "LSTM")


_register()
