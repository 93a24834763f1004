"""What the sweep over one model finds out: labels of values and weights, and what nodes do with them."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx_ir as ir

from onnxprune.ops.channels.elements import Elements, Literal
from onnxprune.ops.channels.grids import ChannelPolicy, Grid
from onnxprune.ops.channels.labels import AxisLabels, LabelArray, LabelSpace
from onnxprune.ops.channels.removal import Removal

__all__ = [
    "Contraction",
    "Labelling",
    "LiteralUse",
    "MacsTerm",
    "Measurement",
    "Role",
    "ShrinkHook",
    "TentativeAxis",
    "WeightUse",
]

ShrinkHook: TypeAlias = Callable[[Removal], None]
"""Rewrites what a node holds besides its labelled weights (a group count, a shape constant)."""


class Role(enum.Enum):
    """What an axis of a weight is to its node."""

    FILTER = "filter"
    """Enumerates what the node produces."""
    INPUT = "input"
    """Is summed over against the channels that come in."""
    PARAMETER = "parameter"
    """Holds one number (or block) per channel: bias, BatchNorm, broadcast constants."""


@dataclass(frozen=True, slots=True, eq=False)
class WeightUse:
    """One use of one axis of an initializer by one node."""

    node: ir.Node
    position: int
    axis: int
    role: Role


@dataclass(frozen=True, slots=True, eq=False)
class Contraction:
    """`node` sums over `axis` of its input `position`; `rank` is that input's rank."""

    node: ir.Node
    position: int
    axis: int
    rank: int
    labels: LabelArray


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """`node` takes statistics over the positions of an axis that carries `labels`; `what` says so in words."""

    node: ir.Node
    labels: LabelArray
    what: str


@dataclass(frozen=True, slots=True, eq=False)
class MacsTerm:
    """A part of the MACs of a node, which is proportional to the kept positions on each of `axes`."""

    share: float
    axes: tuple[LabelArray, ...]


@dataclass(frozen=True, slots=True, eq=False)
class TentativeAxis:
    """`labels` of an axis that count for nothing unless a labelled axis is joined to them.

    `use` is where they come from when that is a weight; None for a number in a shape.
    """

    labels: LabelArray
    use: WeightUse | None


@dataclass(frozen=True, slots=True, eq=False)
class LiteralUse:
    """`node` reads `literal` through input `position`, and needs it rewritten when some of `labels` go.

    `is_count`: the new number is how many of `labels` stay. Otherwise only the node's own rule knows it.
    """

    node: ir.Node
    position: int
    literal: Literal
    labels: LabelArray
    is_count: bool


@dataclass(slots=True, eq=False)
class Labelling:
    """Everything the sweep over one model found out."""

    policy: ChannelPolicy = field(default_factory=ChannelPolicy)
    space: LabelSpace = field(default_factory=LabelSpace)
    values: dict[ir.Value, AxisLabels] = field(default_factory=dict)
    elements: dict[ir.Value, Elements] = field(default_factory=dict)
    weights: dict[ir.Value, dict[int, LabelArray]] = field(default_factory=dict)
    weight_uses: dict[ir.Value, list[WeightUse]] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    grid_memo: dict[tuple[bytes, ...], LabelArray] = field(default_factory=dict)
    """The labels of a grid's elements by its sides: putting the same sides together again gives the same labels."""
    shrink_hooks: list[tuple[LabelArray, ShrinkHook]] = field(default_factory=list)
    macs_terms: dict[ir.Node, tuple[MacsTerm, ...]] = field(default_factory=dict)
    """What the MACs of a node are a sum of; a node that is not here keeps its MACs."""
    tentative: list[TentativeAxis] = field(default_factory=list)
    """Axes that only get labels in case something labelled meets them."""
    firm: list[LabelArray] = field(default_factory=list)
    """Labels that a layer took as its own channels, or sums over: they are not tentative any more."""
    derived: set[ir.Value] = field(default_factory=set)
    """Values computed from constants only, but for the shape that some of them are given."""
    literals: list[LiteralUse] = field(default_factory=list)
    """Numbers that are rewritten though they reach their node through others."""
