"""What `adaround` has decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnxprune.passes.layerwise.gain import Gain
from onnxprune.passes.layerwise.layers import BiasPlace

__all__ = ["AdaRoundPlan", "LayerRounding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRounding:
    """The integers of one layer's weight, as differences from rounding to nearest.

    `steps` holds these differences (-1, 0, 1, seldom more) in the weight's shape, packed; `changed` counts those that
    are not 0. `variant` says which of the candidates was best on rows that it was not fitted to. The ratios of signal
    to noise are of the layer's output on these rows: rounded to nearest, and as chosen.
    """

    layer: str
    weight: str
    shape: tuple[int, ...]
    steps: str
    changed: int
    variant: str
    snr_nearest_db: float
    snr_db: float
    place: BiasPlace | None = None
    correction: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaRoundPlan:
    """`gain` is what all layers together do to the outputs; `is_undone` says that it was a loss, and `layers` empty."""

    method: str
    layers: tuple[LayerRounding, ...]
    skipped: Mapping[str, str]
    gain: Gain | None = None
    is_undone: bool = False
