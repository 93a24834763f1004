"""Flattening in front of a constant weight: the weight's columns follow the axes.

    x(N, C, H, W) -> RESHAPE (N, C*H*W) -> FULLY_CONNECTED with a weight of (units, C*H*W)

Stored as (N, H, W, C), x need not be transposed: the columns of the weight are, before anything runs. Operators of one
input that compute number by number may stand in between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from onnxprune.targets.tflite.graph import Constant
from onnxprune.targets.tflite.layout.axes import AxisMap, Form, Permutation, Port, factor_reshape, identity
from onnxprune.targets.tflite.layout.flow import Flow, OperatorView

__all__ = ["UNARY", "Flattened"]

UNARY = frozenset({
    "ABS", "CAST", "CEIL", "COS", "DEQUANTIZE", "ELU", "EXP", "FLOOR", "GELU", "HARD_SWISH", "LEAKY_RELU", "LOG",
    "LOGICAL_NOT", "LOGISTIC", "NEG", "QUANTIZE", "RELU", "RELU6", "RELU_0_TO_1", "RELU_N1_TO_1", "ROUND", "RSQRT",
    "SIGN", "SIN", "SQRT", "SQUARE", "TANH", "ZEROS_LIKE",
})  # fmt: skip
"""Kinds with one data input that compute each number from the one at its place."""


@dataclass(frozen=True, slots=True)
class Flattened:
    """A RESHAPE that joins all axes behind the first `kept` into columns, and the weights behind it."""

    view: OperatorView
    kept: int
    columns: tuple[tuple[int, int], ...]
    """(place in the graph, position) of the constants with these columns."""

    @classmethod
    def of(cls, view: OperatorView) -> Flattened | None:
        """None where this RESHAPE does something else, or somebody else sees the columns."""
        before, after = view.input(0).shape, view.output().shape
        factored = factor_reshape(before, after)
        if factored is None:
            return None
        last = next((factor for factor, run in enumerate(factored[1]) if run == (len(after) - 1,)), None)
        if last is None or len(factored[0][last]) < 2:
            return None
        kept = factored[0][last][0]
        if any(run for run in factored[1][last + 1 :]) or min(before[kept:]) < 1:
            return None
        columns = _columns(view.flow, view.operator.outputs[0], math.prod(before[kept:]))
        return None if columns is None else cls(view, kept, tuple(columns))

    def axis_map(self) -> AxisMap:
        """The joined axes can have any order; those in front of them stay."""
        front = identity(self.kept)
        runs = tuple((axis,) for axis in range(self.view.input(0).rank))
        return AxisMap(runs={Port(is_output=False, position=0): runs}, allows=lambda order: order[: self.kept] == front)

    def weights(self, form: Form) -> dict[tuple[int, int], Constant]:
        """The weights with their columns in the new order."""
        shape = self.view.input(0).shape[self.kept :]
        order = tuple(axis - self.kept for axis in form.order[self.kept :])
        return {
            place: _with_columns(stored, shape, order)
            for place in self.columns
            if (stored := self.view.flow.view(place[0]).constant(place[1])) is not None
        }


def _with_columns(weight: Constant, shape: tuple[int, ...], order: Permutation) -> Constant:
    """(units, *shape) with the axes of `shape` in another order, as columns again."""
    split = weight.reshaped((weight.shape[0], *shape))
    return split.transposed((0, *(axis + 1 for axis in order))).reshaped(weight.shape)


def _columns(flow: Flow, name: str, length: int) -> list[tuple[int, int]] | None:
    """The constants that are multiplied with the columns of the tensor, and nobody else reads it."""
    found: list[tuple[int, int]] = []
    waiting = [name]
    while waiting:
        read = waiting.pop()
        if read in flow.leaving:
            return None
        for reader in flow.readers.get(read, ()):
            view = flow.view(reader.place)
            if reader.path != identity(len(reader.path)) or reader.position != 0:
                return None
            if view.operator.kind in UNARY and not _has_axis_of_scales(view):
                waiting.append(view.operator.outputs[0])
                continue
            place = _weight(view, length) if view.operator.kind == "FULLY_CONNECTED" else None
            if place is None:
                return None
            found.append(place)
    return found or None


def _has_axis_of_scales(view: OperatorView) -> bool:
    return any(
        tensor.quantization is not None and tensor.quantization.is_per_axis for tensor in (view.input(0), view.output())
    )


def _weight(view: OperatorView, length: int) -> tuple[int, int] | None:
    """Where the numbers of a constant weight stand: in this operator, or in the DEQUANTIZE in front of it."""
    flow, name = view.flow, view.operator.inputs[1]
    place = (view.index, 1)
    if view.constant(1) is None:
        index = flow.producers.get(name)
        if index is None or name in flow.leaving or len(flow.readers[name]) != 1:
            return None
        if flow.graph.operators[index].kind != "DEQUANTIZE":
            return None
        place = (index, 0)
        stored = flow.graph.tensors[flow.graph.operators[index].inputs[0]]
        if stored.quantization is not None and stored.quantization.is_per_axis and stored.quantization.axis != 0:
            return None
    constant = flow.view(place[0]).constant(place[1])
    if constant is None or len(constant.shape) != 2 or int(np.prod(constant.shape[1:])) != length:
        return None
    return place
