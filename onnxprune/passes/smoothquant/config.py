"""What the user asks of `smoothquant`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from onnxprune.contracts import PassConfig

__all__ = ["SmoothQuantConfig"]


class SmoothQuantConfig(PassConfig):
    """How far difficulty moves from activations to weights, and what `quant` will do, which decides how far is best."""

    alpha: Annotated[float, Field(ge=0.0, le=1.0)] | Literal["auto"] = "auto"
    """0: all stays with the activations; 1: all of their spread moves into the weights; 0.5 is the paper's choice.
    "auto": for each group of layers what makes the error of their outputs smallest."""
    insert_mul: bool = False
    """Where the division can't be folded into what stands before, insert a Mul; it costs time, and stays float or not
    as `quant` decides."""
    per_channel: bool = True
    """As in `quant`: weights are rounded so in the search."""
    weight_bits: int = Field(default=8, ge=4, le=8)
    """As in `quant`: weights are rounded so in the search."""
    num_samples: int = Field(default=64, ge=1)
    """At most so many calibration samples; a quarter of them judges the result."""
    exclude: tuple[str, ...] = ()
    """Globs of layers that stay as they are: names of nodes and weights, modules with all inside them."""
