"""What the user asks of `adaround`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from onnxprune.contracts import PassConfig

__all__ = ["AdaRoundConfig"]


class AdaRoundConfig(PassConfig):
    """How weights are rounded, and on how much data."""

    method: Literal["gptq", "adaround"] = "gptq"
    """"gptq": column by column, each error made good by the columns that follow (closed form, no training).
    "adaround": up or down is learned by gradient descent, activation function included; slower."""
    correct_bias: bool = True
    """Let the bias of each layer follow, so that the mean of its output stays; it costs nothing at run time."""
    num_samples: int = Field(default=128, ge=1)
    """At most so many calibration samples; fewer where tensors are large. A quarter of them judges the result."""
    max_rows: int = Field(default=4096, ge=16)
    """Positions of a layer's output, over all samples, that its rounding is fitted to."""
    iterations: int = Field(default=1000, ge=1)
    """Steps of gradient descent for each layer, with "adaround"."""
    exclude: tuple[str, ...] = ()
    """Globs of layers that are rounded to nearest: names of nodes and weights, modules with all inside them."""

    @model_validator(mode="after")
    def _iterations_act(self) -> AdaRoundConfig:
        if self.iterations != type(self).model_fields["iterations"].default and self.method != "adaround":
            raise ValueError("'iterations' acts only with method = 'adaround'")
        return self
