"""What follows a MEAN over height and width, in the form that XNNPACK's sparse inference asks for.

    head  MEAN -> 1x1 convolutions, activations                     (N, 1, 1, C)
          ->  MEAN -> RESHAPE -> FULLY_CONNECTED, activations       (N, C)
    gate  MEAN -> RESHAPE -> FULLY_CONNECTED -> RESHAPE -> MUL      (N, C)
          ->  MEAN -> 1x1 convolutions -> MUL                       (N, 1, 1, C)

A head must leave the cluster at its MEAN: a 1x1 convolution behind it would be taken into the cluster, which then has
no end. A gate must stay in the cluster, where RESHAPE has no place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.graph import Constant, Graph, Operator, Shape, Tensor
from onnxprune.targets.tflite.sparse.rules import GraphView

__all__ = ["with_pooled_form"]

_RANK = 4
_POINTWISE = frozenset({"RELU", "RELU6", "RELU_N1_TO_1", "HARD_SWISH", "LOGISTIC", "LEAKY_RELU", "ELU", "TANH", "GELU"})
_COMMUTATIVE = frozenset({"ADD", "MUL"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pooled:
    """The operators behind a MEAN that compute one vector a picture, of shape (N, C) or (N, 1, 1, C)."""

    mean: Operator
    operators: tuple[Operator, ...]
    is_gate: bool
    """True when a vector scales pictures of the cluster again; False for the head of the network."""


def with_pooled_form(graph: Graph, mean_output: str) -> Graph:
    """One MEAN keeps its axes; what is behind it is computed with four axes in a gate, and with two in a head."""
    view = GraphView(graph)
    mean = view.producers[mean_output]
    axes = view.tensor(mean.inputs[1]).array()
    x, y = view.tensor(mean.inputs[0]), view.tensor(mean_output)
    if x.rank != _RANK or y.type != "FLOAT32" or axes is None or sorted(np.ravel(axes) % _RANK) != [1, 2]:
        return graph
    editor = Editor(graph)
    return _rebuilt(_pooled(mean, view), editor, view)


def _pooled(mean: Operator, view: GraphView) -> _Pooled:
    vectors = {mean.outputs[0]}
    found: list[Operator] = []
    is_gate = False
    for operator in view.graph.operators:
        data = [name for name in operator.inputs if name and not view.is_constant(name)]
        if not vectors.intersection(data):
            continue
        if vectors.issuperset(data) and _keeps_a_vector(operator, view):
            found.append(operator)
            vectors.update(operator.outputs)
        elif operator.kind in _COMMUTATIVE and not vectors.issuperset(data):
            is_gate = True
    return _Pooled(mean=mean, operators=tuple(found), is_gate=is_gate)


def _keeps_a_vector(operator: Operator, view: GraphView) -> bool:
    """True for an operator of one vector a picture that gives another one, and can be spelled with 2 and 4 axes."""
    x, y = view.tensor(operator.inputs[0]), view.tensor(operator.outputs[0])
    if not _is_vector(y) or y.type != "FLOAT32":
        return False
    if operator.kind in _POINTWISE:
        return True
    if operator.kind in _COMMUTATIVE:
        return all(_is_spread(view.tensor(name), y.shape[-1], view) for name in operator.inputs)
    if operator.kind == "RESHAPE":
        return x.shape[-1] == y.shape[-1]
    if operator.kind in ("CONV_2D", "FULLY_CONNECTED"):
        filters = view.tensor(operator.inputs[1])
        is_plain = filters.num_elements == filters.shape[0] * x.shape[-1] and _is_vector(x)
        return is_plain and filters.type == "FLOAT32" and view.stored(operator.inputs[1]) is not None
    return False


def _is_vector(tensor: Tensor) -> bool:
    return tensor.rank == 2 or (tensor.rank == _RANK and tensor.shape[1:3] == (1, 1))


def _is_spread(operand: Tensor, channels: int, view: GraphView) -> bool:
    """True for a vector a picture, or a plain constant of one number or one a channel."""
    if not view.is_constant(operand.name):
        return _is_vector(operand)
    last = operand.shape[-1] if operand.shape else 1
    return operand.constant is not None and operand.num_elements == last and last in (1, channels)


def _rebuilt(pooled: _Pooled, editor: Editor, view: GraphView) -> Graph:
    """The operators in their new form.

    Every value has its old name and shape still, by a RESHAPE where they differ; the editor drops those that nobody
    reads.
    """
    shaped = _with_four_axes if pooled.is_gate else _with_two_axes
    mean = pooled.mean
    old = editor.tensors[mean.outputs[0]]
    four_axes = _with_four_axes(old.shape)
    if pooled.is_gate and old.shape == four_axes:
        spelled = {old.name: old.name}
    else:
        keeping, source = editor.computed(
            "MEAN", mean.inputs, name=f"{old.name}/pooled", shape=four_axes, type_=old.type, node=mean.node,
            keepDims=True,
        )  # fmt: skip
        made = [keeping]
        if not pooled.is_gate:
            flatten, source = _reshape(source, shaped(old.shape), f"{old.name}/flat", mean.node, editor)
            made.append(flatten)
        spelled = {old.name: source.name}
        editor.replace(mean, *made, _restored(source, old, mean.node, editor))
    for operator in pooled.operators:
        old = editor.tensors[operator.outputs[0]]
        if operator.kind == "RESHAPE":
            source = editor.tensors[spelled[operator.inputs[0]]]
            spelled[old.name] = source.name
            editor.replace(operator, _restored(source, old, operator.node, editor))
            if source.shape == old.shape and not editor.is_output(old.name):
                # Readers among `pooled` get their new input when it is their turn.
                others = [one for one in editor.consumers(old.name) if one not in pooled.operators]
                editor.redirect(old.name, source.name, only=others)
            continue
        before, changed = _spelled(operator, editor, view, is_gate=pooled.is_gate)
        inputs = tuple(spelled.get(name, name) for name in changed.inputs)
        if shaped(old.shape) == old.shape:
            spelled[old.name] = old.name
            editor.replace(operator, *before, replace(changed, inputs=inputs))
            continue
        new = editor.add(replace(old, name=f"{old.name}/vector", shape=shaped(old.shape), layout=None))
        spelled[old.name] = new.name
        restored = _restored(new, old, operator.node, editor)
        editor.replace(operator, *before, replace(changed, inputs=inputs, outputs=(new.name,)), restored)
    return editor.graph()


def _spelled(
    operator: Operator, editor: Editor, view: GraphView, *, is_gate: bool
) -> tuple[tuple[Operator, ...], Operator]:
    """The operator with its constants in the rank of its new form, and what unpacks a weight."""
    if operator.kind in _COMMUTATIVE:
        constants_first = sorted(operator.inputs, key=lambda name: not view.is_constant(name))
        return (), replace(
            operator, inputs=tuple(_spread(name, editor, view, is_gate=is_gate) for name in constants_first)
        )
    wanted = "CONV_2D" if is_gate else "FULLY_CONNECTED"
    if operator.kind not in ("CONV_2D", "FULLY_CONNECTED") or operator.kind == wanted:
        return (), operator
    filters = view.tensor(operator.inputs[1])
    rows, columns = filters.shape[0], filters.shape[-1]
    shape = (rows, 1, 1, columns) if is_gate else (rows, columns)
    unpacking, weight = _reshaped_weight(operator.inputs[1], shape, editor)
    options = {"fusedActivationFunction": operator.option("fusedActivationFunction", "NONE")}
    if is_gate:
        options |= {"padding": "VALID", "strideH": 1, "strideW": 1, "dilationHFactor": 1, "dilationWFactor": 1}
    inputs = (operator.inputs[0], weight, *operator.inputs[2:])
    return unpacking, replace(operator, kind=wanted, inputs=inputs, options=options)


def _spread(name: str, editor: Editor, view: GraphView, *, is_gate: bool) -> str:
    """An operand; a constant one with as many axes as the others."""
    operand = view.tensor(name)
    if operand.constant is None:
        return name
    shape = (1,) * (3 if is_gate else 1) + (operand.num_elements,)
    return editor.add_constant(operand.constant.reshaped(shape), f"{name}/spread").name


def _reshaped_weight(name: str, shape: Shape, editor: Editor) -> tuple[tuple[Operator, ...], str]:
    """A weight in another shape, as a constant, behind the same DEQUANTIZE where it is packed."""
    tensor = editor.tensors[name]
    if tensor.constant is not None:
        # Axis 0 is that of the filters in both shapes, so scales keep their axis.
        return (), editor.add(replace(tensor, shape=shape, constant=tensor.constant.reshaped(shape), layout=None)).name
    unpacking = editor.producer(name)
    if unpacking is None:
        raise ValueError(f"'{name}' is neither constant nor computed")
    before, packed = _reshaped_weight(unpacking.inputs[0], shape, editor)
    made = editor.add(replace(tensor, shape=shape, layout=None))
    return (*before, replace(unpacking, inputs=(packed,), outputs=(made.name,))), made.name


def _restored(source: Tensor, old: Tensor, node: str, editor: Editor) -> Operator:
    """RESHAPE that gives the value its old name and shape."""
    reshape, _ = _reshape(source, old.shape, f"{old.name}/same", node, editor)
    return replace(reshape, outputs=(old.name,))


def _reshape(source: Tensor, shape: Shape, name: str, node: str, editor: Editor) -> tuple[Operator, Tensor]:
    target = editor.add_constant(Constant.of(np.array(shape, np.int32)), f"{name}/shape")
    return editor.computed(
        "RESHAPE", [source.name, target.name], name=name, shape=shape, type_=source.type, node=node, newShape=shape
    )


def _with_four_axes(shape: Shape) -> Shape:
    return (shape[0], 1, 1, shape[-1])


def _with_two_axes(shape: Shape) -> Shape:
    return (shape[0], shape[-1])
