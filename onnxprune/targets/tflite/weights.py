"""Weights in fewer bits than the activations: float16, or int8 with activations that are quantized in each run.

What stands in the graph already in a narrower form (`Constant.grid`) keeps that form, without a further rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.ops.affine import symmetric_scales
from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.graph import Constant, Graph, Operator, Quantization, Tensor
from onnxprune.targets.tflite.integers.constants import quantized_constant, weight_form

__all__ = ["SMALLEST_STORED", "WeightsResult", "store_narrow", "weights_as_half", "weights_as_integers"]

SMALLEST_STORED = 1024
"""Elements from which on it pays to store a constant in fewer bits (what TensorFlow's converter takes)."""

_LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsResult:
    """The graph, and constants of some size that stay float32: name -> reason."""

    graph: Graph
    kept_float: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weight:
    """Where an operator has its weight and its data. `axis`: whose indices may have scales of their own."""

    weight: int = 1
    data: int = 0
    axis: int | None = 0
    is_hybrid: bool = True
    """A kernel multiplies float activations by int8, and quantizes them in each run; else the weight is float again
    when the file is loaded."""
    has_asymmetric_option: bool = False


# XNNPACK takes these; a DEPTHWISE_CONV_2D of that kind it leaves to LiteRT's own kernels, and the float one it takes.
_WEIGHTS: Mapping[str, _Weight] = {
    "CONV_2D": _Weight(),
    "TRANSPOSE_CONV": _Weight(data=2),
    "FULLY_CONNECTED": _Weight(has_asymmetric_option=True),
    "BATCH_MATMUL": _Weight(axis=None, has_asymmetric_option=True),
    "DEPTHWISE_CONV_2D": _Weight(axis=3, is_hybrid=False),
}


def weights_as_half(graph: Graph) -> WeightsResult:
    """Float32 constants of some size are stored as float16, behind a DEQUANTIZE that runs once.

    Constants with numbers beyond float16 stay float32.
    """
    editor, narrowed = Editor(graph), _Narrowed()
    kept: dict[str, str] = {}
    for operator in editor.operators:
        reader = operator
        for position in _large_constants(editor, operator):
            reader = narrowed.put(editor, reader, position, lambda found: _half(editor, found, kept))
    return WeightsResult(graph=editor.graph(), kept_float=kept)


def weights_as_integers(graph: Graph) -> WeightsResult:
    """Weights of some size are int8, and multiplied as such where LiteRT can (`_WEIGHTS`).

    Scales are those that a weight has, else symmetric ones from its numbers: one for each channel where the kernel
    takes that, one for each row of a table.
    """
    editor, made = Editor(graph), _Integers()
    kept: dict[str, str] = {}
    for operator in editor.operators:
        if operator.kind == "GATHER":
            _gather_integers(editor, operator)
            continue
        row = _WEIGHTS.get(operator.kind)
        weight = editor.tensors[operator.inputs[row.weight]] if row is not None else None
        if row is None or weight is None or not _is_large(weight):
            continue
        if editor.tensors[operator.inputs[row.data]].type != "FLOAT32":
            continue
        form = _integer_form(weight, row.axis)
        if isinstance(form, str):
            kept[weight.name] = form
        elif row.is_hybrid:
            hybrid = _with_input(operator, row.weight, made.of(editor, weight, form).name)
            editor.replace(
                operator, hybrid.with_options(asymmetricQuantizeInputs=True) if row.has_asymmetric_option else hybrid
            )
        else:
            made.put(editor, operator, row.weight, form)
    return WeightsResult(graph=editor.graph(), kept_float=kept)


def _gather_integers(editor: Editor, operator: Operator) -> None:
    """Rows of a float table -> rows of an int8 table, times the scale of each row.

    table (rows, ...), scales (rows, 1, ...): both are picked from by the same indices.
    """
    table = editor.tensors[operator.inputs[0]]
    output = editor.tensors[operator.outputs[0]]
    has_other_axis = operator.option("axis", 0) != 0 or operator.option("batchDims", 0) != 0
    if has_other_axis or table.constant is None or table.constant.grid is not None or not _is_large(table):
        return
    form = _integer_form(table, 0)
    if isinstance(form, str) or table.rank < 2:
        return
    # Plain integers: with a scale for each row GATHER would refuse them.
    integers = replace(quantized_constant(editor, table, "INT8", form), quantization=None)
    editor.update(integers)
    shape = (table.shape[0], *(1,) * (table.rank - 1))
    scales = editor.add_constant(Constant.of(np.array(form.scales, np.float32).reshape(shape)), f"{table.name}_scales")
    picked_rank = output.rank - table.rank + 1
    picked_shape = (*output.shape[:picked_rank], *shape[1:])
    picked = editor.add(replace(output, name=f"{output.name}_integers", type="INT8"))
    numbers = editor.add(replace(output, name=f"{output.name}_numbers"))
    scale = editor.add(replace(output, name=f"{output.name}_scale", shape=picked_shape))
    indices, node = operator.inputs[1], operator.node
    editor.replace(
        operator,
        replace(operator, inputs=(integers.name, indices), outputs=(picked.name,)),
        Operator(
            kind="CAST",
            inputs=(picked.name,),
            outputs=(numbers.name,),
            options={"inDataType": "INT8", "outDataType": "FLOAT32"},
            node=node,
        ),
        replace(operator, inputs=(scales.name, indices), outputs=(scale.name,)),
        Operator(kind="MUL", inputs=(numbers.name, scale.name), outputs=operator.outputs, node=node),
    )


def store_narrow(graph: Graph) -> Graph:
    """Constants of some size that have a narrower form are stored in it, behind DEQUANTIZE."""
    editor, narrowed = Editor(graph), _Narrowed()
    for operator in editor.operators:
        reader = operator
        for position in _large_constants(editor, operator):
            reader = narrowed.put(editor, reader, position, lambda found: _narrow(editor, found))
    return editor.graph()


def _is_large(tensor: Tensor) -> bool:
    return tensor.constant is not None and tensor.type == "FLOAT32" and tensor.num_elements >= SMALLEST_STORED


def _large_constants(editor: Editor, operator: Operator) -> list[int]:
    """Positions of inputs that are float constants of some size."""
    return [position for position, name in enumerate(operator.inputs) if name and _is_large(editor.tensors[name])]


def _with_input(operator: Operator, position: int, name: str) -> Operator:
    return replace(operator, inputs=(*operator.inputs[:position], name, *operator.inputs[position + 1 :]))


class _Narrowed:
    """Constants that are stored behind DEQUANTIZE: each once, whoever reads it."""

    def __init__(self) -> None:
        self._real_of: dict[str, str] = {}

    def put(
        self, editor: Editor, operator: Operator, position: int, narrow: Callable[[Tensor], Tensor | None]
    ) -> Operator:
        """`operator`, whose input now comes out of a DEQUANTIZE of what `narrow` gives; itself where that is None."""
        name = operator.inputs[position]
        if name not in self._real_of:
            tensor = editor.tensors[name]
            stored = narrow(tensor)
            if stored is None:
                return operator
            real = editor.add(replace(tensor, name=f"{name}_dequantized", constant=None))
            made = Operator(kind="DEQUANTIZE", inputs=(stored.name,), outputs=(real.name,), node=operator.node)
            editor.insert_before(operator, made)
            self._real_of[name] = real.name
        made = _with_input(operator, position, self._real_of[name])
        editor.replace(operator, made)
        return made


class _Integers:
    """int8 forms of weights: each once, whoever reads it."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Quantization], Tensor] = {}
        self._narrowed = _Narrowed()

    def of(self, editor: Editor, weight: Tensor, form: Quantization) -> Tensor:
        key = (weight.name, form)
        if key not in self._known:
            self._known[key] = quantized_constant(editor, weight, "INT8", form)
        return self._known[key]

    def put(self, editor: Editor, operator: Operator, position: int, form: Quantization) -> None:
        self._narrowed.put(editor, operator, position, lambda weight: self.of(editor, weight, form))


def _half(editor: Editor, tensor: Tensor, kept: dict[str, str]) -> Tensor | None:
    assert tensor.constant is not None  # noqa: S101 - callers pass constants
    narrow = _narrow(editor, tensor)
    if narrow is not None:
        return narrow
    largest = _largest_magnitude(tensor.constant.array())
    if largest > _LARGEST_HALF:
        kept[tensor.name] = f"its numbers go up to {largest:g}, and float16 ends at {_LARGEST_HALF:g}"
        return None
    return _as_half(editor, tensor)


def _largest_magnitude(array: npt.NDArray[Any]) -> float:
    """Of the finite numbers: infinities have a float16."""
    finite = array[np.isfinite(array)]
    return float(max(-finite.min(initial=0), finite.max(initial=0)))


def _as_half(editor: Editor, tensor: Tensor) -> Tensor:
    assert tensor.constant is not None  # noqa: S101 - callers pass constants
    return editor.add(
        replace(tensor, name=f"{tensor.name}_half", type="FLOAT16", constant=tensor.constant.cast(np.float16))
    )


def _narrow(editor: Editor, tensor: Tensor) -> Tensor | None:
    """The constant in the narrower form that it has; None: it has none."""
    grid = tensor.constant.grid if tensor.constant is not None else None
    if grid is None:
        return None
    if grid.type == "FLOAT16":
        return _as_half(editor, tensor)
    form = weight_form(tensor, grid.quantization.axis)
    return None if isinstance(form, str) else quantized_constant(editor, tensor, "INT8", form)


def _integer_form(weight: Tensor, axis: int | None) -> Quantization | str:
    """The scales of a weight: its own, else symmetric ones; or why it has no integers. None: one for all."""
    assert weight.constant is not None  # noqa: S101 - callers pass constants
    grid = weight.constant.grid
    if grid is not None and grid.type != "FLOAT16":
        found = weight_form(weight, 0 if axis is None else axis)
        if isinstance(found, str) or not (found.is_per_axis and axis is None):
            return found
        return "its weight has a scale for each channel, and this kernel takes one"
    magnitudes = _magnitudes(weight.constant.array(), axis)
    if not np.isfinite(magnitudes).all():
        return "its weight has numbers that are not finite"
    scales = symmetric_scales(magnitudes, 8)
    return Quantization(scales=tuple(float(scale) for scale in scales), zero_points=(0,) * scales.size, axis=axis or 0)


def _magnitudes(array: npt.NDArray[np.float32], axis: int | None) -> npt.NDArray[np.floating]:
    if axis is None:
        return np.array([np.abs(array).max(initial=0)])
    return np.array([np.abs(part).max(initial=0) for part in np.moveaxis(array, axis, 0)])
