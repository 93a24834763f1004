"""What `equalize` has decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnxprune.passes.layerwise.gain import Gain

__all__ = ["EqualizePlan", "SitePlan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePlan:
    """Output channels of layer `producer` are divided by `factors`, inputs of `consumers` multiplied.

    `absorbed`, in units after that division, is taken off the producer's bias and given to the consumers'; empty: none.
    `clips` are the nodes that become Relu.
    """

    producer: str
    consumers: tuple[str, ...]
    factors: tuple[float, ...]
    absorbed: tuple[float, ...] = ()
    clips: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualizePlan:
    """`ranges` is what was made equal ("none" where that would only do harm)."""

    ranges: str
    sites: tuple[SitePlan, ...]
    skipped: Mapping[str, str]
    gain: Gain | None = None
    is_undone: bool = False
    tried_db: Mapping[str, float] | None = None
    """What each way would have given."""
