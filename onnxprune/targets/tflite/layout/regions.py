"""Regions of flattened tensors, computed on the axes that were flattened.

    x(N, C, H, W) -> RESHAPE (N, G, C/G*H*W) -> mean and variance of the last axis, and what is made of them -> RESHAPE

This is how group normalization arrives. A tensor that is flattened can't be stored in another order; split as
(N, G, C/G, H*W), it can. Between the two RESHAPE there may be operators that compute number by number and reductions;
what they name by a joined axis, they name by its parts then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.graph import Constant, Graph, Operator, Shape, Tensor
from onnxprune.targets.tflite.layout.flatten import UNARY

__all__ = ["with_split_regions"]

_BINARY = frozenset({"ADD", "DIV", "MAXIMUM", "MINIMUM", "MUL", "POW", "SQUARED_DIFFERENCE", "SUB"})
_REDUCTIONS = frozenset({"MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN"})
# More axes than this are not what kernels are made for.
_MOST_AXES = 4


def with_split_regions(graph: Graph) -> Graph:
    """`graph` with every such region split; the same object where there is none."""
    editor = Editor(graph)
    is_changed = False
    for operator in graph.operators:
        if operator.kind == "RESHAPE" and editor.producer(operator.outputs[0]) is operator:
            region = _region(editor, operator)
            if region is not None:
                _split(editor, region)
                is_changed = True
    return editor.graph() if is_changed else graph


@dataclass(frozen=True, slots=True)
class _Region:
    entry: Operator
    parts: tuple[tuple[int, ...], ...]
    """For each axis of the flattened tensor, the lengths that it is split into; none for an axis of length 1."""
    operators: tuple[Operator, ...]


def _region(editor: Editor, entry: Operator) -> _Region | None:
    """What is computed between a RESHAPE that joins axes and the RESHAPEs behind it."""
    before, after = (editor.tensors[name].shape for name in (entry.inputs[0], entry.outputs[0]))
    parts = _parts(before, after)
    if parts is None or editor.tensors[entry.inputs[1]].constant is None:
        return None
    inside = {entry.outputs[0]}
    operators: list[Operator] = []
    for operator in _readers_in_order(editor, entry):
        if operator.kind == "RESHAPE":
            continue
        if not _can_be_split(editor, operator, inside, after):
            return None
        operators.append(operator)
        inside.update(operator.outputs)
    reductions = [operator for operator in operators if operator.kind in _REDUCTIONS]
    if not reductions or any(editor.is_output(name) for name in inside):
        return None
    if not all(_split_axes(editor.tensors[operator.inputs[1]], parts) for operator in reductions):
        return None
    return _Region(entry, parts, tuple(operators))


def _readers_in_order(editor: Editor, entry: Operator) -> Iterator[Operator]:
    """Whoever sees the flattened tensor, up to the next RESHAPE, in graph order."""
    places = {id(operator): place for place, operator in enumerate(editor.operators)}
    found: dict[int, Operator] = {}
    waiting = [entry]
    while waiting:
        for reader in editor.consumers(waiting.pop().outputs[0]):
            if places[id(reader)] not in found:
                found[places[id(reader)]] = reader
                if reader.kind != "RESHAPE" and len(reader.outputs) == 1:
                    waiting.append(reader)
    yield from (found[place] for place in sorted(found))


def _can_be_split(editor: Editor, operator: Operator, inside: set[str], flat: Shape) -> bool:
    output = editor.tensors[operator.outputs[0]]
    if not _fits(output.shape, flat):
        return False
    if operator.kind in _REDUCTIONS:
        axes = editor.tensors[operator.inputs[1]]
        return bool(operator.option("keepDims", 0)) and axes.constant is not None and operator.inputs[0] in inside
    if operator.kind not in _BINARY and operator.kind not in UNARY:
        return False
    tensors = [editor.tensors[name] for name in operator.inputs if name]
    return all(
        tensor.quantization is None
        and (
            tensor.name in inside
            or tensor.num_elements == 1
            or (tensor.constant is not None and _fits((1,) * (len(flat) - tensor.rank) + tensor.shape, flat))
        )
        for tensor in tensors
    )


def _fits(shape: Shape, flat: Shape) -> bool:
    """True when every axis is the flattened tensor's, or of length 1."""
    return len(shape) == len(flat) and all(dim in (1, full) for dim, full in zip(shape, flat, strict=True))


def _parts(before: Shape, after: Shape) -> tuple[tuple[int, ...], ...] | None:
    """How the axes of `after` are split where those of `before` end; None where nothing is joined, or they cross."""
    if 0 in before or len(before) < 3 or min(before[1:]) < 0 or min(after[1:], default=-1) < 0 or before[0] != after[0]:
        return None
    ends = {math.prod(before[1 : axis + 1]) for axis in range(1, len(before))}
    # All axes behind the second are one, where there would be too many: space stays together.
    first = {before[1], math.prod(before[1:])}
    for wanted in (ends, first):
        parts = [(before[0],), *_cut(after[1:], wanted)]
        if len(after) <= sum(len(part) for part in parts) <= _MOST_AXES:
            return tuple(parts) if any(len(part) > 1 for part in parts) else None
    return None


def _cut(lengths: Sequence[int], ends: set[int]) -> list[tuple[int, ...]]:
    """Each length, cut at those products of lengths from the left that divide it."""
    found = []
    passed = 1
    for length in lengths:
        part, start = [], passed
        passed *= length
        for end in sorted(end for end in ends if start < end < passed):
            if end % start == 0 and passed % end == 0:
                part.append(end // start)
                start = end
        if passed != start:
            part.append(passed // start)
        found.append(tuple(part))
    return found


def _split(editor: Editor, region: _Region) -> None:
    """Write the region anew. Its tensors stand for no value any more: none has their shape."""
    split: dict[str, str] = {}
    for operator in (region.entry, *region.operators):
        tensor = editor.tensors[operator.outputs[0]]
        shape = _split_shape(tensor.shape, region.parts)
        split[tensor.name] = editor.add(replace(tensor, name=f"{tensor.name}/split", shape=shape)).name
    entry = split[region.entry.outputs[0]]
    shape = editor.tensors[entry].shape
    numbers = editor.add_constant(Constant.of(np.array(shape, np.int32)), f"{entry}/shape")
    changed = replace(region.entry, inputs=(region.entry.inputs[0], numbers.name), outputs=(entry,))
    editor.insert_before(region.entry, changed.with_options(newShape=shape))
    for operator in region.operators:
        if operator.kind in _REDUCTIONS:
            axes = np.array(_split_axes(editor.tensors[operator.inputs[1]], region.parts), np.int32)
            named = editor.add_constant(Constant.of(axes), operator.inputs[1])
            inputs: tuple[str, ...] = (split[operator.inputs[0]], named.name)
        else:
            inputs = tuple(
                split.get(name) or _split_constant(editor, editor.tensors[name], region.parts)
                for name in operator.inputs
            )
        editor.insert_before(operator, replace(operator, inputs=inputs, outputs=(split[operator.outputs[0]],)))
    inside = {id(operator) for operator in (region.entry, *region.operators)}
    for flat, name in split.items():
        exits = [reader for reader in editor.consumers(flat) if id(reader) not in inside]
        editor.redirect(flat, name, only=exits)
    for operator in (*reversed(region.operators), region.entry):
        editor.replace(operator)


def _split_shape(shape: Shape, parts: Sequence[tuple[int, ...]]) -> Shape:
    found: list[int] = []
    for dim, part in zip(shape, parts, strict=True):
        found.extend(part if math.prod(part) == dim else (1,) * len(part))
    return tuple(found)


def _split_axes(axes: Tensor, parts: Sequence[tuple[int, ...]]) -> list[int]:
    """The places of the parts of the axes that a reduction names."""
    starts = [sum(len(part) for part in parts[:axis]) for axis in range(len(parts) + 1)]
    named = sorted({int(axis) % len(parts) for axis in np.asarray(axes.array()).reshape(-1)})
    return [place for axis in named for place in range(starts[axis], starts[axis + 1])]


def _split_constant(editor: Editor, tensor: Tensor, parts: Sequence[tuple[int, ...]]) -> str:
    if tensor.constant is None or tensor.num_elements == 1:
        return tensor.name
    full = (1,) * (len(parts) - tensor.rank) + tensor.shape
    return editor.add_constant(tensor.constant.reshaped(_split_shape(full, parts)), tensor.name).name
