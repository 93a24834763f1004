"""A small typed TFLite graph: what stands between the ONNX graph and the flatbuffer.

Tensors are known by name. Everything is frozen: stages make new graphs (`Editor` in `edit.py` helps). Kinds, options
and element types bear the names of the TFLite schema, so that serializing is a look-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "NUMPY_TYPES",
    "Constant",
    "Graph",
    "Grid",
    "Model",
    "Operator",
    "OptionValue",
    "Quantization",
    "Shape",
    "Sparsity",
    "Tensor",
    "TensorType",
    "compose",
    "inverse",
    "permuted_shape",
]

TensorType: TypeAlias = Literal[
    "FLOAT32", "FLOAT16", "BFLOAT16", "FLOAT64",
    "INT8", "UINT8", "INT16", "UINT16", "INT32", "UINT32", "INT64", "UINT64",
    "BOOL", "STRING", "COMPLEX64",
]  # fmt: skip
"""Names of the schema's enumeration."""

NUMPY_TYPES: Mapping[TensorType, np.dtype[Any]] = {
    "FLOAT32": np.dtype(np.float32),
    "FLOAT16": np.dtype(np.float16),
    "FLOAT64": np.dtype(np.float64),
    "INT8": np.dtype(np.int8),
    "UINT8": np.dtype(np.uint8),
    "INT16": np.dtype(np.int16),
    "UINT16": np.dtype(np.uint16),
    "INT32": np.dtype(np.int32),
    "UINT32": np.dtype(np.uint32),
    "INT64": np.dtype(np.int64),
    "UINT64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
    "COMPLEX64": np.dtype(np.complex64),
}

Shape: TypeAlias = tuple[int, ...]
"""Dimensions; -1 for one that is known only when the model runs."""

OptionValue: TypeAlias = bool | int | float | str | tuple[int, ...]
"""A field of an operator's options table. Enumerations are given by their name in the schema ("SAME", "RELU6")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """real = (integer - zero point) * scale; one scale, or one for each index of `axis`."""

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    axis: int = 0

    @property
    def is_per_axis(self) -> bool:
        """True when indices of `axis` have scales of their own."""
        return len(self.scales) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The narrower type that floating-point constants fit into without rounding.

    Integers: each number is (integer - zero point) * scale, which is what a DequantizeLinear of constants leaves
    behind; the integer stage finds the integers again. FLOAT16 (with scale 1): a model in half precision.
    """

    type: TensorType
    quantization: Quantization

    def transposed(self, permutation: tuple[int, ...]) -> Grid:
        """For the constants with their axes in another order."""
        if not self.quantization.is_per_axis:
            return self
        axis = permutation.index(self.quantization.axis)
        return replace(self, quantization=replace(self.quantization, axis=axis))

    def reshaped(self, old: tuple[int, ...], new: tuple[int, ...]) -> Grid | None:
        """For the constants in another shape; None where no axis of it has the scales."""
        if not self.quantization.is_per_axis:
            return self
        axis = self.quantization.axis
        before = math.prod(old[:axis])
        for candidate, size in enumerate(new):
            if size == old[axis] and math.prod(new[:candidate]) == before:
                return replace(self, quantization=replace(self.quantization, axis=candidate))
        return None

    def sliced(self, axis: int, begin: int, length: int) -> Grid:
        """For `length` indices of an axis of the constants, from `begin` on."""
        given = self.quantization
        if not given.is_per_axis or given.axis != axis:
            return self
        window = slice(begin, begin + length)
        kept = replace(given, scales=given.scales[window], zero_points=given.zero_points[window])
        return replace(self, quantization=kept)


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """Numbers that are read when they are needed: a model's weights need not be in memory together.

    `load` gives an array of `shape` and `dtype`, which may be a read-only view of a file: let go of it soon. `grid` is
    kept by what only moves the numbers.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], npt.NDArray[Any]]
    grid: Grid | None = None

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> Constant:
        """These numbers, kept in memory."""
        return cls(array.shape, array.dtype, lambda: array)

    def array(self) -> npt.NDArray[Any]:
        """The numbers."""
        found = self.load()
        if found.shape != self.shape or found.dtype != self.dtype:
            raise ValueError(f"a constant of {self.dtype}{self.shape} gave {found.dtype}{found.shape}")
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def transposed(self, permutation: tuple[int, ...]) -> Constant:
        """Axes in another order, as `numpy.transpose` does it."""
        return Constant(
            tuple(self.shape[axis] for axis in permutation),
            self.dtype,
            lambda: np.ascontiguousarray(self.load().transpose(permutation)),
            None if self.grid is None else self.grid.transposed(permutation),
        )

    def reshaped(self, shape: tuple[int, ...]) -> Constant:
        """The same numbers in the same order."""
        grid = None if self.grid is None else self.grid.reshaped(self.shape, shape)
        return Constant(shape, self.dtype, lambda: self.load().reshape(shape), grid)

    def sliced(self, axis: int, begin: int, length: int) -> Constant:
        """`length` indices of an axis, from `begin` on."""
        window = (slice(None),) * axis + (slice(begin, begin + length),)
        return Constant(
            (*self.shape[:axis], length, *self.shape[axis + 1 :]),
            self.dtype,
            lambda: np.ascontiguousarray(self.load()[window]),
            None if self.grid is None else self.grid.sliced(axis, begin, length),
        )

    def cast(self, dtype: npt.DTypeLike) -> Constant:
        """As another element type."""
        wanted = np.dtype(dtype)
        return self if wanted == self.dtype else Constant(self.shape, wanted, lambda: self.load().astype(wanted))

    def mapped(self, function: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Constant:
        """`function` of the numbers, which keeps shape and element type."""
        return Constant(self.shape, self.dtype, lambda: function(self.load()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sparsity:
    """Where the non-zeros of a constant stand: compressed rows along its last axis.

    Row r (all axes but the last, counted in C order) has the non-zeros number `segments[r]` to `segments[r + 1]`, and
    `indices` has their places on the last axis. Both stand inside the flatbuffer, so they are kept in memory.
    """

    segments: npt.NDArray[Any]
    indices: npt.NDArray[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of both vectors."""
        return self.segments.nbytes + self.indices.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor. `constant` None: fed or computed.

    With `sparsity`, `constant` is the vector of its non-zeros, and `shape` still that of the dense tensor.
    `layout` is the permutation p by which it differs from the ONNX value of its name: stored = transpose(value, p).
    None: it is stored as ONNX has it, or there is no such value.
    """

    name: str
    type: TensorType
    shape: Shape
    constant: Constant | None = None
    quantization: Quantization | None = None
    sparsity: Sparsity | None = None
    layout: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def is_static(self) -> bool:
        """True when all dimensions are known."""
        return all(dim >= 0 for dim in self.shape)

    @property
    def num_elements(self) -> int:
        """Elements, with unknown dimensions counted as 1."""
        return int(np.prod([max(dim, 1) if dim < 0 else dim for dim in self.shape], dtype=np.int64))

    def array(self) -> npt.NDArray[Any] | None:
        """The numbers of a constant; None for anything else."""
        return None if self.constant is None else self.constant.array()


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One TFLite operator. `inputs` and `outputs` are tensor names, "" for an input that is left out.

    `options` are fields of the kind's options table, where they differ from the schema's defaults. `node` names the
    ONNX node that it came from. IF and WHILE name their bodies by index of `Model.graphs`, in their options.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    node: str = ""

    def option(self, name: str, default: OptionValue) -> Any:
        """A field of the options, or `default`."""
        return self.options.get(name, default)

    def with_options(self, **changed: OptionValue) -> Operator:
        """The same operator with some options changed."""
        return replace(self, options={**self.options, **changed})


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """Operators in an order in which they can run. Names of interface tensors are those of the ONNX model.

    `values` are the names of ONNX values; tensors with other names are intermediate results of an emitter.
    """

    name: str
    tensors: Mapping[str, Tensor]
    operators: tuple[Operator, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: frozenset[str] = frozenset()

    def producers(self) -> dict[str, Operator]:
        """Tensor name -> the operator that computes it."""
        return {name: operator for operator in self.operators for name in operator.outputs}

    def consumers(self) -> dict[str, list[Operator]]:
        """Tensor name -> operators that read it, each once; outputs of the graph are not among them."""
        found: dict[str, list[Operator]] = {}
        for operator in self.operators:
            for name in dict.fromkeys(operator.inputs):
                if name:
                    found.setdefault(name, []).append(operator)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is serialized. The first graph is the main one; the others are bodies of IF and WHILE.

    `metadata` are named buffers; `input_names` and `output_names` are those of the signature, for the tensors of
    `graphs[0].inputs` and `outputs`.
    """

    graphs: tuple[Graph, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    metadata: Mapping[str, bytes] = field(default_factory=dict)
    description: str = "onnxprune"

    @property
    def main(self) -> Graph:
        """The main graph."""
        return self.graphs[0]

    def with_main(self, graph: Graph) -> Model:
        """The same model with another main graph."""
        return replace(self, graphs=(graph, *self.graphs[1:]))


def inverse(permutation: Iterable[int]) -> tuple[int, ...]:
    """The permutation that undoes this one."""
    given = tuple(permutation)
    return tuple(given.index(axis) for axis in range(len(given)))


def compose(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    """One permutation for transposing by `first` and then by `second`."""
    return tuple(first[axis] for axis in second)


def permuted_shape(shape: Shape, permutation: tuple[int, ...]) -> Shape:
    """The shape after transposing."""
    return tuple(shape[axis] for axis in permutation)
