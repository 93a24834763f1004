"""Removing channels: one generic cut through all labelled weights, and the nodes' own shrink hooks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.graph.names import UniqueNames
from onnxprune.graph.shapes import refresh_shapes
from onnxprune.graph.weights import constant_array, replace_weight
from onnxprune.ops.channels import LabelArray, Removal
from onnxprune.ops.shapes import SHAPES
from onnxprune.passes.prune.analysis import ChannelClasses

__all__ = ["remove_channels"]


def remove_channels(model: ir.Model, classes: ChannelClasses, keeps: npt.NDArray[np.bool_]) -> None:
    """Cut every class that `keeps` (one flag per class) does not keep out of `model`, in place.

    `classes` must come from this very model object, and is out of date afterwards.
    """
    if keeps.all():
        return
    stays = keeps[classes.class_of_label] if classes.num_classes else np.ones(0, dtype=np.bool_)
    labelling = classes.labelling
    # Values first: shapes still have their old axes, and the hooks may rename inputs.
    edited = {
        value: shape
        for value, axes in labelling.values.items()
        if (shape := _cut_shape(value.shape, axes, stays)) is not None
    }
    for weight, axes_of_weight in labelling.weights.items():
        _cut_weight(weight, axes_of_weight, stays)
    removal = Removal(stays, UniqueNames.of_values(model))
    for labels, hook in labelling.shrink_hooks:
        if not stays[labels].all():
            hook(removal)
    refresh_shapes(model, SHAPES, edited=edited)


def _cut_weight(weight: ir.Value, axes: dict[int, LabelArray], stays: npt.NDArray[np.bool_]) -> None:
    cuts = {axis: kept for axis, labels in axes.items() if not (kept := stays[labels]).all()}
    if not cuts:
        return
    array = constant_array(weight)
    if array is None:
        raise ValueError(f"'{weight.name}' is not an initializer.")
    for axis, kept in cuts.items():
        array = np.compress(kept, array, axis=axis)
    replace_weight(weight, array)


def _cut_shape(
    shape: ir.Shape | None, axes: tuple[LabelArray | None, ...], stays: npt.NDArray[np.bool_]
) -> ir.Shape | None:
    """The new shape, or None where nothing changes or nothing is known."""
    if shape is None or len(shape) != len(axes):
        return None
    counts = [None if labels is None else int(stays[labels].sum()) for labels in axes]
    dims = [dim if count is None else count for dim, count in zip(shape, counts, strict=True)]
    return ir.Shape(dims) if dims != list(shape) else None
