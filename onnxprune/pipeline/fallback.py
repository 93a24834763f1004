"""What it costs that layers left 8 bits, and whether the artifact keeps what the simulation promised."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnxprune.contracts import (
    Artifact,
    FallbackCost,
    FallbackRecord,
    LatencyRatio,
    Measurements,
    ModelState,
    Progress,
    Target,
    TargetContext,
)
from onnxprune.errors import quoted_list
from onnxprune.evaluate.budget import is_at_most, score_drop
from onnxprune.evaluate.feeds import feeds_for
from onnxprune.evaluate.fidelity import fidelity
from onnxprune.passes.quant.fallback import without_fallback
from onnxprune.pipeline.measure import Yardstick
from onnxprune.runtime.host import host_summary
from onnxprune.runtime.latency import interleaved_ratio
from onnxprune.runtime.sessions import ort_runner_from_model

__all__ = ["FallbackJob", "promise_warnings", "settled_early_warnings", "with_fallback_costs"]


@dataclass(frozen=True, slots=True)
class FallbackJob:
    """What twins of artifacts are built from and timed with."""

    state: ModelState
    yardstick: Yardstick
    seed: int
    progress: Progress


def with_fallback_costs(
    measurements: Sequence[Measurements],
    artifacts: Sequence[Artifact],
    targets: Sequence[Target[Any]],
    job: FallbackJob,
) -> tuple[Measurements, ...]:
    """`measurements` with what the fallback costs, where layers left 8 bits.

    The artifact's twin is built from the plan as it was before, in a folder that is gone afterwards, and both are timed
    in turn. Where latencies are not measured, or not on the target, the reason stands there instead.

    Raises:
        TargetError: The twin can't be built, though the artifact could.
    """
    plan = job.state.quantization
    record = plan.fallback if plan is not None else None
    if record is None or not record.nodes:
        return tuple(measurements)
    return tuple(
        replace(measured, fallback=_cost(record, artifact, target, job))
        for measured, artifact, target in zip(measurements, artifacts, targets, strict=True)
    )


def promise_warnings(
    state: ModelState,
    artifacts: Sequence[Artifact],
    targets: Sequence[Target[Any]],
    measurements: Sequence[Measurements],
    yardstick: Yardstick,
) -> tuple[str, ...]:
    """One sentence for each artifact that misses the goal which its plan held in the simulation.

    Where the plan itself misses it, one sentence for all. `state` is the one that `quant` left: what passes behind it
    rounded is no float model to hold an artifact against.
    """
    record = state.quantization.fallback if state.quantization is not None else None
    if record is None:
        return ()
    if not record.met:
        return (f"The goal {record.goal} {record.limit:g} of pass 'quant' is missed, whatever leaves 8 bits.",)
    warnings = []
    for artifact, target, measured in zip(artifacts, targets, measurements, strict=True):
        found = _broken_promise(record, state, artifact, target, measured, yardstick)
        if found:
            warnings.append(f"{artifact.target}: {found}")
    return tuple(warnings)


def settled_early_warnings(state: ModelState, repaired_by: Sequence[str]) -> tuple[str, ...]:
    """Says that layers left 8 bits before the passes `repaired_by` could repair them; nothing where none did."""
    record = state.quantization.fallback if state.quantization is not None else None
    if record is None or not record.num_layers or not repaired_by:
        return ()
    layers = "1 layer" if record.num_layers == 1 else f"{record.num_layers} layers"
    text = (
        f"The goal {record.goal} {record.limit:g} was settled inside 'quant': {layers} left 8 bits before "
        f"{quoted_list(repaired_by)} could repair them, and stay out. Run once without the goal: where the artifact's "
        "own figures keep it, nothing has to leave; else raise `quant.weight_bits`, or name the worst layers in "
        "`quant.exclude`."
    )
    return (text,)


def _cost(record: FallbackRecord, artifact: Artifact, target: Target[Any], job: FallbackJob) -> FallbackCost:
    reason = ""
    if not job.yardstick.options.latency:
        reason = "latency is not measured in this run"
    elif not target.is_host:
        reason = f"this machine ({host_summary()['instruction_set']}) is not the target"
    latency = None if reason else _timed(artifact, target, job)
    return FallbackCost(num_layers=record.num_layers, latency=latency, not_measured_reason=reason)


def _timed(artifact: Artifact, target: Target[Any], job: FallbackJob) -> LatencyRatio:
    yardstick = job.yardstick
    libraries, threads = yardstick.custom_op_libraries, yardstick.options.threads
    job.progress.note(f"{artifact.target}: timing what the fallback costs")
    plan = job.state.quantization
    state = job.state if plan is None else replace(job.state, quantization=without_fallback(plan))
    is_measured = artifact.placement is not None and artifact.placement.decided_by == "measured"
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        context = TargetContext(
            folder=Path(folder),
            stem="without_fallback",
            custom_op_libraries=libraries,
            seed=job.seed,
            # Placed as the artifact was, so that the layers make the difference and nothing else.
            timing_threads=threads if is_measured else None,
        )
        twin = target.runner(target.build(state, context), threads=threads, custom_op_libraries=libraries)
        runner = target.runner(artifact, threads=threads, custom_op_libraries=libraries)
        batch = yardstick.batches[0]
        return interleaved_ratio(
            twin,
            runner,
            feeds_for(twin.inputs, batch),
            after_feeds=feeds_for(runner.inputs, batch),
            min_seconds=yardstick.options.min_seconds,
            threads=threads,
        )


def _broken_promise(
    record: FallbackRecord,
    state: ModelState,
    artifact: Artifact,
    target: Target[Any],
    measured: Measurements,
    yardstick: Yardstick,
) -> str:
    if record.goal == "max_drop":
        if record.float_score is None or measured.score is None:
            return ""
        drop = score_drop(record.float_score, measured.score)
        if is_at_most(drop, record.limit):
            return ""
        return (
            f"the artifact misses max_drop {record.limit:g}, which its plan held when it was simulated: "
            f"{measured.score.metric} is worse by {drop:.4g} than the float model's."
        )
    if not yardstick.options.fidelity:
        return ""
    libraries, threads = yardstick.custom_op_libraries, yardstick.options.threads
    reference = ort_runner_from_model(state.model, threads=threads, custom_op_libraries=libraries)
    runner = target.runner(artifact, threads=threads, custom_op_libraries=libraries)
    found = fidelity(reference, runner, yardstick.batches).snr_db
    if is_at_most(-found, -record.limit):
        return ""
    return (
        f"the artifact misses min_snr_db {record.limit:g}, which its plan held when it was simulated: its outputs keep "
        f"{found:.1f} dB of the float model's."
    )
