"""Operators that turn numbers into integers and back, and those that compute with such integers.

Constants become floating-point constants that remember their integers (`Constant.grid`), so that convolutions and the
like get the constant weights that they want. The integer stage makes both sides integers again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import NUMPY_TYPES, Constant, Grid, Quantization, Tensor, TensorType
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

# Types whose tensors can carry scales. INT16 only with zero point 0, which its kernels check.
_QUANTIZED: frozenset[TensorType] = frozenset(("INT8", "UINT8", "INT16"))
# Sums of products of 8-bit numbers up to here are exact in FLOAT32.
_EXACT = 2**24


def _bounds(type_: TensorType) -> tuple[int, int]:
    limits = np.iinfo(NUMPY_TYPES[type_])
    return int(limits.min), int(limits.max)


@TFLITE.register("QuantizeLinear")
def quantize_linear(node: NodeView, build: Builder) -> Tensor:
    """QUANTIZE where one constant scale is all there is to it, else the arithmetic."""
    output = node.node.outputs[0]
    zero_point = node.optional(2)
    type_ = zero_point.type if zero_point is not None else _integer_type(output.dtype)
    x = build.cast(node.input(0), "FLOAT32")
    return _quantized(build, x, node.input(1), zero_point, type_, _axis(node), node.integer("block_size"))


@TFLITE.register("DequantizeLinear")
def dequantize_linear(node: NodeView, build: Builder) -> Tensor:
    """DEQUANTIZE where one constant scale is all there is to it, else the arithmetic; constants are computed here."""
    x = node.input(0)
    return _dequantized(build, x, node.input(1), node.optional(2), _axis(node), node.integer("block_size"))


def _axis(node: NodeView) -> int:
    """The axis of the scales. One scale for all has none, and its default is beyond what a scalar has."""
    is_shared = node.input(1).shape in ((), (1,)) and not node.integer("block_size")
    return 0 if is_shared else node.axis(node.input(0).rank, 1)


@TFLITE.register("DynamicQuantizeLinear")
def dynamic_quantize_linear(node: NodeView, build: Builder) -> tuple[Tensor, Tensor, Tensor]:
    """The range with REDUCE_MIN and REDUCE_MAX, scale and zero point from it, then as QuantizeLinear."""
    x = build.cast(node.input(0), "FLOAT32")
    zero, largest = build.constant(np.float32(0)), build.constant(np.float32(255))
    axes = build.constant(np.arange(x.rank, dtype=np.int32))
    low = build.binary("MINIMUM", build.op("REDUCE_MIN", [x, axes], shape=(), keepDims=False), zero)
    high = build.binary("MAXIMUM", build.op("REDUCE_MAX", [x, axes], shape=(), keepDims=False), zero)
    scale = build.binary("DIV", build.binary("SUB", high, low), largest)
    # A tensor that is zero everywhere has the scale 1, as ONNX Runtime has it; the specification divides 0 by 0.
    is_empty = build.binary("EQUAL", scale, zero, type_="BOOL")
    divisor = build.op("SELECT_V2", [is_empty, build.constant(np.float32(1)), scale], shape=(), type_="FLOAT32")
    offset = build.op("ROUND", [build.binary("DIV", build.binary("SUB", zero, low), divisor)])
    offset = build.binary("MINIMUM", build.binary("MAXIMUM", offset, zero), largest)
    y = build.op("ROUND", [build.binary("DIV", x, divisor)])
    y = build.binary("ADD", y, offset)
    y = build.binary("MINIMUM", build.binary("MAXIMUM", y, zero), largest)
    return build.cast(y, "UINT8"), divisor, build.cast(offset, "UINT8")


@TFLITE.register("QLinearConv")
def qlinear_conv(node: NodeView, build: Builder) -> Tensor:
    """DEQUANTIZE, the convolution, QUANTIZE: what the integer stage makes one CONV_2D of."""
    x = _dequantized(build, node.input(0), node.input(1), node.input(2), 0, 0)
    weight_scale = node.input(4)
    weight = _dequantized(build, node.input(3), weight_scale, node.input(5), 0, 0)
    bias = node.optional(8)
    if bias is not None:
        x_scale = build.reshaped(node.input(1), ())
        if bias.constant is not None and x_scale.constant is not None and weight_scale.constant is not None:
            scales = build.constant(x_scale.constant.array() * weight_scale.constant.array())
        else:
            scales = build.binary("MUL", weight_scale, x_scale)
        bias = _dequantized(build, bias, scales, None, 0, 0)
    y = _emitted("Conv", node, [x, weight, bias], build)
    return _quantized(build, y, node.input(6), node.input(7), node.input(7).type, 1, 0)


@TFLITE.register("QLinearMatMul")
def qlinear_matmul(node: NodeView, build: Builder) -> Tensor:
    """DEQUANTIZE, the product, QUANTIZE: what the integer stage makes one FULLY_CONNECTED of."""
    # Scales of rows of the left matrix, and of columns of the right one.
    left = _dequantized(build, node.input(0), node.input(1), node.input(2), max(node.input(0).rank - 2, 0), 0)
    right = _dequantized(build, node.input(3), node.input(4), node.input(5), node.input(3).rank - 1, 0)
    y = _emitted("MatMul", node, [left, right], build)
    return _quantized(build, y, node.input(6), node.input(7), node.input(7).type, max(y.rank - 2, 0), 0)


@TFLITE.register("MatMulInteger")
def matmul_integer(node: NodeView, build: Builder) -> Tensor:
    """The product in FLOAT32, whose sums are whole numbers; in two parts where those could be too large."""
    terms, one = node.input(0).shape[-1], build.constant(np.float32(1))
    # Zero points of rows of the left matrix, and of columns of the right one.
    left = _dequantized(build, node.input(0), one, node.optional(2), max(node.input(0).rank - 2, 0), 0)
    right = _dequantized(build, node.input(1), one, node.optional(3), node.input(1).rank - 1, 0)
    if 0 <= terms * 255 * 255 <= _EXACT:
        return build.cast(_emitted("MatMul", node, [left, right], build), "INT32")
    if not 0 <= terms * 255 * 16 <= _EXACT:
        raise UnsupportedError(
            f"its sums of {terms if terms >= 0 else 'an unknown number of'} products can leave the whole numbers of "
            "FLOAT32, and LiteRT has no product of matrices with INT32 sums"
        )
    # left = 16 * high + low, with |high| and |low| up to 16.
    high = build.op("FLOOR", [build.binary("MUL", left, build.constant(np.float32(1 / 16)))])
    low = build.binary("SUB", left, build.binary("MUL", high, build.constant(np.float32(16))))
    sums = [build.cast(_emitted("MatMul", node, [part, right], build), "INT32") for part in (high, low)]
    return build.binary("ADD", build.binary("MUL", sums[0], build.constant(np.int32(16))), sums[1])


def _emitted(op_type: str, node: NodeView, inputs: Sequence[Tensor | None], build: Builder) -> Tensor:
    """What the emitter of `op_type` makes of `inputs`, with the attributes of `node`."""
    like = ir.Node("", op_type, (), list(node.node.attributes.values()), version=node.version, name=node.node.name)
    emitter = TFLITE.get(like)
    if emitter is None:
        raise UnsupportedError(f"there is no way to emit {op_type}")
    emitted = emitter(replace(node, node=like, inputs=tuple(inputs)), build)
    return emitted if isinstance(emitted, Tensor) else next(one for one in emitted if one is not None)


def _integer_type(dtype: ir.DataType | None) -> TensorType:
    known: Mapping[ir.DataType | None, TensorType] = {
        ir.DataType.UINT8: "UINT8", ir.DataType.INT8: "INT8", ir.DataType.UINT16: "UINT16", ir.DataType.INT16: "INT16",
    }  # fmt: skip
    if dtype not in known:
        raise UnsupportedError(f"TFLite quantizes to 8 and 16 bits, not to {'?' if dtype is None else dtype.name}")
    return known[dtype]


def _quantization(
    scale: Tensor, zero_point: Tensor | None, axis: int, block_size: int, rank: int
) -> Quantization | None:
    """Constant scales that a tensor can carry; None: they are computed, or differ from block to block."""
    scales = scale.array()
    zero_points = np.zeros(1, np.int64) if zero_point is None else zero_point.array()
    if scales is None or zero_points is None or block_size or (scales.size > 1 and scales.ndim != 1):
        return None
    if scales.size > 1 and not 0 <= axis < rank:
        return None
    shared = np.broadcast_to(zero_points.reshape(-1), scales.size)
    return Quantization(
        scales=tuple(float(number) for number in scales.reshape(-1)),
        zero_points=tuple(int(number) for number in shared),
        axis=axis if scales.size > 1 else 0,
    )


def _has_kernel(type_: TensorType, quantization: Quantization) -> bool:
    """QUANTIZE and DEQUANTIZE convert that type with one such scale."""
    if type_ not in _QUANTIZED or quantization.is_per_axis or not quantization.scales[0] > 0:
        return False
    return type_ != "INT16" or quantization.zero_points == (0,)


def _quantized(
    build: Builder,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    type_: TensorType,
    axis: int,
    block_size: int,
) -> Tensor:
    quantization = _quantization(scale, zero_point, axis, block_size, x.rank)
    if x.constant is not None and quantization is not None:
        return build.constant_tensor(_rounded(x.constant, type_, quantization), name=f"{x.name}/quantized")
    if x.constant is None and quantization is not None and _has_kernel(type_, quantization):
        made = build.op("QUANTIZE", [x], shape=x.shape, type_=type_)
        return build.add(replace(made, quantization=quantization))
    blocks = _Blocks(x, scale, axis, block_size)
    y = build.binary("DIV", blocks.split(build, x), blocks.parameter(build, scale))
    y = build.op("ROUND", [y])
    if zero_point is not None:
        y = build.binary("ADD", y, blocks.parameter(build, build.cast(zero_point, "FLOAT32")))
    low, high = _bounds(type_)
    y = build.binary("MAXIMUM", y, build.constant(np.float32(low)))
    y = build.binary("MINIMUM", y, build.constant(np.float32(high)))
    return blocks.joined(build, build.cast(y, type_))


def _dequantized(
    build: Builder, x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block_size: int
) -> Tensor:
    quantization = _quantization(scale, zero_point, axis, block_size, x.rank)
    if x.constant is not None and quantization is not None:
        return build.constant_tensor(_real(x.constant, x.type, quantization), name=f"{x.name}/dequantized")
    if x.constant is not None and scale.constant is not None and (zero_point is None or zero_point.constant):
        offset = None if zero_point is None else zero_point.constant
        real = _real_in_blocks(x.constant, scale.constant, offset, axis, block_size)
        return build.constant_tensor(real, name=f"{x.name}/dequantized")
    if x.constant is None and quantization is not None and _has_kernel(x.type, quantization):
        known = build.tensors[x.name]
        if known.quantization in (None, quantization):
            build.add(replace(known, quantization=quantization))
            return build.op("DEQUANTIZE", [known], shape=x.shape, type_="FLOAT32")
    blocks = _Blocks(x, scale, axis, block_size)
    y = blocks.split(build, build.cast(x, "FLOAT32"))
    if zero_point is not None and not _is_zero(zero_point):
        y = build.binary("SUB", y, blocks.parameter(build, build.cast(zero_point, "FLOAT32")))
    return blocks.joined(build, build.binary("MUL", y, blocks.parameter(build, build.cast(scale, "FLOAT32"))))


def _is_zero(tensor: Tensor) -> bool:
    array = tensor.array()
    return array is not None and not array.any()


class _Blocks:
    """How scales meet the numbers of `x`: one for all, one for each index of an axis, or one for each block of it.

    x      (..., blocks * size, ...) -> (..., blocks, size, ...)
    scale  (..., blocks,        ...) -> (..., blocks, 1,    ...)
    """

    def __init__(self, x: Tensor, scale: Tensor, axis: int, block_size: int) -> None:
        self._axis = axis
        self._size = block_size
        self._rank = x.rank
        self._shape = x.shape
        self._is_per_axis = scale.rank == 1 and scale.shape[0] != 1
        if block_size and (x.shape[axis] < 0 or x.shape[axis] % block_size):
            raise UnsupportedError(f"axis {axis} of {list(x.shape)} is no multiple of its blocks of {block_size}")

    def split(self, build: Builder, x: Tensor) -> Tensor:
        if not self._size:
            return x
        before, behind = self._shape[: self._axis], self._shape[self._axis + 1 :]
        return build.reshaped(x, (*before, self._shape[self._axis] // self._size, self._size, *behind))

    def parameter(self, build: Builder, tensor: Tensor) -> Tensor:
        if self._size:
            place = self._axis + 1
            return build.reshaped(tensor, (*tensor.shape[:place], 1, *tensor.shape[place:]))
        if self._is_per_axis and tensor.rank == 1 and tensor.shape[0] != 1:
            return build.reshaped(tensor, (tensor.shape[0], *(1,) * (self._rank - 1 - self._axis)))
        if tensor.rank > 1:
            return tensor
        return build.reshaped(tensor, ())

    def joined(self, build: Builder, y: Tensor) -> Tensor:
        return build.reshaped(y, self._shape) if self._size else y


# --- constants --------------------------------------------------------------------------------------------------


def _along(numbers: Sequence[float], axis: int, rank: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    array = np.array(numbers, dtype)
    return array.reshape((-1, *(1,) * (rank - 1 - axis))) if array.size > 1 else array.reshape(())


def _rounded(constant: Constant, type_: TensorType, quantization: Quantization) -> Constant:
    rank = len(constant.shape)
    low, high = _bounds(type_)

    def load() -> npt.NDArray[Any]:
        scales = _along(quantization.scales, quantization.axis, rank, np.float32)
        zero_points = _along(quantization.zero_points, quantization.axis, rank, np.float32)
        integers = np.rint(constant.array() / scales) + zero_points
        return np.asarray(np.clip(integers, low, high), NUMPY_TYPES[type_])

    return Constant(constant.shape, NUMPY_TYPES[type_], load)


def _real(constant: Constant, type_: TensorType, quantization: Quantization) -> Constant:
    rank = len(constant.shape)

    def load() -> npt.NDArray[Any]:
        scales = _along(quantization.scales, quantization.axis, rank, np.float64)
        zero_points = _along(quantization.zero_points, quantization.axis, rank, np.float64)
        # float64 in between: an int32 bias has more digits than a float32.
        return np.asarray((constant.array() - zero_points) * scales, np.float32)

    return Constant(constant.shape, np.dtype(np.float32), load, Grid(type=type_, quantization=quantization))


def _real_in_blocks(
    constant: Constant, scale: Constant, zero_point: Constant | None, axis: int, block_size: int
) -> Constant:
    size = constant.shape[axis]

    def spread(parameter: Constant) -> npt.NDArray[Any]:
        return np.repeat(parameter.array(), block_size, axis=axis).take(np.arange(size), axis=axis)

    def load() -> npt.NDArray[Any]:
        offset = 0 if zero_point is None else spread(zero_point).astype(np.float32)
        return np.asarray((constant.array().astype(np.float32) - offset) * spread(scale), np.float32)

    return Constant(constant.shape, np.dtype(np.float32), load)
