"""What a `.tflite` file says about itself: interface, quantization, layouts, metadata and graph.

Read with the schema that ships in ai-edge-litert, from a file that LiteRT has verified before.

Three entries of the file's metadata are onnxprune's own:
    onnxprune           provenance, JSON
    onnxprune.layouts   JSON object, tensor name -> permutation p, with stored = numpy.transpose(value, p) where `value`
                        is the tensor of that name in the ONNX model
    onnxprune.integers  JSON list, names of the inputs and outputs that are integers with a scale here, and plain
                        integers in the ONNX model
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.contracts import TensorSpec
from onnxprune.errors import ModelError, quoted_list
from onnxprune.graph.tensor_graph import GraphNode, GraphTensor, TensorGraph

__all__ = ["INTEGERS_KEY", "LAYOUTS_KEY", "LitertFile", "LitertTensor", "read_litert_file"]

LAYOUTS_KEY = "onnxprune.layouts"
INTEGERS_KEY = "onnxprune.integers"
_SIGNATURE = "serving_default"

# TFLite's type -> NumPy's name, as far as LiteRT takes and gives NumPy arrays of it.
_DTYPES = {
    "FLOAT32": "float32",
    "FLOAT16": "float16",
    "FLOAT64": "float64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "BOOL": "bool",
}
_STAND_FOR_FLOATS = frozenset({"int8", "uint8", "int16"})

# Operators by which a comparison tells what was folded, and what only converts.
_ONNX_TYPES = {
    "ADD": "Add",
    "DEQUANTIZE": "DequantizeLinear",
    "DIV": "Div",
    "MUL": "Mul",
    "QUANTIZE": "QuantizeLinear",
    "RELU": "Relu",
    "RELU6": "Clip",
    "RELU_0_TO_1": "Clip",
    "RELU_N1_TO_1": "Clip",
    "SUB": "Sub",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LitertTensor:
    """A tensor as it is stored. `name` is that of the signature for inputs and outputs, else the tensor's own.

    `dtype` is NumPy's name, "" for a type that NumPy does not have. A dimension of None may be fed in any size.
    `scales` is empty for what is not quantized; several scales belong to the indices of `axis`.
    `layout` is the permutation that leads from the ONNX model's axes to the stored ones, () where they are the same.
    `is_integer_in_source` says that the ONNX model has these integers too, though a scale stands beside them here.
    """

    index: int
    name: str
    dtype: str
    shape: tuple[int | None, ...] | None
    scales: tuple[float, ...] = ()
    zero_points: tuple[int, ...] = ()
    axis: int = 0
    layout: tuple[int, ...] = ()
    is_integer_in_source: bool = False

    @property
    def stands_for_floats(self) -> bool:
        """True for integers with a scale: real = (integer - zero point) * scale."""
        return bool(self.scales) and self.dtype in _STAND_FOR_FLOATS and not self.is_integer_in_source

    def spec(self, *, as_float: bool, in_source_layout: bool) -> TensorSpec:
        """The tensor as a runner shows it."""
        shape: tuple[int | None, ...] | None = self.shape
        if in_source_layout and self.layout and shape is not None:
            shape = tuple(shape[place] for place in np.argsort(self.layout))
        return TensorSpec(
            name=self.name, dtype="float32" if as_float and self.stands_for_floats else self.dtype, shape=shape
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LitertFile:
    """A file's main subgraph. `tensors` are those that can be asked for by name, inputs and outputs included."""

    inputs: tuple[LitertTensor, ...]
    outputs: tuple[LitertTensor, ...]
    tensors: Mapping[str, LitertTensor]
    metadata: Mapping[str, str]
    graph: TensorGraph
    has_variables: bool


def read_litert_file(content: Any, subject: str) -> LitertFile:
    """Read a verified flatbuffer; `subject` names it in errors.

    Args:
        content: Bytes, or a memory map of the file, which then is not read as a whole.
        subject: "'model.tflite'".

    Raises:
        ModelError: Its signature, metadata or interface is not one that can be run.
    """
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(content, 0)
    subgraph = model.Subgraphs(0)
    metadata = _metadata(model, content)
    layouts = _layouts(metadata, subject)
    integers = _integers(metadata, subject)
    inputs, outputs = _indices(subgraph, "Inputs"), _indices(subgraph, "Outputs")
    stored = [_text(subgraph.Tensors(index).Name()) for index in range(subgraph.TensorsLength())]
    interface = dict.fromkeys([*inputs, *outputs])
    public = {index: stored[index] for index in interface} | _signature_names(model, subject)
    # A name that several tensors have says nothing about any of them.
    names = {index: public.get(index, name) for index, name in enumerate(stored)}
    counts = Counter(names.values())
    tensors = {
        name: replace(
            _tensor(schema, subgraph.Tensors(index), index, name, layouts.get(stored[index], ()), subject),
            is_integer_in_source=index in interface and name in integers,
        )
        for index, name in names.items()
        if index in interface or (name and counts[name] == 1)
    }
    for what, indices in (("inputs", inputs), ("outputs", outputs)):
        _check_interface(what, [names[index] for index in indices], tensors, schema, subgraph, indices, subject)
    return LitertFile(
        inputs=tuple(tensors[names[index]] for index in inputs),
        outputs=tuple(tensors[names[index]] for index in outputs),
        tensors=tensors,
        metadata=metadata,
        graph=_graph(schema, model, subgraph, names, tensors, set(inputs), set(outputs)),
        has_variables=any(subgraph.Tensors(index).IsVariable() for index in names),
    )


def _signature_names(model: Any, subject: str) -> dict[int, str]:
    """Tensor index -> name, from the signature "serving_default" or the only one; empty where there is none."""
    signatures = [model.SignatureDefs(index) for index in range(model.SignatureDefsLength())]
    named = [one for one in signatures if _text(one.SignatureKey()) == _SIGNATURE]
    if not named and len(signatures) != 1:
        return {}
    (signature,) = named[:1] or signatures
    if signature.SubgraphIndex() != 0:
        raise ModelError(
            f"{subject} can't be run: its signature '{_text(signature.SignatureKey())}' names subgraph "
            f"{signature.SubgraphIndex()}, and only the main one, 0, is supported.",
            "Export it with that signature alone.",
        )
    maps = [signature.Inputs(index) for index in range(signature.InputsLength())]
    maps += [signature.Outputs(index) for index in range(signature.OutputsLength())]
    return {one.TensorIndex(): _text(one.Name()) for one in maps}


def _check_interface(
    what: str,
    names: Sequence[str],
    tensors: Mapping[str, LitertTensor],
    schema: Any,
    subgraph: Any,
    indices: Sequence[int],
    subject: str,
) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ModelError(
            f"{subject} can't be run: several of its {what} are called {quoted_list(repeated)}.",
            "Give them names of their own.",
        )
    for name, index in zip(names, indices, strict=True):
        if not tensors[name].dtype:
            kind = _type_name(schema, subgraph.Tensors(index).Type())
            raise ModelError(
                f"{subject} has '{name}' of type {kind} among its {what}; only numbers and booleans can be fed and "
                "compared.",
                "Cut the model before that tensor.",
            )


def _tensor(schema: Any, tensor: Any, index: int, name: str, layout: tuple[int, ...], subject: str) -> LitertTensor:
    shape = _shape(tensor)
    if layout and (shape is None or len(layout) != len(shape)):
        raise ModelError(
            f"{subject} is damaged: its metadata '{LAYOUTS_KEY}' has a layout of {len(layout)} axes for '{name}', "
            f"which has {'an unknown number' if shape is None else len(shape)}."
        )
    quantization = tensor.Quantization()
    scales: tuple[float, ...] = ()
    zero_points: tuple[int, ...] = ()
    axis = 0
    if quantization is not None and quantization.ScaleLength():
        scales = tuple(float(scale) for scale in quantization.ScaleAsNumpy())
        zero_points = tuple(_numbers(quantization, "ZeroPoint")) or (0,) * len(scales)
        axis = quantization.QuantizedDimension()
        if len(zero_points) != len(scales) or not all(math.isfinite(scale) and scale > 0.0 for scale in scales):
            raise ModelError(
                f"{subject} is damaged: '{name}' has {len(scales)} scales and {len(zero_points)} zero points, the "
                f"smallest scale is {min(scales):g}.",
                "Scales are positive, and each has one zero point.",
            )
    return LitertTensor(
        index=index,
        name=name,
        dtype=_DTYPES.get(_type_name(schema, tensor.Type()), ""),
        shape=shape,
        scales=scales,
        zero_points=zero_points,
        axis=axis,
        layout=layout,
    )


def _shape(tensor: Any) -> tuple[int | None, ...] | None:
    signature = _numbers(tensor, "ShapeSignature") or _numbers(tensor, "Shape")
    if not signature and not tensor.HasRank():
        return None  # a scalar and an unknown rank are stored alike
    return tuple(None if size < 0 else size for size in signature)


def _metadata(model: Any, content: Any) -> dict[str, str]:
    """Entries that are text."""
    found = {}
    for number in range(model.MetadataLength()):
        entry = model.Metadata(number)
        buffer = model.Buffers(entry.Buffer()) if entry.Buffer() < model.BuffersLength() else None
        if buffer is None:
            continue
        # Large files have their buffers behind the flatbuffer; offset 1 is a mark of writers that are not done.
        stored = bytes(content[buffer.Offset() : buffer.Offset() + buffer.Size()]) if buffer.Offset() > 1 else b""
        if buffer.DataLength():
            stored = buffer.DataAsNumpy().tobytes()
        try:
            text = stored.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            found[_text(entry.Name())] = text
    return found


def _layouts(metadata: Mapping[str, str], subject: str) -> dict[str, tuple[int, ...]]:
    try:
        stored = json.loads(metadata.get(LAYOUTS_KEY, "{}"))
        layouts = {str(name): tuple(int(axis) for axis in layout) for name, layout in stored.items()}
    except (ValueError, TypeError, AttributeError):
        layouts = {"": (-1,)}
    if any(sorted(layout) != list(range(len(layout))) for layout in layouts.values()):
        raise ModelError(
            f"{subject} is damaged: its metadata '{LAYOUTS_KEY}' is no JSON object of permutations, so nobody knows "
            "which axis is which.",
            "Build it again.",
        )
    return layouts


def _integers(metadata: Mapping[str, str], subject: str) -> frozenset[str]:
    try:
        names = json.loads(metadata.get(INTEGERS_KEY, "[]"))
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"{subject} is damaged: its metadata '{INTEGERS_KEY}' is no JSON list of names, so nobody knows what its "
            "integers stand for.",
            "Build it again.",
        )
    return frozenset(names)


def _graph(
    schema: Any,
    model: Any,
    subgraph: Any,
    names: Mapping[int, str],
    tensors: Mapping[str, LitertTensor],
    inputs: set[int],
    outputs: set[int],
) -> TensorGraph:
    known = {tensor.index: name for name, tensor in tensors.items()}
    variable = {index for index in names if subgraph.Tensors(index).IsVariable()}
    # What no input reaches is a constant, also where an operator computes it (DEQUANTIZE of stored weights).
    reached = inputs | variable
    nodes = []
    for number in range(subgraph.OperatorsLength()):
        operator = subgraph.Operators(number)
        reads, writes = _indices(operator, "Inputs"), _indices(operator, "Outputs")
        if reached.intersection(reads) or not reads:
            reached.update(writes)
        kind = _operator_name(schema, model.OperatorCodes(operator.OpcodeIndex()))
        nodes.append(
            GraphNode(
                name=names[writes[0]] if writes else "",
                op_type=kind,
                onnx_type=_ONNX_TYPES.get(kind, kind),
                reads=tuple(known[index] for index in reads if index in known),
                writes=tuple(known[index] for index in writes if index in known),
            )
        )
    return TensorGraph(
        nodes=tuple(nodes),
        tensors={
            name: GraphTensor(
                name=name,
                may_be_float=tensor.stands_for_floats or tensor.dtype.startswith("float"),
                num_elements=_num_elements(tensor.shape),
                is_output=tensor.index in outputs,
                is_constant=tensor.index not in reached,
            )
            for name, tensor in tensors.items()
        },
    )


def _num_elements(shape: tuple[int | None, ...] | None) -> int | None:
    sizes = [size for size in shape or () if size is not None]
    return math.prod(sizes) if shape is not None and len(sizes) == len(shape) else None


def _operator_name(schema: Any, code: Any) -> str:
    # Files from before 2020 have the old field only, later ones both; the larger one is right.
    number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
    if number == schema.BuiltinOperator.CUSTOM:
        return _text(code.CustomCode())
    return _names_in(schema.BuiltinOperator).get(number, f"operator {number}")


def _type_name(schema: Any, number: int) -> str:
    return _names_in(schema.TensorType).get(number, f"type {number}")


@functools.cache
def _names_in(enum: type) -> dict[int, str]:
    return {number: name for name, number in vars(enum).items() if isinstance(number, int)}


def _indices(table: Any, field: str) -> list[int]:
    """Tensors that are there: an optional input that is left out has index -1."""
    return [index for index in _numbers(table, field) if index >= 0]


def _numbers(table: Any, field: str) -> list[int]:
    if not getattr(table, f"{field}Length")():
        return []
    array: npt.NDArray[Any] = getattr(table, f"{field}AsNumpy")()
    return [int(number) for number in array]


def _text(name: bytes | None) -> str:
    return (name or b"").decode("utf-8", "replace")
