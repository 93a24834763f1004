"""uint8 becomes int8: the same reals with integers and zero points moved by 128.

TFLite's kernels for uint8 are those of its old scheme, with one scale for a weight and a zero point in it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.graph import Constant, Operator, Quantization, Tensor
from onnxprune.targets.tflite.integers.borders import data_positions
from onnxprune.targets.tflite.integers.table import MOVES

__all__ = ["signed_integers"]

_SHIFT = 128


def signed_integers(editor: Editor) -> None:
    """Shift every group of uint8 tensors that only conversions and moving operators touch; name literal fillings."""
    _spread_quantizations(editor)
    for operator in editor.operators:
        if operator.kind == "PAD":
            _fill_literally(editor, operator)
    done: set[str] = set()
    for operator in editor.operators:
        for name in (*operator.inputs, *operator.outputs):
            if name and name not in done and editor.tensors[name].type == "UINT8":
                group = _group(editor, name)
                done |= group
                _shift(editor, group)


def _spread_quantizations(editor: Editor) -> None:
    """Integers that are moved keep their scale: tensors between QUANTIZE and DEQUANTIZE get it, back and forth."""
    moving = [operator for operator in editor.operators if operator.kind in MOVES]
    for ordered in (moving, moving[::-1]):
        for operator in ordered:
            names = [*(operator.inputs[position] for position in data_positions(operator)), *operator.outputs]
            tensors = [editor.tensors[name] for name in names]
            known = {tensor.quantization for tensor in tensors if tensor.quantization is not None}
            if len(known) != 1 or tensors[0].type not in ("INT8", "UINT8", "INT16"):
                continue
            for tensor in tensors:
                if tensor.quantization is None:
                    editor.update(replace(tensor, quantization=next(iter(known))))


def _fill_literally(editor: Editor, operator: Operator) -> None:
    """PAD fills quantized tensors with the zero point; one that was emitted on integers means the integer 0."""
    output = editor.tensors[operator.outputs[0]]
    if output.quantization is None or output.quantization.zero_points == (0,) or output.type not in ("INT8", "UINT8"):
        return
    value = editor.add_constant(Constant.of(np.zeros((), np.dtype(output.type.lower()))), f"{output.name}_filling")
    editor.update(replace(value, quantization=output.quantization))
    editor.replace(operator, replace(operator, kind="PADV2", inputs=(*operator.inputs, value.name), options={}))


def _group(editor: Editor, start: str) -> set[str]:
    """All uint8 tensors that moving operators connect with `start`."""
    found, waiting = {start}, [start]
    while waiting:
        name = waiting.pop()
        producer = editor.producer(name)
        for operator in (*editor.consumers(name), *((producer,) if producer is not None else ())):
            if operator.kind not in MOVES:
                continue
            names = (*(operator.inputs[position] for position in data_positions(operator)), *operator.outputs)
            for other in names:
                if other not in found and editor.tensors[other].type == "UINT8":
                    found.add(other)
                    waiting.append(other)
    return found


def _shift(editor: Editor, group: set[str]) -> None:
    if not all(_can_shift(editor, name) for name in group):
        return
    for name in sorted(group):
        tensor = editor.tensors[name]
        assert tensor.quantization is not None  # noqa: S101 - `_can_shift`
        moved = replace(tensor, type="INT8", quantization=_moved(tensor.quantization))
        if name in editor.inputs:
            _convert_input(editor, tensor, moved)
        else:
            constant = None if tensor.constant is None else _moved_constant(tensor.constant)
            editor.update(replace(moved, constant=constant))


def _can_shift(editor: Editor, name: str) -> bool:
    """It has one scale, stays inside of the graph, and none but conversions and moving operators touch it."""
    tensor, producer = editor.tensors[name], editor.producer(name)
    if tensor.quantization is None or tensor.quantization.is_per_axis or editor.is_output(name):
        return False
    touching = (*editor.consumers(name), *((producer,) if producer is not None else ()))
    return all(operator.kind in MOVES or operator.kind in ("QUANTIZE", "DEQUANTIZE") for operator in touching)


def _convert_input(editor: Editor, tensor: Tensor, moved: Tensor) -> None:
    """The model is fed uint8: a QUANTIZE makes int8 of it."""
    readers = editor.consumers(tensor.name)
    made = editor.add(replace(moved, name=f"{tensor.name}_signed"))
    first = next(operator for operator in editor.operators if operator in readers)
    quantize = Operator(kind="QUANTIZE", inputs=(tensor.name,), outputs=(made.name,), node=tensor.name)
    editor.insert_before(first, quantize)
    editor.redirect(tensor.name, made.name, only=[one for one in editor.consumers(tensor.name) if one is not quantize])


def _moved(quantization: Quantization) -> Quantization:
    return replace(quantization, zero_points=tuple(point - _SHIFT for point in quantization.zero_points))


def _moved_constant(constant: Constant) -> Constant:
    return Constant(
        constant.shape,
        np.dtype(np.int8),
        lambda: (constant.array().astype(np.int16) - _SHIFT).astype(np.int8),
    )
