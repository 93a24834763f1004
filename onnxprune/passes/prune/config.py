"""What a user may ask of `prune`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from onnxprune.contracts import PassConfig
from onnxprune.passes.prune.criteria import CriterionName

__all__ = ["DEFAULT_RATIO", "PruneConfig", "ScopeRatio"]

DEFAULT_RATIO = 0.25
"""Removed where no target is given; without retraining, most networks stand no more."""

Ratio = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]


class ScopeRatio(PassConfig):
    """A ratio of its own for some layers."""

    match: str = Field(min_length=1, description="Glob of node or weight names, or of modules with all inside them.")
    ratio: Ratio = Field(description="Part of the channels of each matching layer to remove; 0 leaves them alone.")


class PruneConfig(PassConfig):
    """How many channels to remove, which ones, and from where.

    At most one of `ratio`, `macs_ratio` and `params_ratio` may be set; with none, `ratio` is `DEFAULT_RATIO`.
    """

    ratio: Ratio | None = Field(
        default=None,
        description="Part of the channels to remove: of every layer ('per-layer' ranking), or of all ('global'); "
        "0.25 when no ratio at all is given.",
    )
    macs_ratio: Ratio | None = Field(
        default=None, description="Part of the model's MACs to remove; the fewest channels that reach it go."
    )
    params_ratio: Ratio | None = Field(
        default=None, description="Part of the model's parameters to remove; the fewest channels that reach it go."
    )
    ranking: Literal["per-layer", "global"] = Field(
        default="per-layer",
        description="'per-layer' takes the same part of every layer, 'global' the least important channels anywhere.",
    )
    criterion: CriterionName = Field(default="l1", description="How important a channel is.")
    channel_multiple: int = Field(
        default=1, ge=1, le=1024, description="Widths stay multiples of this (8 or 16 suit most kernels); rounded up."
    )
    min_channels: int | None = Field(
        default=None, ge=1, description="Channels that every layer keeps; by default the larger of 8 and an eighth."
    )
    skip: tuple[str, ...] = Field(
        default=(),
        description="Layers whose channels all stay: globs of node or weight names, or of modules with all inside.",
    )
    scopes: tuple[ScopeRatio, ...] = Field(
        default=(), description="Layers with a ratio of their own; the first match counts."
    )
    steps: int = Field(
        default=1, ge=1, le=100, description="Remove in this many steps and rank anew, without what is gone, in each."
    )
    verify_oracle: bool = Field(
        default=False,
        description="Compare the pruned model with the original in which the removed channels are masked with zeros.",
    )

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = [name for name in ("ratio", "macs_ratio", "params_ratio") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one target, not {' and '.join(given)}")
        return self

    @property
    def target(self) -> tuple[Literal["ratio", "macs_ratio", "params_ratio"], float]:
        """The one target and its value."""
        if self.macs_ratio is not None:
            return "macs_ratio", self.macs_ratio
        if self.params_ratio is not None:
            return "params_ratio", self.params_ratio
        return "ratio", DEFAULT_RATIO if self.ratio is None else self.ratio
