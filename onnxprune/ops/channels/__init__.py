"""How channels flow through operators: labels on every axis of every value, and the rule of each operator.

- labels: numbers, and which of them live or die together
- elements: what small shape tensors hold
- flow: what a rule sees and may say; the table `CHANNELS`
- sweep: runs the rules over a model
- removal: what shrink hooks work with
- broadcasting, convolution, contraction, movement, reshaping, statistics: the rules
"""

from __future__ import annotations

from onnxprune.ops.channels import broadcasting, contraction, convolution, movement, reshaping, statistics
from onnxprune.ops.channels.flow import CHANNELS, ChannelRule, Contraction, Flow, Labelling, Role, WeightUse
from onnxprune.ops.channels.labels import LabelArray, LabelSpace
from onnxprune.ops.channels.removal import Removal
from onnxprune.ops.channels.sweep import label_channels, label_node

__all__ = [
    "CHANNELS",
    "ChannelRule",
    "Contraction",
    "Flow",
    "LabelArray",
    "LabelSpace",
    "Labelling",
    "Removal",
    "Role",
    "WeightUse",
    "label_channels",
    "label_node",
]

# Importing a module of rules registers its rows; naming them keeps the imports from looking unused.
_RULES = (broadcasting, contraction, convolution, movement, reshaping, statistics)
