"""Fixing dynamic axes of a converted model, as `--shape` asks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from onnxprune.contracts import CanonicalModel, TensorSpec
from onnxprune.convert.request import Dimension
from onnxprune.errors import UsageError, did_you_mean
from onnxprune.graph.canonical import canonicalize
from onnxprune.graph.shapes import fix_input_shapes
from onnxprune.ops.shapes import SHAPES

__all__ = ["apply_shapes", "check_shapes", "tensor_specs"]


def apply_shapes(model: CanonicalModel, shapes: Mapping[str, tuple[Dimension, ...]]) -> CanonicalModel:
    """`model` with the axes that `shapes` gives a number fixed; an axis that it gives a name stays dynamic.

    Raises:
        UsageError: A shape is for no input, has another rank than the input, or contradicts a fixed axis.
    """
    if not shapes:
        return model
    check_shapes(model.graph.inputs, shapes)
    inputs = {str(value.name): value for value in model.graph.inputs}
    full = {name: [dim for dim in shape if isinstance(dim, int)] for name, shape in shapes.items()}
    full = {name: sizes for name, sizes in full.items() if len(sizes) == len(shapes[name])}
    for name, shape in shapes.items():
        if name not in full:
            _fix_some_axes(model, inputs[name], shape)
    fix_input_shapes(model, full, SHAPES)
    # Infers everything behind the inputs anew, and folds the shape arithmetic that is constant now.
    return canonicalize(model, shape_rules=SHAPES)


def check_shapes(values: Sequence[ir.Value], shapes: Mapping[str, tuple[Dimension, ...]]) -> None:
    """Check that `shapes` fit the graph inputs `values`; raises as `apply_shapes` does."""
    inputs = {str(value.name): value for value in values}
    for name, shape in shapes.items():
        if name not in inputs:
            raise UsageError(
                f"--shape names '{name}', which is no input of the model.", did_you_mean(name, list(inputs))
            )
        _check_fits(inputs[name], shape)


def _fix_some_axes(model: ir.Model, value: ir.Value, shape: tuple[Dimension, ...]) -> None:
    """Fix the axes of input `value` that `shape` gives a number, and the same symbols at the other inputs."""
    sizes: dict[str, int] = {}
    if value.shape is None:
        value.shape = ir.Shape(shape)
        return
    for dim, new in zip(value.shape, shape, strict=True):
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None and isinstance(new, int):
            sizes[dim.value] = new
    value.shape = ir.Shape([_bound(old, new) for old, new in zip(value.shape, shape, strict=True)])
    for other in (*model.graph.inputs, *model.graph.outputs):
        if other.shape is not None:
            other.shape = ir.Shape(
                [sizes.get(str(dim.value), dim) if isinstance(dim, ir.SymbolicDim) else dim for dim in other.shape]
            )


def _bound(old: int | ir.SymbolicDim, new: Dimension) -> int | ir.SymbolicDim | str:
    if isinstance(new, int) or not isinstance(old, ir.SymbolicDim):
        return new
    # An axis that has a name keeps it: other inputs may share it.
    return old if old.value is not None else new


def _check_fits(value: ir.Value, shape: tuple[Dimension, ...]) -> None:
    if value.shape is None:
        return
    declared = ",".join("?" if not isinstance(dim, int) and dim.value is None else str(dim) for dim in value.shape)
    asked = ",".join(map(str, shape))
    if len(shape) != len(value.shape):
        raise UsageError(
            f"--shape {value.name}={asked} has {len(shape)} axes, but the input has {len(value.shape)}: {declared}."
        )
    for axis, (new, old) in enumerate(zip(shape, value.shape, strict=True)):
        if not isinstance(old, int) or new == old:
            continue
        what = "keeps axis {} dynamic" if isinstance(new, str) else "changes axis {}"
        raise UsageError(
            f"--shape {value.name}={asked} {what.format(axis)}, which the model fixes: {declared}.",
            "Only axes that are dynamic in the source can be given a size or stay dynamic.",
        )


def tensor_specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    """Name, element type and shape of graph inputs or outputs."""
    return tuple(
        TensorSpec(
            name=str(value.name),
            dtype=_dtype_name(value.dtype),
            shape=None
            if value.shape is None
            else tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape),
        )
        for value in values
    )


def _dtype_name(dtype: ir.DataType | None) -> str:
    if dtype is None:
        return "unknown"
    return "object" if dtype is ir.DataType.STRING else dtype.numpy().name
