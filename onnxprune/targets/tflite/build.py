"""What emitters build with: tensors in, tensors out, operators noted down on the way.

Axes are ONNX's throughout. An emitter that needs another order calls `Builder.transposed`; the layout stage makes the
transpositions go away. Whatever is computed from constants alone, and cheap, is computed here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.targets.tflite.elements import MAX_ELEMENTS, Elements
from onnxprune.targets.tflite.folding import folded
from onnxprune.targets.tflite.graph import (
    NUMPY_TYPES,
    Constant,
    Operator,
    OptionValue,
    Shape,
    Tensor,
    TensorType,
    compose,
    permuted_shape,
)

__all__ = ["COMPUTED_AS", "Builder", "UnsupportedError", "broadcast_shape", "tensor_type_of"]


class UnsupportedError(Exception):
    """A node that can't be expressed. The message is the reason, as in "TRANSPOSE_CONV has no groups".

    Never leaves `lower`, which names all of them at once.
    """


COMPUTED_AS: Mapping[TensorType, TensorType] = {"FLOAT16": "FLOAT32", "BFLOAT16": "FLOAT32", "FLOAT64": "FLOAT32"}
"""Floating-point types that LiteRT stores and converts but has no arithmetic for. Inside, they are FLOAT32."""

_MAX_FILLED_ELEMENTS = 1024
"""More elements that are all the same are not worth their bytes in the file."""
_STEERING_TYPES: tuple[TensorType, ...] = ("INT32", "INT64", "BOOL")


class Builder:
    """Collects the operators of one graph."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.operators: list[Operator] = []
        self.node = ""
        """The ONNX node that is being emitted."""
        self._taken: set[str] = set()
        self._producers: dict[str, int] = {}
        self._elements: dict[str, Elements] = {}
        self._shapes: dict[str, str] = {}

    # --- tensors ----------------------------------------------------------------------------------------------

    def name(self, wanted: str) -> str:
        """`wanted`, or with a number behind it where that is taken."""
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name

    def reserve(self, names: Sequence[str]) -> None:
        """Keep names of ONNX values for what stands for them."""
        self._taken.update(names)

    def add(self, tensor: Tensor) -> Tensor:
        """Make `tensor` part of the graph."""
        self.tensors[tensor.name] = tensor
        return tensor

    def constant(self, array: npt.ArrayLike, type_: TensorType | None = None, *, name: str = "") -> Tensor:
        """A constant; Python integers become INT32 and Python floats FLOAT32 unless `type_` says otherwise."""
        numbers = np.asarray(array)
        if type_ is None and not isinstance(array, (np.ndarray, np.generic)):
            type_ = {"i": "INT32", "f": "FLOAT32", "b": "BOOL"}[numbers.dtype.kind]  # type: ignore[assignment]
        type_ = type_ or tensor_type_of(numbers.dtype)
        return self.constant_tensor(Constant.of(numbers.astype(NUMPY_TYPES[type_], copy=False)), name=name)

    def constant_tensor(self, constant: Constant, *, name: str = "") -> Tensor:
        """A tensor that holds `constant`."""
        name = self.name(name or f"{self.node}/constant")
        return self.add(Tensor(name=name, type=tensor_type_of(constant.dtype), shape=constant.shape, constant=constant))

    # --- operators --------------------------------------------------------------------------------------------

    def op(
        self,
        kind: str,
        inputs: Sequence[Tensor | None],
        *,
        shape: Shape | None = None,
        type_: TensorType | None = None,
        **options: OptionValue,
    ) -> Tensor:
        """The output of a new operator with one output, or a constant where it can be computed now.

        Args:
            kind: Of the schema's BuiltinOperator.
            inputs: None for one that is left out.
            shape: Of the output; None: the inputs broadcast.
            type_: Of the output; None: that of the first input.
            options: Fields of the options table.
        """
        given = [tensor for tensor in inputs if tensor is not None]
        shape = broadcast_shape(*(tensor.shape for tensor in given)) if shape is None else shape
        type_ = type_ or given[0].type
        known = folded(kind, inputs, shape, type_, options)
        if known is not None:
            return self.constant(known, type_)
        (output,) = self.ops(kind, inputs, outputs=[(shape, type_)], **options)
        return output

    def ops(
        self,
        kind: str,
        inputs: Sequence[Tensor | None],
        *,
        outputs: Sequence[tuple[Shape, TensorType]],
        **options: OptionValue,
    ) -> tuple[Tensor, ...]:
        """The outputs of a new operator; shape and type of each are given."""
        made = tuple(
            self.add(Tensor(name=self.name(f"{self.node}/{kind.lower()}"), type=type_, shape=tuple(shape)))
            for shape, type_ in outputs
        )
        self._producers.update((tensor.name, len(self.operators)) for tensor in made)
        self.operators.append(
            Operator(
                kind=kind,
                inputs=tuple("" if tensor is None else tensor.name for tensor in inputs),
                outputs=tuple(tensor.name for tensor in made),
                options=options,
                node=self.node,
            )
        )
        return made

    def binary(
        self, kind: str, left: Tensor, right: Tensor, *, type_: TensorType | None = None, **options: OptionValue
    ) -> Tensor:
        """An operator of two tensors that broadcast, brought to the same rank (so that axes can be reordered)."""
        rank = max(left.rank, right.rank)
        left, right = self.with_rank(left, rank), self.with_rank(right, rank)
        shape = broadcast_shape(left.shape, right.shape)
        return self.op(kind, [left, right], shape=shape, type_=type_, **options)

    def chained(self, kind: str, tensors: Iterable[Tensor]) -> Tensor:
        """`binary` over all of them (one at least) from the left; a generator is asked for one at a time."""
        return functools.reduce(lambda left, right: self.binary(kind, left, right), tensors)

    # --- what is known ahead ---------------------------------------------------------------------------------

    def known_elements(self, tensor: Tensor) -> Elements | None:
        """What is known of a short integer tensor before the model runs, element by element."""
        if tensor.constant is None:
            return self._elements.get(tensor.name)
        if tensor.type not in _STEERING_TYPES or tensor.num_elements > MAX_ELEMENTS:
            return None
        array = tensor.constant.array()
        return Elements.of((int(number) for number in array.reshape(-1)), array.shape)

    def note_elements(self, tensor: Tensor, elements: Elements) -> None:
        """Remember what is known of a computed tensor."""
        self._elements[tensor.name] = elements

    # --- reordering and reshaping ---------------------------------------------------------------------------

    def transposed(self, tensor: Tensor, permutation: Sequence[int]) -> Tensor:
        """Axes in another order; nothing to do where the order is the same, done at once for a constant."""
        order = tuple(int(axis) for axis in permutation)
        if order == tuple(range(tensor.rank)):
            return tensor
        if tensor.constant is not None:
            return self.constant_tensor(tensor.constant.transposed(order), name=f"{tensor.name}/transposed")
        producer = self.producer(tensor)
        if producer is not None and producer.kind == "TRANSPOSE":
            before, first = self.tensors[producer.inputs[0]], self.tensors[producer.inputs[1]].array()
            assert first is not None  # noqa: S101 - only this method makes TRANSPOSE
            return self.transposed(before, compose(tuple(int(axis) for axis in first), order))
        return self.op(
            "TRANSPOSE",
            [tensor, self.constant(np.array(order, np.int32))],
            shape=permuted_shape(tensor.shape, order),
            type_=tensor.type,
        )

    def reshaped(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """The same numbers in another shape, with at most one dimension that is not known (-1)."""
        wanted = tuple(int(dim) for dim in shape)
        if wanted == tensor.shape and (tensor.is_static or wanted.count(-1) == 1):
            return tensor
        if tensor.constant is not None:
            return self.constant_tensor(tensor.constant.reshaped(wanted), name=f"{tensor.name}/reshaped")
        if wanted.count(-1) > 1 or (-1 in wanted and 0 in wanted):
            raise UnsupportedError(f"RESHAPE to {list(wanted)} has several dimensions that only the run knows")
        return self.op(
            "RESHAPE",
            [tensor, self.constant(np.array(wanted, np.int32))],
            shape=wanted,
            type_=tensor.type,
            newShape=wanted,
        )

    def with_rank(self, tensor: Tensor, rank: int) -> Tensor:
        """With axes of length 1 in front, as NumPy broadcasts."""
        missing = rank - tensor.rank
        if missing <= 0:
            return tensor
        if tensor.shape.count(-1) > 1:
            return self.unsqueezed(tensor, range(missing))
        return self.reshaped(tensor, (1,) * missing + tensor.shape)

    def unsqueezed(self, tensor: Tensor, axes: Iterable[int]) -> Tensor:
        """With axes of length 1, at these positions of the result."""
        shape = list(tensor.shape)
        positions = sorted(axes)
        for axis in positions:
            shape.insert(axis, 1)
        if shape.count(-1) <= 1:
            return self.reshaped(tensor, shape)
        # EXPAND_DIMS takes any shape, one axis at a time.
        for axis in positions:
            larger = (*tensor.shape[:axis], 1, *tensor.shape[axis:])
            position = self.constant(np.array(axis, np.int32))
            tensor = self.op("EXPAND_DIMS", [tensor, position], shape=larger, type_=tensor.type)
        return tensor

    def squeezed(self, tensor: Tensor, axes: Iterable[int]) -> Tensor:
        """Without these axes, whose length is 1."""
        gone = sorted(axes)
        shape = tuple(dim for axis, dim in enumerate(tensor.shape) if axis not in gone)
        if shape.count(-1) <= 1:
            return self.reshaped(tensor, shape)
        return self.op("SQUEEZE", [tensor], shape=shape, type_=tensor.type, squeezeDims=tuple(gone))

    def cast(self, tensor: Tensor, type_: TensorType) -> Tensor:
        """As another element type."""
        if tensor.type == type_:
            return tensor
        if tensor.constant is not None:
            return self.constant_tensor(tensor.constant.cast(NUMPY_TYPES[type_]), name=f"{tensor.name}/cast")
        return self.op("CAST", [tensor], shape=tensor.shape, type_=type_, inDataType=tensor.type, outDataType=type_)

    def shape_of(self, tensor: Tensor) -> Tensor:
        """The dimensions as an INT32 vector: a constant where all are known, else SHAPE."""
        if tensor.is_static:
            return self.constant(np.array(tensor.shape, np.int32))
        known = self.tensors.get(self._shapes.get(tensor.name, ""))
        if known is None:
            known = self.op("SHAPE", [tensor], shape=(tensor.rank,), type_="INT32", outType="INT32")
            self._shapes[tensor.name] = known.name
        return known

    def copied(self, tensor: Tensor) -> Tensor:
        """RESHAPE to its own shape: LiteRT wants an operator behind every output, and one output each."""
        return self.op("RESHAPE", [tensor, self.shape_of(tensor)], shape=tensor.shape, type_=tensor.type)

    def scalar(self, tensor: Tensor) -> Tensor:
        """A tensor of one element without axes."""
        return self.reshaped(tensor, ())

    def filled(self, shape: Sequence[int | Tensor], value: npt.NDArray[Any] | np.generic) -> Tensor:
        """One number everywhere: a constant where that is small, else FILL."""
        dims = tuple(dim if isinstance(dim, int) else -1 for dim in shape)
        if -1 not in dims and math.prod(dims) <= _MAX_FILLED_ELEMENTS:
            return self.constant(np.full(dims, value))
        number = self.constant(np.asarray(value).reshape(()))
        return self.op("FILL", [self.vector(shape), number], shape=dims, type_=number.type)

    def vector(self, parts: Sequence[int | Tensor]) -> Tensor:
        """An INT32 vector of numbers and of tensors (scalars and vectors of integers)."""
        joined: list[Tensor] = []
        numbers: list[int] = []
        for part in (*parts, None):
            if isinstance(part, int):
                numbers.append(part)
                continue
            if numbers:
                joined.append(self.constant(np.array(numbers, np.int32)))
                numbers = []
            if part is not None:
                as_vector = part if part.rank == 1 else self.reshaped(part, (1,))
                joined.append(self.cast(as_vector, "INT32"))
        if not joined:
            return self.constant(np.zeros(0, np.int32))
        if len(joined) == 1:
            return joined[0]
        return self.op("CONCATENATION", joined, shape=(sum(one.shape[0] for one in joined),), type_="INT32", axis=0)

    def length(self, tensor: Tensor, axis: int) -> int | Tensor:
        """The length of an axis: a number where it is known, else an INT32 vector of one element."""
        if tensor.shape[axis] >= 0:
            return tensor.shape[axis]
        begin, end, step = (self.constant(np.array([number], np.int32)) for number in (axis, axis + 1, 1))
        return self.op("STRIDED_SLICE", [self.shape_of(tensor), begin, end, step], shape=(1,), type_="INT32")

    # --- for the lowering -----------------------------------------------------------------------------------

    def producer(self, tensor: Tensor) -> Operator | None:
        """The operator that computes `tensor`; None for an input or a constant."""
        position = self._producers.get(tensor.name)
        return None if position is None else self.operators[position]

    def renamed(self, tensor: Tensor, name: str) -> Tensor:
        """`tensor` under another name; an operator of the node at hand computes it."""
        old = tensor.name
        renamed = replace(tensor, name=name)
        del self.tensors[old]
        self.add(renamed)
        position = self._producers.pop(old)
        self._producers[name] = position
        for later in range(position, len(self.operators)):
            operator = self.operators[later]
            if old in (*operator.inputs, *operator.outputs):
                self.operators[later] = replace(
                    operator,
                    inputs=tuple(name if given == old else given for given in operator.inputs),
                    outputs=tuple(name if given == old else given for given in operator.outputs),
                )
        return renamed

    def take_back(self, count: int) -> None:
        """Forget the operators behind the first `count`."""
        for operator in self.operators[count:]:
            for name in operator.outputs:
                del self._producers[name]
                del self.tensors[name]
        del self.operators[count:]


def broadcast_shape(*shapes: Shape) -> Shape:
    """The shape that `shapes` broadcast to; -1 where that is not known."""
    rank = max(len(shape) for shape in shapes)
    found: list[int] = []
    for position in range(rank):
        dims = {shape[position - rank + len(shape)] for shape in shapes if position - rank + len(shape) >= 0}
        known = {dim for dim in dims if dim not in (1, -1)}
        if len(known) > 1:
            raise UnsupportedError(f"shapes {', '.join(str(list(shape)) for shape in shapes)} don't broadcast")
        found.append(known.pop() if known else (-1 if -1 in dims else 1))
    return tuple(found)


def tensor_type_of(dtype: np.dtype[Any]) -> TensorType:
    """The schema's name of a NumPy element type.

    Raises:
        UnsupportedError: The schema has none.
    """
    for name, known in NUMPY_TYPES.items():
        if known == dtype:
            return name
    raise UnsupportedError(f"TFLite has no tensors of {dtype}")
