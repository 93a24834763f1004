"""Activations: clamps are recognized, and become part of the operator in front of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.fusion.rule import Rule, has_activation, is_plain_float, small_array
from onnxprune.targets.tflite.graph import Operator

__all__ = ["RULES"]

_FUSED = ("RELU", "RELU6", "RELU_N1_TO_1")
# CONCATENATION could carry one as well, but XNNPACK leaves it alone then.
_HOSTS = frozenset({
    "ADD", "AVERAGE_POOL_2D", "CONV_2D", "CONV_3D", "DEPTHWISE_CONV_2D", "DIV", "FULLY_CONNECTED", "MAX_POOL_2D",
    "MUL", "SUB", "TRANSPOSE_CONV",
})  # fmt: skip
_CLAMPS = {(0.0, 6.0): "RELU6", (-1.0, 1.0): "RELU_N1_TO_1", (0.0, 1.0): "RELU_0_TO_1"}


def _fuse_activation(editor: Editor, operator: Operator) -> bool:
    """RELU(CONV_2D(x)) -> CONV_2D with RELU in it."""
    host = editor.producer(operator.inputs[0])
    if host is None or host.kind not in _HOSTS or has_activation(host):
        return False
    if editor.only_reader(operator.inputs[0]) is not operator:
        return False
    if not is_plain_float(editor, operator.inputs[0]) or not is_plain_float(editor, operator.outputs[0]):
        return False
    fused = replace(host, outputs=operator.outputs).with_options(fusedActivationFunction=operator.kind)
    editor.replace(operator, fused)
    editor.replace(host)
    return True


def _recognize_clamp(editor: Editor, operator: Operator) -> bool:
    """MINIMUM(MAXIMUM(x, 0), 6) -> RELU6(x), in either order; likewise for the clamps to -1..1 and 0..1."""
    bound, inner_name = _bound(editor, operator)
    inner = editor.producer(inner_name)
    if bound is None or inner is None or editor.only_reader(inner_name) is not operator:
        return False
    if inner.kind == "RELU":
        other, source = 0.0, inner.inputs[0]
    elif inner.kind in ("MINIMUM", "MAXIMUM"):
        other_bound, source = _bound(editor, inner)
        if other_bound is None:
            return False
        other = other_bound
    else:
        return False
    kinds = {operator.kind, "MAXIMUM" if inner.kind == "RELU" else inner.kind}
    kind = _CLAMPS.get((min(bound, other), max(bound, other)))
    if kind is None or kinds != {"MINIMUM", "MAXIMUM"} or (bound > other) != (operator.kind == "MINIMUM"):
        return False
    editor.replace(operator, replace(operator, kind=kind, inputs=(source,), options={}))
    editor.replace(inner)
    return True


def _recognize_relu(editor: Editor, operator: Operator) -> bool:
    """MAXIMUM(x, 0) -> RELU(x)."""
    bound, source = _bound(editor, operator)
    if bound != 0.0:
        return False
    editor.replace(operator, replace(operator, kind="RELU", inputs=(source,), options={}))
    return True


def _bound(editor: Editor, operator: Operator) -> tuple[float | None, str]:
    """The number that MINIMUM or MAXIMUM compares with, and the tensor it compares."""
    output = editor.tensors[operator.outputs[0]]
    for position in (1, 0):
        numbers = small_array(editor.tensors[operator.inputs[position]])
        other = operator.inputs[1 - position]
        if numbers is None or numbers.size != 1 or editor.tensors[other].shape != output.shape:
            continue
        if is_plain_float(editor, other):
            return float(numbers.reshape(())), other
    return None, ""


RULES: Mapping[str, Sequence[Rule]] = {
    **dict.fromkeys(_FUSED, (_fuse_activation,)),
    "MINIMUM": (_recognize_clamp,),
    "MAXIMUM": (_recognize_clamp, _recognize_relu),
}
