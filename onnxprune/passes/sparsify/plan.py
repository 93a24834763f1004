"""What `sparsify` has decided: a threshold for each tensor instead of a mask, so that the plan stays small."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SparsifyPlan", "TensorPlan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """Zero every unit of `tensor` whose score is below `threshold`, and the first `ties` that are equal to it.

    `units` counts all units, `zeroed` those that are zero afterwards, `zero_before` those that were zero already.
    `group` names the rule that decided ("default", "rules[0]"), `sparsity` what it asks for.
    """

    tensor: str
    group: str
    sparsity: float
    threshold: float
    ties: int
    units: int
    zeroed: int
    zero_before: int

    @property
    def changes_weights(self) -> bool:
        """False where everything to be zeroed is zero already."""
        return self.zeroed > self.zero_before


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsifyPlan:
    """`pattern` as in the configuration; `skipped` maps tensors that stay as they are to the reason."""

    pattern: str
    tensors: tuple[TensorPlan, ...]
    skipped: dict[str, str]
