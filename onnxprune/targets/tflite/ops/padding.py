"""Pad, in all modes."""

from __future__ import annotations

import math

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Tensor, TensorType
from onnxprune.targets.tflite.ops.carriers import carried, returned
from onnxprune.targets.tflite.ops.indexing import gathered, sliced
from onnxprune.targets.tflite.ops.shaping import concatenated
from onnxprune.targets.tflite.ops.sizes import slice_of
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

_PADDED: tuple[TensorType, ...] = ("FLOAT32", "INT8", "UINT8", "INT16", "INT32", "INT64", "BOOL")
_MAX_PADDED_RANK = 5
"""Of the PAD and PADV2 kernels."""

_INT32_MAX = int(np.iinfo(np.int32).max)

_Widths = dict[int, tuple[int, int]]
"""Axis -> indices to add before and behind; only axes where there are any."""


@TFLITE.register("Pad")
def pad(node: NodeView, build: Builder) -> Tensor:
    """PAD, PADV2 or MIRROR_PAD; GATHER for modes edge and wrap; SLICE for negative widths."""
    x, mode = node.input(0), node.text("mode", "constant")
    axes = _axes(node, x)
    if node.array(1) is None:
        return _padded_as_computed(node, build, axes)
    numbers = [int(width) for width in node.required_array(1, "pads")]
    widths = {axis: (numbers[index], numbers[index + len(axes)]) for index, axis in enumerate(axes)}
    if mode != "constant" and any(min(width) < 0 < max(width) for width in widths.values()):
        raise UnsupportedError(f"it crops and pads the same axis in mode '{mode}'")
    x = _cropped(build, x, widths)
    growing = {axis: (max(0, low), max(0, high)) for axis, (low, high) in widths.items() if max(low, high) > 0}
    if not growing:
        return x
    if mode == "constant":
        return _with_value(build, x, growing, _value(node, build))
    # The kernel checks where the length is not known.
    if mode == "reflect" and all(x.shape[axis] < 0 or max(width) < x.shape[axis] for axis, width in growing.items()):
        paddings = build.constant([list(growing.get(axis, (0, 0))) for axis in range(x.rank)])
        return build.op("MIRROR_PAD", [x, paddings], shape=_grown(x, growing), type_=x.type, mode="REFLECT")
    for axis, width in growing.items():
        x = _continued(build, x, axis, width, mode)
    return x


def _axes(node: NodeView, x: Tensor) -> list[int]:
    if not node.has(3):
        return list(range(x.rank))
    return [int(axis) % x.rank for axis in node.required_array(3, "axes")]


def _value(node: NodeView, build: Builder) -> Tensor | None:
    """The number to pad with; None for zero."""
    value = node.optional(2)
    if value is None or (value.constant is not None and not value.constant.array().any()):
        return None
    return build.reshaped(value, (1,))


def _cropped(build: Builder, x: Tensor, widths: _Widths) -> Tensor:
    """Without what negative widths take away."""
    return sliced(
        build,
        x,
        {
            axis: (max(0, -low), high if high < 0 else _INT32_MAX, 1)
            for axis, (low, high) in widths.items()
            if min(low, high) < 0
        },
    )


def _grown(x: Tensor, widths: _Widths) -> tuple[int, ...]:
    return tuple(dim if dim < 0 else dim + sum(widths.get(axis, (0, 0))) for axis, dim in enumerate(x.shape))


def _with_value(build: Builder, x: Tensor, widths: _Widths, value: Tensor | None) -> Tensor:
    if x.rank > _MAX_PADDED_RANK:
        return _with_value_by_axis(build, x, widths, value)
    given = carried(build, x, _PADDED)
    paddings = build.constant([list(widths.get(axis, (0, 0))) for axis in range(x.rank)])
    return returned(build, _pad(build, given, paddings, value, _grown(x, widths)), x.type)


def _pad(build: Builder, x: Tensor, paddings: Tensor, value: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if value is None:
        return build.op("PAD", [x, paddings], shape=shape, type_=x.type)
    return build.op("PADV2", [x, paddings, carried(build, value, (x.type,))], shape=shape, type_=x.type)


def _with_value_by_axis(build: Builder, x: Tensor, widths: _Widths, value: Tensor | None) -> Tensor:
    """One axis after the other, with those before and those behind taken together."""
    for axis, width in widths.items():
        before, behind = x.shape[:axis], x.shape[axis + 1 :]
        shape = _grown(x, {axis: width})
        three = tuple(-1 if -1 in dims else math.prod(dims) for dims in (before, (x.shape[axis],), behind))
        x = build.reshaped(_with_value(build, build.reshaped(x, three), {1: width}, value), shape)
    return x


def _continued(build: Builder, x: Tensor, axis: int, width: tuple[int, int], mode: str) -> Tensor:
    """Modes edge, wrap, and reflect where the mirror is used more than once, along one axis."""
    length = x.shape[axis]
    if length == 0:
        raise UnsupportedError(f"axis {axis}, which it pads in mode '{mode}', has no elements")
    if length > 0:
        modes = {"edge": "edge", "reflect": "reflect", "wrap": "wrap"}
        places = np.pad(np.arange(length, dtype=np.int32), width, mode=modes[mode])  # type: ignore[call-overload]
        return gathered(build, x, build.constant(places), axis=axis)
    if mode != "edge":
        raise UnsupportedError(f"axis {axis}, which it pads in mode '{mode}', has a length that only the run knows")
    low, high = width
    first = slice_of(build, x, axis, 0, 1)
    last = sliced(build, x, {axis: (-1, _INT32_MAX, 1)})
    return concatenated(build, [first] * low + [x] + [last] * high, axis)


def _padded_as_computed(node: NodeView, build: Builder, axes: list[int]) -> Tensor:
    """PAD, PADV2 or MIRROR_PAD by computed widths, none of which may be negative: the kernel checks that."""
    x, widths, mode = node.input(0), build.cast(node.input(1), "INT32"), node.text("mode", "constant")
    if mode not in ("constant", "reflect"):
        raise UnsupportedError(f"its widths are computed when the model runs, and must be constant in mode '{mode}'")
    if x.rank > _MAX_PADDED_RANK:
        raise UnsupportedError(f"PAD takes {_MAX_PADDED_RANK} axes where the widths are computed, and has {x.rank}")
    pairs = build.transposed(build.reshaped(widths, (2, len(axes))), (1, 0))
    rows = [
        slice_of(build, pairs, 0, axes.index(axis), 1) if axis in axes else build.constant([[0, 0]])
        for axis in range(x.rank)
    ]
    paddings = pairs if axes == list(range(x.rank)) else concatenated(build, rows, 0)
    given = carried(build, x, _PADDED)
    shape = tuple(-1 if axis in axes else dim for axis, dim in enumerate(x.shape))
    if mode == "reflect":
        return returned(
            build, build.op("MIRROR_PAD", [given, paddings], shape=shape, type_=given.type, mode="REFLECT"), x.type
        )
    return returned(build, _pad(build, given, paddings, _value(node, build), shape), x.type)
