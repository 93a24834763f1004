"""Constant factors and summands, one number or one a channel, move into the convolution or product next to them.

    y = conv(x, W) + b:    y * s + t  ->  conv(x, s W) + (s b + t)
                           conv(s x + t, W) + b  ->  conv(x, W s) + (b + W t)     without padding, where t is not 0

Weights stay where they are until they are written: a constant is combined with its factor when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.fusion.rule import Rule, has_activation, is_plain_float, small_array
from onnxprune.targets.tflite.graph import Constant, Grid, Operator, Tensor

__all__ = ["RULES"]

_Array = npt.NDArray[Any]

# Of the smaller of two summands, this much may be lost to rounding of their sum.
_LOST = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Host:
    """Where an operator keeps its weight and bias, and which axes of the weight are channels."""

    data: int = 0
    weight: int = 1
    bias: int = 2
    out_axis: int
    in_axis: int | None
    """None: summands and factors in front of it stay there."""


_HOSTS: Mapping[str, _Host] = {
    "CONV_2D": _Host(out_axis=0, in_axis=3),
    "DEPTHWISE_CONV_2D": _Host(out_axis=3, in_axis=3),
    "CONV_3D": _Host(out_axis=4, in_axis=3),
    "FULLY_CONNECTED": _Host(out_axis=0, in_axis=1),
    "TRANSPOSE_CONV": _Host(data=2, bias=3, out_axis=0, in_axis=None),
}


# --- behind a host ------------------------------------------------------------------------------------------------


def _into_host_before(editor: Editor, operator: Operator) -> bool:
    """MUL(CONV_2D(x), s) and ADD(CONV_2D(x), t): into the weight and the bias."""
    found = _constant_operand(editor, operator)
    if found is None:
        return False
    before, constant = found
    host = editor.producer(before)
    spec = None if host is None else _HOSTS.get(host.kind)
    if host is None or spec is None or has_activation(host) or editor.only_reader(before) is not operator:
        return False
    weight = editor.tensors[host.inputs[spec.weight]]
    if weight.constant is None or not is_plain_float(editor, weight.name):
        return False
    channels = editor.tensors[before].shape[-1]
    numbers = _per_channel(constant, channels)
    bias = _bias(editor, host, spec, channels)
    if numbers is None or bias is None or weight.shape[spec.out_axis] != channels:
        return False
    if operator.kind in ("MUL", "DIV"):
        factor = _factor(operator, numbers)
        if factor is None:
            return False
        scaled = _along(weight.constant, spec.out_axis, factor)
        changed = _with_constants(editor, host, spec, scaled, bias * factor if _has_bias(host, spec) else None)
    else:
        total = _sum(bias, numbers if operator.kind == "ADD" else -numbers)
        if total is None:
            return False
        changed = _with_constants(editor, host, spec, None, total)
    options = {**changed.options, "fusedActivationFunction": operator.option("fusedActivationFunction", "NONE")}
    editor.replace(operator, replace(changed, outputs=operator.outputs, options=options))
    editor.replace(host)
    return True


# --- in front of a host -------------------------------------------------------------------------------------------


def _into_host_behind(editor: Editor, host: Operator) -> bool:
    """CONV_2D(MUL(x, s)) and CONV_2D(ADD(x, t)): into the weight and the bias."""
    spec = _HOSTS[host.kind]
    operator = editor.producer(host.inputs[spec.data])
    if operator is None or spec.in_axis is None or has_activation(operator) or operator.kind not in _ARITHMETIC:
        return False
    found = _constant_operand(editor, operator)
    weight = editor.tensors[host.inputs[spec.weight]]
    if found is None or weight.constant is None or not is_plain_float(editor, weight.name):
        return False
    if editor.only_reader(operator.outputs[0]) is not host:
        return False
    before, constant = found
    channels = editor.tensors[before].shape[-1]
    numbers = _per_channel(constant, channels)
    outputs = editor.tensors[host.outputs[0]].shape[-1]
    bias = _bias(editor, host, spec, outputs)
    per_input = None if numbers is None else _spread_over(host, weight, spec.in_axis, numbers)
    if bias is None or per_input is None:
        return False
    if operator.kind in ("MUL", "DIV"):
        factor = _factor(operator, per_input)
        if factor is None:
            return False
        changed = _with_constants(editor, host, spec, _along(weight.constant, spec.in_axis, factor), None)
    elif host.option("padding", "VALID") == "VALID" and weight.num_elements <= _READ_WHOLE:
        summand = per_input if operator.kind == "ADD" else -per_input
        changed = _with_constants(editor, host, spec, None, bias + _through(spec, weight.constant, summand))
    else:
        return False
    inputs = list(changed.inputs)
    inputs[spec.data] = before
    editor.replace(host, replace(changed, inputs=tuple(inputs)))
    editor.replace(operator)
    return True


# Weights that are read to move a summand through them.
_READ_WHOLE = 1 << 24


def _spread_over(host: Operator, weight: Tensor, axis: int, numbers: _Array) -> _Array | None:
    """The number of each index of the weight's axis, which meets channels of the input."""
    length = weight.shape[axis]
    if host.kind == "DEPTHWISE_CONV_2D":
        # Output c * multiplier + m comes from input c.
        return np.repeat(numbers, length // len(numbers)) if length % len(numbers) == 0 else None
    if length == len(numbers):
        return numbers
    # A convolution in groups: its filters meet one group each, and all of them only where the numbers are equal.
    return numbers[:length] if (numbers == numbers[0]).all() else None


def _through(spec: _Host, weight: Constant, summand: _Array) -> _Array:
    """What a constant input adds to every output."""
    numbers = weight.array().astype(np.float64)
    axes = tuple(axis for axis in range(numbers.ndim) if axis != spec.out_axis)
    products = numbers * _shaped(summand, spec.in_axis or 0, numbers.ndim)
    return np.asarray(products.sum(axis=axes), np.float32)


# --- one after the other ------------------------------------------------------------------------------------------


def _merge_factors(editor: Editor, operator: Operator) -> bool:
    """MUL(MUL(x, a), b) -> MUL(x, a b).

    Not for sums: x - 1 + 1e-30 is how division by zero is kept away, and -1 + 1e-30 is -1.
    """
    found = _constant_operand(editor, operator)
    first = None if found is None else editor.producer(found[0])
    if found is None or first is None or has_activation(first) or editor.only_reader(found[0]) is not operator:
        return False
    inner = _constant_operand(editor, first) if first.kind in ("MUL", "DIV") else None
    if inner is None or editor.tensors[found[0]].shape.count(-1) > 1:
        return False
    one, other = _factor(first, inner[1]), _factor(operator, found[1])
    joined = None if one is None or other is None else _usable(one.astype(np.float64) * other)
    if joined is None:
        return False
    constant = editor.add_constant(Constant.of(joined), f"{operator.outputs[0]}/constant")
    editor.replace(operator, replace(operator, kind="MUL", inputs=(inner[0], constant.name)))
    editor.replace(first)
    return True


_ARITHMETIC = ("MUL", "DIV", "ADD", "SUB")


def _constant_operand(editor: Editor, operator: Operator) -> tuple[str, _Array] | None:
    """(the other tensor, the constant) where the constant leaves the other's shape as it is; float32 only."""
    output = editor.tensors[operator.outputs[0]]
    for position in (1, 0) if operator.kind in ("MUL", "ADD") else (1,):
        numbers = small_array(editor.tensors[operator.inputs[position]])
        other = operator.inputs[1 - position]
        if numbers is None or not is_plain_float(editor, other):
            continue
        if numbers.ndim <= output.rank and editor.tensors[other].shape == output.shape:
            return other, numbers
    return None


def _per_channel(numbers: _Array, channels: int) -> _Array | None:
    """One number a channel, from a constant that varies along the last axis at most."""
    if channels < 1 or numbers.size not in (1, channels) or (numbers.size > 1 and numbers.shape[-1] != channels):
        return None
    return np.broadcast_to(numbers.reshape(-1), (channels,)).astype(np.float32)


def _factor(operator: Operator, numbers: _Array) -> _Array | None:
    """What MUL or DIV multiplies with; None where float32 can't say it."""
    return numbers if operator.kind == "MUL" else _usable(1.0 / numbers.astype(np.float64)) if numbers.all() else None


def _usable(factor: _Array) -> _Array | None:
    """The factor in float32; None where it is too large or too small for its full precision."""
    sizes = np.abs(factor[factor != 0])
    limits = np.finfo(np.float32)
    if ((sizes > limits.max) | (sizes < limits.tiny)).any():
        return None
    return factor.astype(np.float32)


def _sum(bias: _Array, summand: _Array) -> _Array | None:
    """The sum of both; None where one is so small that the other swallows it."""
    one, other = bias.astype(np.float64), summand.astype(np.float64)
    total = (one + other).astype(np.float32)
    pairs = ((one, other), (other, one))
    is_kept = all((np.abs(total - left - right) <= _LOST * np.abs(right)).all() for left, right in pairs)
    return total if is_kept else None


def _has_bias(host: Operator, spec: _Host) -> bool:
    return len(host.inputs) > spec.bias and host.inputs[spec.bias] != ""


def _bias(editor: Editor, host: Operator, spec: _Host, channels: int) -> _Array | None:
    """The bias, zeros where there is none; None where it is computed."""
    if not _has_bias(host, spec):
        return np.zeros(channels, np.float32)
    numbers = small_array(editor.tensors[host.inputs[spec.bias]])
    return None if numbers is None else numbers.reshape(-1)


def _shaped(numbers: _Array, axis: int, rank: int) -> _Array:
    return numbers.reshape(tuple(-1 if one == axis else 1 for one in range(rank)))


def _along(weight: Constant, axis: int, factor: _Array) -> Constant:
    """The weight with a factor for each index of an axis; integers stay integers where their scales take it."""
    shaped = _shaped(factor, axis, len(weight.shape))
    return replace(weight.mapped(_times(shaped)), grid=_scaled(weight, axis, factor))


def _scaled(weight: Constant, axis: int, factor: _Array) -> Grid | None:
    """The integers of `weight` with scales that have taken up the factors; None where there is no such grid."""
    grid = weight.grid
    if grid is None or grid.type == "FLOAT16":
        return None
    old = grid.quantization
    # A scale is positive, and a channel of zeros is so with any.
    if (factor < 0).any() or (old.is_per_axis and old.axis != axis):
        return None
    scales = np.asarray(old.scales, np.float32) * np.where(factor == 0, 1, factor).astype(np.float32)
    zero_points = np.broadcast_to(np.asarray(old.zero_points), scales.shape)
    return replace(
        grid,
        quantization=replace(
            old, scales=tuple(map(float, scales)), zero_points=tuple(map(int, zero_points)), axis=axis
        ),
    )


def _times(factor: _Array) -> Callable[[_Array], _Array]:
    return lambda weight: np.asarray(weight * factor, weight.dtype)


def _with_constants(
    editor: Editor, host: Operator, spec: _Host, weight: Constant | None, bias: _Array | None
) -> Operator:
    """The host with a new weight, a new bias, or both."""
    inputs = [*host.inputs, *[""] * (spec.bias + 1 - len(host.inputs))]
    if weight is not None:
        inputs[spec.weight] = editor.add_constant(weight, host.inputs[spec.weight]).name
    if bias is not None:
        name = inputs[spec.bias] or f"{host.outputs[0]}/bias"
        inputs[spec.bias] = editor.add_constant(Constant.of(bias.astype(np.float32)), name).name
    return replace(host, inputs=tuple(inputs if inputs[-1] else inputs[:-1]))


RULES: Mapping[str, Sequence[Rule]] = {
    **dict.fromkeys(("ADD", "SUB"), (_into_host_before,)),
    **dict.fromkeys(("MUL", "DIV"), (_into_host_before, _merge_factors)),
    **{kind: (_into_host_behind,) for kind, spec in _HOSTS.items() if spec.in_axis is not None},
}
