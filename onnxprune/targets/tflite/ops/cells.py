"""One step of LSTM, GRU and RNN.

Symbols: B batch, H hidden units, G gates; `projected` is W x + b of the step, (B, G * H), computed for all
steps at once. A state of None is zero, which saves its product.

UNIDIRECTIONAL_SEQUENCE_LSTM is not used: its states are variables that live on from one call to the next, so that the
second call would begin where the first one ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from onnxprune.targets.tflite.build import Builder
from onnxprune.targets.tflite.graph import Tensor
from onnxprune.targets.tflite.ops.cell_activations import Activation
from onnxprune.targets.tflite.ops.contraction import linear
from onnxprune.targets.tflite.ops.sizes import slice_of

__all__ = ["Cell", "State", "gru_step", "lstm_step", "rnn_step"]

State: TypeAlias = "tuple[Tensor | None, ...]"
"""The hidden state, which is the output as well, and the cell state of LSTM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One direction of a layer.

    `recurrences` are the matrices of the recurrent products: one of (G * H, H), or two for a GRU that resets early, of
    the gates and of the proposal. `recurrent_bias` (G * H,) is what GRU adds to the recurrent product before the reset;
    `peepholes` are three vectors (H,) for the gates i, o, f. `clip` 0: none.
    """

    step: Callable[[Cell, Builder, Tensor, State], tuple[Tensor, ...]]
    activations: tuple[Activation, ...]
    hidden: int
    recurrences: tuple[Tensor, ...]
    recurrent_bias: Tensor | None = None
    peepholes: tuple[Tensor, ...] = ()
    clip: float = 0.0
    joins_gates: bool = False
    """LSTM's input_forget: the forget gate is one minus the input gate."""
    resets_late: bool = False
    """GRU's linear_before_reset."""

    def activated(self, build: Builder, which: int, x: Tensor) -> Tensor:
        """An activation of clipped numbers."""
        if self.clip > 0:
            x = build.binary("MINIMUM", x, build.constant(np.float32(self.clip)))
            x = build.binary("MAXIMUM", x, build.constant(np.float32(-self.clip)))
        return self.activations[which](build, x)

    def tensors(self) -> tuple[Tensor, ...]:
        """What the step reads besides its arguments."""
        return (*self.recurrences, *((self.recurrent_bias,) if self.recurrent_bias else ()), *self.peepholes)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Cell:
        """The same cell with others in the place of `tensors()`."""
        given = list(tensors)
        recurrences = tuple(given.pop(0) for _ in self.recurrences)
        bias = given.pop(0) if self.recurrent_bias else None
        return replace(self, recurrences=recurrences, recurrent_bias=bias, peepholes=tuple(given))


def rnn_step(cell: Cell, build: Builder, projected: Tensor, state: State) -> tuple[Tensor, ...]:
    """The new state is f(W x + R h + b)."""
    return (cell.activated(build, 0, _plus_product(build, projected, state[0], cell.recurrences[0])),)


def lstm_step(cell: Cell, build: Builder, projected: Tensor, state: State) -> tuple[Tensor, ...]:
    """Gates in the order i, o, f, c; f and i look at the old cell state through peepholes, o at the new one."""
    hidden, memory = state
    gates = _plus_product(build, projected, hidden, cell.recurrences[0])
    i, o, f, c = _split(build, gates, 4)
    i = cell.activated(build, 0, _peeped(cell, build, i, 0, memory))
    new = build.binary("MUL", i, cell.activated(build, 1, c))
    if memory is not None:
        if cell.joins_gates:
            f = build.binary("SUB", build.constant(np.float32(1.0)), i)
        else:
            f = cell.activated(build, 0, _peeped(cell, build, f, 2, memory))
        new = build.binary("ADD", build.binary("MUL", f, memory), new)
    o = cell.activated(build, 0, _peeped(cell, build, o, 1, new))
    return build.binary("MUL", o, cell.activations[2](build, new)), new


def gru_step(cell: Cell, build: Builder, projected: Tensor, state: State) -> tuple[Tensor, ...]:
    """Gates in the order z, r, h; the new state is between the proposal and the old state: n + z (h - n)."""
    (hidden,) = state
    size = cell.hidden
    if cell.resets_late:
        z, r, n = _split(build, projected, 3)
        if hidden is not None:
            parts = _split(build, linear(build, hidden, cell.recurrences[0], cell.recurrent_bias), 3)
        elif cell.recurrent_bias is not None:
            parts = _split(build, build.reshaped(cell.recurrent_bias, (1, 3 * size)), 3)
        else:
            parts = ()
        if parts:
            z, r = build.binary("ADD", z, parts[0]), build.binary("ADD", r, parts[1])
            n = build.binary("ADD", n, build.binary("MUL", cell.activated(build, 0, r), parts[2]))
        z = cell.activated(build, 0, z)
    else:
        early, n = _cut(build, projected, 2 * size)
        of_gates, of_proposal = cell.recurrences
        z, r = _split(build, cell.activated(build, 0, _plus_product(build, early, hidden, of_gates)), 2)
        if hidden is not None:
            n = _plus_product(build, n, build.binary("MUL", r, hidden), of_proposal)
    n = cell.activated(build, 1, n)
    if hidden is None:
        return (build.binary("SUB", n, build.binary("MUL", z, n)),)
    return (build.binary("ADD", n, build.binary("MUL", z, build.binary("SUB", hidden, n))),)


def _plus_product(build: Builder, projected: Tensor, hidden: Tensor | None, recurrence: Tensor) -> Tensor:
    return projected if hidden is None else build.binary("ADD", projected, linear(build, hidden, recurrence))


def _peeped(cell: Cell, build: Builder, gate: Tensor, which: int, memory: Tensor | None) -> Tensor:
    if not cell.peepholes or memory is None:
        return gate
    return build.binary("ADD", gate, build.binary("MUL", memory, cell.peepholes[which]))


def _split(build: Builder, x: Tensor, count: int) -> tuple[Tensor, ...]:
    """Equal parts of the last axis."""
    shape = (*x.shape[:-1], x.shape[-1] // count)
    axis = build.constant(x.rank - 1)
    return build.ops("SPLIT", [axis, x], outputs=[(shape, x.type)] * count, numSplits=count)


def _cut(build: Builder, x: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """The last axis in two."""
    return slice_of(build, x, -1, 0, at), slice_of(build, x, -1, at, x.shape[-1] - at)
