"""Where numbers become integers and integers numbers: conversions meet, and move to where they cost least.

Nothing here changes a result, but for DEQUANTIZE -> QUANTIZE with other scales, which becomes one rounding in fixed
point.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.graph import NUMPY_TYPES, Operator, Quantization, Tensor, TensorType
from onnxprune.targets.tflite.integers.constants import exact_integers, quantized_constant
from onnxprune.targets.tflite.integers.table import MONOTONE, MOVES

__all__ = [
    "INTEGER_TYPES",
    "data_positions",
    "hoist_quantize",
    "integers_behind",
    "join_conversions",
    "merge_conversions",
    "sink_dequantize",
]

INTEGER_TYPES: frozenset[TensorType] = frozenset(("INT8", "INT16"))

# Made by neither a QUANTIZE of its own nor a DEQUANTIZE for each output.
_SEVERAL_OUTPUTS = frozenset(("SPLIT", "SPLIT_V", "UNPACK"))
_ACTIVATION = "fusedActivationFunction"


def integers_behind(editor: Editor, name: str) -> Tensor | None:
    """The integers that a DEQUANTIZE makes the tensor of, where they have one scale."""
    producer = editor.producer(name)
    if producer is None or producer.kind != "DEQUANTIZE":
        return None
    tensor = editor.tensors[producer.inputs[0]]
    if tensor.type not in INTEGER_TYPES or tensor.quantization is None or tensor.quantization.is_per_axis:
        return None
    return tensor


def data_positions(operator: Operator) -> tuple[int, ...]:
    """Inputs of an operator in `MOVES` that carry what it moves."""
    positions = MOVES[operator.kind]
    return tuple(range(len(operator.inputs))) if positions is None else positions


def merge_conversions(editor: Editor) -> None:
    """Convert each tensor once to each quantization."""
    known: dict[tuple[object, ...], str] = {}
    for operator in editor.operators:
        if operator.kind not in ("QUANTIZE", "DEQUANTIZE"):
            continue
        output = editor.tensors[operator.outputs[0]]
        key = (operator.kind, operator.inputs[0], output.type, output.quantization)
        first = known.setdefault(key, output.name)
        if first != output.name and not editor.is_output(output.name):
            editor.redirect(output.name, first)
            editor.replace(operator)


def join_conversions(editor: Editor) -> None:
    """DEQUANTIZE -> QUANTIZE: nothing where the scales agree, else a QUANTIZE from integers to integers."""
    for operator in editor.operators:
        if operator.kind != "QUANTIZE":
            continue
        before = integers_behind(editor, operator.inputs[0])
        after = editor.tensors[operator.outputs[0]]
        if before is None or after.type not in INTEGER_TYPES:
            continue
        if (before.type, before.quantization) == (after.type, after.quantization) and not editor.is_output(after.name):
            editor.redirect(after.name, before.name)
            editor.replace(operator)
        else:
            editor.replace(operator, replace(operator, inputs=(before.name,)))


def _dequantized(integers: Tensor, real: Tensor, node: str) -> Operator:
    """DEQUANTIZE of `integers` into the tensor `real`, which is known already."""
    return Operator(kind="DEQUANTIZE", inputs=(integers.name,), outputs=(real.name,), node=node)


# --- DEQUANTIZE goes down ---------------------------------------------------------------------------------------


def sink_dequantize(editor: Editor) -> None:
    """Let operators that only move numbers move the integers."""
    for operator in editor.operators:
        if operator.kind in MOVES and operator.option(_ACTIVATION, "NONE") in ("NONE", "RELU"):
            _sink(editor, operator)


def _sink(editor: Editor, operator: Operator) -> None:
    positions = data_positions(operator)
    found = {position: integers_behind(editor, operator.inputs[position]) for position in positions}
    first = next((tensor for tensor in found.values() if tensor is not None), None)
    form = _form_of_constants(editor, operator) if first is None else _form(first)
    if form is None:
        return
    type_, quantization = form
    inputs = list(operator.inputs)
    for position, tensor in found.items():
        given = editor.tensors[operator.inputs[position]]
        if tensor is not None and (tensor.type, tensor.quantization) == (type_, quantization):
            inputs[position] = tensor.name
        elif given.constant is not None and (
            exact_integers(given, type_, quantization) or _pads_below(editor, operator, given, quantization, type_)
        ):
            inputs[position] = quantized_constant(editor, given, type_, quantization).name
        else:
            return
    outputs: list[str] = []
    behind: list[Operator] = []
    for name in operator.outputs:
        real = editor.tensors[name]
        if real.type != "FLOAT32":
            return
        integers = editor.add(replace(real, name=f"{name}_quantized", type=type_, quantization=quantization))
        outputs.append(integers.name)
        behind.append(_dequantized(integers, real, operator.node))
    moved = replace(operator, inputs=tuple(inputs), outputs=tuple(outputs))
    editor.replace(operator, _as_plain_padding(editor, moved, quantization), *behind)


def _form(tensor: Tensor) -> tuple[TensorType, Quantization] | None:
    return None if tensor.quantization is None else (tensor.type, tensor.quantization)


def _form_of_constants(editor: Editor, operator: Operator) -> tuple[TensorType, Quantization] | None:
    """What a table of quantized constants is stored as (GATHER: an embedding)."""
    if operator.kind != "GATHER":
        return None
    constant = editor.tensors[operator.inputs[0]].constant
    if constant is None or constant.grid is None or constant.grid.quantization.is_per_axis:
        return None
    return (constant.grid.type, constant.grid.quantization) if constant.grid.type in INTEGER_TYPES else None


def _pads_below(
    editor: Editor, operator: Operator, value: Tensor, quantization: Quantization, type_: TensorType
) -> bool:
    """Padding with what is below all integers, for a MAX_POOL_2D, which never chooses it: the smallest integer does."""
    if operator.kind != "PADV2" or value.name != operator.inputs[2]:
        return False
    array = value.array()
    smallest = (int(np.iinfo(NUMPY_TYPES[type_]).min) - quantization.zero_points[0]) * quantization.scales[0]
    readers = editor.consumers(operator.outputs[0])
    return (
        array is not None
        and bool((array <= smallest).all())
        and bool(readers)
        and all(reader.kind == "MAX_POOL_2D" for reader in readers)
    )


def _as_plain_padding(editor: Editor, operator: Operator, quantization: Quantization) -> Operator:
    """PADV2 with the zero point as PAD, which XNNPACK takes and PADV2 it does not."""
    if operator.kind != "PADV2":
        return operator
    array = editor.tensors[operator.inputs[2]].array()
    if array is None or not (array == quantization.zero_points[0]).all():
        return operator
    return replace(operator, kind="PAD", inputs=operator.inputs[:2])


# --- QUANTIZE goes up -------------------------------------------------------------------------------------------


def hoist_quantize(editor: Editor) -> None:
    """Round before numbers are moved or clipped, where the result is read as integers only."""
    waiting = [operator for operator in editor.operators if operator.kind == "QUANTIZE"]
    while waiting:
        waiting.extend(_hoist(editor, waiting.pop()))


def _hoist(editor: Editor, quantize: Operator) -> list[Operator]:
    """The QUANTIZE operators that now stand above; none: it can't be moved."""
    real, integers = quantize.inputs[0], editor.tensors[quantize.outputs[0]]
    operator = editor.producer(real)
    quantization = integers.quantization
    if operator is None or editor.only_reader(real) is not quantize or quantization is None:
        return []
    if integers.type not in INTEGER_TYPES or operator.kind in _SEVERAL_OUTPUTS:
        return []
    if operator.kind in MOVES:
        positions = data_positions(operator)
        if operator.kind in ("CONCATENATION", "PACK") and operator.option(_ACTIVATION, "NONE") != "NONE":
            return []
    elif operator.kind in MONOTONE:
        positions = MONOTONE[operator.kind]
        if len(positions) == 1 and integers_behind(editor, operator.inputs[0]) is not None:
            return []  # it has an integer kernel that rescales
    else:
        return []
    if any(editor.tensors[operator.inputs[position]].type != "FLOAT32" for position in positions):
        return []
    inputs, above = list(operator.inputs), []
    for position in positions:
        given = editor.tensors[operator.inputs[position]]
        if given.constant is not None:
            inputs[position] = quantized_constant(editor, given, integers.type, quantization).name
            continue
        made = editor.add(replace(given, name=f"{given.name}_quantized", type=integers.type, quantization=quantization))
        inputs[position] = made.name
        above.append(Operator(kind="QUANTIZE", inputs=(given.name,), outputs=(made.name,), node=quantize.node))
    moved = _as_plain_padding(editor, replace(operator, inputs=tuple(inputs), outputs=(integers.name,)), quantization)
    editor.replace(quantize)
    editor.replace(operator, *above, moved)
    _drop_where_saturation_does_it(editor, moved)
    return above


def _drop_where_saturation_does_it(editor: Editor, operator: Operator) -> None:
    """An operator that clips to what integers can't leave anyway goes."""
    name = operator.outputs[0]
    quantization, type_ = editor.tensors[name].quantization, editor.tensors[name].type
    if operator.kind not in MONOTONE or quantization is None or editor.is_output(name):
        return
    limits = np.iinfo(NUMPY_TYPES[type_])
    if operator.kind in ("MAXIMUM", "MINIMUM"):
        kept = _kept_operand(editor, operator, limits)
    else:
        low, high = {"RELU": (0.0, np.inf), "RELU6": (0.0, 6.0), "RELU_0_TO_1": (0.0, 1.0)}.get(
            operator.kind, (-1.0, 1.0)
        )
        scale, zero_point = quantization.scales[0], quantization.zero_points[0]
        is_free = np.rint(low / scale) + zero_point <= limits.min and np.rint(high / scale) + zero_point >= limits.max
        kept = operator.inputs[0] if is_free else None
    if kept is not None:
        editor.redirect(name, kept)
        editor.replace(operator)


def _kept_operand(editor: Editor, operator: Operator, limits: np.iinfo[np.signedinteger]) -> str | None:
    """The operand that MAXIMUM or MINIMUM always chooses, because the other one is the limit of the integers."""
    for bound, other in (operator.inputs, operator.inputs[::-1]):
        array = editor.tensors[bound].array()
        if array is None or editor.tensors[other].shape != editor.tensors[operator.outputs[0]].shape:
            continue
        if bool((array == (limits.min if operator.kind == "MAXIMUM" else limits.max)).all()):
            return other
    return None
