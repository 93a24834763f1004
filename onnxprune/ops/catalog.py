"""All operator tables by name, for `onnxprune ops` and for tests over every table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxprune.ops.channels import CHANNELS
from onnxprune.ops.layout import LAYOUT
from onnxprune.ops.macs import MACS
from onnxprune.ops.quant import QUANT
from onnxprune.ops.shapes import SHAPES
from onnxprune.ops.table import OpTable

__all__ = ["OP_TABLES"]

OP_TABLES: Mapping[str, OpTable[Any]] = {
    "layout": LAYOUT,
    "channels": CHANNELS,
    "macs": MACS,
    "quant": QUANT,
    "shapes": SHAPES,
}
