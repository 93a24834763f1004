"""What it costs to compute a node in float or in integers, and to convert a tensor between them."""

from __future__ import annotations

import math
from typing import Protocol

import onnx_ir as ir

from onnxprune.ops.planned import PlannedNode
from onnxprune.targets.qdq.cost_table import TableCosts

__all__ = ["IntegerWhereverPossible", "PlacementCosts"]


class PlacementCosts(Protocol):
    """Nanoseconds of one run. Infinite forbids; a node is only asked about where it has an integer kernel."""

    def float_ns(self, planned: PlannedNode) -> float:
        """The node, and what it absorbs, in float."""
        ...

    def integer_ns(self, planned: PlannedNode) -> float:
        """The same in integers, without conversions."""
        ...

    def quantize_ns(self, value: ir.Value) -> float:
        """One QuantizeLinear of a tensor."""
        ...

    def dequantize_ns(self, value: ir.Value) -> float:
        """One DequantizeLinear of a tensor."""
        ...


class IntegerWhereverPossible(TableCosts):
    """No node is float that could be integer: what is written to time every integer kernel once."""

    def float_ns(self, planned: PlannedNode) -> float:
        """Infinite."""
        return math.inf
