"""What the user asks of `bias-correction`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from onnxprune.contracts import PassConfig

__all__ = ["BiasCorrectionConfig"]


class BiasCorrectionConfig(PassConfig):
    """Where the mean errors come from."""

    method: Literal["auto", "data", "analytic"] = "auto"
    """"data": the mean difference of every layer's output, float against integer, over calibration samples, with
    earlier layers corrected already. "analytic": the weights' rounding errors times the mean inputs, which are
    calibration means, or, without data, what a BatchNormalization before the layer says. "auto": both where there are
    data, and the better one counts."""
    num_samples: int = Field(default=128, ge=1)
    """At most so many calibration samples; fewer where tensors are large. A quarter of them judges the result."""
    exclude: tuple[str, ...] = ()
    """Globs of layers that keep their bias: names of nodes and weights, modules with all inside them."""
