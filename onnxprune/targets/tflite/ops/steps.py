"""All steps of one direction of a recurrent layer.

Few steps stand in the graph one after the other; many, or a number that only the run knows, become a WHILE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Tensor
from onnxprune.targets.tflite.ops.cells import Cell, State
from onnxprune.targets.tflite.ops.sizes import Size, known, reshaped_to, scalar, shape_vector, size_of
from onnxprune.targets.tflite.ops.table import Body, Scope

__all__ = ["Done", "Sequences", "all_steps"]

MAX_UNROLLED_STEPS = 64
MAX_COPIED_BYTES = 2 << 20
"""XNNPACK packs a matrix anew for every operator that reads it: unrolled, each step has a copy of the recurrent
matrices. Where they outgrow a processor's cache a WHILE is the faster one (50 steps of 256 units: 1.2 against 3.1 ms).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """What a direction works through. `time` is the axis of steps in `projected`, 0 or 1; the other one is the batch.

    `lengths` are the steps of each sequence, (B, 1) INT32, None: all.
    """

    projected: Tensor
    steps: Size
    batch: Size
    time: int
    is_reverse: bool
    lengths: Tensor | None
    keeps_all: bool
    """Whether the outputs of all steps are asked for."""


Done: TypeAlias = "tuple[Tensor | None, tuple[Tensor, ...]]"
"""Outputs of all steps (without the axis of directions), and the last states."""


def all_steps(build: Builder, scope: Scope, cell: Cell, sequence: Sequences, state: State) -> Done:
    """Run through the sequences from the first `state` on."""
    if _is_short(cell, sequence.steps):
        return _unrolled(build, cell, sequence, state)
    return _looped(build, scope, cell, sequence, state)


def _is_short(cell: Cell, steps: Size) -> bool:
    copied = 4 * known(steps) * sum(matrix.num_elements for matrix in cell.recurrences)
    return 0 <= known(steps) <= MAX_UNROLLED_STEPS and copied <= MAX_COPIED_BYTES


def _unrolled(build: Builder, cell: Cell, sequence: Sequences, state: State) -> Done:
    """The steps one after the other."""
    steps = known(sequence.steps)
    if steps < 1:
        raise UnsupportedError("its sequences have no steps")
    projected = sequence.projected
    width = projected.shape[2]
    shape = (known(sequence.batch), width)
    inputs = build.ops("UNPACK", [projected], outputs=[(shape, "FLOAT32")] * steps, num=steps, axis=sequence.time)
    outputs: list[Tensor] = [inputs[0]] * steps
    for step in reversed(range(steps)) if sequence.is_reverse else range(steps):
        new = cell.step(cell, build, inputs[step], state)
        outputs[step], state = _where_running(build, sequence.lengths, build.constant(step), new, state)
    final = tuple(one for one in state if one is not None)
    if not sequence.keeps_all:
        return None, final
    every = build.op(
        "PACK",
        outputs,
        shape=_of_all_steps(sequence, cell),
        type_="FLOAT32",
        valuesCount=steps,
        axis=sequence.time,
    )
    return every, final


def _of_all_steps(sequence: Sequences, cell: Cell) -> tuple[int, int, int]:
    steps, batch = known(sequence.steps), known(sequence.batch)
    return (steps, batch, cell.hidden) if sequence.time == 0 else (batch, steps, cell.hidden)


def _where_running(
    build: Builder, lengths: Tensor | None, step: Tensor, new: tuple[Tensor, ...], old: State
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(output, states): behind its end a sequence gives zeros and keeps its states, in both directions.

    A reverse direction passes over the padding first, with its first state, and so begins at the last step.
    """
    if lengths is None:
        return new[0], new
    running = build.binary("LESS", step, lengths, type_="BOOL")
    zero = build.constant(np.float32(0))
    kept = tuple(
        build.op("SELECT_V2", [running, one, zero if former is None else former], shape=one.shape, type_=one.type)
        for one, former in zip(new, old, strict=True)
    )
    if old[0] is None:
        return kept[0], kept
    return build.op("SELECT_V2", [running, new[0], zero], shape=new[0].shape, type_=new[0].type), kept


def _looped(build: Builder, scope: Scope, cell: Cell, sequence: Sequences, state: State) -> Done:
    """A WHILE over (step, states, all outputs, what every step reads)."""
    states = [_zeros(build, [sequence.batch, cell.hidden]) if one is None else one for one in state]
    computed = [tensor for tensor in cell.tensors() if tensor.constant is None]
    lengths = [] if sequence.lengths is None else [sequence.lengths]
    every: list[Tensor] = []
    if sequence.keeps_all:
        sizes = [sequence.steps, sequence.batch] if sequence.time == 0 else [sequence.batch, sequence.steps]
        every = [_zeros(build, [*sizes, cell.hidden])]
    carried = [build.constant(0), *states, *every, sequence.projected, *lengths, *computed]
    condition = _condition(scope.body(f"{build.node}/condition"), carried, sequence, 1 + len(states) + len(every))
    body = _step(scope.body(f"{build.node}/body"), cell, carried, sequence, len(states))
    results = build.ops(
        "WHILE",
        carried,
        outputs=[(tensor.shape, tensor.type) for tensor in carried],
        condSubgraphIndex=condition,
        bodySubgraphIndex=body,
    )
    final = results[1 : 1 + len(states)]
    return (results[1 + len(states)] if every else None), tuple(final)


def _zeros(build: Builder, sizes: Sequence[Size]) -> Tensor:
    inputs = [shape_vector(build, sizes), build.constant(np.float32(0))]
    return build.op("FILL", inputs, shape=tuple(known(size) for size in sizes), type_="FLOAT32")


def _condition(body: Body, carried: Sequence[Tensor], sequence: Sequences, projected: int) -> int:
    """Are there steps left? `projected` is its position in `carried`."""
    fed = [body.input(tensor, tensor.shape) for tensor in carried]
    steps = scalar(body.build, size_of(fed[projected], sequence.time))
    return body.finish([body.build.binary("LESS", fed[0], steps, type_="BOOL")])


def _step(body: Body, cell: Cell, carried: Sequence[Tensor], sequence: Sequences, num_states: int) -> int:
    """One step."""
    inner = body.build
    fed = [body.input(tensor, tensor.shape) for tensor in carried]
    rest = list(fed)
    counter = rest.pop(0)
    states = tuple(rest.pop(0) for _ in range(num_states))
    every = rest.pop(0) if sequence.keeps_all else None
    projected = rest.pop(0)
    lengths = None if sequence.lengths is None else rest.pop(0)
    given = [rest.pop(0) if one.constant is None else inner.constant_tensor(one.constant) for one in cell.tensors()]
    step = counter
    if sequence.is_reverse:
        last = inner.binary("SUB", scalar(inner, size_of(projected, sequence.time)), inner.constant(1))
        step = inner.binary("SUB", last, counter)
    shape = (known(sequence.batch), projected.shape[2])
    x = inner.op("GATHER", [projected, step], shape=shape, type_="FLOAT32", axis=sequence.time)
    new = cell.with_tensors(given)
    output, after = _where_running(inner, lengths, step, new.step(new, inner, x, states), states)
    results = [inner.binary("ADD", counter, inner.constant(1)), *after]
    if every is not None:
        sizes: list[Size] = [1, size_of(output, 0)] if sequence.time == 0 else [size_of(output, 0), 1]
        entry = reshaped_to(inner, output, [*sizes, cell.hidden])
        zero, place = inner.constant([0]), inner.reshaped(step, (1,))
        start = [place, zero, zero] if sequence.time == 0 else [zero, place, zero]
        places = inner.op("CONCATENATION", start, shape=(3,), type_="INT32", axis=0)
        results.append(inner.op("DYNAMIC_UPDATE_SLICE", [every, entry, places], shape=every.shape, type_="FLOAT32"))
    return body.finish([*results, *fed[len(results) :]])
