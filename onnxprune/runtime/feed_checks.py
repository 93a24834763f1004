"""Feeds against the inputs that a runner declares, in the same words for every runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.contracts import Batch, TensorSpec
from onnxprune.errors import BadDataError, did_you_mean, quoted_list

__all__ = ["checked_feeds"]


def checked_feeds(feeds: Batch, inputs: Sequence[TensorSpec]) -> list[tuple[TensorSpec, npt.NDArray[Any]]]:
    """The array for each of `inputs`, in their order.

    Raises:
        BadDataError: A feed is missing, unknown, or has another element type or shape than declared.
    """
    _check_names(feeds, inputs)
    arrays = [(spec, np.asarray(feeds[spec.name])) for spec in inputs]
    for spec, array in arrays:
        _check_array(array, spec)
    return arrays


def _check_names(feeds: Batch, inputs: Sequence[TensorSpec]) -> None:
    known = [spec.name for spec in inputs]
    missing = [name for name in known if name not in feeds]
    if missing:
        raise BadDataError(
            f"The data lack {quoted_list(missing)}: the model's inputs are {quoted_list(known)}, "
            f"the data have {quoted_list(feeds) or 'nothing'}."
        )
    unknown = [name for name in feeds if name not in known]
    if unknown:
        raise BadDataError(
            f"The data have {quoted_list(unknown)}, which the model has no input for.", did_you_mean(unknown[0], known)
        )


def _check_array(array: npt.NDArray[Any], spec: TensorSpec) -> None:
    is_right_type = array.dtype.kind in "OUST" if spec.dtype == "object" else array.dtype.name == spec.dtype
    if not is_right_type:
        expected = "strings" if spec.dtype == "object" else spec.dtype
        raise BadDataError(f"Input '{spec.name}' takes {expected}, but the data are {array.dtype.name}.")
    if spec.shape is None:
        return
    fits = len(array.shape) == len(spec.shape) and all(
        not isinstance(expected, int) or expected == got for expected, got in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        raise BadDataError(
            f"Input '{spec.name}' takes the shape {_shape_text(spec.shape)}, but the data have "
            f"{_shape_text(array.shape)}."
        )


def _shape_text(shape: Sequence[int | str | None]) -> str:
    return "x".join("?" if dim is None else str(dim) for dim in shape) or "of a scalar"
