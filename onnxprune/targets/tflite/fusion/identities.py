"""Operators that change nothing, chains of reshapes, and transposed operands of matrix products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.fusion.rule import Rule, bypassed, has_activation, remove_unread, small_array
from onnxprune.targets.tflite.graph import Constant, Operator

__all__ = ["RESHAPE_RULES", "RULES"]

_NEUTRAL = {"ADD": 0, "SUB": 0, "MUL": 1, "DIV": 1}
_RESHAPES = ("RESHAPE", "EXPAND_DIMS", "SQUEEZE")


def _drop_reshape(editor: Editor, operator: Operator) -> bool:
    """RESHAPE to the shape that the tensor has."""
    before, after = (editor.tensors[name] for name in (operator.inputs[0], operator.outputs[0]))
    if before.shape != after.shape or before.type != after.type or before.quantization != after.quantization:
        return False
    if before.shape.count(-1) > 1 and not _is_own_shape(editor, operator):
        return False
    return bypassed(editor, operator)


def _is_own_shape(editor: Editor, operator: Operator) -> bool:
    """True for RESHAPE(x, SHAPE(x))."""
    shape = editor.producer(operator.inputs[1])
    return shape is not None and shape.kind == "SHAPE" and shape.inputs[0] == operator.inputs[0]


def _drop_cast(editor: Editor, operator: Operator) -> bool:
    """CAST to the element type that the tensor has."""
    before, after = (editor.tensors[name] for name in (operator.inputs[0], operator.outputs[0]))
    return before.type == after.type and bypassed(editor, operator)


def _drop_pad(editor: Editor, operator: Operator) -> bool:
    """Padding by nothing."""
    rows = small_array(editor.tensors[operator.inputs[1]])
    return rows is not None and not rows.any() and bypassed(editor, operator)


def _drop_neutral(editor: Editor, operator: Operator) -> bool:
    """Adding or subtracting 0, multiplying with 1 or dividing by it."""
    if has_activation(operator):
        return False
    output = editor.tensors[operator.outputs[0]]
    for position in (1, 0) if operator.kind in ("ADD", "MUL") else (1,):
        numbers = small_array(editor.tensors[operator.inputs[position]])
        other = operator.inputs[1 - position]
        if numbers is None or not (numbers == _NEUTRAL[operator.kind]).all():
            continue
        if editor.tensors[other].shape == output.shape and output.shape.count(-1) <= 1:
            swapped = replace(operator, inputs=(other, operator.inputs[position]))
            editor.replace(operator, swapped)
            return bypassed(editor, swapped)
    return False


def _merge_reshapes(editor: Editor, operator: Operator) -> bool:
    """RESHAPE(RESHAPE(x)) -> RESHAPE(x); axes of length 1 that come or go count as such."""
    first = editor.producer(operator.inputs[0])
    output = editor.tensors[operator.outputs[0]]
    if first is None or first.kind not in _RESHAPES or output.shape.count(-1) > 1:
        return False
    if operator.kind == "RESHAPE" and editor.tensors[operator.inputs[1]].constant is None:
        return False
    shape = editor.add_constant(Constant.of(np.array(output.shape, np.int32)), f"{output.name}/shape")
    merged = replace(operator, kind="RESHAPE", inputs=(first.inputs[0], shape.name), options={"newShape": output.shape})
    editor.replace(operator, merged)
    remove_unread(editor, first)
    return True


def _swap_in_product(editor: Editor, operator: Operator) -> bool:
    """BATCH_MATMUL(a, TRANSPOSE(b)) of b's last two axes -> adjY, which costs nothing."""
    transpose = editor.producer(operator.inputs[1])
    if transpose is None or transpose.kind != "TRANSPOSE" or editor.only_reader(transpose.outputs[0]) is not operator:
        return False
    order = small_array(editor.tensors[transpose.inputs[1]])
    if order is None:
        return False
    rank = len(order)
    if tuple(order) != (*range(rank - 2), rank - 1, rank - 2):
        return False
    swapped = replace(operator, inputs=(operator.inputs[0], transpose.inputs[0]))
    editor.replace(operator, swapped.with_options(adjY=not operator.option("adjY", default=False)))
    editor.replace(transpose)
    return True


RESHAPE_RULES: Mapping[str, Sequence[Rule]] = {
    "RESHAPE": (_drop_reshape, _merge_reshapes),
    "EXPAND_DIMS": (_merge_reshapes,),
    "SQUEEZE": (_merge_reshapes,),
}

RULES: Mapping[str, Sequence[Rule]] = {
    **RESHAPE_RULES,
    "CAST": (_drop_cast,),
    **dict.fromkeys(("PAD", "PADV2", "MIRROR_PAD"), (_drop_pad,)),
    **dict.fromkeys(_NEUTRAL, (_drop_neutral,)),
    "BATCH_MATMUL": (_swap_in_product,),
}
