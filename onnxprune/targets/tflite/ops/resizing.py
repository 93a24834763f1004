"""Resize: RESIZE_BILINEAR and RESIZE_NEAREST_NEIGHBOR where they compute just what ONNX asks for.

Everything else goes axis by axis: nearest gathers, linear and cubic are products with a constant matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Tensor, inverse
from onnxprune.targets.tflite.ops.interpolation import Resampling, Sampled, nearest_of_tflite, weights_of_tflite
from onnxprune.targets.tflite.ops.sizes import Size, known, product_of, reshaped_to, shape_vector, size_of
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

# Both sides compute coordinates up to the axis' size in float32, in a few steps, and take their fractions for weights.
_WEIGHT_ERROR_PER_ELEMENT = 4 * float(np.finfo(np.float32).eps)
# Sizes on which an axis whose size only the run knows is tried.
_TRIED_SIZES = (2, 3, 5, 16, 37, 240)


class _Corners(NamedTuple):
    """The options of TFLite's two operators."""

    align_corners: bool
    half_pixel: bool


_CORNERS = (
    _Corners(align_corners=False, half_pixel=False),
    _Corners(align_corners=False, half_pixel=True),
    _Corners(align_corners=True, half_pixel=False),
)


@TFLITE.register("Resize")
def resize(node: NodeView, build: Builder) -> Tensor:
    """All axes that change: TFLite's operators two axes at a time, or else each axis by itself."""
    x = node.input(0)
    how = Resampling(
        mode=node.text("mode", "nearest"),
        coordinates=node.text("coordinate_transformation_mode", "half_pixel"),
        rounding=node.text("nearest_mode", "round_prefer_floor"),
        cubic_a=node.number("cubic_coeff_a", -0.75),
        is_antialiased=bool(node.integer("antialias")),
        excludes_outside=bool(node.integer("exclude_outside")),
    )
    if how.mode != "nearest" and x.type != "FLOAT32":
        raise UnsupportedError(f"runtimes disagree on how {x.type} numbers between two are rounded")
    axes = [axis for axis in _sampled(node, x) if _changes(axis, how)]
    y = x
    for group in _neighbours([axis.axis for axis in axes]):
        parts = [axis for axis in axes if axis.axis in group]
        corners = _corners(how, parts) if x.type == "FLOAT32" else None
        if corners is not None:
            y = _images(build, y, parts, how, corners)
            continue
        for part in parts:
            y = _gathered(build, y, part, how) if how.mode == "nearest" else _weighted(build, y, part, how)
    return _extrapolated(build, y, axes, how, node.number("extrapolation_value", 0.0))


# --- what changes -----------------------------------------------------------------------------------------------------


def _sampled(node: NodeView, x: Tensor) -> list[Sampled]:
    """The axes that the node names, with their sizes and scales."""
    axes = [axis % x.rank for axis in node.ints("axes", range(x.rank))]
    roi = _roi(node, len(axes))
    if node.has(2) and node.optional(2).shape != (0,):  # type: ignore[union-attr]
        scales = [float(scale) for scale in node.required_array(2, "scales")]
        found = []
        for position, (axis, scale) in enumerate(zip(axes, scales, strict=True)):
            size, (start, end) = x.shape[axis], roi[position]
            # The product is rounded to float32 as ONNX Runtime does: 3 * (10 / 3) is 10.
            width = float(np.float32(size) * np.float32(end - start) * np.float32(scale))
            found.append(
                Sampled(
                    axis=axis,
                    size=size,
                    output=-1 if size < 0 else math.floor(width),
                    scale=scale,
                    width=width,
                    start=start,
                    end=end,
                )
            )
        return found
    return _sampled_to(node, x, axes, roi)


def _roi(node: NodeView, count: int) -> list[tuple[float, float]]:
    """(start, end) of each named axis."""
    if node.text("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize":
        return [(0.0, 1.0)] * count
    roi = [float(number) for number in node.required_array(1, "region of interest")]
    return list(zip(roi[:count], roi[count:], strict=True))


def _sampled_to(node: NodeView, x: Tensor, axes: Sequence[int], roi: Sequence[tuple[float, float]]) -> list[Sampled]:
    """From the sizes wanted."""
    array = node.array(3)
    wanted = _inferred_sizes(node, x, axes) if array is None else [int(size) for size in array]
    policy = node.text("keep_aspect_ratio_policy", "stretch")
    sizes = [x.shape[axis] for axis in axes]
    if any(size < 0 and to != size for size, to in zip(sizes, wanted, strict=True)):
        raise UnsupportedError("its sizes are fixed, and those of its input are not")
    ratios = [
        float(np.float32(to) / np.float32(size)) if size > 0 else 1.0 for size, to in zip(sizes, wanted, strict=True)
    ]
    if policy != "stretch":
        ratio = min(ratios) if policy == "not_larger" else max(ratios)
        ratios = [ratio] * len(axes)
        wanted = [math.floor(size * ratio + 0.5) for size in sizes]
    widths = wanted if policy == "stretch" else [size * ratio for size, ratio in zip(sizes, ratios, strict=True)]
    return [
        Sampled(axis=axis, size=size, output=output, scale=scale, width=width, start=start, end=end)
        for axis, size, output, scale, width, (start, end) in zip(axes, sizes, wanted, ratios, widths, roi, strict=True)
    ]


def _inferred_sizes(node: NodeView, x: Tensor, axes: Sequence[int]) -> list[int]:
    """Sizes that are computed, as in Concat(batch, channels, 64, 64): from the shapes around the node."""
    before, behind = node.node.inputs[0], node.node.outputs[0]
    found = []
    for axis in axes:
        to = behind.shape[axis] if behind.shape is not None else None
        if isinstance(to, int):
            found.append(to)
        elif (
            before is not None
            and before.shape is not None
            # Two dimensions that nobody has named need not be equal.
            and getattr(to, "value", None) is not None
            and to == before.shape[axis]
        ):
            found.append(x.shape[axis])
        else:
            raise UnsupportedError("its sizes are computed when the model runs, and must be constant")
    return found


def _changes(axis: Sampled, how: Resampling) -> bool:
    """False for an axis that stays as it is."""
    is_cropped = how.outside(axis) is not None and (axis.start, axis.end) != (0, 1)
    return axis.scale != 1 or axis.output != axis.size or is_cropped


def _neighbours(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Pairs of axes that lie side by side, from the last on, and what is left by itself."""
    left = sorted(axes)
    groups: list[tuple[int, ...]] = []
    while left:
        last = left.pop()
        groups.append((left.pop(), last) if left and left[-1] == last - 1 else (last,))
    return groups


# --- TFLite's operators -----------------------------------------------------------------------------------------------


def _corners(how: Resampling, axes: Sequence[Sampled]) -> _Corners | None:
    """The options with which TFLite's operator does what ONNX asks for; None: there are none."""
    if how.mode not in ("nearest", "linear") or how.outside(axes[0]) is not None:
        return None
    return next((corners for corners in _CORNERS if all(_is_equal(how, axis, corners) for axis in axes)), None)


def _is_equal(how: Resampling, axis: Sampled, corners: _Corners) -> bool:
    if axis.size < 0:
        if axis.scale != int(axis.scale):
            raise UnsupportedError(
                "its scale is fractional, and the size of its input is known only when the model runs"
            )
        tried = (
            Sampled(axis=axis.axis, size=size, output=int(size * axis.scale), scale=axis.scale, width=size * axis.scale)
            for size in _TRIED_SIZES
        )
        return all(_is_equal(how, one, corners) for one in tried)
    options = corners._asdict()
    if how.mode == "nearest":
        return np.array_equal(how.nearest(axis), nearest_of_tflite(axis.size, axis.output, **options))
    difference = how.weights(axis) - weights_of_tflite(axis.size, axis.output, **options)
    return bool(np.abs(difference).max(initial=0.0) <= _WEIGHT_ERROR_PER_ELEMENT * axis.size)


def _images(build: Builder, x: Tensor, axes: Sequence[Sampled], how: Resampling, corners: _Corners) -> Tensor:
    """One axis or two that lie side by side, of images (others before, first, second, channels).

    A single axis is the first of the two; the second is all that lies between it and the channels.
    """
    changed = [axis.axis for axis in axes]
    others = [axis for axis in range(x.rank) if axis not in changed]
    channels = others.pop() if others else None
    # Others that come before; behind, they can only follow a single axis.
    before = [axis for axis in others if axis < changed[0] or len(changed) == 2]
    after = [axis for axis in others if axis not in before]
    order = (*before, *changed, *after, *(() if channels is None else (channels,)))
    y = build.transposed(x, order)
    sizes = [size_of(x, axis) for axis in order]
    count = len(before)
    front, first = product_of(sizes[:count]), sizes[count]
    second: Size = sizes[count + 1] if len(changed) == 2 else product_of([size_of(x, axis) for axis in after])
    depth: Size = 1 if channels is None else size_of(x, channels)
    image = reshaped_to(build, y, [front, first, second, depth])
    targets = [_target(x, axis) for axis in axes]
    new = [*targets, second][:2]
    kind = "RESIZE_NEAREST_NEIGHBOR" if how.mode == "nearest" else "RESIZE_BILINEAR"
    image = build.op(
        kind,
        [image, shape_vector(build, new)],
        shape=(known(front), known(new[0]), known(new[1]), known(depth)),
        type_=x.type,
        alignCorners=corners.align_corners,
        halfPixelCenters=corners.half_pixel,
    )
    sizes[count : count + len(changed)] = targets
    return build.transposed(reshaped_to(build, image, sizes), inverse(order))


def _target(x: Tensor, axis: Sampled) -> Size:
    if axis.output >= 0:
        return axis.output
    return product_of([size_of(x, axis.axis), int(axis.scale)])


# --- axis by axis -----------------------------------------------------------------------------------------------------


def _gathered(build: Builder, x: Tensor, axis: Sampled, how: Resampling) -> Tensor:
    """GATHER with constant indices."""
    if axis.size < 0:
        raise UnsupportedError("RESIZE_NEAREST_NEIGHBOR rounds in another way, and the size of its input is not known")
    indices = build.constant(how.nearest(axis).astype(np.int32))
    shape = (*x.shape[: axis.axis], axis.output, *x.shape[axis.axis + 1 :])
    return build.op("GATHER", [x, indices], shape=shape, type_=x.type, axis=axis.axis)


def _weighted(build: Builder, x: Tensor, axis: Sampled, how: Resampling) -> Tensor:
    """FULLY_CONNECTED over the axis, with its matrix for a weight."""
    if axis.size < 0:
        raise UnsupportedError("RESIZE_BILINEAR does not compute this mode, and the size of its input is not known")
    order = (*(other for other in range(x.rank) if other != axis.axis), axis.axis)
    last = build.transposed(x, order)
    weight = build.constant(how.weights(axis).astype(np.float32))
    bias = build.constant(np.zeros(axis.output, np.float32))
    y = build.op(
        "FULLY_CONNECTED",
        [last, weight, bias],
        shape=(*last.shape[:-1], axis.output),
        type_=x.type,
        keepNumDims=True,
    )
    return build.transposed(y, inverse(order))


def _extrapolated(build: Builder, y: Tensor, axes: Sequence[Sampled], how: Resampling, value: float) -> Tensor:
    """`value` at the places that lie outside along any axis."""
    masks: Mapping[int, np.ndarray | None] = {axis.axis: how.outside(axis) for axis in axes}
    outside = np.zeros((1,) * y.rank, np.bool_)
    for axis, mask in masks.items():
        if mask is not None:
            outside = outside | mask.reshape(-1, *(1,) * (y.rank - 1 - axis))
    if not outside.any():
        return y
    fill = build.constant(np.full((1,) * y.rank, value), y.type)
    return build.op("SELECT_V2", [build.constant(outside), fill, y], shape=y.shape, type_=y.type)
