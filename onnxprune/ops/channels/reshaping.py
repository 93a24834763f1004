"""Channels through Reshape and Flatten: axes that are merged and split.

The axes of input and output are cut into blocks of equal size, from the left and from the right (row-major order):
    (N, C, H, W) -> (N, g, C/g, H, W)   blocks  N|N   C|g,C/g   H|H   W|W
    (N, C, H, W) -> (N, C*H*W)          blocks  N|N   C,H,W|C*H*W
Inside a block the labels of the input axes are laid out over the whole block and read off again along the output axes.
Where they change along one axis only, it has them (Flatten repeats each label H*W times; taking the merge apart again
finds the channels). Where several labelled axes become one, or one becomes several, the labels stand on a grid (channel
shuffle, pixel shuffle, attention heads): see `grids`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from onnxprune.ops.channels.elements import Dimension, Elements, Literal
from onnxprune.ops.channels.flow import CHANNELS, Flow
from onnxprune.ops.channels.labels import LabelArray

__all__: list[str] = []

Dim: TypeAlias = int | str | None
# A label array over a whole block is one number per element of the block: beyond this it is no channel axis.
_MAX_BLOCK = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Input axes and output axes that hold the same elements in the same order."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@CHANNELS.register("Reshape")
def _reshape(flow: Flow) -> None:
    labels = flow.labels(0)
    elements = flow.elements(1)
    if all(axis is None for axis in labels):
        flow.freeze_elements(1, f"is counted in the shape of fixed data in {flow.where}")
        return
    dims, out_dims = flow.dims(0), _target_dims(flow, elements)
    if elements is None or dims is None or out_dims is None:
        flow.freeze_input(0, f"is reshaped to a shape that is computed at run time by {flow.where}")
        flow.freeze_elements(1, f"is counted in a shape by {flow.where}")
        return
    produced = _relabel(flow, dims, out_dims)
    flow.give(produced)
    for axis, element in enumerate(elements):
        on_axis = produced[axis]
        if on_axis is not None:
            flow.follow(1, element, on_axis)
        elif isinstance(element, Dimension):
            flow.freeze(element.labels, f"its number is the size of an axis without channels in {flow.where}")


@CHANNELS.register("Flatten")
def _flatten(flow: Flow) -> None:
    labels, dims = flow.labels(0), flow.dims(0)
    if all(axis is None for axis in labels) or dims is None:
        return
    axis = flow.node.attributes.get_int("axis", 1)
    axis += len(dims) if axis < 0 else 0  # axis = rank is allowed: everything goes to the left
    blocks = [
        _Block(inputs=tuple(range(axis)), outputs=(0,)),
        _Block(inputs=tuple(range(axis, len(dims))), outputs=(1,)),
    ]
    out_dims = [_product_of(dims[:axis]), _product_of(dims[axis:])]
    produced: list[LabelArray | None] = [None, None]
    for block in blocks:
        _carry(flow, block, dims, out_dims, produced)
    flow.give(produced)


def _target_dims(flow: Flow, elements: Elements | None) -> tuple[Dim, ...] | None:
    """The output's dimensions, from shape inference and from what the shape input holds."""
    inferred, given, allow_zero = flow.out_dims(), flow.dims(0), flow.node.attributes.get_int("allowzero", 0)
    if elements is None:
        return inferred
    if inferred is not None and len(inferred) != len(elements):
        return None
    dims: list[Dim] = []
    for axis, element in enumerate(elements):
        known = inferred[axis] if inferred is not None else None
        if isinstance(known, int):
            dims.append(known)
        elif isinstance(element, Literal) and element.number > 0:
            dims.append(element.number)
        elif isinstance(element, Literal) and element.number == 0 and not allow_zero and given and axis < len(given):
            dims.append(given[axis])
        elif isinstance(element, Dimension) and element.size is not None:
            dims.append(element.size)
        else:
            dims.append(known)
    return tuple(dims)


def _relabel(flow: Flow, dims: tuple[Dim, ...], out_dims: tuple[Dim, ...]) -> list[LabelArray | None]:
    produced: list[LabelArray | None] = [None] * len(out_dims)
    for block in _blocks(dims, out_dims):
        _carry(flow, block, dims, out_dims, produced)
    return produced


def _blocks(dims: Sequence[Dim], out_dims: Sequence[Dim]) -> list[_Block]:
    """Cut both shapes into blocks of equal size; what can't be matched ends up in one block in the middle."""
    left, in_start, out_start = _match(dims, out_dims)
    rest, rest_out = list(dims[in_start:]), list(out_dims[out_start:])
    right, in_taken, out_taken = _match(rest[::-1], rest_out[::-1])
    in_stop, out_stop = len(dims) - in_taken, len(out_dims) - out_taken
    blocks = [_Block(inputs=tuple(inputs), outputs=tuple(outputs)) for inputs, outputs in left]
    for inputs, outputs in right:
        blocks.append(
            _Block(
                inputs=tuple(sorted(len(dims) - 1 - axis for axis in inputs)),
                outputs=tuple(sorted(len(out_dims) - 1 - axis for axis in outputs)),
            )
        )
    if in_start < in_stop or out_start < out_stop:
        blocks.append(_Block(inputs=tuple(range(in_start, in_stop)), outputs=tuple(range(out_start, out_stop))))
    return blocks


def _match(dims: Sequence[Dim], out_dims: Sequence[Dim]) -> tuple[list[tuple[list[int], list[int]]], int, int]:
    """Blocks from the front as far as sizes are known to agree, and how many axes of each side they take."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(dims) and j < len(out_dims):
        inputs, outputs = [i], [j]
        next_i, next_j = i + 1, j + 1
        while not _same_size([dims[a] for a in inputs], [out_dims[a] for a in outputs]):
            in_size, out_size = _product_of([dims[a] for a in inputs]), _product_of([out_dims[a] for a in outputs])
            if not isinstance(in_size, int) or not isinstance(out_size, int):
                return blocks, i, j
            if in_size < out_size and next_i < len(dims):
                inputs.append(next_i)
                next_i += 1
            elif out_size < in_size and next_j < len(out_dims):
                outputs.append(next_j)
                next_j += 1
            else:
                return blocks, i, j
        blocks.append((inputs, outputs))
        i, j = next_i, next_j
    # Axes of size 1 that are left over belong to nothing.
    while i < len(dims) and dims[i] == 1:
        blocks.append(([i], []))
        i += 1
    while j < len(out_dims) and out_dims[j] == 1:
        blocks.append(([], [j]))
        j += 1
    return blocks, i, j


def _same_size(dims: list[Dim], out_dims: list[Dim]) -> bool:
    if None in dims or None in out_dims:
        return False
    names = sorted(dim for dim in dims if isinstance(dim, str))
    out_names = sorted(dim for dim in out_dims if isinstance(dim, str))
    numbers = math.prod(dim for dim in dims if isinstance(dim, int))
    return names == out_names and numbers == math.prod(dim for dim in out_dims if isinstance(dim, int))


def _product_of(dims: Sequence[Dim]) -> int | None:
    numbers = [dim for dim in dims if isinstance(dim, int)]
    return math.prod(numbers) if len(numbers) == len(dims) else None


def _carry(
    flow: Flow, block: _Block, dims: Sequence[Dim], out_dims: Sequence[Dim], produced: list[LabelArray | None]
) -> None:
    """Move the labels of one block from its input axes to one output axis."""
    labels = flow.labels(0)
    labelled = [axis for axis in block.inputs if labels[axis] is not None]
    if not labelled:
        return
    if len(block.inputs) == len(block.outputs) == 1:
        produced[block.outputs[0]] = labels[labelled[0]]
        return
    in_sizes = [dims[axis] for axis in block.inputs]
    out_sizes = [out_dims[axis] for axis in block.outputs]
    size, out_size = _product_of(in_sizes), _product_of(out_sizes)
    if size is None or size != out_size or size > _MAX_BLOCK:
        for axis in labelled:
            flow.freeze(labels[axis], f"is merged with axes of unknown size, or too large, by {flow.where}")
        return
    over_block = _over_block(flow, block, [int(dim or 0) for dim in in_sizes])
    if len(block.outputs) == 1:
        produced[block.outputs[0]] = over_block
        return
    sides = flow.grid(over_block, [int(dim or 0) for dim in out_sizes])
    for axis, side in zip(block.outputs, sides, strict=True):
        produced[axis] = side


def _over_block(flow: Flow, block: _Block, sizes: Sequence[int]) -> LabelArray:
    """The label of each element of the block, row-major."""
    on_axes = [flow.axis_labels(0, axis) for axis in block.inputs]
    labelled = [on_axis for on_axis in on_axes if on_axis is not None]
    flat = flow.merged(labelled) if len(labelled) > 1 else labelled[0]
    sides = [1 if on_axis is None else len(on_axis) for on_axis in on_axes]
    return np.ascontiguousarray(np.broadcast_to(flat.reshape(sides), sizes)).reshape(-1)
