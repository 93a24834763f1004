"""Runs passes one after another, and blocks of them several times around, from the cache where that holds them.

A block ends early when the score falls too far: the iteration that did it is undone, and the model before it goes on.
How many iterations were kept is a decision like any other: it stands in the plan, and `--plan` repeats it unscored.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from onnxprune.contracts import (
    CanonicalModel,
    Evaluator,
    Iteration,
    JsonObject,
    JsonValue,
    ModelState,
    PassContext,
    PassReport,
    Requirement,
    Score,
    Skip,
)
from onnxprune.errors import UsageError
from onnxprune.evaluate.budget import is_at_most, score_drop
from onnxprune.evaluate.figures import holds_parameters
from onnxprune.graph.writer import content_hash
from onnxprune.passes.harness import plan_from_json, plan_to_json, run_pass
from onnxprune.pipeline.cache import PassCache, chain_key, file_hash
from onnxprune.pipeline.lock import PlanLock, PlannedPass
from onnxprune.pipeline.stages import AnyPass, RepeatedStage, Stage, passes_of
from onnxprune.plugins import plugin_version
from onnxprune.recipe import REPEAT, Repeat
from onnxprune.runtime.host import host_isa, processor_name
from onnxprune.runtime.sessions import ort_runner_from_model

__all__ = ["Execution", "PassesResult", "run_stages"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What running needs besides the passes. `source_score` is what blocks with `score_drop` are held against."""

    context: PassContext
    start_key: str
    cache: PassCache | None
    lock: PlanLock | None
    source_score: Score | None
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PassesResult:
    """The state at the end, and what was reported and decided on the way.

    `unrepaired` is the state in front of the first of the passes `repaired_by`, which repair what int8 does: its model
    is the float one that `quant` saw. Without such passes it is the state at the end.
    """

    state: ModelState
    unrepaired: ModelState
    repaired_by: tuple[str, ...]
    reports: tuple[PassReport, ...]
    plans: tuple[PlannedPass, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Position:
    """A place in the run: the state, the key of everything that led there, and the entry that holds the model."""

    state: ModelState
    key: str
    model_key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """One time around a block; `original_key` is the key of what the block began with."""

    iteration: Iteration
    original_key: str

    @property
    def identity(self) -> JsonObject:
        """What a pass's result may depend on besides the model that it gets."""
        turn = self.iteration
        return {"number": turn.number, "times": turn.times, "schedule": turn.schedule, "original": self.original_key}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """What one pass, or one time around a block, left behind."""

    position: _Position
    reports: tuple[PassReport, ...] = ()
    plans: tuple[PlannedPass, ...] = ()

    def then(self, following: _Done) -> _Done:
        return _Done(
            position=following.position,
            reports=(*self.reports, *following.reports),
            plans=(*self.plans, *following.plans),
        )


def run_stages(stages: Sequence[Stage], state: ModelState, execution: Execution) -> PassesResult:
    """Run everything, starting from `state`.

    Raises:
        OnnxPruneError: Whatever a pass raises; what was finished before it is in the cache.
    """
    runner = _StageRunner(execution, num_passes=len(passes_of(stages)))
    done = _Done(position=_Position(state=state, key=execution.start_key, model_key=None))
    unrepaired: ModelState | None = None
    repaired_by: list[str] = []
    for stage in stages:
        here = done.position
        repairing = [pass_.pass_id for pass_ in passes_of([stage]) if pass_.needs_quantization]
        if repairing and unrepaired is None:
            unrepaired = here.state
        repaired_by += repairing
        done = done.then(
            runner.run_block(stage, here) if isinstance(stage, RepeatedStage) else runner.run_pass(stage, here, None)
        )
    runner.forget_the_rest()
    end = done.position.state
    return PassesResult(
        state=end,
        unrepaired=end if unrepaired is None else unrepaired,
        repaired_by=tuple(repaired_by),
        reports=done.reports,
        plans=done.plans,
    )


class _StageRunner:
    """Runs single passes and blocks; remembers which entries of the cache this run used."""

    def __init__(self, execution: Execution, *, num_passes: int) -> None:
        self._execution = execution
        self._num_passes = num_passes
        self._num_started = 0
        self._keys: list[str] = []

    def forget_the_rest(self) -> None:
        """Leave in the cache what this run used."""
        if self._execution.cache is not None:
            self._execution.cache.keep_only(self._keys)

    def run_pass(self, pass_: AnyPass, here: _Position, turn: _Turn | None) -> _Done:
        """Run one pass, or take its result from the cache; `turn` says which time around, inside a block."""
        lock, cache, context = self._execution.lock, self._execution.cache, self._execution.context
        given_plan = lock.plan_of(pass_.pass_id) if lock is not None else None
        key = chain_key(
            here.key, **_pass_identity(pass_, context, given_plan), **({} if turn is None else {"turn": turn.identity})
        )
        self._keys.append(key)
        # What an evaluator's code returns can't be told from its name: such a pass is always run.
        is_repeatable = Requirement.EVALUATOR not in pass_.requirements or given_plan is not None
        self._num_started += 1
        place = f"[{self._num_started}/{self._num_passes}] {pass_.pass_id}"
        found = None
        if cache is not None and is_repeatable:
            found = cache.get(key, before=here.state, before_model_key=here.model_key)
        if found is not None:
            context.progress.note(f"{place}: taken from the cache")
            position = _Position(state=found.state, key=key, model_key=found.model_key)
            report, plan = found.report, found.plan
        else:
            context.progress.note(f"{place}: {pass_.summary}")
            decided = plan_from_json(pass_, given_plan) if given_plan is not None else None
            outcome = run_pass(
                pass_, here.state, replace(context, iteration=None if turn is None else turn.iteration), plan=decided
            )
            report, plan = outcome.report, plan_to_json(pass_, outcome.plan)
            model_key = None
            if cache is not None:
                stored = cache.put(
                    key,
                    before=here.state,
                    before_model_key=here.model_key,
                    state=outcome.state,
                    report=report,
                    plan=plan,
                )
                model_key = stored.model_key
            if not is_repeatable:
                # A pass may decide much and leave the graph as it is: what it decided counts as well.
                key = chain_key(key, result=content_hash(outcome.state.model), decided=plan)
            position = _Position(state=outcome.state, key=key, model_key=model_key)
        _log(report)
        planned = PlannedPass(step_id=pass_.pass_id, name=pass_.name, plan=plan)
        return _Done(position=position, reports=(report,), plans=(planned,))

    def run_block(self, stage: RepeatedStage, start: _Position) -> _Done:
        """Run a block until it is through, or until the score falls too far."""
        judge = _Judge(self._execution, stage.block)
        kept = _Done(position=start)
        iterations = stage.iterations[: self._given_iterations(stage.block)]
        num_kept, num_before = 0, self._num_started
        undone: Skip | None = None
        for number, passes in enumerate(iterations, start=1):
            done = self._run_iteration(stage, number, passes, kept.position, start)
            undone = judge.objection(number, passes, done.position.state)
            if undone is not None:
                break
            kept, num_kept = kept.then(done), number
        # Iterations that do not come to pass count as done, so that the next pass is not '[3/9]' again.
        self._num_started = num_before + len(passes_of([stage]))
        report = _block_report(stage.block, start.state, kept.position.state, num_kept, judge, undone)
        _log(report)
        plan = PlannedPass(step_id=stage.block.step_id, name=REPEAT, plan={"iterations": num_kept})
        return replace(kept, reports=(*kept.reports, report), plans=(*kept.plans, plan))

    def _run_iteration(
        self,
        stage: RepeatedStage,
        number: int,
        passes: Sequence[AnyPass],
        here: _Position,
        start: _Position,
    ) -> _Done:
        block = stage.block
        iteration = Iteration(number=number, times=block.times, schedule=block.schedule, original=start.state)
        turn = _Turn(iteration=iteration, original_key=start.key)
        done = _Done(position=here)
        for pass_ in passes:
            done = done.then(self.run_pass(pass_, done.position, turn))
        return done

    def _given_iterations(self, block: Repeat) -> int:
        """How many times around to go at most: all, or as many as the plan kept."""
        plan = self._execution.lock.plan_of(block.step_id) if self._execution.lock is not None else None
        if plan is None:
            return block.times
        count = plan.get("iterations") if isinstance(plan, dict) else None
        if not isinstance(count, int) or not 0 <= count <= block.times:
            raise UsageError(
                f"The plan given for '{block.step_id}' does not fit: it keeps {count!r} of {block.times} iterations.",
                "Use a plan that the same version of onnxprune wrote, or run without `--plan`.",
            )
        return count


class _Judge:
    """Scores the model after each time around a block, where the block has a limit and nothing was decided before."""

    def __init__(self, execution: Execution, block: Repeat) -> None:
        self._execution = execution
        self._limit = block.score_drop if execution.lock is None else None
        self.scores: list[Score] = []
        self.duration_s = 0.0

    def objection(self, number: int, passes: Sequence[AnyPass], state: ModelState) -> Skip | None:
        """Why the iteration that led to `state` has to be undone, or None."""
        before, evaluator = self._execution.source_score, self._execution.context.evaluator
        if self._limit is None or before is None or evaluator is None:
            return None
        started = time.perf_counter()
        score = self._score(evaluator, state.model)
        self.duration_s += time.perf_counter() - started
        self.scores.append(score)
        drop = score_drop(before, score)
        self._execution.context.progress.note(f"iteration {number}: {score.metric} {score.value:.4g}")
        if is_at_most(drop, self._limit):
            return None
        return Skip(
            where=", ".join(pass_.pass_id for pass_ in passes),
            reason=f"undone: {score.metric} came to {score.value:.4g}, which is {drop:.4g} below the source's "
            f"{before.value:.4g}; score_drop allows {self._limit:g}",
        )

    def _score(self, evaluator: Evaluator, model: CanonicalModel) -> Score:
        libraries = self._execution.context.custom_op_libraries
        return evaluator.evaluate(
            ort_runner_from_model(model, threads=self._execution.threads, custom_op_libraries=libraries)
        )


def _block_report(
    block: Repeat, before: ModelState, after: ModelState, num_kept: int, judge: _Judge, undone: Skip | None
) -> PassReport:
    parameters = _num_parameters(before.model), _num_parameters(after.model)
    figures: dict[str, float] = {
        "iterations": num_kept,
        "parameters_before": parameters[0],
        "parameters_after": parameters[1],
    }
    figures |= {f"score{number}": score.value for number, score in enumerate(judge.scores, start=1)}
    change = f"{100 * (parameters[1] / parameters[0] - 1):+.1f} %" if parameters[0] else "none"
    return PassReport(
        pass_id=block.step_id,
        pass_name=REPEAT,
        summary=f"{num_kept} of {block.times} iterations kept: parameters {change} in all",
        skips=() if undone is None else (undone,),
        notes=(f"Stopped after iteration {num_kept}. {undone.where} {undone.reason}.",) if undone is not None else (),
        figures=figures,
        config={"times": block.times, "schedule": block.schedule, "score_drop": block.score_drop},
        duration_s=judge.duration_s,
    )


def _num_parameters(model: CanonicalModel) -> int:
    return sum(
        value.const_value.size
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None and holds_parameters(value)
    )


def _log(report: PassReport) -> None:
    logger.info("%s: %s", report.pass_id, report.summary)
    for note in report.notes:
        logger.info("%s: %s", report.pass_id, note)
    for change in report.changes:
        logger.debug("%s: %s: %s %s", report.pass_id, change.where, change.what, dict(change.figures))
    for skip in report.skips:
        logger.debug("%s: %s: left alone, %s", report.pass_id, skip.where, skip.reason)


def _pass_identity(pass_: AnyPass, context: PassContext, given_plan: JsonValue | None) -> JsonObject:
    """Everything besides the model that a pass's result depends on."""
    identity: JsonObject = {
        "pass": pass_.name,
        "from": plugin_version("pass", pass_.name),
        "config": pass_.config.model_dump(mode="json"),
        "seed": context.seed,
        "plan": given_plan,
    }
    if given_plan is not None:
        return identity
    if pass_.uses_calibration and context.calibration is not None:
        identity["calibration"] = context.calibration.content_hash
    identity["files"] = [file_hash(path) for path in pass_.files_read]
    if Requirement.TIMING in pass_.requirements:
        identity["machine"] = [processor_name(), host_isa().summary]
    return identity
