"""Sparse tensors of a proto made dense, because onnx_ir drops or refuses them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from onnxprune.errors import ModelError
from onnxprune.graph.names import printable

__all__ = ["densify"]

MAX_DENSE_BYTES = 256 << 20
"""A sparse tensor of a few bytes can stand for any size, so what it grows to is bounded."""


def densify(proto: onnx.ModelProto, path: Path) -> None:
    """Turn sparse initializers and sparse Constant values into dense ones of the same name.

    Raises:
        ModelError: A sparse tensor is malformed, or its dense form is above 256 MiB; names it.
    """
    for graph in _graphs(proto):
        for sparse in graph.sparse_initializer:
            graph.initializer.append(_dense(sparse, sparse.values.name, path))
        del graph.sparse_initializer[:]
        for node in graph.node:
            _densify_attributes(node, path)
    for function in proto.functions:
        for node in function.node:
            _densify_attributes(node, path)


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    graphs = [proto.graph]
    graphs.extend(graph for function in proto.functions for node in function.node for graph in _bodies(node))
    while graphs:
        graph = graphs.pop()
        yield graph
        graphs.extend(body for node in graph.node for body in _bodies(node))


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _densify_attributes(node: onnx.NodeProto, path: Path) -> None:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.SPARSE_TENSORS:
            raise ModelError(
                f"'{path}': node '{printable(node.name)}' ({printable(node.op_type)}) holds a list of sparse tensors "
                f"in '{printable(attribute.name)}', which no standard operator does.",
            )
        if attribute.type != onnx.AttributeProto.SPARSE_TENSOR:
            continue
        label = node.output[0] if node.output else node.name
        if node.op_type != "Constant" or attribute.name != "sparse_value":
            raise ModelError(
                f"'{path}': node '{printable(node.name)}' ({printable(node.op_type)}) holds a sparse tensor in "
                f"'{printable(attribute.name)}'; only Constant nodes with 'sparse_value' are supported.",
            )
        dense = _dense(attribute.sparse_tensor, label, path)
        attribute.Clear()
        attribute.name = "value"
        attribute.type = onnx.AttributeProto.TENSOR
        attribute.t.CopyFrom(dense)


def _dense(sparse: onnx.SparseTensorProto, name: str, path: Path) -> onnx.TensorProto:
    where = f"'{path}': sparse tensor '{printable(name)}'"
    dims = list(sparse.dims)
    if any(dim < 0 for dim in dims):
        raise ModelError(f"{where} has a negative dimension: {dims}.")
    values = numpy_helper.to_array(sparse.values).reshape(-1)
    if values.dtype == object:
        raise ModelError(f"{where} holds strings; only numbers are supported.")
    size = math.prod(dims)
    if size * values.dtype.itemsize > MAX_DENSE_BYTES:
        raise ModelError(
            f"{where} of shape {dims} would take {size * values.dtype.itemsize / 2**20:.0f} MiB in dense form; sparse "
            f"weights are turned into dense ones up to {MAX_DENSE_BYTES >> 20} MiB.",
            "Export the model with dense weights.",
        )
    indices = numpy_helper.to_array(sparse.indices).astype(np.int64)
    if indices.ndim == 2 and indices.shape == (values.size, len(dims)):
        if any((indices[:, axis] < 0).any() or (indices[:, axis] >= dim).any() for axis, dim in enumerate(dims)):
            raise ModelError(f"{where} of shape {dims} has an index outside of it.")
        flat = np.ravel_multi_index(tuple(indices.T), tuple(dims)) if dims else np.zeros(values.size, np.int64)
    elif indices.ndim == 1 and indices.size == values.size:
        flat = indices
    else:
        raise ModelError(f"{where} has {values.size} values but indices of shape {list(indices.shape)}.")
    if flat.size and (flat.min() < 0 or flat.max() >= size):
        raise ModelError(f"{where} of shape {dims} has an index outside of it.")
    dense = np.zeros(size, dtype=values.dtype)
    dense[flat] = values
    return numpy_helper.from_array(dense.reshape(dims), name)
