"""Parts and shapes of tensors whose dimensions may be known only when the model runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from onnxprune.targets.tflite.build import Builder
from onnxprune.targets.tflite.graph import Tensor

__all__ = ["Size", "Unknown", "known", "product_of", "reshaped_to", "scalar", "shape_vector", "size_of", "slice_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown:
    """A dimension that is known when the model runs: `times` the product of axes of tensors."""

    axes: tuple[tuple[Tensor, int], ...]
    times: int = 1


Size: TypeAlias = "int | Unknown"


def known(size: Size) -> int:
    """The number, or -1."""
    return size if isinstance(size, int) else -1


def size_of(tensor: Tensor, axis: int) -> Size:
    """A dimension of `tensor`."""
    axis %= tensor.rank
    dim = tensor.shape[axis]
    return dim if dim >= 0 else Unknown(axes=((tensor, axis),))


def product_of(sizes: Sequence[Size]) -> Size:
    """The product of dimensions."""
    times = math.prod(size if isinstance(size, int) else size.times for size in sizes)
    axes = tuple(axis for size in sizes if not isinstance(size, int) for axis in size.axes)
    return Unknown(axes=axes, times=times) if axes else times


def shape_vector(build: Builder, sizes: Sequence[Size]) -> Tensor:
    """The sizes as an INT32 vector."""
    return build.vector([size if isinstance(size, int) else _computed(build, size) for size in sizes])


def scalar(build: Builder, size: Size) -> Tensor:
    """The size as an INT32 number."""
    return build.constant(size) if isinstance(size, int) else build.scalar(_computed(build, size))


def reshaped_to(build: Builder, tensor: Tensor, sizes: Sequence[Size]) -> Tensor:
    """The same numbers in the shape of `sizes`: a constant shape where at most one is unknown."""
    shape = tuple(known(size) for size in sizes)
    if shape.count(-1) <= 1:
        return build.reshaped(tensor, shape)
    return build.op("RESHAPE", [tensor, shape_vector(build, sizes)], shape=shape, type_=tensor.type)


def _computed(build: Builder, size: Unknown) -> Tensor:
    """The dimension as an INT32 vector of one entry."""
    factors: list[int | Tensor] = [] if size.times == 1 else [size.times]
    factors += [build.length(tensor, axis) for tensor, axis in size.axes]
    return build.chained("MUL", (build.vector([factor]) for factor in factors))


def slice_of(build: Builder, tensor: Tensor, axis: int, begin: int, length: int) -> Tensor:
    """`length` entries of one axis from `begin` on, which are there."""
    axis %= tensor.rank
    shape = (*tensor.shape[:axis], length, *tensor.shape[axis + 1 :])
    if shape == tensor.shape:
        return tensor
    if tensor.constant is not None:
        return build.constant_tensor(tensor.constant.sliced(axis, begin, length), name=f"{tensor.name}/slice")
    begins = [begin if position == axis else 0 for position in range(tensor.rank)]
    # -1, of an open size: all that is there. XNNPACK takes numbers only.
    return build.op(
        "SLICE", [tensor, build.constant(begins), build.constant(list(shape))], shape=shape, type_=tensor.type
    )
