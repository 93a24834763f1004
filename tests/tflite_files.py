"""`.tflite` files for tests, written with the schema that ships in ai-edge-litert. Layouts are TFLite's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt

TRAINED = ("kws_float", "kws_int8", "resnet8_cifar10_float", "resnet8_cifar10_int8", "vww_96_float", "vww_96_int8")
"""Files in the shared data, without ending; their batch size is left open."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """`data` None: an activation that is fed or returned. Zero points are 0 where there are several scales.

    `open_shape` has -1 for sizes that may be fed otherwise than `shape` says.
    """

    shape: tuple[int, ...]
    dtype: type[np.generic] = np.int8
    scales: tuple[float, ...] = ()
    zero_point: int = 0
    axis: int = 0
    data: npt.NDArray[Any] | None = None
    open_shape: tuple[int, ...] = ()
    is_variable: bool = False


@dataclass(frozen=True, kw_only=True)
class Node:
    """`inputs` and `outputs` are names; "" for an optional input that is left out."""

    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    options_type: str = ""
    options: Mapping[str, Any] | None = None
    version: int = 1


def tflite_file(
    *,
    tensors: Mapping[str, Tensor],
    operators: Sequence[Node],
    inputs: Sequence[str],
    outputs: Sequence[str],
    signatures: Mapping[str, Mapping[str, str]] | None = None,
    metadata: Mapping[str, bytes] | None = None,
) -> bytes:
    """A file with one subgraph; `signatures` are names of inputs and outputs (-> tensor's name) by their key."""
    from ai_edge_litert import schema_py_generated as schema

    model, subgraph = schema.ModelT(), schema.SubGraphT()
    empty = schema.BufferT()
    empty.data = []
    model.version, model.buffers, model.operatorCodes, model.metadata = 3, [empty], [], []
    subgraph.tensors = [_tensor(schema, model, tensor, name) for name, tensor in tensors.items()]
    places = {name: place for place, name in enumerate(tensors)} | {"": -1}
    subgraph.operators = [_operator(schema, model, node, places) for node in operators]
    subgraph.inputs, subgraph.outputs = [places[name] for name in inputs], [places[name] for name in outputs]
    model.subgraphs = [subgraph]
    model.signatureDefs = [_signature(schema, key, names, places, inputs) for key, names in (signatures or {}).items()]
    for key, content in (metadata or {}).items():
        entry = schema.MetadataT()
        entry.name, entry.buffer = key, len(model.buffers)
        model.buffers.append(_buffer(schema, content))
        model.metadata.append(entry)
    return packed(model)


def packed(model: Any) -> bytes:
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def unpacked(path: Path) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    return schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)


def _operator(schema: Any, model: Any, node: Node, places: Mapping[str, int]) -> Any:
    made, code = schema.OperatorT(), schema.OperatorCodeT()
    made.opcodeIndex = len(model.operatorCodes)
    made.inputs, made.outputs = [places[name] for name in node.inputs], [places[name] for name in node.outputs]
    if node.options_type:
        made.builtinOptions = getattr(schema, f"{node.options_type}T")()
        made.builtinOptionsType = getattr(schema.BuiltinOptions, node.options_type)
        for name, value in (node.options or {}).items():
            assert hasattr(made.builtinOptions, name), name
            setattr(made.builtinOptions, name, value)
    code.builtinCode = getattr(schema.BuiltinOperator, node.name, schema.BuiltinOperator.CUSTOM)
    if code.builtinCode == schema.BuiltinOperator.CUSTOM:
        code.customCode = node.name
    code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), node.version
    model.operatorCodes.append(code)
    return made


def _tensor(schema: Any, model: Any, tensor: Tensor, name: str) -> Any:
    made = schema.TensorT()
    made.name, made.shape, made.buffer, made.isVariable = name, list(tensor.shape), 0, tensor.is_variable
    made.hasRank = True
    if tensor.open_shape:
        made.shapeSignature = list(tensor.open_shape)
    made.type = getattr(schema.TensorType, np.dtype(tensor.dtype).name.upper().replace("STR", "STRING"))
    if tensor.scales:
        quantization = schema.QuantizationParametersT()
        quantization.scale = list(tensor.scales)
        quantization.zeroPoint = [tensor.zero_point] * len(tensor.scales)
        quantization.quantizedDimension = tensor.axis
        made.quantization = quantization
    if tensor.data is not None:
        made.buffer = len(model.buffers)
        model.buffers.append(_buffer(schema, np.ascontiguousarray(tensor.data, dtype=tensor.dtype).tobytes()))
    return made


def _buffer(schema: Any, content: bytes) -> Any:
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(content, dtype=np.uint8)
    return buffer


def _signature(
    schema: Any, key: str, names: Mapping[str, str], places: Mapping[str, int], inputs: Sequence[str]
) -> Any:
    made = schema.SignatureDefT()
    made.signatureKey, made.subgraphIndex, made.inputs, made.outputs = key, 0, [], []
    for name, tensor in sorted(names.items()):  # converters store them in the order of the alphabet
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = name, places[tensor]
        (made.inputs if tensor in inputs else made.outputs).append(entry)
    return made
