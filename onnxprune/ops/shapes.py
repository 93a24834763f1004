"""Shape rules for operators that ONNX's own inference does not know (contrib and custom domains)."""

from __future__ import annotations

from onnxprune.graph.shapes import ShapeRule
from onnxprune.ops.table import OpTable

__all__ = ["SHAPES"]

SHAPES: OpTable[ShapeRule] = OpTable("shapes")
