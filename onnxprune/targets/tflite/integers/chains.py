"""Float operators between DEQUANTIZE and QUANTIZE that no integer kernel takes as they are, in forms that some do.

Chains of constants have no scale between their operators. What is put there loses nothing.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.graph import Constant, Grid, Operator, Quantization, Tensor
from onnxprune.targets.tflite.integers.borders import INTEGER_TYPES, integers_behind

__all__ = ["prepare_chains"]

_ACTIVATION = "fusedActivationFunction"
_LARGEST = 127


def prepare_chains(editor: Editor) -> None:
    """Chains of constants, and pools of everything, have a form with an integer kernel.

    1. An AVERAGE_POOL_2D of the whole picture is a MEAN, whose result may have a scale of its own.
    2. x * c + d with a number for each channel is a depthwise convolution of one weight: c = 127 * (c / 127) is exact.
    3. Between x and x * c, for one positive number c, the integers are the same with another scale.
    """
    for operator in editor.operators:
        if operator.kind == "AVERAGE_POOL_2D":
            _pool_as_mean(editor, operator)
    for operator in editor.operators:
        if operator.kind in ("MUL", "ADD") and editor.producer(operator.outputs[0]) is operator:
            _channels_as_convolution(editor, operator)
    # Scales spread from both ends of a chain.
    for ordered in (editor.operators, editor.operators[::-1]):
        for operator in ordered:
            if operator.kind == "MUL":
                _keep_integers(editor, operator)


def _is_quantized_once(editor: Editor, name: str) -> Tensor | None:
    """The integers of a result that one QUANTIZE alone reads."""
    reader = editor.only_reader(name)
    if reader is None or reader.kind != "QUANTIZE":
        return None
    integers = editor.tensors[reader.outputs[0]]
    if integers.type not in INTEGER_TYPES or integers.quantization is None or integers.quantization.is_per_axis:
        return None
    return integers


def _pool_as_mean(editor: Editor, operator: Operator) -> None:
    x = editor.tensors[operator.inputs[0]]
    window = (operator.option("filterHeight", 1), operator.option("filterWidth", 1))
    # One result means one window, with SAME as well: then nothing is padded.
    covers = window == x.shape[1:3] and editor.tensors[operator.outputs[0]].shape[1:3] == (1, 1)
    before, after = integers_behind(editor, x.name), _is_quantized_once(editor, operator.outputs[0])
    if not covers or operator.option(_ACTIVATION, "NONE") != "NONE" or before is None or after is None:
        return
    if before.quantization == after.quantization:
        return
    axes = editor.add_constant(Constant.of(np.array([1, 2], np.int32)), f"{operator.outputs[0]}_axes")
    mean = replace(operator, kind="MEAN", inputs=(x.name, axes.name), options={"keepDims": True})
    editor.replace(operator, mean)


# --- one number for each channel ----------------------------------------------------------------------------------


def _channels_as_convolution(editor: Editor, operator: Operator) -> None:
    """DEQUANTIZE -> MUL -> ADD -> QUANTIZE, or one of both, on pictures with the channels last."""
    found = _data_and_constant(editor, operator)
    if found is None or integers_behind(editor, found[0]) is None:
        return
    x = editor.tensors[found[0]]
    channels = x.shape[-1]
    factors, offsets = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    last, array = operator, _by_channel(found[1], x)
    if array is None:
        return
    if operator.kind == "ADD":
        offsets = array
    else:
        factors = array
        following = editor.only_reader(operator.outputs[0])
        added = _data_and_constant(editor, following) if following is not None and following.kind == "ADD" else None
        array = None if added is None else _by_channel(added[1], x)
        if following is not None and array is not None and operator.option(_ACTIVATION, "NONE") == "NONE":
            last, offsets = following, array
    if _is_quantized_once(editor, last.outputs[0]) is None or _is_one_number(factors, offsets):
        return
    scales = np.maximum(np.abs(factors) / np.float32(_LARGEST), np.finfo(np.float32).tiny)
    form = Quantization(scales=tuple(map(float, scales)), zero_points=(0,) * channels, axis=3)
    exact = (np.rint(factors / scales) * scales).astype(np.float32).reshape(1, 1, 1, channels)
    weight = replace(Constant.of(exact), grid=Grid(type="INT8", quantization=form))
    name = last.outputs[0]
    convolution = Operator(
        kind="DEPTHWISE_CONV_2D",
        inputs=(
            x.name,
            editor.add_constant(weight, f"{name}_factors").name,
            editor.add_constant(Constant.of(offsets), f"{name}_offsets").name,
        ),
        outputs=last.outputs,
        options={
            "padding": "VALID", "strideH": 1, "strideW": 1, "depthMultiplier": 1,
            _ACTIVATION: last.option(_ACTIVATION, "NONE"),
        },
        node=last.node,
    )  # fmt: skip
    if last is not operator:
        editor.replace(operator)
    editor.replace(last, convolution)


def _is_one_number(factors: npt.NDArray[np.float32], offsets: npt.NDArray[np.float32]) -> bool:
    """The same for all channels, without both: ADD and MUL take that as it is."""
    return len(set(factors.tolist())) == 1 and len(set(offsets.tolist())) == 1


def _data_and_constant(editor: Editor, operator: Operator) -> tuple[str, Tensor] | None:
    """The computed operand's name, and the constant one, if that has no integers of its own."""
    for data, other in (operator.inputs, operator.inputs[::-1]):
        tensor = editor.tensors[other]
        if tensor.constant is not None and tensor.type == "FLOAT32" and editor.tensors[data].constant is None:
            return None if tensor.constant.grid is not None else (data, tensor)
    return None


def _by_channel(tensor: Tensor, x: Tensor) -> npt.NDArray[np.float32] | None:
    """A number for each channel of the picture `x`; None where the constant is something else."""
    channels = x.shape[-1]
    if x.rank != 4 or channels < 1 or tensor.num_elements not in (1, channels):
        return None
    if tensor.num_elements > 1 and tensor.shape[-1] != channels:
        return None
    array = tensor.array()
    return None if array is None else np.broadcast_to(array.reshape(-1), (channels,)).astype(np.float32)


# --- one number for all ---------------------------------------------------------------------------------------------


def _keep_integers(editor: Editor, operator: Operator) -> None:
    found = _data_and_constant(editor, operator)
    array = None if found is None else found[1].array()
    if found is None or array is None or array.size == 0 or array.min() != array.max() or array.min() <= 0:
        return
    if operator.option(_ACTIVATION, "NONE") != "NONE":
        return
    factor, (data, _), result = float(array.flat[0]), found, operator.outputs[0]
    before, after = integers_behind(editor, data), _is_quantized_once(editor, result)
    if before is None and after is not None and editor.only_reader(data) is operator:
        _round(editor, data, operator, after, 1 / factor)
    reader = editor.only_reader(result)
    if before is not None and after is None and reader is not None and reader.kind in ("ADD", "SUB", "MUL"):
        _round(editor, result, reader, before, factor)


def _round(editor: Editor, name: str, reader: Operator, like: Tensor, factor: float) -> None:
    """Let `reader` read `name` through integers of `like`, with its scale times `factor`."""
    real = editor.tensors[name]
    assert like.quantization is not None  # noqa: S101 - callers pass integers
    scale = float(np.float32(like.quantization.scales[0] * factor))
    form = replace(like.quantization, scales=(scale,))
    integers = editor.add(replace(real, name=f"{name}_quantized", type=like.type, quantization=form))
    rounded = editor.add(replace(real, name=f"{name}_dequantized"))
    conversions = (
        Operator(kind="QUANTIZE", inputs=(name,), outputs=(integers.name,), node=reader.node),
        Operator(kind="DEQUANTIZE", inputs=(integers.name,), outputs=(rounded.name,), node=reader.node),
    )
    inputs = tuple(rounded.name if one == name else one for one in reader.inputs)
    editor.replace(reader, *conversions, replace(reader, inputs=inputs))
