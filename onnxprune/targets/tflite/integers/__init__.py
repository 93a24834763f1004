"""Stage 4: float operators between DEQUANTIZE and QUANTIZE become integer operators.

1. uint8 becomes int8 (`signed.py`).
2. DEQUANTIZE goes down and QUANTIZE up through what only moves or clips numbers (`borders.py`).
3. An operator whose activations come out of DEQUANTIZE, and whose result goes into one QUANTIZE, computes in
   integers where LiteRT has a kernel (`table.py`); a QUANTIZE from integers to integers meets its wishes
   about scales.
4. DEQUANTIZE -> QUANTIZE that are left become one QUANTIZE, or nothing.
5. Inputs and outputs become integers, if that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.graph import (
    Constant,
    Graph,
    Grid,
    Operator,
    OptionValue,
    Quantization,
    Tensor,
    TensorType,
)
from onnxprune.targets.tflite.integers.borders import (
    INTEGER_TYPES,
    hoist_quantize,
    integers_behind,
    join_conversions,
    merge_conversions,
    sink_dequantize,
)
from onnxprune.targets.tflite.integers.chains import prepare_chains
from onnxprune.targets.tflite.integers.constants import (
    bias_integers,
    exact_scalar,
    quantized_constant,
    weight_form,
)
from onnxprune.targets.tflite.integers.signed import signed_integers
from onnxprune.targets.tflite.integers.table import ARITHMETIC, IntegerKind

__all__ = ["Integerized", "integerize"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Integerized:
    """The graph; why what could have been integer is not; and results of a fixed scale that is not the planned one.

    `float_reasons` maps outputs of operators to kind and reason, `fixed_scales` those of operators to their kind.
    """

    graph: Graph
    float_reasons: Mapping[str, tuple[str, str]]
    fixed_scales: Mapping[str, str]


def integerize(graph: Graph, *, float_io: bool) -> Integerized:
    """The graph with integer operators.

    Args:
        graph: With QUANTIZE and DEQUANTIZE around float operators.
        float_io: Inputs and outputs stay float; else those that are quantized at once become integers.
    """
    editor = Editor(graph)
    signed_integers(editor)
    merge_conversions(editor)
    sink_dequantize(editor)
    merge_conversions(editor)
    hoist_quantize(editor)
    merge_conversions(editor)
    prepare_chains(editor)
    reasons: dict[str, tuple[str, str]] = {}
    for operator in editor.operators:
        reason = _compute(editor, operator)
        if reason is not None:
            reasons[operator.outputs[0]] = (operator.kind, reason)
    join_conversions(editor)
    merge_conversions(editor)
    if not float_io:
        _integer_inputs(editor)
        _integer_outputs(editor)
    made = editor.graph()
    readers = made.consumers()
    computed = {name for operator in made.operators for name in operator.outputs}
    return Integerized(
        graph=made,
        float_reasons={name: why for name, why in reasons.items() if name in computed},
        fixed_scales={
            operator.outputs[0]: operator.kind
            for operator in made.operators
            if operator.kind in ARITHMETIC
            and ARITHMETIC[operator.kind].fixed
            and made.tensors[operator.outputs[0]].type in INTEGER_TYPES
            and any(reader.kind == "QUANTIZE" for reader in readers.get(operator.outputs[0], ()))
        },
    )


# --- one operator -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operands:
    """Everything that the integer operator needs. `data` maps positions to integer tensors or constants to round."""

    data: Mapping[int, Tensor]
    weight: Quantization | None
    bias: Constant | None
    bias_form: Quantization | None


def _compute(editor: Editor, operator: Operator) -> str | None:
    """Make the operator an integer one, or say why it stays float; None as well for those that have no part in it."""
    if len(operator.outputs) != 1 or editor.tensors[operator.outputs[0]].type != "FLOAT32":
        return None
    if operator.kind in ("DEQUANTIZE", "CAST"):
        return None
    quantize = editor.only_reader(operator.outputs[0])
    has_integers = any(name and integers_behind(editor, name) is not None for name in operator.inputs)
    if quantize is None or quantize.kind != "QUANTIZE":
        return "its result is read as float" if has_integers else None
    wanted = editor.tensors[quantize.outputs[0]]
    kind = ARITHMETIC.get("MUL" if operator.kind == "DIV" else operator.kind)
    if kind is None or wanted.type not in kind.types:
        return f"LiteRT has no {operator.kind} of {wanted.type}"
    if wanted.quantization is None or wanted.quantization.is_per_axis:
        return "its result has a scale for each channel"
    operator = _multiplied(editor, operator)
    if operator.kind == "DIV":
        # The kernel of int8 ends the run at the first divisor that is rounded to zero.
        return "LiteRT divides integers by constants only, none of them zero"
    operands = _operands(editor, operator, kind, wanted.type)
    if isinstance(operands, str):
        return operands
    _rewrite(editor, operator, quantize, kind, operands)
    return None


def _multiplied(editor: Editor, operator: Operator) -> Operator:
    """A division by constants as MUL by their reciprocals."""
    divisor = editor.tensors[operator.inputs[1]] if operator.kind == "DIV" else None
    array = None if divisor is None else divisor.array()
    if divisor is None or array is None or not array.all():
        return operator
    reciprocals = (1 / array.astype(np.float64)).astype(np.float32)
    largest = float(np.float32(np.abs(reciprocals).max(initial=0) / np.iinfo(np.int8).max)) or 1.0
    grid = Grid(type="INT8", quantization=Quantization(scales=(largest,), zero_points=(0,)))
    # Equal divisors are exact as they are (`exact_scalar`); others are rounded to 8 bits.
    is_uniform = array.size == 0 or array.min() == array.max()
    constant = replace(Constant.of(reciprocals), grid=None if is_uniform else grid)
    factor = editor.add_constant(constant, f"{divisor.name}_reciprocal")
    multiplied = replace(operator, kind="MUL", inputs=(operator.inputs[0], factor.name))
    editor.replace(operator, multiplied)
    return multiplied


def _operands(editor: Editor, operator: Operator, kind: IntegerKind, type_: TensorType) -> _Operands | str:
    data: dict[int, Tensor] = {}
    for position in kind.data:
        found = _data(editor, operator.inputs[position], type_)
        if isinstance(found, str):
            return found
        data[position] = found
    if all(tensor.constant is not None for tensor in data.values()):
        return "it computes with constants only"
    if kind.weight is None:
        return _Operands(data=data, weight=None, bias=None, bias_form=None)
    form = weight_form(editor.tensors[operator.inputs[kind.weight]], kind.weight_axis)
    if isinstance(form, str):
        return form
    name = _input(operator, kind.bias)
    if not name:
        return _Operands(data=data, weight=form, bias=None, bias_form=None)
    source = data[kind.data[0]].quantization
    assert source is not None  # noqa: S101 - `_data` gives quantized tensors
    bias = bias_integers(editor.tensors[name], source.scales[0], form, "INT64" if type_ == "INT16" else "INT32")
    if bias is None:
        return "its bias is computed when the model runs, or too large for the scale input * weight"
    return _Operands(data=data, weight=form, bias=Constant.of(bias[0]), bias_form=bias[1])


def _input(operator: Operator, position: int | None) -> str:
    return "" if position is None or position >= len(operator.inputs) else operator.inputs[position]


def _data(editor: Editor, name: str, type_: TensorType) -> Tensor | str:
    """The integers of an activation; for a constant the float tensor, with the quantization that it is to have."""
    integers = integers_behind(editor, name)
    if integers is not None:
        return integers if integers.type == type_ else f"an operand is {integers.type}, its result {type_}"
    tensor = editor.tensors[name]
    if tensor.constant is None:
        return "an operand is float"
    grid = tensor.constant.grid
    grid = grid if grid is not None and grid.type in ("INT8", "UINT8", "INT16") else None
    form = exact_scalar(tensor, type_) if grid is None or grid.quantization.is_per_axis else grid.quantization
    if form is None:
        return f"its constant '{name}' is not quantized"
    if grid is not None and grid.type == "UINT8" and type_ == "INT8":
        form = replace(form, zero_points=tuple(point - 128 for point in form.zero_points))
    return replace(tensor, quantization=form)


def _rewrite(editor: Editor, operator: Operator, quantize: Operator, kind: IntegerKind, operands: _Operands) -> None:
    """Put the integer operator in place, with a QUANTIZE before or behind where scales must be others."""
    wanted = editor.tensors[quantize.outputs[0]]
    type_ = wanted.type
    first = operands.data[kind.data[0]]
    form = kind.fixed.get(type_) or (first.quantization if kind.scale == "of the input" else wanted.quantization)
    inputs, before = list(operator.inputs), []
    for position, tensor in operands.data.items():
        own = form if kind.equal_scales else tensor.quantization
        assert own is not None  # noqa: S101
        if tensor.constant is not None:
            inputs[position] = quantized_constant(editor, tensor, type_, own).name
        elif tensor.quantization == own:
            inputs[position] = tensor.name
        else:
            made = editor.add(replace(tensor, name=f"{tensor.name}_requantized", quantization=own))
            before.append(Operator(kind="QUANTIZE", inputs=(tensor.name,), outputs=(made.name,), node=operator.node))
            inputs[position] = made.name
    if kind.weight is not None and operands.weight is not None:
        weight = editor.tensors[operator.inputs[kind.weight]]
        inputs[kind.weight] = quantized_constant(editor, weight, "INT8", operands.weight).name
    if kind.bias is not None and operands.bias is not None:
        bias = editor.add_constant(operands.bias, f"{operator.inputs[kind.bias]}_quantized")
        editor.update(replace(bias, quantization=operands.bias_form))
        inputs[kind.bias] = bias.name
    made_op = replace(operator, inputs=tuple(inputs), options=_options(operator, type_))
    if form == wanted.quantization:
        editor.replace(quantize)
        editor.replace(operator, *before, replace(made_op, outputs=(wanted.name,)))
        return
    raw = editor.add(replace(wanted, name=f"{wanted.name}_raw", quantization=form))
    editor.replace(operator, *before, replace(made_op, outputs=(raw.name,)))
    editor.replace(quantize, replace(quantize, inputs=(raw.name,)))


def _options(operator: Operator, type_: TensorType) -> Mapping[str, OptionValue]:
    if type_ == "INT16" and operator.kind in ("ADD", "SUB"):
        # Else the kernel wants scales that are powers of two.
        return {**operator.options, "potScaleInt16": False}
    return operator.options


# --- inputs and outputs -----------------------------------------------------------------------------------------


def _integer_inputs(editor: Editor) -> None:
    for name in editor.inputs:
        tensor = editor.tensors[name]
        quantize = editor.only_reader(name)
        if tensor.type != "FLOAT32" or quantize is None or quantize.kind != "QUANTIZE":
            continue
        integers = editor.tensors[quantize.outputs[0]]
        if integers.type not in INTEGER_TYPES or editor.is_output(integers.name):
            continue
        editor.update(replace(tensor, type=integers.type, quantization=integers.quantization))
        editor.redirect(integers.name, name)
        editor.replace(quantize)


def _integer_outputs(editor: Editor) -> None:
    for name in editor.outputs:
        integers = integers_behind(editor, name)
        dequantize = editor.producer(name)
        if integers is None or dequantize is None or editor.producer(integers.name) is None:
            continue
        if editor.is_output(integers.name):
            continue
        readers = editor.consumers(name)
        if readers:
            real = editor.add(replace(editor.tensors[name], name=f"{name}_dequantized"))
            editor.replace(dequantize, replace(dequantize, outputs=(real.name,)))
            editor.redirect(name, real.name, only=readers)
        editor.redirect(name, integers.name)
