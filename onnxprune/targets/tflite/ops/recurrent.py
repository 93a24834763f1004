"""LSTM, GRU and RNN: the products with the inputs of all steps at once, then the steps (`steps.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from onnxprune.targets.tflite.build import Builder
from onnxprune.targets.tflite.graph import Tensor
from onnxprune.targets.tflite.ops.cell_activations import activations_of
from onnxprune.targets.tflite.ops.cells import Cell, gru_step, lstm_step, rnn_step
from onnxprune.targets.tflite.ops.contraction import linear
from onnxprune.targets.tflite.ops.sizes import Size, known, reshaped_to, size_of, slice_of
from onnxprune.targets.tflite.ops.steps import Done, Sequences, all_steps
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

__all__: list[str] = []

# A constant that is looked at to see whether it is zero.
_MAX_LOOKED_AT = 1 << 16


@TFLITE.register("RNN")
def rnn(node: NodeView, build: Builder) -> list[Tensor | None]:
    """The new state is f(W x + R h + b)."""
    cells, biases = [], []
    for direction, activations in enumerate(activations_of(node, ("Tanh",), _directions(node))):
        recurrence, of_inputs, of_states = _parameters(node, build, direction)
        cells.append(
            Cell(
                step=rnn_step,
                activations=activations,
                hidden=recurrence.shape[1],
                recurrences=(recurrence,),
                clip=node.number("clip"),
            )
        )
        biases.append(_sum(build, of_inputs, of_states))
    return _layer(node, build, cells, biases, initial=(5,))


@TFLITE.register("GRU")
def gru(node: NodeView, build: Builder) -> list[Tensor | None]:
    """Update gate z, reset gate r, proposal h; linear_before_reset keeps the bias of the recurrent product apart."""
    cells, biases = [], []
    resets_late = bool(node.integer("linear_before_reset"))
    for direction, activations in enumerate(activations_of(node, ("Sigmoid", "Tanh"), _directions(node))):
        recurrence, of_inputs, of_states = _parameters(node, build, direction)
        hidden = recurrence.shape[1]
        cut = [slice_of(build, recurrence, 0, *part) for part in ((0, 2 * hidden), (2 * hidden, hidden))]
        cells.append(
            Cell(
                step=gru_step,
                activations=activations,
                hidden=hidden,
                recurrences=(recurrence,) if resets_late else tuple(cut),
                recurrent_bias=of_states if resets_late else None,
                clip=node.number("clip"),
                resets_late=resets_late,
            )
        )
        biases.append(of_inputs if resets_late else _sum(build, of_inputs, of_states))
    return _layer(node, build, cells, biases, initial=(5,))


@TFLITE.register("LSTM")
def lstm(node: NodeView, build: Builder) -> list[Tensor | None]:
    """Gates i, o, f and c, with peepholes where they are given."""
    cells, biases = [], []
    for direction, activations in enumerate(activations_of(node, ("Sigmoid", "Tanh", "Tanh"), _directions(node))):
        recurrence, of_inputs, of_states = _parameters(node, build, direction)
        hidden = recurrence.shape[1]
        peepholes = _entry(build, node.optional(7), direction)
        cells.append(
            Cell(
                step=lstm_step,
                activations=activations,
                hidden=hidden,
                recurrences=(recurrence,),
                peepholes=()
                if peepholes is None
                else tuple(slice_of(build, peepholes, 0, start * hidden, hidden) for start in range(3)),
                clip=node.number("clip"),
                joins_gates=bool(node.integer("input_forget")),
            )
        )
        biases.append(_sum(build, of_inputs, of_states))
    return _layer(node, build, cells, biases, initial=(5, 6))


def _directions(node: NodeView) -> int:
    return 2 if node.text("direction", "forward") == "bidirectional" else 1


def _entry(build: Builder, tensor: Tensor | None, direction: int) -> Tensor | None:
    """What belongs to one direction; the first axis of `tensor` counts them."""
    if tensor is None:
        return None
    return build.reshaped(slice_of(build, tensor, 0, direction, 1), tensor.shape[1:])


def _parameters(node: NodeView, build: Builder, direction: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Recurrent matrix (G * H, H), and the biases of the two products (G * H,)."""
    recurrence = _entry(build, node.input(2), direction)
    bias = _entry(build, node.optional(3), direction)
    assert recurrence is not None  # noqa: S101 - a required input
    if bias is None:
        return recurrence, None, None
    half = bias.shape[0] // 2
    return recurrence, slice_of(build, bias, 0, 0, half), slice_of(build, bias, 0, half, half)


def _sum(build: Builder, one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else build.binary("ADD", one, other)


def _layer(
    node: NodeView, build: Builder, cells: Sequence[Cell], biases: Sequence[Tensor | None], *, initial: Sequence[int]
) -> list[Tensor | None]:
    """All directions, and their outputs put together: Y, Y_h, and Y_c for LSTM."""
    x = node.input(0)
    time = 1 if node.integer("layout") else 0
    steps, batch = size_of(x, time), size_of(x, 1 - time)
    lengths = _lengths(node, build, steps)
    found: list[Done] = []
    for direction, (cell, bias) in enumerate(zip(cells, biases, strict=True)):
        weight = _entry(build, node.input(1), direction)
        assert weight is not None  # noqa: S101 - a required input
        sequence = Sequences(
            projected=linear(build, x, weight, bias),
            steps=steps,
            batch=batch,
            time=time,
            is_reverse=direction == 1 or node.text("direction", "forward") == "reverse",
            lengths=lengths,
            keeps_all=node.is_read(0),
        )
        state = tuple(_initial(build, node.optional(position), direction, time) for position in initial)
        found.append(all_steps(build, node.scope, cell, sequence, state))
    hidden = cells[0].hidden
    every = [done[0] for done in found if done[0] is not None]
    ordered = [steps, batch] if time == 0 else [batch, steps]
    y = _with_directions(build, every, [*ordered, hidden], 1 + time) if every else None
    last = [
        _with_directions(build, [done[1][which] for done in found], [batch, hidden], time)
        for which in range(len(initial))
    ]
    return [y, *last]


def _lengths(node: NodeView, build: Builder, steps: Size) -> Tensor | None:
    """(B, 1); None where every sequence is as long as the input."""
    given = node.optional(4)
    if given is None:
        return None
    numbers = given.array()
    if numbers is not None and isinstance(steps, int) and bool((numbers >= steps).all()):
        return None
    return build.reshaped(build.cast(given, "INT32"), (given.shape[0], 1))


def _initial(build: Builder, given: Tensor | None, direction: int, time: int) -> Tensor | None:
    """(B, H) of one direction; None: zero."""
    if given is None:
        return None
    if given.constant is not None and given.num_elements <= _MAX_LOOKED_AT and not given.constant.array().any():
        return None
    part = slice_of(build, given, time, direction, 1)
    return reshaped_to(build, part, [size_of(given, 1 - time), given.shape[2]])


def _with_directions(build: Builder, parts: Sequence[Tensor], sizes: Sequence[Size], axis: int) -> Tensor:
    """The directions along a new axis."""
    whole = [*sizes[:axis], 1, *sizes[axis:]]
    shaped = [reshaped_to(build, part, whole) for part in parts]
    if len(shaped) == 1:
        return shaped[0]
    shape = tuple(len(parts) if position == axis else known(size) for position, size in enumerate(whole))
    return build.op("CONCATENATION", shaped, shape=shape, type_=shaped[0].type, axis=axis)
