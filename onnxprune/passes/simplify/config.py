"""What the user asks of `simplify`, and what it has decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from onnxprune.contracts import PassConfig
from onnxprune.errors import did_you_mean
from onnxprune.passes.simplify.stages import STAGES

__all__ = ["SimplifyConfig", "SimplifyPlan"]

STAGE_NAMES = tuple(stage.name for stage in STAGES)


class SimplifyConfig(PassConfig):
    """Which stages run, and what a foreign tool may use."""

    stages: tuple[str, ...] = STAGE_NAMES
    """Names of stages, in the order in which they run."""
    skip_stages: tuple[str, ...] = ()
    """Stages to leave out."""
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 300.0
    """Seconds after which a foreign tool is stopped; its stage is then skipped with a note."""
    memory_limit_bytes: Annotated[int, Field(gt=0)] = 8 << 30
    """Memory that a foreign tool may use; with more it is stopped in the same way."""

    @model_validator(mode="after")
    def _stages_exist(self) -> Self:
        for name in (*self.stages, *self.skip_stages):
            if name not in STAGE_NAMES:
                raise ValueError(f"unknown stage '{name}'. {did_you_mean(name, STAGE_NAMES)}")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class SimplifyPlan:
    """The stages to run, in order. What they rewrite follows from the model alone."""

    stages: tuple[str, ...]
