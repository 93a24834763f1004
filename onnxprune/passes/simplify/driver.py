"""Stage after stage until none of them finds anything; what does not keep the outputs is taken back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from onnxprune.contracts import CanonicalModel, PassContext
from onnxprune.errors import ModelError
from onnxprune.graph.canonical import canonicalize
from onnxprune.graph.cleanup import remove_dead_code
from onnxprune.graph.foreign import ForeignToolError
from onnxprune.graph.shapes import refresh_shapes
from onnxprune.graph.weights import weight_bytes
from onnxprune.ops.shapes import SHAPES
from onnxprune.passes.simplify.check import OutputCheck, make_output_check
from onnxprune.passes.simplify.stages import MAX_FOLDED_BYTES, OwnStage, Stage, ToolLimits, ToolStage

__all__ = ["Simplification", "StageOutcome", "run_stages"]

# Every round must make the graph smaller, so this only bounds the time that pathological graphs take.
MAX_ROUNDS = 10

_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutcome:
    """What one stage did in all rounds: nodes before and after, and how the count of each operator changed.

    `skipped` says why it does nothing (any more), and is "" otherwise.
    """

    stage: str
    nodes_removed: int = 0
    rewrites: int = 0
    ops: Counter[str] = field(default_factory=Counter)
    skipped: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simplification:
    """The simplified model and what happened; `unchecked` says why outputs could not be compared, or ""."""

    model: CanonicalModel
    outcomes: tuple[StageOutcome, ...]
    unchecked: str


def run_stages(
    model: CanonicalModel, stages: Sequence[Stage], limits: ToolLimits, context: PassContext
) -> Simplification:
    """Run `stages` in order, again and again until none changes anything. `model` stays as it is.

    A stage's result stays when it has fewer nodes, or as many with smaller weights, and gives the outputs that `model`
    gives. When it differs, fails, or touches quantization, the model goes back to before the stage, which is not tried
    again. Where outputs can't be compared, our own stages run all the same (they are exact by construction), foreign
    tools don't.
    """
    check = make_output_check(model, context)
    outcomes = {stage.name: StageOutcome(stage=stage.name) for stage in stages}
    settled: set[str] = set()
    for _ in range(MAX_ROUNDS):
        if len(settled) == len(stages):
            break
        for stage in stages:
            if stage.name in settled:
                continue
            if isinstance(stage, ToolStage):
                context.progress.note(f"simplify: waiting for {stage.name}")
            found = _try(stage, model, limits, check)
            before = outcomes[stage.name]
            if isinstance(found, str):
                outcomes[stage.name] = replace(before, skipped=found)
                settled.add(stage.name)
            elif found is None:
                settled.add(stage.name)
            else:
                outcomes[stage.name] = _add(before, model, found)
                model = found
                # Everybody may find something new, but for those that have been given up.
                settled = {name for name in settled if outcomes[name].skipped}
    return Simplification(
        model=model,
        outcomes=tuple(outcomes[stage.name] for stage in stages),
        unchecked=check if isinstance(check, str) else "",
    )


def _try(
    stage: Stage, model: CanonicalModel, limits: ToolLimits, check: OutputCheck | str
) -> CanonicalModel | str | None:
    """A smaller model with the same outputs; None where the stage finds nothing; or why it is given up."""
    match stage:
        case OwnStage():
            candidate = model.clone()
            if not stage.rewrite(candidate):
                return None
            remove_dead_code(candidate)
            refresh_shapes(candidate, SHAPES)
            result = CanonicalModel(candidate)
        case ToolStage():
            if isinstance(check, str):
                return f"skipped, because the outputs can't be compared: {check}"
            try:
                result = canonicalize(stage.run(model, limits), shape_rules=SHAPES)
            except (ForeignToolError, ModelError) as error:
                return f"skipped: {error}"
    if not _is_smaller(result, model):
        return None
    if _ops(result, _QUANTIZERS) != _ops(model, _QUANTIZERS):
        return "rolled back, because it changed QuantizeLinear or DequantizeLinear nodes"
    problem = check.problem(result) if isinstance(check, OutputCheck) else ""
    return f"rolled back: {problem}" if problem else result


def _is_smaller(after: ir.Model, before: ir.Model) -> bool:
    """Fewer nodes, with weights that grew by no more than folding may; or as many nodes and smaller weights."""
    nodes_after, nodes_before = _num_nodes(after), _num_nodes(before)
    grown_bytes = weight_bytes(after) - weight_bytes(before)
    return (
        grown_bytes <= MAX_FOLDED_BYTES
        if nodes_after < nodes_before
        else (nodes_after == nodes_before and grown_bytes < 0)
    )


def _add(outcome: StageOutcome, before: ir.Model, after: ir.Model) -> StageOutcome:
    ops = Counter(outcome.ops)
    ops.update(_ops(after))
    ops.subtract(_ops(before))
    return replace(
        outcome,
        nodes_removed=outcome.nodes_removed + _num_nodes(before) - _num_nodes(after),
        rewrites=outcome.rewrites + 1,
        ops=ops,
    )


def _ops(model: ir.Model, only: frozenset[str] | None = None) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes() if only is None or node.op_type in only)


def _num_nodes(model: ir.Model) -> int:
    return sum(1 for _ in model.graph.all_nodes())
