"""Taking the layers that do the most damage out of 8 bits, until a goal holds, with few evaluations.

1. The plan as it is is measured. Where the goal holds, that was all.
2. Layers are sorted by the damage that ends when they leave (see `onnxprune.passes.quant.ranking`), which needs a few
   samples and no evaluator.
3. How many of the most damaging ones have to leave is found by bisection, on a logarithmic scale, because few are
   usually enough. It ends when the number is known to a tenth.
4. Layers that were taken along are given back in groups, the least damaging first, as long as the goal holds.

Taking all layers with weights back to float gives the float model, since the rest goes along: that is known and not
measured. What leaves goes to float, or
keeps its integer weights and gets activations of 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import onnx_ir as ir

from onnxprune.contracts import FallbackRecord, LayerError, NullProgress, Progress, QuantizationPlan
from onnxprune.ops.planned import PlannedNode, planned_nodes
from onnxprune.passes.quant.goals import Goal
from onnxprune.passes.quant.units import followers, layers_of
from onnxprune.passes.quant.widen import with_wide_activations

__all__ = ["Diagnosis", "FallbackKind", "with_fallback", "without_fallback"]

FallbackKind: TypeAlias = Literal["float", "int16"]

MOVED_REASON = "it only moves numbers, between nodes that were returned to float"
ALONE_REASON = "no layer with a weight is left in 8 bits"

_ROUGHLY = 0.1
"""The number of layers is not searched for more closely than this part of it: giving back does the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What rounding each layer costs, and the layers in the order in which they are to leave 8 bits."""

    errors: tuple[LayerError, ...]
    ranked: tuple[PlannedNode, ...]


@dataclass(frozen=True, slots=True)
class _Measured:
    """A choice of layers that leave 8 bits, the plan without them, and its figure."""

    layers: tuple[PlannedNode, ...]
    plan: QuantizationPlan
    figure: float
    holds: bool


def with_fallback(
    model: ir.Model,
    plan: QuantizationPlan,
    goal: Goal,
    *,
    kind: FallbackKind,
    diagnose: Callable[[], Diagnosis],
    progress: Progress | None = None,
) -> QuantizationPlan:
    """`plan` with as many layers taken out of 8 bits as it takes to hold `goal`, and the record of how.

    Where even all layers together don't make it hold, all have left, and the record says what was reached.

    Args:
        model: The float model.
        plan: Its plan.
        goal: What to hold.
        kind: Where layers go.
        diagnose: Measures and ranks the layers; only called where the goal does not hold.
        progress: Notes every evaluation.
    """
    search = _Search(model, plan, goal, kind, progress or NullProgress())
    nothing = search.measure(())
    if nothing.holds:
        return replace(plan, fallback=search.record(nothing, nothing, {}))
    diagnosis = diagnose()
    damage = {error.node: error for error in diagnosis.errors}
    chosen = search.give_back(search.smallest_prefix(diagnosis.ranked, nothing))
    reasons = {
        name: _reason(damage.get(layer.node.name or ""), kind) for layer in chosen.layers for name in layer.names
    }
    along = {
        name: reason
        for name, reason in chosen.plan.returned_nodes.items()
        if name not in plan.returned_nodes and name not in reasons
    }
    left = {**reasons, **along}
    result = replace(chosen.plan, layer_errors=diagnosis.errors, fallback=search.record(nothing, chosen, left))
    return replace(result, returned_nodes={**plan.returned_nodes, **left}) if kind == "float" else result


def without_fallback(plan: QuantizationPlan) -> QuantizationPlan:
    """The plan as it was before layers left 8 bits: what the fallback is compared with."""
    if plan.fallback is None:
        return plan
    returned = {name: reason for name, reason in plan.returned_nodes.items() if name not in plan.fallback.nodes}
    activations = {**plan.activations, **plan.fallback.narrow_activations}
    return replace(plan, returned_nodes=returned, fallback=None, activations=activations)


class _Search:
    def __init__(
        self, model: ir.Model, plan: QuantizationPlan, goal: Goal, kind: FallbackKind, progress: Progress
    ) -> None:
        self._model = model
        self._plan = plan
        self._goal = goal
        self._kind = kind
        self._progress = progress
        self._num_layers = len(layers_of(model, plan))

    def measure(self, layers: Sequence[PlannedNode]) -> _Measured:
        """The plan without `layers`, and whether the goal holds."""
        plan = self._plan_without(layers)
        if layers and not planned_nodes(self._model, plan):
            # The float model itself: its figure is known.
            figure = self._goal.exact_figure
        else:
            figure = self._goal.measure(plan)
        place = "float" if self._kind == "float" else "16 bits"
        self._progress.note(
            f"{len(layers)} of {self._num_layers} layers in {place}, simulated: {self._goal.describe(figure)}"
        )
        return _Measured(tuple(layers), plan, figure, self._goal.holds(figure))

    def smallest_prefix(self, ranked: Sequence[PlannedNode], nothing: _Measured) -> _Measured:
        """About as few of the first of `ranked` as make the goal hold; all of them where nothing does."""
        if not ranked:
            return nothing
        too_few, enough = 0, len(ranked)
        # 16 bits may not help at all, where weights do the damage; float is known to.
        best = self.measure(ranked) if self._kind == "int16" else None
        if best is not None and not best.holds:
            return best
        while enough - too_few > max(1, math.floor(_ROUGHLY * enough)):
            # The geometric mean: of 100 layers 10 are tried first, not 50.
            middle = min(max(round(math.sqrt(max(too_few, 1) * enough)), too_few + 1), enough - 1)
            measured = self.measure(ranked[:middle])
            if measured.holds:
                best, enough = measured, middle
            else:
                too_few = middle
        return best if best is not None else self.measure(ranked)

    def give_back(self, found: _Measured) -> _Measured:
        """`found` without the layers that the goal does not need, as far as a few evaluations show."""
        if not found.holds:
            return found
        # The last of them made the goal hold.
        pending = list(reversed(found.layers[:-1]))
        size = max(1, len(pending) // 2)
        for _ in range(self._goal.max_tries_to_give_back):
            if not pending:
                break
            group, rest = pending[:size], pending[size:]
            measured = self.measure([layer for layer in found.layers if layer not in group])
            if measured.holds:
                found, pending = measured, rest
            elif size > 1:
                size = max(1, size // 2)
            else:
                pending = rest
        return found

    def record(self, before: _Measured, chosen: _Measured, nodes: dict[str, str]) -> FallbackRecord:
        """What is to be remembered."""
        changed = {
            name: entry for name, entry in self._plan.activations.items() if chosen.plan.activations[name] != entry
        }
        is_all_float = bool(chosen.layers) and not planned_nodes(self._model, chosen.plan)
        return FallbackRecord(
            goal=self._goal.name,
            limit=self._goal.limit,
            kind=self._kind,
            before=before.figure,
            reached=chosen.figure,
            met=chosen.holds,
            evaluations=self._goal.num_evaluations,
            num_layers=self._num_layers if is_all_float else len(chosen.layers),
            float_score=self._goal.float_score,
            nodes=nodes,
            narrow_activations=changed,
            is_all_float=is_all_float,
        )

    def _plan_without(self, layers: Sequence[PlannedNode]) -> QuantizationPlan:
        names = [name for layer in layers for name in layer.names]
        if self._kind == "int16":
            return with_wide_activations(self._model, self._plan, names)
        moved = [name for mover in followers(self._model, self._plan, names) for name in mover.names] if layers else []
        returned = {**dict.fromkeys(moved, MOVED_REASON), **dict.fromkeys(names, "")}
        plan = replace(self._plan, returned_nodes={**self._plan.returned_nodes, **returned})
        rest = planned_nodes(self._model, plan)
        if not layers or any(item.row.is_compute for item in rest):
            return plan
        # Integers pay by the weights that are multiplied with them: without any, no target makes the rest integer.
        alone = dict.fromkeys((name for item in rest for name in item.names), ALONE_REASON)
        return replace(plan, returned_nodes={**plan.returned_nodes, **alone})


def _reason(error: LayerError | None, kind: FallbackKind) -> str:
    text = "returned to float" if kind == "float" else "its activations have 16 bits"
    if error is None:
        return text
    alone = f"its 8-bit output has {error.own_db:.1f} dB"
    if error.output_db is not None:
        alone += f", and with the tensors at it, it leaves the model's outputs at {error.output_db:.1f} dB"
    return f"{text}: {alone}"
