"""Channels through products and sums over axes: MatMul, Gemm, Einsum, recurrent layers.

One algebra serves all: every axis of every operand gets a letter, as in Einsum. Per letter
    labelled computed operands are joined; constants are labelled with what they meet
    in the output         the axis is passed on; a letter that only a constant has is a new channel
    not in the output     the axis is summed over: removed channels count as zeros, which is exact
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxprune.ops.channels.flow import CHANNELS, Flow, Role
from onnxprune.ops.channels.labels import LabelArray

__all__: list[str] = []


def _product(flow: Flow, operands: Mapping[int, Sequence[str]], output: Sequence[str]) -> tuple[LabelArray | None, ...]:
    """Labels of each letter of `output`; `operands` maps input positions to one letter per axis."""
    letters = sorted({letter for term in operands.values() for letter in term})
    labels = {letter: _letter(flow, operands, letter, is_summed=letter not in output) for letter in letters}
    flow.macs_follow(*labels.values())
    return tuple(labels[letter] for letter in output)


def _letter(flow: Flow, operands: Mapping[int, Sequence[str]], letter: str, *, is_summed: bool) -> LabelArray | None:
    axes = [
        (position, axis)
        for position, term in operands.items()
        for axis, own_letter in enumerate(term)
        if own_letter == letter and (flow.dims(position) or ())[axis] != 1
    ]
    computed = [(position, axis) for position, axis in axes if not flow.is_constant(position)]
    constant = [(position, axis) for position, axis in axes if flow.is_constant(position)]
    labelled = [
        (position, axis, labels)
        for position, axis in computed
        if (labels := flow.axis_labels(position, axis)) is not None
    ]
    if not labelled:
        return _new_channels(flow, constant) if not computed and not is_summed else None
    first = labelled[0][2]
    for _, _, labels in labelled[1:]:
        flow.join(first, labels)
    for position, axis in constant:
        flow.bind(position, axis, first, Role.INPUT if is_summed else Role.PARAMETER)
    for position, axis in computed:
        if flow.axis_labels(position, axis) is None:
            flow.bind(position, axis, first)  # freezes, with the name of what is fixed
    if is_summed:
        for position, axis, _ in labelled:
            flow.contract(position, axis)
    return first


def _new_channels(flow: Flow, constant: Sequence[tuple[int, int]]) -> LabelArray | None:
    if len(constant) != 1 or not flow.is_trainable(constant[0][0]):
        return None
    return flow.own(*constant[0])


@CHANNELS.register("MatMul")
def _matmul(flow: Flow) -> None:
    left, right = flow.dims(0), flow.dims(1)
    if not left or not right:
        _freeze_all(flow, "meets a tensor of unknown rank")
        return
    batch_rank = max(len(left), len(right)) - 2
    batch = [f"b{index}" for index in range(max(batch_rank, 0))]
    left_letters = ["k"] if len(left) == 1 else [*batch[len(batch) - (len(left) - 2) :], "m", "k"]
    right_letters = ["k"] if len(right) == 1 else [*batch[len(batch) - (len(right) - 2) :], "k", "n"]
    output = [*batch, *(["m"] if len(left) > 1 else []), *(["n"] if len(right) > 1 else [])]
    flow.give(_product(flow, {0: left_letters, 1: right_letters}, output))


@CHANNELS.register("Gemm")
def _gemm(flow: Flow) -> None:
    left = ["k", "m"] if flow.node.attributes.get_int("transA", 0) else ["m", "k"]
    right = ["n", "k"] if flow.node.attributes.get_int("transB", 0) else ["k", "n"]
    if flow.dims(0) is None or flow.dims(1) is None:
        _freeze_all(flow, "meets a tensor of unknown rank")
        return
    labels = _product(flow, {0: left, 1: right}, ["m", "n"])
    flow.give(labels)
    if not flow.has(2):
        return
    dims = flow.dims(2)
    if dims is None:
        _freeze_all(flow, "meets a tensor of unknown rank")
        return
    for axis, axis_labels in zip((-2, -1), labels, strict=True):
        if len(dims) >= -axis and dims[axis] != 1:
            if axis_labels is not None:
                flow.bind(2, axis, axis_labels, Role.PARAMETER)
            else:
                flow.freeze_input(2, f"is added to fixed channels in {flow.where}", axes=[axis])


@CHANNELS.register("Einsum")
def _einsum(flow: Flow) -> None:
    equation = flow.node.attributes.get_string("equation", "").replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    known_ranks = all(flow.dims(position) is not None for position in range(flow.num_inputs))
    if not arrow or "..." in equation or len(terms) != flow.num_inputs or not known_ranks:
        _freeze_all(flow, "is in an equation with an ellipsis or an implicit output")
        return
    if any(len(set(term)) != len(term) for term in terms):
        _freeze_all(flow, "is on a diagonal")
        return
    flow.give(_product(flow, {position: list(term) for position, term in enumerate(terms)}, list(output)))


@CHANNELS.register("RNN", "GRU", "LSTM")
def _recurrent(flow: Flow) -> None:
    """X is (steps, batch, input): its features are summed over by W. The hidden units stay.

    With layout = 1, X is (batch, steps, input), which changes nothing here.
    """
    flow.freeze_input(0, f"is a step or batch axis of {flow.where}", axes=[0, 1])
    for position in range(2, flow.num_inputs):
        flow.freeze_input(position, f"is state of {flow.where}")
    flow.freeze_input(1, f"holds hidden units of {flow.where}", axes=[0, 1])
    incoming = flow.axis_labels(0, 2)
    if incoming is not None:
        flow.bind(1, 2, incoming, Role.INPUT)
        flow.contract(0, 2)
    else:
        flow.freeze_input(1, f"meets fixed input features in {flow.where}", axes=[2])
    if flow.is_trainable(1):
        flow.freeze(flow.own(1, 1), f"hidden units of {flow.where} are not pruned")


def _freeze_all(flow: Flow, what: str) -> None:
    for position in range(flow.num_inputs):
        flow.freeze_input(position, f"{what} in {flow.where}")
