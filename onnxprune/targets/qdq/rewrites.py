"""How each integer operator is written so that ONNX Runtime finds its integer kernel.

Most keep their operator between DequantizeLinear and QuantizeLinear. The others compute the same with operators that
have an integer kernel; what makes them exact stands at each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.graph.weights import constant_array
from onnxprune.ops.quant import QUANT, activation_inputs, bias_input, pools_everything, weight_input
from onnxprune.targets.qdq.convolutions import WiderConvolution, widened
from onnxprune.targets.qdq.resizing import resized_rows_and_columns
from onnxprune.targets.qdq.transposed import Phases, phases_of
from onnxprune.targets.qdq.writer import IntegerUnit, IntegerWriter

__all__ = [
    "Rewrite",
    "average_pool_as_depthwise_conv",
    "batch_norm_as_depthwise_conv",
    "clip_as_add",
    "conv_transpose_as_conv",
    "convolution",
    "divide_as_multiply",
    "global_max_pool_as_reduce_max",
    "hard_sigmoid_as_add",
    "hard_swish_as_add_and_mul",
    "keep_on_integers",
    "keep_operator",
    "pad_on_integers",
    "reduce_mean_as_global_pool",
    "resize_as_gathers",
    "subtract_as_add",
    "sum_as_add",
]

Rewrite: TypeAlias = Callable[[IntegerWriter, IntegerUnit], None]

# A bias must fit into int32 beside the products it is added to.
_LARGEST_BIAS_INTEGER = 2**30
_BIAS = 2


def keep_operator(writer: IntegerWriter, unit: IntegerUnit) -> None:
    """DequantizeLinear -> the operator -> QuantizeLinear, with int8 weight and int32 bias where it has them.

    An absorbed Relu or Clip is left out: its range begins (and ends) where the integers saturate.
    """
    _keep(writer, unit, None)


def convolution(writer: IntegerWriter, unit: IntegerUnit) -> None:
    """As `keep_operator`, with fewer and wider groups or a padded input where that is faster (`convolutions.py`)."""
    wider = widened(unit.node, writer.spelling)
    data = _data(unit.node)
    if wider is None or not wider.added_inputs:
        _keep(writer, unit, wider)
        return
    rank = len(data.shape) if data.shape is not None else 4
    padded = writer.emit(
        "Pad",
        [writer.integers(data), _channel_pads(writer, rank, wider.added_inputs), writer.zero_point(data)],
        like=unit.node,
    )
    quantization = writer.quantization(data)
    padded.type = writer.integers(data).type
    name = f"{data.name}_padded"
    real = writer.dequantize(padded, quantization.scale, quantization.zero_point, name)
    _keep(writer, unit, wider, data=real)


def _keep(
    writer: IntegerWriter, unit: IntegerUnit, wider: WiderConvolution | None, *, data: ir.Value | None = None
) -> None:
    """The operator with its weight as `wider` says, on `data` in place of its first input."""
    node = unit.node
    row = QUANT.get(node)
    inputs = list(node.inputs)
    activations = set(activation_inputs(node, row)) if row is not None else set()
    for position, value in enumerate(inputs):
        if value is not None and value in activations:
            inputs[position] = writer.operand(value) if data is None else data
    weight = weight_input(node, row) if row is not None else None
    if row is not None and weight is not None:
        real_weight, scales = writer.planned_weight(weight, wider)
        inputs = [real_weight if value is weight else value for value in inputs]
        bias = bias_input(node, row)
        if bias is not None:
            inputs[bias[0]] = writer.bias(_array(bias[1]), bias[1].name or "bias", _data(node), scales)
    groups = {} if wider is None else {"group": wider.groups // wider.merged}
    raw_outputs = writer.copy_operator(node, inputs, groups)
    if unit.absorbed is not None:
        writer.finish(raw_outputs[0], unit.outputs[0])
        return
    raw_of = dict(zip(node.outputs, raw_outputs, strict=True))
    for output in unit.outputs:
        writer.finish(raw_of[output], output)


def conv_transpose_as_conv(writer: IntegerWriter, unit: IntegerUnit) -> None:
    """ConvTranspose as one convolution for all its phases, interleaved as integers (`transposed.py`)."""
    node, output = unit.node, unit.outputs[0]
    phases = phases_of(node)
    if phases is None:
        raise ValueError(f"'{node.name}' can't be written as a convolution.")
    array, scales, planned = writer.weight_and_scales(_weight(node))
    scales = np.tile(scales, phases.count) if scales.size > 1 else scales
    axis = 0 if scales.size > 1 else None
    name = f"{node.name}_weight"
    operands = [writer.operand(_data(node)), writer.weight(phases.weight(array), name, scales, axis, planned.num_bits)]
    if len(node.inputs) > _BIAS and node.inputs[_BIAS] is not None:
        bias = np.tile(_array(node.inputs[_BIAS]).reshape(-1), phases.count)
        operands.append(writer.bias(bias, f"{node.name}_bias", _data(node), scales))
    attributes = {"pads": phases.pads, "kernel_shape": [phases.rows.count, phases.columns.count]}
    raw = writer.emit("Conv", operands, attributes, like=node, replaces=True)
    raw.type = output.type
    quantization = writer.quantization(output)
    integers = writer.quantize(raw, quantization.scale, quantization.zero_point, f"{output.name}_phases")
    interleaved = _interleave(writer, node, integers, phases, channels=array.shape[1])
    interleaved.type = integers.type
    writer.finish_integers(interleaved, output)


def _interleave(writer: IntegerWriter, node: ir.Node, integers: ir.Value, phases: Phases, *, channels: int) -> ir.Value:
    """[N, phases * channels, Q, Q'] -> [N, channels, height, width]."""
    rows, columns = phases.rows, phases.columns

    def shape(*dims: int) -> ir.Value:
        return writer.initializer(np.array(dims, dtype=np.int64), f"{node.name}_shape")

    runs = columns.stride * channels
    moved = writer.emit("Transpose", [integers], {"perm": [0, 2, 3, 1]}, like=node)
    moved = writer.emit("Reshape", [moved, shape(-1, columns.steps, rows.stride, runs)], like=node)
    moved = writer.emit("Transpose", [moved], {"perm": [0, 2, 1, 3]}, like=node)
    height, width = rows.steps * rows.stride, columns.steps * columns.stride
    moved = writer.emit("Reshape", [moved, shape(-1, height, width, channels)], like=node)
    if (height, width) != (rows.size, columns.size):
        ends = shape(rows.size, columns.size)
        moved = writer.emit("Slice", [moved, shape(0, 0), ends, shape(1, 2)], like=node)
    return writer.emit("Transpose", [moved], {"perm": [0, 3, 1, 2]}, like=node)


def keep_on_integers(writer: IntegerWriter, unit: IntegerUnit) -> None:
    """The operator itself on the integers: it moves them, so input and output share one scale."""
    node = unit.node
    integers = writer.integers(_data(node))
    _finish_moved(writer, unit, integers, list(node.inputs[1:]))


def pad_on_integers(writer: IntegerWriter, unit: IntegerUnit) -> None:
    """Pad on the integers, where the padding value 0 is the zero point."""
    node = unit.node
    data = _data(node)
    others = [*node.inputs[1:], None, None]
    if node.attributes.get_string("mode", "constant") == "constant":
        others[1] = writer.zero_point(data)
    while others and others[-1] is None:
        others.pop()
    _finish_moved(writer, unit, writer.integers(data), others)


def resize_as_gathers(writer: IntegerWriter, unit: IntegerUnit) -> None:
    """Resize to the nearest as Gathers of rows and columns where its sizes are known (`resizing.py`)."""
    node = unit.node
    indices = resized_rows_and_columns(node)
    if indices is None:
        keep_operator(writer, unit)
        return
    data = _data(node)
    dtype = writer.integers(data).type
    moved = writer.emit("Transpose", [writer.integers(data)], {"perm": [0, 2, 3, 1]}, like=node)
    for axis, (kind, wanted) in enumerate(zip(("rows", "columns"), indices, strict=True), start=1):
        stored = writer.initializer(wanted, f"{node.name}_{kind}")
        moved = writer.emit("Gather", [moved, stored], {"axis": axis}, like=node)
    back = writer.emit("Transpose", [moved], {"perm": [0, 3, 1, 2]}, like=node, replaces=True)
    back.type = dtype
    writer.finish_integers(back, unit.outputs[0])


def clip_as_add(writer: IntegerWriter, unit: IntegerUnit) -> None:
    """Relu or Clip as x + 0: QLinearAdd rescales, and the saturation of its output clips."""
    node = unit.node
    zero = writer.constant(np.zeros((), dtype=np.float32), f"{node.name}_zero")
    added = writer.emit("Add", [writer.operand(_data(node)), zero], like=node, replaces=True)
    writer.finish(added, unit.outputs[0])


def sum_as_add(writer: IntegerWriter, unit: IntegerUnit) -> None:
    """Sum of two tensors as Add."""
    operands = [writer.operand(value) for value in unit.node.inputs if value is not None]
    writer.finish(writer.emit("Add", operands, like=unit.node, replaces=True), unit.outputs[0])


def subtract_as_add(writer: IntegerWriter, unit: IntegerUnit) -> None:
    """Subtracting a constant c is adding -c."""
    _with_constant_operand(writer, unit, "Add", np.negative)


def divide_as_multiply(writer: IntegerWriter, unit: IntegerUnit) -> None:
    """Dividing by a constant c is multiplying by 1/c."""
    _with_constant_operand(writer, unit, "Mul", np.reciprocal)


def hard_sigmoid_as_add(writer: IntegerWriter, unit: IntegerUnit) -> None:
    """HardSigmoid as QLinearAdd: see `_shifted_and_clipped`."""
    node, output = unit.node, unit.outputs[0]
    quantization = writer.quantization(output)
    integers = _shifted_and_clipped(
        writer,
        node,
        alpha=node.attributes.get_float("alpha", 0.2),
        beta=node.attributes.get_float("beta", 0.5),
        scale=quantization.scale,
        zero_point=quantization.zero_point,
    )
    writer.finish_integers(integers, output)


def hard_swish_as_add_and_mul(writer: IntegerWriter, unit: IntegerUnit) -> None:
    """HardSwish, x * HardSigmoid(x) with slope 1/6: the gate as in `_shifted_and_clipped`, then QLinearMul."""
    node = unit.node
    # The gate uses its whole range [0, 1].
    scale, zero_point = float(np.float32(1 / 255)), -128
    integers = _shifted_and_clipped(writer, node, alpha=1 / 6, beta=0.5, scale=scale, zero_point=zero_point)
    gate = writer.dequantize(integers, scale, zero_point, f"{node.name}_gate")
    product = writer.emit("Mul", [writer.operand(_data(node)), gate], like=node, replaces=True)
    writer.finish(product, unit.outputs[0])


def reduce_mean_as_global_pool(writer: IntegerWriter, unit: IntegerUnit) -> None:
    """A mean over the spatial axes is GlobalAveragePool, which has an integer kernel."""
    node, output = unit.node, unit.outputs[0]
    data = _data(node)
    pooled = writer.emit("GlobalAveragePool", [writer.operand(data)], like=node, replaces=True)
    if node.attributes.get_int("keepdims", 1):
        writer.finish(pooled, output)
        return
    quantization = writer.quantization(output)
    pooled.type = output.type
    name = f"{output.name}_pooled"
    integers = writer.quantize(pooled, quantization.scale, quantization.zero_point, name)
    real = writer.dequantize(integers, quantization.scale, quantization.zero_point, f"{name}_dequantized")
    axes = writer.initializer(_spatial_axes(data), f"{node.name}_axes")
    writer.finish(writer.emit("Squeeze", [real, axes], like=node), output)


def global_max_pool_as_reduce_max(writer: IntegerWriter, unit: IntegerUnit) -> None:
    """GlobalMaxPool as ReduceMax over the spatial axes, which has an integer kernel."""
    node = unit.node
    data = _data(node)
    axes = writer.initializer(_spatial_axes(data), f"{node.name}_axes")
    reduced = writer.emit("ReduceMax", [writer.operand(data), axes], {"keepdims": 1}, like=node, replaces=True)
    writer.finish(reduced, unit.outputs[0])


def average_pool_as_depthwise_conv(writer: IntegerWriter, unit: IntegerUnit) -> None:
    """An average is a depthwise convolution whose weights are all 1/size: each is 127 in its scale, so exact.

    One window over the whole input is GlobalAveragePool.
    """
    node = unit.node
    data = _data(node)
    if pools_everything(node):
        pooled = writer.emit("GlobalAveragePool", [writer.operand(data)], like=node, replaces=True)
        writer.finish(pooled, unit.outputs[0])
        return
    kernel_shape = list(node.attributes.get_ints("kernel_shape", ()))
    channels = _num_channels(data)
    share = 1.0 / math.prod(kernel_shape)
    weight = writer.uniform_weight(share, (channels, 1, *kernel_shape), f"{node.name}_weight")
    kept = {name: list(node.attributes.get_ints(name, ())) for name in ("strides", "pads", "dilations")}
    attributes = {
        "group": channels,
        "kernel_shape": kernel_shape,
        **{name: ints for name, ints in kept.items() if ints},
    }
    raw = writer.emit("Conv", [writer.operand(data), weight], attributes, like=node, replaces=True)
    writer.finish(raw, unit.outputs[0])


def batch_norm_as_depthwise_conv(writer: IntegerWriter, unit: IntegerUnit) -> None:
    """BatchNormalization that no convolution took in, as a 1x1 depthwise convolution.

        y = x * w + b,  w = gamma / sqrt(var + epsilon),  b = beta - mean * w

    Each channel has one weight and a scale of its own, so every weight is +-127 and the factor is exact.
    """
    node = unit.node
    data = _data(node)
    rank = len(data.shape) if data.shape is not None else 4
    gamma, beta, mean, variance = (_array(value).astype(np.float64) for value in node.inputs[1:5])
    factor = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    shift = beta - mean * factor
    smallest_scales = np.abs(shift) / (_LARGEST_BIAS_INTEGER * writer.quantization(data).scale)
    shape = (factor.size, *[1] * (rank - 1))
    name = node.name or "BatchNormalization"
    weight, scales = writer.channel_weight(factor.astype(np.float32).reshape(shape), f"{name}_weight", smallest_scales)
    bias = writer.bias(shift, f"{name}_bias", data, scales)
    attributes = {"group": factor.size, "kernel_shape": [1] * (rank - 2)}
    raw = writer.emit("Conv", [writer.operand(data), weight, bias], attributes, like=node, replaces=True)
    writer.finish(raw, unit.outputs[0])


def _shifted_and_clipped(
    writer: IntegerWriter, node: ir.Node, *, alpha: float, beta: float, scale: float, zero_point: int
) -> ir.Value:
    """Integers of clip(alpha * x + beta, 0, 1) in the given scale, by one QLinearAdd.

        alpha * x + beta = alpha * (x + beta / alpha)

    The sum x + beta/alpha in the scale `scale / alpha` has the very integers of the result in the scale `scale`, and
    they saturate where [0, 1] ends.
    """
    shift = writer.constant(np.array(beta / alpha, dtype=np.float32), f"{node.name}_shift")
    shifted = writer.emit("Add", [writer.operand(_data(node)), shift], like=node)
    shifted.type, shifted.shape = node.outputs[0].type, node.outputs[0].shape
    return writer.quantize(shifted, float(np.float32(scale / alpha)), zero_point, f"{node.name}_shifted")


def _with_constant_operand(
    writer: IntegerWriter,
    unit: IntegerUnit,
    op_type: str,
    change: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]],
) -> None:
    node = unit.node
    operand = node.inputs[1]
    changed = change(_array(operand).astype(np.float32))
    constant = writer.constant(changed, f"{node.name}_operand")
    result = writer.emit(op_type, [writer.operand(_data(node)), constant], like=node, replaces=True)
    writer.finish(result, unit.outputs[0])


def _channel_pads(writer: IntegerWriter, rank: int, added: int) -> ir.Value:
    pads = np.zeros((2, rank), dtype=np.int64)
    pads[1, 1] = added
    return writer.initializer(pads.reshape(-1), "added_channels")


def _finish_moved(writer: IntegerWriter, unit: IntegerUnit, integers: ir.Value, others: list[ir.Value | None]) -> None:
    (moved,) = writer.copy_operator(unit.node, [integers, *others])
    moved.type = integers.type
    writer.finish_integers(moved, unit.outputs[0])


def _data(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    if value is None:
        raise ValueError(f"'{node.name}' has no first input.")
    return value


def _weight(node: ir.Node) -> ir.Value:
    value = node.inputs[1]
    if value is None:
        raise ValueError(f"'{node.name}' has no weight.")
    return value


def _num_channels(data: ir.Value) -> int:
    channels = data.shape[1] if data.shape is not None and len(data.shape) > 1 else None
    if not isinstance(channels, int):
        raise TypeError(f"The number of channels of '{data.name}' is unknown.")
    return channels


def _array(value: ir.Value | None) -> npt.NDArray[np.generic]:
    array = constant_array(value)
    if array is None:
        raise ValueError("A constant was expected.")
    return array


def _spatial_axes(data: ir.Value) -> npt.NDArray[np.int64]:
    rank = len(data.shape) if data.shape is not None else 4
    return np.arange(2, rank, dtype=np.int64)
