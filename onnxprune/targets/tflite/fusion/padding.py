"""Explicit padding becomes padding SAME of the operator behind it, where SAME pads just as much.

SAME makes ceil(size / stride) windows and pads what they need, the odd one behind. Convolutions pad zeros; MAX_POOL_2D
leaves padded places out, which is what padding with minus infinity means, and padding with zeros where nothing is
below zero. AVERAGE_POOL_2D leaves them out too, and no explicit padding means that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.fusion.rule import Rule, has_activation, remove_unread, small_array
from onnxprune.targets.tflite.graph import Constant, Operator, Shape

__all__ = ["RULES"]

_AXES = ("D", "H", "W")
_DILATIONS = {"D": "dilationDFactor", "H": "dilationHFactor", "W": "dilationWFactor"}
# Where the sizes of the filter stand.
_KERNEL = {"CONV_2D": (1, 2), "DEPTHWISE_CONV_2D": (1, 2), "CONV_3D": (0, 1, 2)}

_ABOVE_ZERO = frozenset({"RELU", "RELU6", "RELU_0_TO_1", "LOGISTIC", "SOFTMAX", "ABS", "SQUARE", "SQRT", "EXP"})
_KEEPING_SIGN = frozenset({
    "AVERAGE_POOL_2D", "CONCATENATION", "DEQUANTIZE", "GATHER", "MAX_POOL_2D", "MEAN", "PAD", "QUANTIZE", "REDUCE_MAX",
    "RESHAPE", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "SLICE", "SPLIT", "STRIDED_SLICE", "TRANSPOSE",
})  # fmt: skip
_LOOKED_BACK = 8


def _pad_convolution(editor: Editor, operator: Operator) -> bool:
    """PAD, then CONV_2D with padding VALID -> CONV_2D with padding SAME."""
    pad = editor.producer(operator.inputs[0])
    filters = editor.tensors[operator.inputs[1]].shape
    kernel = tuple(filters[axis] for axis in _KERNEL[operator.kind])
    return pad is not None and pad.kind == "PAD" and _pad_same(editor, pad, operator, kernel)


def _pad_max_pool(editor: Editor, operator: Operator) -> bool:
    """PADV2 with minus infinity (or PAD, where nothing is below zero), then MAX_POOL_2D -> padding SAME."""
    pad = editor.producer(operator.inputs[0])
    if pad is None or not _pads_neutrally(editor, pad):
        return False
    kernel = (operator.option("filterHeight", 0), operator.option("filterWidth", 0))
    return _pad_same(editor, pad, operator, kernel) or _pad_zeros(editor, pad, operator)


def _pads_neutrally(editor: Editor, pad: Operator) -> bool:
    """True when no maximum sees the padding."""
    if pad.kind == "PAD":
        return _is_above_zero(editor, pad.inputs[0], _LOOKED_BACK)
    return pad.kind == "PADV2" and _pads_lowest(editor, pad)


def _pads_lowest(editor: Editor, pad: Operator) -> bool:
    tensor = editor.tensors[pad.inputs[2]]
    number = small_array(tensor)
    lowest = float(np.finfo(np.float32).min)
    return number is not None and tensor.type == "FLOAT32" and float(number.reshape(())) <= lowest


def _pad_zeros(editor: Editor, pad: Operator, operator: Operator) -> bool:
    """PADV2 with minus infinity -> PAD, where nothing is below zero: a range of integers can hold that."""
    if pad.kind != "PADV2" or editor.only_reader(pad.outputs[0]) is not operator:
        return False
    if not _is_above_zero(editor, pad.inputs[0], _LOOKED_BACK):
        return False
    editor.replace(pad, replace(pad, kind="PAD", inputs=pad.inputs[:2]))
    return True


def _pad_same(editor: Editor, pad: Operator, operator: Operator, kernel: Shape) -> bool:
    if operator.option("padding", "SAME") != "VALID":
        return False
    before = editor.tensors[pad.inputs[0]].shape
    rows = small_array(editor.tensors[pad.inputs[1]])
    if rows is None or len(before) != len(kernel) + 2:
        return False
    sizes = before[1:-1]
    if min(sizes) < 1 or rows[0].any() or rows[-1].any():
        return False
    for size, window, axis, row in zip(sizes, kernel, _AXES[-len(kernel) :], rows[1:-1], strict=True):
        stride = operator.option(f"stride{axis}", 1)
        dilation = operator.option(_DILATIONS[axis], 1)
        if tuple(row) != _same(size, (window - 1) * dilation + 1, stride):
            return False
    editor.replace(
        operator, replace(operator, inputs=(pad.inputs[0], *operator.inputs[1:])).with_options(padding="SAME")
    )
    remove_unread(editor, pad)
    return True


def _same(size: int, window: int, stride: int) -> tuple[int, int]:
    """What SAME pads in front and behind."""
    whole = max((-(-size // stride) - 1) * stride + window - size, 0)
    return whole // 2, whole - whole // 2


def _is_above_zero(editor: Editor, name: str, looked_back: int) -> bool:
    """True when no number of the tensor can be below zero."""
    operator = editor.producer(name)
    if operator is None:
        numbers = small_array(editor.tensors[name])
        return numbers is not None and bool((numbers >= 0).all())
    if looked_back == 0:
        return False
    if operator.kind in _ABOVE_ZERO or operator.option("fusedActivationFunction", "NONE") in ("RELU", "RELU6"):
        return True
    if operator.kind in ("ADD", "MUL", "MAXIMUM", "MINIMUM"):
        return all(_is_above_zero(editor, given, looked_back - 1) for given in operator.inputs)
    if operator.kind not in _KEEPING_SIGN or has_activation(operator):
        return False
    # Inputs of integers are axes and sizes, or numbers that come from QUANTIZE.
    data = [given for given in operator.inputs if given and editor.tensors[given].type not in ("INT32", "INT64")]
    return bool(data) and all(_is_above_zero(editor, given, looked_back - 1) for given in data)


def _merge_pads(editor: Editor, operator: Operator) -> bool:
    """PAD(PAD(x)) -> PAD(x)."""
    first = editor.producer(operator.inputs[0])
    if first is None or first.kind != "PAD" or editor.only_reader(operator.inputs[0]) is not operator:
        return False
    inner, outer = (small_array(editor.tensors[pad.inputs[1]]) for pad in (first, operator))
    if inner is None or outer is None:
        return False
    rows = editor.add_constant(Constant.of((inner + outer).astype(np.int32)), f"{operator.outputs[0]}/paddings")
    editor.replace(operator, replace(operator, inputs=(first.inputs[0], rows.name)))
    editor.replace(first)
    return True


RULES: Mapping[str, Sequence[Rule]] = {
    **dict.fromkeys(_KERNEL, (_pad_convolution,)),
    "MAX_POOL_2D": (_pad_max_pool,),
    "PAD": (_merge_pads,),
}
