"""Which constants of an operator are weights that may be stored as integers, and which axis has its own scales.

Only weights in the sense of a layer: constants of element-wise arithmetic (anchors, masks, strides of a detector) have
no row, because eight bits would move the boxes that are computed with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from onnxprune.ops.layout import weight_axes
from onnxprune.ops.table import OpTable

__all__ = ["STORED_WEIGHTS", "StoredRow", "StoredWeight", "stored_weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """A constant weight of a node. `axis` has one scale for each index; None: one scale for all numbers."""

    value: ir.Value
    axis: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRow:
    """One operator. `more_positions` are inputs with weights beside the layout table's, with the same axis."""

    axis: Callable[[ir.Node, int | None], int | None] = lambda _node, out_axis: out_axis
    """The axis with scales of its own, given the axis of outputs that the layout table names."""
    more_positions: tuple[int, ...] = ()
    refuses: Callable[[ir.Node], bool] = lambda _node: False
    """True for a node whose constant is no weight after all."""


STORED_WEIGHTS: OpTable[StoredRow] = OpTable("weights stored as integers")


def stored_weights(node: ir.Node) -> tuple[StoredWeight, ...]:
    """The constant weights of `node` that may be stored as integers, each once."""
    row = STORED_WEIGHTS.get(node)
    axes = weight_axes(node) if row is not None else None
    if row is None or axes is None or row.refuses(node):
        return ()
    axis = row.axis(node, axes.out_axis)
    positions = (axes.weight_input, *row.more_positions)
    values = (node.inputs[position] for position in positions if position < len(node.inputs))
    constants = (value for value in values if value is not None and value.const_value is not None)
    return tuple(StoredWeight(value=value, axis=axis) for value in dict.fromkeys(constants))


def _transposed_conv_axis(node: ir.Node, out_axis: int | None) -> int | None:
    # Grouped, an index of axis 1 is a channel of every group; axis 0 at least tells the groups apart.
    return out_axis if node.attributes.get_int("group", 1) == 1 else 0


def _picks_no_rows(node: ir.Node) -> bool:
    table = node.inputs[0]
    rank = None if table is None or table.shape is None else len(table.shape)
    return node.attributes.get_int("axis", 0) != 0 or rank is None or rank < 2


def _register_rows() -> None:
    STORED_WEIGHTS.add(StoredRow(), "Conv", "Gemm", "MatMul")
    STORED_WEIGHTS.add(StoredRow(axis=_transposed_conv_axis), "ConvTranspose")
    # The gates of W and R: one scale for each unit of each gate.
    STORED_WEIGHTS.add(StoredRow(more_positions=(2,)), "LSTM", "GRU", "RNN")
    # A table of embeddings: rows differ most in magnitude, and one that is also a classifier's weight keeps its
    # integers, because there the rows are the outputs.
    STORED_WEIGHTS.add(StoredRow(axis=lambda _node, _out_axis: 0, refuses=_picks_no_rows), "Gather")


_register_rows()
