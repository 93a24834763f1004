"""Weights stored as their non-zeros, with a DENSIFY in front of what reads them.

XNNPACK's delegate unpacks such a weight once, when the model is loaded: float32, float16 and int8 ones that it makes
float with DEQUANTIZE, and int8 ones of integer convolutions. It refuses to load the model where FULLY_CONNECTED or a
convolution of floats would read unpacked int8.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.graph import Graph, Operator, Tensor
from onnxprune.targets.tflite.sparse.encoding import encode_rows
from onnxprune.targets.tflite.sparse.rules import GraphView

__all__ = ["SparseStorage", "with_sparse_weights"]

MAX_INDEX_BYTES = 256 << 20
"""Places of non-zeros stand inside the flatbuffer, which ends at 2 GiB. Weights beyond this many bytes stay dense."""

_FLOAT_READERS = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseStorage:
    """The graph, and what its weights that are stored sparse take."""

    graph: Graph
    tensors: int
    dense_bytes: int
    sparse_bytes: int
    compressed_dense_bytes: int
    """The same weights in a download that is compressed with DEFLATE, as app stores do."""
    compressed_sparse_bytes: int


def with_sparse_weights(graph: Graph) -> SparseStorage:
    """Store every weight sparse that takes fewer bytes so, and that the delegate unpacks.

    Constants are read one at a time.
    """
    view = GraphView(graph)
    editor = Editor(graph)
    tensors = dense_bytes = sparse_bytes = compressed_dense = compressed_sparse = index_bytes = 0
    for tensor in graph.tensors.values():
        if tensor.constant is None or not _may_be_sparse(tensor, view):
            continue
        encoded = encode_rows(tensor.constant)
        if encoded is None or index_bytes + encoded[1].nbytes > MAX_INDEX_BYTES:
            continue
        values, sparsity = encoded
        index_bytes += sparsity.nbytes
        tensors += 1
        dense_bytes += tensor.constant.nbytes
        sparse_bytes += values.nbytes + sparsity.nbytes
        compressed_dense += _compressed_bytes(tensor.constant.array())
        compressed_sparse += sum(map(_compressed_bytes, (values.array(), sparsity.segments, sparsity.indices)))
        packed = editor.add(replace(tensor, name=f"{tensor.name}/sparse", constant=values, sparsity=sparsity))
        editor.update(replace(tensor, constant=None))
        first = editor.consumers(tensor.name)[0]
        editor.insert_before(
            first, Operator(kind="DENSIFY", inputs=(packed.name,), outputs=(tensor.name,), node=first.node)
        )
    return SparseStorage(
        graph=editor.graph(),
        tensors=tensors,
        dense_bytes=dense_bytes,
        sparse_bytes=sparse_bytes,
        compressed_dense_bytes=compressed_dense,
        compressed_sparse_bytes=compressed_sparse,
    )


def _may_be_sparse(tensor: Tensor, view: GraphView) -> bool:
    """True for a weight all of whose readers take it unpacked."""
    if tensor.quantization is not None and any(tensor.quantization.zero_points):
        # A zero left out comes back as the integer 0, which stands for another number.
        return False
    readers = view.readers.get(tensor.name, [])
    return bool(readers) and all(_unpacks(reader, tensor, view) for reader in readers)


def _unpacks(reader: Operator, tensor: Tensor, view: GraphView) -> bool:
    if reader.kind == "DEQUANTIZE":
        name = reader.outputs[0]
        behind = view.readers.get(name, [])
        return name not in view.graph.outputs and all(_computes_in_float(one, name, view) for one in behind)
    if tensor.type == "FLOAT32":
        return _computes_in_float(reader, tensor.name, view)
    is_integer = tensor.type == "INT8" and view.tensor(reader.inputs[0]).type == "INT8"
    return is_integer and reader.kind == "CONV_2D" and reader.inputs[1] == tensor.name


def _computes_in_float(reader: Operator, weight: str, view: GraphView) -> bool:
    """True for a float layer that reads `weight` as its filters, and nowhere else."""
    if reader.kind not in _FLOAT_READERS or view.tensor(reader.inputs[0]).type != "FLOAT32":
        return False
    return reader.inputs[1] == weight and reader.inputs.count(weight) == 1


def _compressed_bytes(array: npt.NDArray[Any]) -> int:
    packer = zlib.compressobj(6)
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    chunk = 1 << 24
    done = sum(len(packer.compress(content[start : start + chunk])) for start in range(0, len(content), chunk))
    return done + len(packer.flush())
