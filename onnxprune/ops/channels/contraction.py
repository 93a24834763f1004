"""Channels through products and sums over axes: MatMul, Gemm, Einsum.

One algebra serves all: every axis of every operand gets a letter, as in Einsum. Per letter
    labelled computed operands are joined; constants are labelled with what they meet
    in the output         the axis is passed on; a letter that only a constant has is a new channel
    not in the output     the axis is summed over: removed channels count as zeros, which is exact
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from onnxprune.ops.channels.flow import CHANNELS, Flow
from onnxprune.ops.channels.labelling import Role
from onnxprune.ops.channels.labels import LabelArray

__all__: list[str] = []


def _product(
    flow: Flow,
    operands: Mapping[int, Sequence[str]],
    output: Sequence[str],
    *,
    fixed: Collection[str] = (),
) -> tuple[LabelArray | None, ...]:
    """Labels of each letter of `output`; `operands` maps input positions to one letter per axis.

    Letters in `fixed` have no labels.
    """
    letters = sorted({letter for term in operands.values() for letter in term})
    labels = {
        letter: None if letter in fixed else _letter(flow, operands, letter, is_summed=letter not in output)
        for letter in letters
    }
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
    for position, axis, _ in labelled:
        # A weight that came through others is used here as a constant would be.
        is_new = not is_summed and len(axes) == 1
        flow.own(position, axis, Role.FILTER if is_new else Role.INPUT if is_summed else Role.PARAMETER)
    first = labelled[0][2]
    for _, _, labels in labelled[1:]:
        flow.join(first, labels)
    for position, axis in constant:
        flow.bind(position, axis, first, Role.INPUT if is_summed else Role.PARAMETER)
    fixed = [(position, axis) for position, axis in computed if flow.axis_labels(position, axis) is None]
    for position, axis in fixed:
        flow.bind(position, axis, first)  # freezes, with the name of what is fixed
    if fixed:
        return first
    if is_summed:
        for position, axis, _ in labelled:
            flow.contract(position, axis)
    elif len(labelled) > 1:
        # Products of two activations that are made once for each of these: attention heads.
        flow.prefer(first)
    return first


def _new_channels(flow: Flow, constant: Sequence[tuple[int, int]]) -> LabelArray | None:
    if len(constant) != 1 or not flow.is_trainable(constant[0][0]):
        return None
    position, axis = constant[0]
    if position == 0 and flow.is_derived(range(flow.num_inputs)):
        # A layer that works on a table (coordinates, positions): the table's rows are data, as those of an input are.
        return flow.own_tentatively(position, axis)
    return flow.own(position, axis)


@CHANNELS.register("MatMul")
@CHANNELS.register("FusedMatMul", "TransposeMatMul", domain="com.microsoft")
def _matmul(flow: Flow) -> None:
    left, right, attributes = flow.dims(0), flow.dims(1), flow.node.attributes
    if not left or not right:
        _freeze_all(flow, "meets a tensor of unknown rank")
        return
    batch = [f"b{index}" for index in range(max(len(left), len(right)) - 2, 0, -1)]
    output = [*batch, *(["m"] if len(left) > 1 else []), *(["n"] if len(right) > 1 else [])]
    operands = {}
    for position, rank, matrix, side in ((0, len(left), ["m", "k"], "A"), (1, len(right), ["k", "n"], "B")):
        if rank == 1:
            operands[position] = ["k"]
            continue
        if attributes.get_int(f"trans{side}", 0):
            matrix = matrix[::-1]
        own_batch = batch[len(batch) - (rank - 2) :]
        # transBatch: the row axis is stored before the batch axes.
        rows_first = attributes.get_int(f"transBatch{side}", 0)
        operands[position] = [matrix[0], *own_batch, matrix[1]] if rows_first else [*own_batch, *matrix]
    flow.give(_product(flow, operands, output))


@CHANNELS.register("Gemm")
@CHANNELS.register("FusedGemm", domain="com.microsoft")
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
    ranks = [len(dims) for position in range(flow.num_inputs) if (dims := flow.dims(position)) is not None]
    equation = flow.node.attributes.get_string("equation", "").replace(" ", "")
    terms = _terms(equation, ranks) if len(ranks) == flow.num_inputs else None
    if terms is None:
        _freeze_all(flow, "is in an equation that is not understood")
        return
    inputs, output = terms
    # A diagonal holds the elements whose indices on two axes are equal: both axes stay.
    diagonal = {letter for term in inputs for letter in term if term.count(letter) > 1}
    for position, term in enumerate(inputs):
        axes = [axis for axis, letter in enumerate(term) if letter in diagonal]
        flow.freeze_input(position, f"is on a diagonal in {flow.where}", axes=axes)
    flow.give(_product(flow, dict(enumerate(inputs)), output, fixed=diagonal))


def _terms(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]] | None:
    """Letters of each input's axes and of the output's; axes behind an ellipsis get numbers, the last one is 1."""
    left, arrow, right = equation.partition("->")
    written = left.split(",")
    if len(written) != len(ranks):
        return None
    inputs: list[list[str]] = []
    for term, rank in zip(written, ranks, strict=True):
        letters = _axes_of(term, rank)
        if letters is None:
            return None
        inputs.append(letters)
    hidden = max((sum(letter.startswith(".") for letter in term) for term in inputs), default=0)
    ahead = [f".{number}" for number in range(hidden, 0, -1)]
    if arrow:
        head, dots, tail = right.partition("...")
        return inputs, [*head, *(ahead if dots else []), *tail]
    letters = [letter for term in inputs for letter in term if not letter.startswith(".")]
    once = [letter for letter in letters if letters.count(letter) == 1]
    if any(letter.isupper() for letter in once) and any(letter.islower() for letter in once):
        return None  # NumPy and ONNX Runtime order capitals differently
    return inputs, [*ahead, *sorted(once)]


def _axes_of(term: str, rank: int) -> list[str] | None:
    head, dots, tail = term.partition("...")
    hidden = rank - len(head) - len(tail)
    if hidden < 0 or (hidden and not dots):
        return None
    return [*head, *(f".{number}" for number in range(hidden, 0, -1)), *tail]


def _freeze_all(flow: Flow, what: str) -> None:
    for position in range(flow.num_inputs):
        flow.freeze_input(position, f"{what} in {flow.where}")
