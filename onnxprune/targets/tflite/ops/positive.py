"""Which tensors are never negative, by the operators that they come from."""

from __future__ import annotations

from onnxprune.targets.tflite.build import Builder
from onnxprune.targets.tflite.graph import Tensor

__all__ = ["is_never_negative"]

_ALWAYS = frozenset({"RELU", "RELU6", "RELU_0_TO_1", "LOGISTIC", "SOFTMAX", "ABS", "SQUARE", "EXP", "SQRT"})
# Not negative where their first input is not.
_LIKE_THE_FIRST = frozenset(
    {
        "TRANSPOSE", "RESHAPE", "EXPAND_DIMS", "SQUEEZE", "SLICE", "STRIDED_SLICE", "PAD", "GATHER", "MAX_POOL_2D",
        "AVERAGE_POOL_2D", "REDUCE_MAX", "MEAN", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "DEPTH_TO_SPACE",
        "SPACE_TO_DEPTH",
    }
)  # fmt: skip
_LIKE_ALL = frozenset({"CONCATENATION", "ADD", "MUL", "MINIMUM"})
_FARTHEST = 32
# A longer constant costs more to read than its answer is worth.
_MOST_NUMBERS = 65536


def is_never_negative(build: Builder, tensor: Tensor) -> bool:
    """True when no number of `tensor` can be below 0; False where that can't be told."""
    waiting, seen = [tensor], 0
    while waiting:
        current, seen = waiting.pop(), seen + 1
        if current.type in ("UINT8", "BOOL"):
            continue
        if seen > _FARTHEST:
            return False
        if current.constant is not None:
            if current.num_elements > _MOST_NUMBERS or not (current.constant.array() >= 0).all():
                return False
            continue
        producer = build.producer(current)
        if producer is None:
            return False
        inputs = [build.tensors[name] for name in producer.inputs if name]
        if producer.kind in _ALWAYS:
            continue
        if producer.kind == "CAST" or producer.kind in _LIKE_THE_FIRST:
            waiting.append(inputs[0])
        elif producer.kind in _LIKE_ALL:
            waiting.extend(inputs)
        elif producer.kind == "MAXIMUM":
            constants = [one for one in inputs if one.constant is not None]
            waiting.extend(constants or inputs)
        else:
            return False
    return True
