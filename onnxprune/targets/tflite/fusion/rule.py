"""What fusion rules have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.graph import Operator, Tensor

__all__ = ["Rule", "bypassed", "has_activation", "is_plain_float", "remove_unread", "small_array"]

Rule: TypeAlias = Callable[[Editor, Operator], bool]
"""Gives True when it changed the graph."""

# A constant is looked at, not only combined, up to this size: more than channels is not worth reading for it.
_SMALL = 1 << 16


def small_array(tensor: Tensor) -> npt.NDArray[Any] | None:
    """The numbers of a constant of the size of a few channels."""
    if tensor.constant is None or tensor.num_elements > _SMALL or tensor.quantization is not None:
        return None
    return np.asarray(tensor.constant.array())


def has_activation(operator: Operator) -> bool:
    """True when an activation is fused into the operator."""
    return bool(operator.option("fusedActivationFunction", "NONE") != "NONE")


def is_plain_float(editor: Editor, name: str) -> bool:
    """True for a FLOAT32 tensor without scales."""
    tensor = editor.tensors[name]
    return tensor.type == "FLOAT32" and tensor.quantization is None


def bypassed(editor: Editor, operator: Operator) -> bool:
    """Let readers of the operator's output read its first input instead; False where LiteRT needs the operator.

    An output of the graph must be computed by an operator, and one tensor can't be two of them.
    """
    before, after = operator.inputs[0], operator.outputs[0]
    if editor.is_output(after):
        if editor.producer(before) is None or editor.is_output(before):
            return False
        editor.redirect(after, before)
        return True
    editor.redirect(after, before)
    editor.replace(operator)
    return True


def remove_unread(editor: Editor, operator: Operator) -> None:
    """Remove an operator whose outputs nobody reads any more: it would count as a reader of its inputs."""
    if not any(editor.consumers(name) or editor.is_output(name) for name in operator.outputs):
        editor.replace(operator)
