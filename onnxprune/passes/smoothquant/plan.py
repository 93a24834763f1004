"""What `smoothquant` has decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnxprune.passes.layerwise.gain import Gain

__all__ = ["Fold", "GroupPlan", "SmoothQuantPlan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Constant `position` of `node` holds one number a channel on its last axis, or a layer's output channels.

    `is_layer` says that it is a layer's weight, whose bias (if any) is divided too.
    """

    node: str
    position: int
    is_layer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """Channels of `tensor` are divided by `factors` in `folds`; the inputs of `layers` are multiplied.

    Without folds a Mul is inserted behind `tensor`. `error_ratio` is the error of the layers' outputs over what it was.
    """

    tensor: str
    layers: tuple[str, ...]
    folds: tuple[Fold, ...]
    factors: tuple[float, ...]
    alpha: float
    error_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothQuantPlan:
    """`gain` is what all groups together do to the outputs; `is_undone` says that it is not worth it."""

    groups: tuple[GroupPlan, ...]
    skipped: Mapping[str, str]
    gain: Gain | None = None
    is_undone: bool = False
