"""How channels flow through operators: labels on every axis of every value, and the rule of each operator.

- labels: numbers, and which of them live or die together
- elements: what small shape tensors hold
- grids: labels on a rectangle, and which of its sides carries removals
- labelling: what the sweep finds out
- flow: what a rule sees and may say; the table `CHANNELS`
- sweep: runs the rules over a model
- removal: what shrink hooks work with
- attention, broadcasting, convolution, contraction, fused_norms, indexing, movement, recurrent, reshaping, statistics:
  the rules
"""

from __future__ import annotations

from onnxprune.ops.channels import (
    attention,
    broadcasting,
    contraction,
    convolution,
    fused_norms,
    indexing,
    movement,
    recurrent,
    reshaping,
    statistics,
)
from onnxprune.ops.channels.flow import CHANNELS, ChannelRule, Flow
from onnxprune.ops.channels.grids import ChannelPolicy, UnitChoice
from onnxprune.ops.channels.labelling import Contraction, Labelling, MacsTerm, Measurement, Role, WeightUse
from onnxprune.ops.channels.labels import LabelArray, LabelSpace
from onnxprune.ops.channels.removal import Removal
from onnxprune.ops.channels.sweep import label_channels, label_node

__all__ = [
    "CHANNELS",
    "ChannelPolicy",
    "ChannelRule",
    "Contraction",
    "Flow",
    "LabelArray",
    "LabelSpace",
    "Labelling",
    "MacsTerm",
    "Measurement",
    "Removal",
    "Role",
    "UnitChoice",
    "WeightUse",
    "label_channels",
    "label_node",
]

# Importing a module of rules registers its rows; naming them keeps the imports from looking unused.
_RULES = (
    attention,
    broadcasting,
    contraction,
    convolution,
    fused_norms,
    indexing,
    movement,
    recurrent,
    reshaping,
    statistics,
)
