"""What a graph weighs.

A *parameter* is one element of an initializer that holds weights:
    - floats of any width, but for those that only set how an operator works (`SETTINGS`: scales of quantization,
      sizes of Resize, bounds of Clip ...);
    - integers that are the data of a DequantizeLinear or the weight or bias of an integer operator
      (`INTEGER_WEIGHTS`). Indices, shapes and zero points are none.
An initializer with several readers counts once. BatchNorm's running mean and variance count: they are stored.

A parameter is *zero* when it stands for the real number 0: for integers, when it equals its zero point.

Bytes in sparse storage, with n elements of which k are not zero, each of v bytes (values are kept dense for COO, CSR
and bitmap alike; int4 packs two into a byte):
    coo      k * (8 + v)              one int64 index a value, as in ONNX's sparse_initializer
    csr      k * (4 + v) + 4 * (rows + 1)   int32 column indices and row starts; rows = axis 0, the rest are columns
    bitmap   k * v + ceil(n / 8)      one bit an element
Scalars are stored as they are. No runtime that onnxprune targets computes with these, but for TFLite's sparse kernels.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import CanonicalModel, ModelFigures
from onnxprune.errors import OutputError
from onnxprune.graph.weights import constant_array, iter_windows
from onnxprune.ops.macs import count_macs_per_sample

__all__ = [
    "SPARSE_STORAGES",
    "WeightFigures",
    "holds_parameters",
    "model_figures",
    "sparse_storage_bytes",
    "weight_figures",
    "zipped_bytes",
]

SPARSE_STORAGES = ("coo", "csr", "bitmap")
_WINDOW_BYTES = 16 << 20
_ZIP_LEVEL = 6  # the default of zip, gzip and app stores

# operator -> inputs that set how it works; a float that only feeds these is no parameter
SETTINGS: Mapping[str, tuple[int, ...]] = {
    "Clip": (1, 2),
    "DequantizeLinear": (1, 2),
    "Dropout": (1, 2),
    "NonMaxSuppression": (2, 3, 4),
    "OneHot": (1, 2),
    "Pad": (1, 2),
    "QLinearConv": (1, 4, 6),
    "QLinearMatMul": (1, 4, 6),
    "QuantizeLinear": (1, 2),
    "Range": (0, 1, 2),
    "Resize": (1, 2, 3),
    "Upsample": (1,),
}
# operator -> {input with integer weights: input with its zero point (None: none)}
INTEGER_WEIGHTS: Mapping[str, Mapping[int, int | None]] = {
    "ConvInteger": {1: 3},
    "DequantizeLinear": {0: 2},
    "MatMulInteger": {1: 3},
    "MatMulNBits": {1: None},
    "QLinearConv": {3: 5, 8: None},
    "QLinearMatMul": {3: 5},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFigures:
    """One initializer with parameters. `sparse_bytes` has an entry for each of `SPARSE_STORAGES`."""

    name: str
    parameters: int
    nonzero_parameters: int
    dense_bytes: int
    sparse_bytes: Mapping[str, int]

    @property
    def smallest_storage(self) -> str:
        """What takes the fewest bytes: "dense", or one of `SPARSE_STORAGES`."""
        best = min(self.sparse_bytes, key=self.sparse_bytes.__getitem__)
        return best if self.sparse_bytes[best] < self.dense_bytes else "dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class _ZeroPoint:
    values: npt.NDArray[Any]
    axis: int


def weight_figures(model: ir.Model) -> tuple[WeightFigures, ...]:
    """The figures of each initializer that holds parameters, in the graph's order; weights are read in windows."""
    return tuple(
        _figures_of(value, zero_point)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
        for zero_point in _as_parameters(value)
    )


def holds_parameters(value: ir.Value) -> bool:
    """True for an initializer whose elements are parameters, by the definition at the top."""
    return value.const_value is not None and any(True for _ in _as_parameters(value))


def model_figures(model: CanonicalModel) -> ModelFigures:
    """Static figures of the whole model.

    `weight_bytes` and `sparse_bytes` are about the same initializers, so that they can be compared: `sparse_bytes`
    says what *all* of them would take in one storage, more than dense where there are few zeros. MACs are those of one
    sample: a named dynamic axis 0 of an input counts as 1.
    """
    weights = weight_figures(model)
    firsts = [value.shape[0] for value in model.graph.inputs if value.shape]
    sizes = {dim.value: 1 for dim in firsts if isinstance(dim, ir.SymbolicDim) and dim.value}
    macs = count_macs_per_sample(model)
    shapes = {value.name: _sized_shape(value, sizes) for value in model.graph.inputs if value.name}
    return ModelFigures(
        parameters=sum(one.parameters for one in weights),
        nonzero_parameters=sum(one.nonzero_parameters for one in weights),
        macs=macs.total,
        weight_bytes=sum(one.dense_bytes for one in weights),
        num_nodes=sum(len(graph) for graph in model.graphs()),
        shape_used={name: shape for name, shape in shapes.items() if shape is not None},
        sparse_bytes={storage: sum(one.sparse_bytes[storage] for one in weights) for storage in SPARSE_STORAGES},
        uncounted_ops=macs.uncounted,
    )


def sparse_storage_bytes(shape: Sequence[int], bitwidth: int, nonzero: int) -> dict[str, int]:
    """Bytes of one weight of `shape` in each of `SPARSE_STORAGES`, `nonzero` of whose elements are not zero."""
    values = (nonzero * bitwidth + 7) // 8
    if not shape:
        return dict.fromkeys(SPARSE_STORAGES, (bitwidth + 7) // 8)
    return {
        "coo": nonzero * 8 + values,
        "csr": nonzero * 4 + values + 4 * (shape[0] + 1),
        "bitmap": values + (math.prod(shape) + 7) // 8,
    }


def zipped_bytes(path: Path) -> int:
    """What the file at `path` takes in a zip archive or a compressed download (deflate, level 6), without headers.

    Raises:
        OutputError: The file can't be read.
    """
    compressor = zlib.compressobj(_ZIP_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    size = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                size += len(compressor.compress(chunk))
    except OSError as error:
        raise OutputError(f"'{path}' can't be read: {error.strerror}.") from error
    return size + len(compressor.flush())


def _sized_shape(value: ir.Value, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """The input's shape with `sizes` for its named dimensions; None where one stays open."""
    if value.shape is None:
        return None
    dims = [dim if isinstance(dim, int) else sizes.get(dim.value or "") for dim in value.shape]
    known = tuple(dim for dim in dims if dim is not None)
    return known if len(known) == len(dims) else None


def _as_parameters(value: ir.Value) -> Iterator[_ZeroPoint | None]:
    """Once for an initializer that holds parameters (with the zero point of integers), else nothing."""
    dtype = value.dtype
    if dtype is None:
        return
    uses = [(node, index) for node, index in value.uses()]
    if dtype.is_floating_point():
        if not uses or value.is_graph_output() or any(i not in SETTINGS.get(node.op_type, ()) for node, i in uses):
            yield None
        return
    for node, index in uses:
        weights = INTEGER_WEIGHTS.get(node.op_type, {})
        if index in weights:
            yield _zero_point(node, weights[index])
            return


def _zero_point(node: ir.Node, index: int | None) -> _ZeroPoint | None:
    if index is None or index >= len(node.inputs):
        return None
    values = constant_array(node.inputs[index])
    if values is None or not np.any(values):
        return None
    default = 1 if node.op_type == "DequantizeLinear" else 0
    return _ZeroPoint(values=values, axis=node.attributes.get_int("axis", default))


def _figures_of(value: ir.Value, zero_point: _ZeroPoint | None) -> WeightFigures:
    tensor = value.const_value
    if tensor is None:
        raise ValueError(f"'{value.name}' is no initializer")
    shape = tuple(tensor.shape.numpy())
    nonzero = sum(
        int(np.count_nonzero(_stands_for_nonzero(window.array, window.start, shape, zero_point)))
        for window in iter_windows(value, _WINDOW_BYTES)
    )
    return WeightFigures(
        name=value.name or "",
        parameters=tensor.size,
        nonzero_parameters=nonzero,
        dense_bytes=tensor.nbytes,
        sparse_bytes=sparse_storage_bytes(shape, tensor.dtype.bitwidth, nonzero),
    )


def _stands_for_nonzero(
    window: npt.NDArray[Any], start: int, shape: tuple[int, ...], zero_point: _ZeroPoint | None
) -> npt.NDArray[np.bool_]:
    """For each element of the window, whether it stands for another number than 0."""
    if zero_point is None:
        return np.asarray(window != 0, dtype=bool)
    points = zero_point.values
    if points.size == 1:
        return np.asarray(window != points.reshape(()), dtype=bool)
    if points.ndim == 1 and points.size == shape[zero_point.axis]:
        # Row-major: the index along `axis` changes every `inner` elements.
        inner = int(np.prod(shape[zero_point.axis % len(shape) + 1 :], dtype=np.int64))
        positions = (np.arange(start, start + window.size) // inner) % points.size
        return np.asarray(window != points[positions], dtype=bool)
    # Blocked quantization: one zero point for each block along `axis`.
    axis = zero_point.axis % len(shape)
    block = -(-shape[axis] // points.shape[axis])
    index = list(np.unravel_index(np.arange(start, start + window.size), shape))
    index[axis] = index[axis] // block
    return np.asarray(window != points[tuple(index)], dtype=bool)
