"""Constants as integers: activations' operands, weights and biases, read when they are written."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.graph import NUMPY_TYPES, Constant, Quantization, Tensor, TensorType

__all__ = ["along_axis", "bias_integers", "exact_integers", "exact_scalar", "quantized_constant", "weight_form"]

_INT8 = np.iinfo(np.int8)
# What a weight with a zero point is stored as: the numbers of `type`, moved by that much, are int8.
_SHIFT: dict[TensorType, int] = {"INT8": 0, "UINT8": 128}


def along_axis(numbers: tuple[float, ...], axis: int, rank: int) -> npt.NDArray[np.float64]:
    """Scales as an array that broadcasts against a tensor of that rank."""
    array = np.array(numbers, np.float64)
    return array.reshape((-1, *(1,) * (rank - 1 - axis))) if array.size > 1 else array.reshape(())


def _rounded(constant: Constant, type_: TensorType, quantization: Quantization) -> Constant:
    limits = np.iinfo(NUMPY_TYPES[type_])
    rank = len(constant.shape)

    def load() -> npt.NDArray[Any]:
        scales = along_axis(quantization.scales, quantization.axis, rank)
        zero_points = along_axis(tuple(map(float, quantization.zero_points)), quantization.axis, rank)
        integers = np.rint(constant.array() / scales) + zero_points
        return np.clip(integers, limits.min, limits.max).astype(NUMPY_TYPES[type_])

    return Constant(constant.shape, NUMPY_TYPES[type_], load)


def quantized_constant(editor: Editor, tensor: Tensor, type_: TensorType, quantization: Quantization) -> Tensor:
    """The constant `tensor` rounded to integers, as a new tensor."""
    assert tensor.constant is not None  # noqa: S101 - callers pass constants
    constant = _rounded(tensor.constant, type_, quantization)
    return editor.add(
        Tensor(
            name=f"{tensor.name}_quantized",
            type=type_,
            shape=tensor.shape,
            constant=constant,
            quantization=quantization,
        )
    )


def exact_integers(tensor: Tensor, type_: TensorType, quantization: Quantization) -> bool:
    """True when the numbers of a constant are integers of that quantization, without rounding."""
    if tensor.constant is None:
        return False
    grid = tensor.constant.grid
    if grid is not None and grid.quantization == quantization and grid.type == type_:
        return True
    array = tensor.constant.array()
    integers = _rounded(tensor.constant, type_, quantization).array().astype(np.float32)
    return bool(np.array_equal((integers - quantization.zero_points[0]) * np.float32(quantization.scales[0]), array))


def exact_scalar(tensor: Tensor, type_: TensorType) -> Quantization | None:
    """A quantization that has one number, or the same one everywhere, as its largest integer; None for others."""
    array = tensor.array()
    if array is None or array.size == 0 or array.min() != array.max():
        return None
    magnitude = abs(float(array.flat[0]))
    largest = int(np.iinfo(NUMPY_TYPES[type_]).max)
    return Quantization(scales=(float(np.float32(magnitude / largest)) or 1.0,), zero_points=(0,))


def weight_form(tensor: Tensor, axis: int) -> Quantization | str:
    """Scales (all zero points 0) with which a weight is stored as INT8, or why it can't be.

    Args:
        tensor: The weight, in the order in which its operator reads it.
        axis: The one whose indices may have scales of their own.
    """
    constant = tensor.constant
    if constant is None:
        return "its weight is computed when the model runs"
    if constant.grid is None:
        return "its weight is not quantized"
    form = constant.grid.quantization
    if constant.grid.type not in _SHIFT:
        return f"its weight is {constant.grid.type}, and integer operators want INT8"
    if form.is_per_axis and form.axis != axis:
        return f"its weight has scales along axis {form.axis}, and integer operators want them along axis {axis}"
    if any(point != _SHIFT[constant.grid.type] for point in form.zero_points) and not _fits(constant, form):
        return "its weight has a zero point, and integer operators want none"
    return Quantization(scales=form.scales, zero_points=(0,) * len(form.scales), axis=form.axis)


def _fits(constant: Constant, form: Quantization) -> bool:
    """True when the integers without their zero points have 8 bits."""
    integers = np.rint(constant.array() / along_axis(form.scales, form.axis, len(constant.shape)))
    return bool(integers.min(initial=0) >= _INT8.min and integers.max(initial=0) <= _INT8.max)


def bias_integers(
    tensor: Tensor, input_scale: float, weight: Quantization, type_: TensorType
) -> tuple[npt.NDArray[Any], Quantization] | None:
    """A bias with the scale input * weight; None where its integers don't fit into `type_` (INT32 or INT64)."""
    array = tensor.array()
    if array is None:
        return None
    scales = (np.float32(input_scale) * np.array(weight.scales, np.float32)).astype(np.float32)
    integers = np.rint(array.astype(np.float64).reshape(-1) / scales)
    if np.abs(integers, dtype=np.float64).max(initial=0) > np.iinfo(np.int32).max and type_ == "INT32":
        return None
    quantization = Quantization(scales=tuple(float(scale) for scale in scales), zero_points=(0,) * scales.size, axis=0)
    return integers.astype(NUMPY_TYPES[type_]), quantization
