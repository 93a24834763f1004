"""Does an array fit an input? Conversions that change no value are made, everything else is refused by name.

Floats become the float type of the input (rounded; refused where a value becomes infinite). Integers and booleans
become the integer type of the input where every value survives. Text becomes strings. Nothing else is converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.contracts import TensorSpec, numpy_dtype
from onnxprune.errors import BadDataError

__all__ = ["fit_array", "is_float", "shape_text"]


def is_float(dtype: np.dtype[Any]) -> bool:
    """True for NumPy's floats and those of `ml_dtypes`, which NumPy itself calls void."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def shape_text(shape: Sequence[int | str | None] | None) -> str:
    """'1x3x224x224', '?' for what is unknown, 'scalar' for no axes."""
    if shape is None:
        return "of unknown rank"
    return "x".join("?" if dim is None else str(dim) for dim in shape) or "scalar"


def fit_array(array: npt.NDArray[Any], spec: TensorSpec, *, has_batch_axis: bool, where: str) -> npt.NDArray[Any]:
    """`array` in the element type of `spec`, proven to have its shape and only finite values.

    Args:
        array: As fed.
        spec: The input.
        has_batch_axis: True: axis 0 counts samples and is not compared with `spec`.
        where: Names the sample in messages.

    Raises:
        BadDataError: Names the input, what it expects and what it got.
    """
    _check_shape(array, spec, where, free_axes=1 if has_batch_axis else 0)
    converted = _converted(array, spec, where)
    if is_float(converted.dtype):
        _check_finite(converted, array, spec, where)
    # NumPy makes one axis of none here.
    return np.ascontiguousarray(converted) if converted.ndim else converted


def _check_shape(array: npt.NDArray[Any], spec: TensorSpec, where: str, *, free_axes: int) -> None:
    if spec.shape is None:
        return
    fits = array.ndim == len(spec.shape) and all(
        not isinstance(dim, int) or dim == size or axis < free_axes
        for axis, (dim, size) in enumerate(zip(spec.shape, array.shape, strict=True))
    )
    if fits and 0 not in array.shape:
        return
    hint = ""
    if array.ndim == len(spec.shape) == 4:
        moved = {"NHWC": (0, 3, 1, 2), "NCHW": (0, 2, 3, 1)}
        for layout, order in moved.items():
            turned = tuple(array.shape[axis] for axis in order)
            if all(
                not isinstance(dim, int) or dim == size for dim, size in zip(spec.shape[1:], turned[1:], strict=True)
            ):
                hint = f"The data look like {layout}: give them as array.transpose{order}."
    raise BadDataError(
        f"{where}: input '{spec.name}' expects {spec.dtype} {shape_text(spec.shape)}, got {array.dtype} "
        f"{shape_text(array.shape)}.",
        hint,
    )


def _converted(array: npt.NDArray[Any], spec: TensorSpec, where: str) -> npt.NDArray[Any]:
    wanted = numpy_dtype(spec.dtype)
    if array.dtype == wanted and wanted.kind != "O":
        return array
    if wanted.kind == "O":
        if array.dtype.kind in "UT" or (
            array.dtype.kind == "O" and all(isinstance(item, str | bytes) for item in array.ravel())
        ):
            return array.astype(object)
    elif is_float(wanted) and is_float(array.dtype):
        # Values that become infinite are told apart from infinite data by `_check_finite`.
        with np.errstate(over="ignore"):
            return array.astype(wanted)
    elif wanted.kind in "iu" and array.dtype.kind in "iub":
        converted = array.astype(wanted)
        if np.array_equal(converted, array) and np.array_equal(converted < 0, array < 0):
            return converted
        raise BadDataError(
            f"{where}: input '{spec.name}' expects {spec.dtype}, got {array.dtype} with values from {array.min()} to "
            f"{array.max()}, which don't fit in.",
            "Store the data in the element type of the input.",
        )
    hint = "Store the data in the element type of the input."
    if is_float(wanted) and array.dtype.kind in "iu":
        hint = "Convert them to float, or say how: preprocess.scale (1 feeds the numbers as they are), mean and std."
    raise BadDataError(f"{where}: input '{spec.name}' expects {spec.dtype}, got {array.dtype}.", hint)


def _check_finite(converted: npt.NDArray[Any], array: npt.NDArray[Any], spec: TensorSpec, where: str) -> None:
    finite = np.isfinite(converted)
    if finite.all():
        return
    position = tuple(int(axis) for axis in np.argwhere(~finite)[0])
    value = array[position]
    if np.isfinite(value):
        raise BadDataError(
            f"{where}: input '{spec.name}' is {spec.dtype}, in which the value {value} at {list(position)} is "
            "infinite.",
            "Scale the data.",
        )
    raise BadDataError(
        f"{where}: input '{spec.name}' holds {int((~finite).sum())} values that are NaN or infinite (the first at "
        f"{list(position)}).",
        "Correct or leave out this sample: such values spoil every range that is measured.",
    )
