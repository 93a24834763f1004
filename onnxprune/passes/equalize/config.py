"""What the user asks of `equalize`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from onnxprune.contracts import PassConfig

__all__ = ["EqualizeConfig"]


class EqualizeConfig(PassConfig):
    """What is made equal, and what `quant` will do, which decides whether that helps."""

    ranges: Literal["auto", "weights", "activations", "depthwise"] = "auto"
    """"weights": those of a channel's weights in the layer before and the layers behind. "activations": that of the
    channel's numbers, and the weights behind. "depthwise": as "activations", but only before depthwise convolutions,
    whose weights have a scale for each channel anyway. "auto": the best of these with calibration data, else
    "weights"."""
    absorb_biases: bool = False
    """Move what no calibration sample makes a channel fall below into the biases behind, where nothing is padded and
    that gives a gain. For other inputs the function may change a little."""
    relax_clips: bool = True
    """Make a Clip (ReLU6) a Relu where calibration data stay below its upper bound; else its layers are left out."""
    per_channel: bool = True
    """As in `quant`: the gain is judged with it."""
    weight_bits: int = Field(default=8, ge=4, le=8)
    """As in `quant`: the gain is judged with it."""
    num_samples: int = Field(default=64, ge=1)
    """At most so many calibration samples; a quarter of them judges the result."""
    exclude: tuple[str, ...] = ()
    """Globs of layers that stay as they are: names of nodes and weights, modules with all inside them."""
