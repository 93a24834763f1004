"""From a recipe's steps to configured passes: one after another, and blocks of them several times around."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from onnxprune.contracts import Pass
from onnxprune.errors import PreconditionError
from onnxprune.plugins import find_pass
from onnxprune.recipe import ITERATION_MARK, Recipe, Repeat, Step

__all__ = ["AnyPass", "RepeatedStage", "Stage", "make_stages", "passes_of"]

AnyPass: TypeAlias = Pass[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatedStage:
    """A block of the recipe; `iterations[i]` holds its passes the (i + 1)-th time around, named 'prune@1' and so on."""

    block: Repeat
    iterations: tuple[tuple[AnyPass, ...], ...]


Stage: TypeAlias = AnyPass | RepeatedStage


def make_stages(recipe: Recipe) -> tuple[Stage, ...]:
    """What to run, in order.

    Raises:
        PreconditionError: A pass that quantizes stands in a block: nothing can follow it, not even its own repetition.
    """
    return tuple(
        _make_pass(step, step.step_id) if isinstance(step, Step) else _make_block(step) for step in recipe.steps
    )


def passes_of(stages: Sequence[Stage]) -> tuple[AnyPass, ...]:
    """All passes in the order in which they run, when no block stops early."""
    return tuple(
        pass_
        for stage in stages
        for iteration in (stage.iterations if isinstance(stage, RepeatedStage) else ((stage,),))
        for pass_ in iteration
    )


def _make_pass(step: Step, pass_id: str) -> AnyPass:
    return find_pass(step.name)(step.config, pass_id=pass_id)


def _make_block(block: Repeat) -> RepeatedStage:
    for step in block.steps:
        if find_pass(step.name).produces_quantization:
            raise PreconditionError(
                f"Pass '{step.step_id}' stands inside '{block.step_id}', and its scales are for weights that stay.",
                f"Put '{step.step_id}' behind '{block.step_id}'.",
            )
    return RepeatedStage(
        block=block,
        iterations=tuple(
            tuple(_make_pass(step, f"{step.step_id}{ITERATION_MARK}{number}") for step in block.steps)
            for number in range(1, block.times + 1)
        ),
    )
