"""One quantized operator in TFLite: a flatbuffer is built around it, and LiteRT's interpreter runs it.

Layouts here are TFLite's: channels last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from tests.litert import run_file
from tests.tflite_files import Node, Tensor, tflite_file


@dataclass(frozen=True, kw_only=True)
class Operator:
    """`options` are fields of the options table called `options_type`; outputs are activations."""

    name: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    options_type: str = ""
    options: Mapping[str, Any] | None = None
    version: int = 1


def flatbuffer(operator: Operator) -> bytes:
    """A `.tflite` file with this operator alone."""
    read, made = _names(operator.inputs), _names(operator.outputs, behind=len(operator.inputs))
    return tflite_file(
        tensors=dict(zip((*read, *made), (*operator.inputs, *operator.outputs), strict=True)),
        operators=[
            Node(
                name=operator.name,
                inputs=read,
                outputs=made,
                options_type=operator.options_type,
                options=operator.options,
                version=operator.version,
            )
        ],
        inputs=[name for name, tensor in zip(read, operator.inputs, strict=True) if tensor.data is None],
        outputs=made,
    )


def run(operator: Operator, feeds: Sequence[npt.NDArray[Any]], *, is_reference: bool) -> list[npt.NDArray[Any]]:
    """The outputs. `is_reference` picks TFLite's reference kernels, else those that applications run (XNNPACK)."""
    fed = [name for name, tensor in zip(_names(operator.inputs), operator.inputs, strict=True) if tensor.data is None]
    kernels = "reference" if is_reference else "XNNPACK"
    outputs = run_file(flatbuffer(operator), dict(zip(fed, feeds, strict=True)), kernels=kernels)
    return [outputs[name] for name in _names(operator.outputs, behind=len(operator.inputs))]


def _names(tensors: Sequence[Tensor], *, behind: int = 0) -> list[str]:
    return [f"t{behind + index}" for index in range(len(tensors))]
