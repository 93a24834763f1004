"""What `bias-correction` has decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnxprune.passes.layerwise.gain import Gain
from onnxprune.passes.layerwise.layers import BiasPlace

__all__ = ["BiasCorrectionPlan", "LayerCorrection"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCorrection:
    """What is added to the bias of `layer`, one number for each output channel.

    `mean_error` is the root mean square over channels of the mean error that was found, in the output's units.
    """

    layer: str
    place: BiasPlace
    correction: tuple[float, ...]
    mean_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasCorrectionPlan:
    """`gain` is what all corrections together do to the outputs; None: there were no data to judge with.

    `is_undone` says that they made the outputs worse; `corrections` is empty then.
    """

    method: str
    corrections: tuple[LayerCorrection, ...]
    skipped: Mapping[str, str]
    gain: Gain | None = None
    is_undone: bool = False
