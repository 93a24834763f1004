"""Formulas over tensors, written as formulas: `x / (abs(x) + 1)` is ABS, ADD and DIV.

Numbers become constants of the other operand's element type and rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.targets.tflite.build import Builder
from onnxprune.targets.tflite.graph import NUMPY_TYPES, OptionValue, Tensor, TensorType

__all__ = ["Term"]


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """A tensor in a formula. Each operation notes down one TFLite operator."""

    build: Builder
    tensor: Tensor

    def __abs__(self) -> Term:
        return self.unary("ABS")

    def __neg__(self) -> Term:
        return self.unary("NEG")

    def __add__(self, other: Term | float) -> Term:
        return self.binary("ADD", other)

    def __sub__(self, other: Term | float) -> Term:
        return self.binary("SUB", other)

    def __mul__(self, other: Term | float) -> Term:
        return self.binary("MUL", other)

    def __truediv__(self, other: Term | float) -> Term:
        return self.binary("DIV", other)

    def __mod__(self, other: Term | float) -> Term:
        """Of the sign of `other`, as Python has it."""
        return self.binary("FLOOR_MOD", other)

    def __radd__(self, number: float) -> Term:
        return self.number(number).binary("ADD", self)

    def __rsub__(self, number: float) -> Term:
        return self.number(number).binary("SUB", self)

    def __rmul__(self, number: float) -> Term:
        return self.number(number).binary("MUL", self)

    def __rtruediv__(self, number: float) -> Term:
        return self.number(number).binary("DIV", self)

    def __gt__(self, other: Term | float) -> Term:
        return self.compared("GREATER", other)

    def __lt__(self, other: Term | float) -> Term:
        return self.compared("LESS", other)

    def at_least(self, other: Term | float) -> Term:
        """The larger of the two."""
        return self.binary("MAXIMUM", other)

    def at_most(self, other: Term | float) -> Term:
        """The smaller of the two."""
        return self.binary("MINIMUM", other)

    def magnitude(self) -> Term:
        """ABS; of INT64, which it lacks, the larger of the number and its negative."""
        return self.at_least(-self) if self.tensor.type == "INT64" else abs(self)

    def compared(self, kind: str, other: Term | float) -> Term:
        """A comparison, by its kind: BOOL."""
        return Term(self.build, self.build.binary(kind, self.tensor, self._operand(other), type_="BOOL"))

    def unary(self, kind: str, **options: OptionValue) -> Term:
        """An operator of this tensor that keeps shape and element type."""
        return Term(
            self.build, self.build.op(kind, [self.tensor], shape=self.tensor.shape, type_=self.tensor.type, **options)
        )

    def binary(self, kind: str, other: Term | float, **options: OptionValue) -> Term:
        """An operator of two tensors that broadcast, and keeps the element type."""
        return Term(
            self.build, self.build.binary(kind, self.tensor, self._operand(other), type_=self.tensor.type, **options)
        )

    def cast(self, type_: TensorType) -> Term:
        """As another element type."""
        return Term(self.build, self.build.cast(self.tensor, type_))

    def selecting(self, where_true: Term, where_false: Term | float) -> Term:
        """Of two tensors, by this BOOL one."""
        other = where_true._operand(where_false)
        rank = max(self.tensor.rank, where_true.tensor.rank, other.rank)
        parts = [self.build.with_rank(part, rank) for part in (self.tensor, where_true.tensor, other)]
        return Term(self.build, self.build.op("SELECT_V2", parts, type_=where_true.tensor.type))

    def number(self, number: float) -> Term:
        """A constant of this element type, with this many axes."""
        array = np.full((1,) * self.tensor.rank, number, NUMPY_TYPES[self.tensor.type])
        return Term(self.build, self.build.constant(array))

    def _operand(self, other: Term | float) -> Tensor:
        return (other if isinstance(other, Term) else self.number(other)).tensor
