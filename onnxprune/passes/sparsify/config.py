"""What the user asks of `sparsify`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from onnxprune.contracts import PassConfig
from onnxprune.passes.sparsify.patterns import NOfM, Pattern, parse_pattern

__all__ = ["ScopeRule", "SparsifyConfig"]

DEFAULT_SPARSITY = 0.5

Ratio = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class ScopeRule(PassConfig):
    """A part of the model with a sparsity of its own. A weight is in it when *all* selectors given match.

    `name` is a glob for the weight's name or its node's; `op_type` an operator ("Conv"); `module` a glob for
    a module, which takes in everything inside it ("backbone": "backbone.layer1.conv").
    """

    name: str | None = None
    op_type: str | None = None
    module: str | None = None
    sparsity: Ratio

    @model_validator(mode="after")
    def _selects_something(self) -> Self:
        if self.name is None and self.op_type is None and self.module is None:
            raise ValueError("give at least one of 'name', 'op_type' and 'module'")
        return self


class SparsifyConfig(PassConfig):
    """Which share of the weights becomes zero, and in which pattern."""

    sparsity: Ratio | None = None
    """Share of units that are zero afterwards. Left out: nothing outside `rules` where there are rules; else the
    pattern's own share for n:m, and 0.5 for the other patterns."""
    scope: Literal["global", "layer"] = "global"
    """Rank all weights of one sparsity together, or reach it in every weight tensor on its own."""
    pattern: str = "unstructured"
    """"unstructured", "unit" (whole filters and neurons), n:m such as "2:4", or blocks of outputs x inputs as "4x1"."""
    rules: tuple[ScopeRule, ...] = ()
    """Parts with a sparsity of their own; the first that matches counts."""
    skip: tuple[str, ...] = ()
    """Globs of what stays as it is: names of nodes and weights, modules with all inside them ("head", "*.stem")."""

    @model_validator(mode="after")
    def _pattern_allows_the_levels(self) -> Self:
        pattern = parse_pattern(self.pattern)
        if isinstance(pattern, NOfM):
            largest = 1 - pattern.keep / pattern.group
            for level in (self.sparsity, *(rule.sparsity for rule in self.rules)):
                if level is not None and level > largest:
                    raise ValueError(
                        f"sparsity {level} is above {largest:g}, all that pattern '{self.pattern}' can zero"
                    )
        return self

    @property
    def parsed_pattern(self) -> Pattern:
        """`pattern`, understood."""
        return parse_pattern(self.pattern)

    @property
    def default_sparsity(self) -> float:
        """The sparsity of weights that no rule matches."""
        if self.sparsity is not None:
            return self.sparsity
        if self.rules:
            return 0.0
        pattern = self.parsed_pattern
        return 1 - pattern.keep / pattern.group if isinstance(pattern, NOfM) else DEFAULT_SPARSITY
