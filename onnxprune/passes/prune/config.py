"""What a user may ask of `prune`."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias, get_args

from pydantic import Field, field_validator, model_validator

from onnxprune.contracts import CHECK_MARK, PATH_MARK, PassConfig
from onnxprune.ops.channels import ChannelPolicy, UnitChoice
from onnxprune.passes.prune.criteria import CRITERIA
from onnxprune.passes.prune.criterion_plugins import check_criterion_name

__all__ = ["DEFAULT_RATIO", "PruneConfig", "ScopeRatio", "TargetName"]

DEFAULT_RATIO = 0.25
"""Removed where no target is given; without retraining, most networks stand no more."""

TargetName: TypeAlias = Literal["ratio", "macs_ratio", "params_ratio", "bytes_ratio", "latency_ratio"]
"""What may be asked for."""
Ratio = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]


class ScopeRatio(PassConfig):
    """A ratio of its own for some layers."""

    match: str = Field(min_length=1, description="Glob of node or weight names, or of modules with all inside them.")
    ratio: Ratio = Field(description="Part of the channels of each matching layer to remove; 0 leaves them alone.")


class PruneConfig(PassConfig):
    """How many channels to remove, which ones, and from where.

    At most one of `ratio`, `macs_ratio`, `params_ratio`, `bytes_ratio` and `latency_ratio` may be set; with none,
    `ratio` is `DEFAULT_RATIO`.
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
    bytes_ratio: Ratio | None = Field(
        default=None,
        description="Part of the bytes of the model's weights to remove, as they are stored; the fewest channels that "
        "reach it go.",
    )
    latency_ratio: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Time of the pruned model over the original's on this machine, measured with ONNX Runtime: 0.5 is "
        "half the time. Widths are those that pay here.",
    )
    latency_threads: int = Field(default=1, ge=1, description="Threads that `latency_ratio` is measured with.")
    ranking: Literal["per-layer", "global", "sensitivity"] = Field(
        default="per-layer",
        description="'per-layer' takes the same part of every layer, 'global' the least important channels anywhere, "
        "'sensitivity' those that move the outputs least for what they save (needs calibration data).",
    )
    criterion: str = Field(
        default="l1",
        description=f"How important a channel is: {', '.join(CRITERIA)}, a function of yours "
        "('path/file.py:function'), or what an installed package brings.",
        json_schema_extra={PATH_MARK: "function"},
    )
    gradients: str | None = Field(
        default=None,
        min_length=1,
        description="Gradients of a loss by the weights, for the criteria 'taylor' and 'fisher': .npz or .safetensors, "
        "named like the initializers. A path counts from the recipe.",
        json_schema_extra={PATH_MARK: "file"},
    )
    grouping: Literal["none", "isomorphic"] = Field(
        default="none",
        description="'global' ranking only. 'isomorphic': layers are ranked against those of the same structure, and "
        "each such set loses the same part.",
    )
    channel_multiple: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        default="auto",
        description="Widths stay multiples of this number, rounded up. 'auto': the nearest multiple of 16, else of 8, "
        "else of 4, that is not far from what is asked for, as kernels like it; 1: exactly what is asked for.",
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
    attention: Literal["auto", "heads", "width"] = Field(
        default="auto",
        description="What goes from attention: 'heads' as a whole, the same part of the 'width' of every head, or "
        "'auto': heads where there are at least four, else their width.",
    )
    exact: bool = Field(
        default=False,
        description="Leave channels alone over which statistics are taken (LayerNorm, channel means): the pruned model "
        "equals the original with the removed channels at zero. Otherwise the statistics are those of the rest.",
    )
    verify_oracle: bool = Field(
        default=False,
        description="Compare the pruned model with the original in which the removed channels are masked with zeros.",
        json_schema_extra={CHECK_MARK: True},
    )

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = [name for name in get_args(TargetName) if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one target, not {' and '.join(given)}")
        if self.latency_ratio is not None and self.channel_multiple != "auto":
            raise ValueError("latency_ratio measures which widths pay: leave channel_multiple alone")
        return self

    @field_validator("criterion")
    @classmethod
    def _criterion_exists(cls, name: str) -> str:
        check_criterion_name(name)
        return name

    @model_validator(mode="after")
    def _data_are_used(self) -> Self:
        row = CRITERIA.get(self.criterion)
        if row is not None and row.needs == "gradients" and self.gradients is None:
            raise ValueError(f"criterion '{self.criterion}' needs `gradients`, a .npz or .safetensors file")
        if row is not None and row.needs != "gradients" and self.gradients is not None:
            raise ValueError(f"criterion '{self.criterion}' does not look at `gradients`: drop them, or use 'taylor'")
        if self.grouping != "none" and self.ranking != "global":
            raise ValueError(f"grouping = '{self.grouping}' is for ranking = 'global'")
        return self

    @property
    def policy(self) -> ChannelPolicy:
        """What is decided about channels before any of them is ranked."""
        return ChannelPolicy(units=UnitChoice(self.attention), is_exact=self.exact)

    @property
    def target(self) -> tuple[TargetName, float]:
        """The one target and its value."""
        for name in get_args(TargetName):
            value = getattr(self, name)
            if value is not None:
                return name, value
        return "ratio", DEFAULT_RATIO
