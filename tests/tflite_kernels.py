"""One quantized operator in TFLite: a flatbuffer is built around it, and TFLite's interpreter runs it.

Layouts here are TFLite's: channels last. Needs TensorFlow; `pytest.importorskip("tensorflow")` first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """`data` None: an activation that is fed or returned. Zero points are 0 where there are several scales."""

    shape: tuple[int, ...]
    dtype: type[np.generic] = np.int8
    scales: tuple[float, ...] = ()
    zero_point: int = 0
    axis: int = 0
    data: npt.NDArray[Any] | None = None


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
    from tensorflow.lite.python import schema_py_generated as schema

    model, subgraph = schema.ModelT(), schema.SubGraphT()
    empty = schema.BufferT()
    empty.data = []
    model.version, model.buffers, subgraph.tensors = 3, [empty], []
    for index, tensor in enumerate((*operator.inputs, *operator.outputs)):
        subgraph.tensors.append(_tensor(schema, model, tensor, f"t{index}"))
    count = len(operator.inputs)
    fed = [index for index, tensor in enumerate(operator.inputs) if tensor.data is None]
    made = list(range(count, count + len(operator.outputs)))
    node, code = schema.OperatorT(), schema.OperatorCodeT()
    node.opcodeIndex, node.inputs, node.outputs = 0, list(range(count)), made
    if operator.options_type:
        node.builtinOptions = getattr(schema, f"{operator.options_type}T")()
        node.builtinOptionsType = getattr(schema.BuiltinOptions, operator.options_type)
        for name, value in (operator.options or {}).items():
            assert hasattr(node.builtinOptions, name), name
            setattr(node.builtinOptions, name, value)
    code.builtinCode = getattr(schema.BuiltinOperator, operator.name)
    code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), operator.version
    subgraph.operators, subgraph.inputs, subgraph.outputs = [node], fed, made
    model.operatorCodes, model.subgraphs = [code], [subgraph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _tensor(schema: Any, model: Any, tensor: Tensor, name: str) -> Any:
    made = schema.TensorT()
    made.name, made.shape, made.buffer = name, list(tensor.shape), 0
    made.type = {np.int8: schema.TensorType.INT8, np.int32: schema.TensorType.INT32}[tensor.dtype]
    if tensor.scales:
        quantization = schema.QuantizationParametersT()
        quantization.scale = list(tensor.scales)
        quantization.zeroPoint = [tensor.zero_point] * len(tensor.scales)
        quantization.quantizedDimension = tensor.axis
        made.quantization = quantization
    if tensor.data is not None:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(tensor.data, dtype=tensor.dtype).tobytes(), dtype=np.uint8)
        made.buffer = len(model.buffers)
        model.buffers.append(buffer)
    return made


def run(operator: Operator, feeds: Sequence[npt.NDArray[Any]], *, is_reference: bool) -> list[npt.NDArray[Any]]:
    """The outputs. `is_reference` picks TFLite's reference kernels, else those that applications run (XNNPACK)."""
    from tensorflow.lite.python.interpreter import Interpreter, OpResolverType

    kind = OpResolverType.BUILTIN_REF if is_reference else OpResolverType.AUTO
    interpreter = Interpreter(model_content=flatbuffer(operator), num_threads=1, experimental_op_resolver_type=kind)
    interpreter.allocate_tensors()
    for detail, feed in zip(interpreter.get_input_details(), feeds, strict=True):
        interpreter.set_tensor(detail["index"], feed)
    interpreter.invoke()
    return [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]
