"""Quantized operators in NumPy: exact integer sums, rescaled in real numbers or in TFLite's fixed-point arithmetic.

Integers are signed (int8's numbers in int64 arrays), layouts are ONNX's. With `Rounding.REAL` a result is the nearest
integer to the real number, half to even: what QuantizeLinear says. With `Rounding.TFLITE` sums are multiplied by a
31-bit multiplier and shifted, as TFLite's reference kernels do (gemmlowp's rounding, twice):

    MultiplyByQuantizedMultiplier(x, m, s) = RoundingDivideByPOT(SaturatingRoundingDoublingHighMul(x << s+, m), s-)

Sources: the TFLite 8-bit quantization specification; tensorflow/lite/kernels/internal/reference (conv, add, mul, mean,
leaky_relu, average pool); Jacob et al., 2018, arXiv:1712.05877.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import QuantizationPlan
from onnxprune.graph.weights import constant_array
from onnxprune.ops.affine import largest_symmetric_integer, quantize_array
from onnxprune.ops.planned import PlannedNode
from onnxprune.ops.quant import bias_input, clip_bounds, pools_everything
from onnxprune.targets.qdq.spelling import Spelling

Integers = npt.NDArray[np.int64]


class Rounding(enum.Enum):
    REAL = "real"
    TFLITE = "tflite"


@dataclass(frozen=True, kw_only=True)
class Affine:
    """Scale and signed zero point of one tensor."""

    scale: float
    zero_point: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """One integer node of a plan with the integers that it reads."""

    item: PlannedNode
    plan: QuantizationPlan
    spelling: Spelling
    integers: Mapping[str, Integers]
    rounding: Rounding

    @property
    def node(self) -> ir.Node:
        return self.item.node

    @property
    def output(self) -> Affine:
        return self.affine(self.item.outputs[0])

    def affine(self, value: ir.Value | None) -> Affine:
        assert value is not None
        found = self.plan.activations[value.name or ""]
        return Affine(scale=found.scale, zero_point=found.zero_point)

    def centered(self, position: int) -> Integers:
        """Integers minus zero point of the input at `position`, constant or not."""
        value = self.node.inputs[position]
        assert value is not None
        affine = self.affine(value)
        if value.const_value is not None:
            array = np.asarray(constant_array(value), dtype=np.float32)
            limits = {"smallest": -128, "largest": 127, "dtype": np.int8}
            stored = quantize_array(array, [affine.scale], zero_point=affine.zero_point, **limits)
            return stored.astype(np.int64) - affine.zero_point
        return self.integers[value.name or ""].astype(np.int64) - affine.zero_point

    def scale(self, position: int) -> float:
        return self.affine(self.node.inputs[position]).scale


# --- rescaling ------------------------------------------------------------------------------------------------------


def quantize_multiplier(real: float) -> tuple[int, int]:
    """31-bit multiplier and shift: real = multiplier * 2**(shift - 31)."""
    if real == 0.0:
        return 0, 0
    fraction, shift = math.frexp(real)
    multiplier = round(fraction * 2**31)
    if multiplier == 2**31:
        multiplier, shift = multiplier // 2, shift + 1
    return (0, 0) if shift < -31 else (multiplier, shift)


def _doubling_high_mul(x: Integers, multiplier: int) -> Integers:
    product = x * multiplier
    nudge = np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    # Integer division of C++ rounds toward zero.
    total = product + nudge
    return np.sign(total) * (np.abs(total) >> 31)


def _rounding_divide_by_power(x: Integers, exponent: int) -> Integers:
    mask = (1 << exponent) - 1
    threshold = (mask >> 1) + (x < 0)
    return (x >> exponent) + ((x & mask) > threshold)


def multiply_fixed(x: Integers, real: float) -> Integers:
    """x * real as TFLite's reference kernels compute it."""
    multiplier, shift = quantize_multiplier(real)
    return _rounding_divide_by_power(_doubling_high_mul(x << max(shift, 0), multiplier), max(-shift, 0))


def rescale(x: Integers, factors: npt.NDArray[np.float64], case: Case, *, axis: int | None = None) -> Integers:
    """x * factor + zero point, saturated to int8; one factor, or one for each index of `axis`."""
    if case.rounding is Rounding.REAL:
        shape = [1] * x.ndim
        if axis is not None:
            shape[axis] = -1
        scaled = np.rint(x * factors.reshape(shape if factors.size > 1 else [1] * x.ndim)).astype(np.int64)
    elif factors.size == 1:
        scaled = multiply_fixed(x, float(factors.reshape(-1)[0]))
    else:
        assert axis is not None
        moved = np.moveaxis(x, axis, 0)
        rows = [multiply_fixed(row, float(factor)) for row, factor in zip(moved, factors, strict=True)]
        scaled = np.moveaxis(np.stack(rows), 0, axis)
    return np.clip(scaled + case.output.zero_point, -128, 127)


def _from_real(real: npt.NDArray[np.float64], case: Case) -> Integers:
    """The nearest integers of real numbers; TFLite's tables round half away from zero."""
    steps = real / case.output.scale
    rounded = np.rint(steps) if case.rounding is Rounding.REAL else np.sign(steps) * np.floor(np.abs(steps) + 0.5)
    return np.clip(rounded.astype(np.int64) + case.output.zero_point, -128, 127)


# --- operators ------------------------------------------------------------------------------------------------------


def reference(case: Case) -> Integers | None:
    """The output of an integer node; None where it has no model here (it only moves integers, or none was written)."""
    operator = OPERATORS.get(case.node.op_type)
    return None if operator is None else operator(case)


def stored_weight(case: Case) -> tuple[Integers, npt.NDArray[np.float64]]:
    assert case.item.weight is not None
    planned = case.plan.weights[case.item.weight.name or ""]
    array = np.asarray(constant_array(case.item.weight), dtype=np.float32)
    scales, bits = case.spelling.weight_form(planned, case.item.weight, array)
    largest = largest_symmetric_integer(bits)
    stored = quantize_array(
        array, scales.tolist(), axis=planned.axis, smallest=-largest, largest=largest, dtype=np.int8
    )
    return stored.astype(np.int64), scales.astype(np.float64)


def stored_bias(case: Case, weight_scales: npt.NDArray[np.float64]) -> Integers:
    found = bias_input(case.node, case.item.row)
    if found is None:
        return np.zeros(1, dtype=np.int64)
    array = np.asarray(constant_array(found[1]), dtype=np.float64).reshape(-1)
    scale = (np.float32(case.scale(0)) * weight_scales.astype(np.float32)).astype(np.float64)
    return np.rint(array / scale).astype(np.int64)


def _layer_factors(case: Case, weight_scales: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return case.scale(0) * weight_scales / case.output.scale


def pads_of(node: ir.Node, rank: int) -> list[tuple[int, int]]:
    assert node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    pads = list(node.attributes.get_ints("pads", [0] * 2 * rank))
    return [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)]


def windows(x: Integers, node: ir.Node, kernel: Sequence[int], *, fill: int) -> Integers:
    """(N, C, out..., kernel...) of a padded picture."""
    rank = len(kernel)
    strides = node.attributes.get_ints("strides", [1] * rank)
    dilations = node.attributes.get_ints("dilations", [1] * rank)
    padded = np.pad(x, pads_of(node, rank), constant_values=fill)
    spans = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=tuple(range(2, 2 + rank)))
    steps = tuple(slice(None, None, stride) for stride in strides)
    inside = tuple(slice(None, None, dilation) for dilation in dilations)
    return view[(slice(None), slice(None), *steps, *inside)]


def _conv(case: Case) -> Integers:
    weight, scales = stored_weight(case)
    group = case.node.attributes.get_int("group", 1)
    kernel = weight.shape[2:]
    view = windows(case.centered(0), case.node, kernel, fill=0)
    axes = "xyz"[: len(kernel)]
    parts = [
        np.einsum(f"nc{axes.upper()}{axes},oc{axes}->no{axes.upper()}", part, filters, optimize=True)
        for part, filters in zip(np.split(view, group, axis=1), np.split(weight, group, axis=0), strict=True)
    ]
    sums = np.concatenate(parts, axis=1)
    bias = stored_bias(case, scales)
    sums = sums + bias.reshape(1, -1, *[1] * len(kernel))
    return rescale(sums, _layer_factors(case, scales), case, axis=1)


def _gemm(case: Case) -> Integers:
    weight, scales = stored_weight(case)
    matrix = weight.T if case.node.attributes.get_int("transB", 0) else weight
    sums = case.centered(0) @ matrix + stored_bias(case, scales)
    return rescale(sums, _layer_factors(case, scales), case, axis=1)


def _matmul(case: Case) -> Integers:
    weight, scales = stored_weight(case)
    sums = case.centered(0) @ weight
    return rescale(sums, _layer_factors(case, scales), case, axis=sums.ndim - 1)


def _add(case: Case) -> Integers:
    first, second = case.centered(0), case.centered(1)
    scales = case.scale(0), case.scale(1)
    if case.rounding is Rounding.REAL:
        real = first * scales[0] + second * scales[1]
        return _from_real(real, case)
    twice = 2 * max(scales)
    shifted = [multiply_fixed(x << 20, scale / twice) for x, scale in zip((first, second), scales, strict=True)]
    return rescale(shifted[0] + shifted[1], np.array([twice / (2**20 * case.output.scale)]), case)


def _mul(case: Case) -> Integers:
    factor = case.scale(0) * case.scale(1) / case.output.scale
    return rescale(case.centered(0) * case.centered(1), np.array([factor]), case)


def _mean(case: Case) -> Integers:
    x = case.centered(0)
    axes = tuple(range(2, x.ndim))
    keeps = case.node.op_type != "ReduceMean" or bool(case.node.attributes.get_int("keepdims", 1))
    sums = x.sum(axis=axes, keepdims=keeps)
    count = math.prod(x.shape[2:])
    return rescale(sums, np.array([case.scale(0) / (case.output.scale * count)]), case)


def _average_pool(case: Case) -> Integers | None:
    if pools_everything(case.node):
        return _mean(case)
    kernel = list(case.node.attributes.get_ints("kernel_shape", ()))
    view = windows(case.centered(0), case.node, kernel, fill=0)
    sums, count = view.sum(axis=tuple(range(-len(kernel), 0))), math.prod(kernel)
    if case.rounding is Rounding.REAL:
        return rescale(sums, np.array([1.0 / count]), case)
    # TFLite divides the sum of what is stored, half away from zero.
    stored = sums + count * case.output.zero_point
    return np.sign(stored) * ((np.abs(stored) + count // 2) // count)


def _table(function: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]) -> Callable[[Case], Integers]:
    return lambda case: _from_real(function(case.centered(0) * case.scale(0)), case)


def _softmax(case: Case) -> Integers:
    axis = case.node.attributes.get_int("axis", -1)
    real = case.centered(0) * case.scale(0)
    powers = np.exp(real - real.max(axis=axis, keepdims=True))
    return _from_real(powers / powers.sum(axis=axis, keepdims=True), case)


def _leaky_relu(case: Case) -> Integers:
    x, factor = case.centered(0), case.scale(0) / case.output.scale
    alpha = case.node.attributes.get_float("alpha", 0.01)
    return np.where(
        x >= 0, rescale(x, np.array([factor]), case), rescale(x, np.array([factor * np.float32(alpha)]), case)
    )


def _clip(case: Case) -> Integers:
    assert clip_bounds(case.node) is not None
    return rescale(case.centered(0), np.array([case.scale(0) / case.output.scale]), case)


def _concat(case: Case) -> Integers:
    parts = [
        rescale(case.centered(position), np.array([case.scale(position) / case.output.scale]), case)
        for position in range(len(case.node.inputs))
    ]
    return np.concatenate(parts, axis=case.node.attributes.get_int("axis", 0))


OPERATORS: dict[str, Callable[[Case], Integers | None]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _add,
    "Sum": _add,
    "Mul": _mul,
    "GlobalAveragePool": _mean,
    "ReduceMean": _mean,
    "AveragePool": _average_pool,
    "Sigmoid": _table(lambda x: 1.0 / (1.0 + np.exp(-x))),
    "Tanh": _table(np.tanh),
    "HardSwish": _table(lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    "Softmax": _softmax,
    "LeakyRelu": _leaky_relu,
    "Relu": _clip,
    "Clip": _clip,
    "Concat": _concat,
}
