"""The main job: source -> passes -> artifacts -> measurements -> report.

Everything that can fail early fails early: configurations and requirements before the source is opened, then the data
and every pass's and target's own check before the first pass starts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from onnxprune.contracts import (
    Artifact,
    BudgetOutcome,
    CalibrationSource,
    Evaluator,
    JsonObject,
    JsonValue,
    Measurements,
    ModelState,
    NullProgress,
    PassContext,
    PassReport,
    Placement,
    Progress,
    Runner,
    RunReport,
    Score,
    Target,
    TargetContext,
    TensorSpec,
)
from onnxprune.convert.report import ConvertedModel, SourceKind
from onnxprune.convert.request import SourceRequest
from onnxprune.convert.source import open_source
from onnxprune.data.overlap import overlap_warning
from onnxprune.data.source import open_data
from onnxprune.errors import PreconditionError, UsageError, quoted_list
from onnxprune.evaluate import open_evaluator
from onnxprune.evaluate.budget import check_budget
from onnxprune.evaluate.figures import model_figures
from onnxprune.graph.io import external_data_files, save_model
from onnxprune.graph.writer import content_hash
from onnxprune.passes.harness import check_requirements
from onnxprune.pipeline.cache import PassCache, chain_key, file_hash
from onnxprune.pipeline.execute import Execution, PassesResult, run_stages
from onnxprune.pipeline.fallback import FallbackJob, promise_warnings, settled_early_warnings, with_fallback_costs
from onnxprune.pipeline.lock import (
    LOCK_NAME,
    LOCK_SCHEMA,
    PlanLock,
    check_lock,
    decisive_tables,
    placements_for,
    render_lock,
)
from onnxprune.pipeline.measure import Yardstick, measure_artifact, measure_source, sample_batches
from onnxprune.pipeline.output import staged_folder, write_text
from onnxprune.pipeline.stages import RepeatedStage, Stage, make_stages, passes_of
from onnxprune.pipeline.verdict import result_warnings, sparse_targets
from onnxprune.plugins import find_target
from onnxprune.recipe import Recipe, Repeat, portable_settings, recipe_to_json
from onnxprune.runtime.host import host_summary, runtime_versions
from onnxprune.runtime.sessions import ort_runner_from_model

__all__ = ["REPORT_SCHEMA", "DryRun", "PipelineOptions", "dry_run", "run_pipeline"]

REPORT_SCHEMA = 1
FIDELITY_BUDGETS = ("fidelity_cosine", "fidelity_snr_db", "fidelity_max_abs")


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineOptions:
    """How to run, apart from what the recipe says.

    `cache` is the folder of intermediate results (None: keep none). `lock` repeats an earlier run's decisions.
    """

    out: Path
    cache: Path | None = None
    lock: PlanLock | None = None
    progress: Progress = field(default_factory=NullProgress)


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What a run would do: each pass's plan (JSON) and report. Nothing was written."""

    plans: Mapping[str, JsonValue]
    reports: tuple[PassReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """Everything that was opened and checked before the first pass."""

    recipe: Recipe
    stages: tuple[Stage, ...]
    targets: tuple[Target[Any], ...]
    converted: ConvertedModel
    source_hash: str
    runner: Runner
    calibration: CalibrationSource | None
    evaluator: Evaluator | None
    context: PassContext
    warnings: tuple[str, ...]


def run_pipeline(
    request: SourceRequest,
    recipe: Recipe,
    options: PipelineOptions,
    *,
    write_report: Callable[[RunReport, Path], None],
) -> RunReport:
    """Do what `recipe` says to the model that `request` names, and write artifacts, plan and report to `options.out`.

    A missed budget is not raised: it stands in the report, and the artifact is kept. `write_report` gets the report and
    the folder to write it to, which becomes `options.out` together with everything else.

    Raises:
        OnnxPruneError: See `onnxprune.errors`; nothing in `options.out` has changed then.
    """
    started = time.monotonic()
    progress = options.progress
    stages, targets = _instantiate(recipe)
    _check_requirements(recipe, stages, targets, is_planned=options.lock is not None)
    with staged_folder(options.out) as staging:
        prepared = _prepare(request, recipe, stages, targets, options)
        _check_not_the_source(request, recipe, options.out)
        # The source is scored first: bad evaluation data or a failing evaluator shows before the passes' work.
        yardstick = _yardstick(prepared, progress)
        done = _run_passes(prepared, options, yardstick.source_score)
        artifacts = _build(prepared, done, staging, options)
        source_measurements = _measure_source(request, prepared, yardstick)
        measurements = tuple(
            measure_artifact(artifact, target, yardstick, progress)
            for artifact, target in zip(artifacts, targets, strict=True)
        )
        measurements = with_fallback_costs(
            measurements, artifacts, targets, FallbackJob(done.state, yardstick, recipe.seed, progress)
        )
        lock = PlanLock(
            schema=LOCK_SCHEMA,
            source_hash=prepared.source_hash,
            recipe=decisive_tables(recipe),
            passes=done.plans,
            placements={a.target: a.placement for a in artifacts if a.placement is not None},
            versions=runtime_versions(),
        )
        write_text(staging / LOCK_NAME, render_lock(lock))
        before, after = model_figures(prepared.converted.model), model_figures(done.state.model)
        report = RunReport(
            schema=REPORT_SCHEMA,
            source=_describe_source(request, prepared),
            recipe=recipe_to_json(recipe),
            before=before,
            after=after,
            source_measurements=source_measurements,
            passes=done.reports,
            artifacts=tuple(replace(artifact, folder=options.out / artifact.target) for artifact in artifacts),
            measurements=measurements,
            budgets=_budgets(recipe, measurements, source_measurements),
            warnings=(
                *prepared.warnings,
                *result_warnings(
                    before, after, source_measurements, measurements, sparse_targets=sparse_targets(artifacts)
                ),
                *promise_warnings(done.unrepaired, artifacts, targets, measurements, yardstick),
                *settled_early_warnings(done.state, done.repaired_by),
            ),
            versions=runtime_versions(),
            host=host_summary(),
            duration_s=time.monotonic() - started,
        )
        write_report(report, staging)
    return report


def dry_run(request: SourceRequest, recipe: Recipe, options: PipelineOptions) -> DryRun:
    """Run all checks and passes in memory, build nothing and write nothing."""
    stages, targets = _instantiate(recipe)
    _check_requirements(recipe, stages, targets, is_planned=options.lock is not None)
    prepared = _prepare(request, recipe, stages, targets, options)
    done = _run_passes(prepared, replace(options, cache=None), None)
    return DryRun(plans={entry.step_id: entry.plan for entry in done.plans}, reports=done.reports)


# --- before the first pass ------------------------------------------------------------------------------------


def _instantiate(recipe: Recipe) -> tuple[tuple[Stage, ...], tuple[Target[Any], ...]]:
    return make_stages(recipe), tuple(find_target(step.name)(step.config) for step in recipe.targets)


def _check_requirements(
    recipe: Recipe, stages: Sequence[Stage], targets: Sequence[Target[Any]], *, is_planned: bool
) -> None:
    """What can be refused without opening anything. Passes whose plans are given need no data."""
    check_requirements(
        passes_of(stages),
        has_calibration=recipe.data.calibration is not None or is_planned,
        has_evaluator=recipe.data.eval is not None or is_planned,
        untimed_reason="" if is_planned else _untimed_reason(recipe, targets),
    )
    judged = [step.step_id for step in recipe.steps if isinstance(step, Repeat) and step.score_drop is not None]
    if judged and recipe.data.eval is None and not is_planned:
        raise PreconditionError(
            f"The limit 'score_drop' of '{judged[0]}' needs an evaluator, but the run has none.",
            "Give `--eval PATH` (labelled images or .npz) or `--eval module:function`, or drop the limit.",
        )
    if recipe.budget.score_drop is not None and (recipe.data.eval is None or not recipe.measure.score):
        raise PreconditionError(
            "The budget 'score_drop' needs an evaluator, but the run has none.",
            "Give `--eval PATH` (labelled images or .npz) or `--eval module:function`, or drop the budget.",
        )
    if recipe.budget.latency_ratio is not None:
        elsewhere = [target.name for target in targets if not target.is_host]
        if elsewhere:
            raise PreconditionError(
                f"The budget 'latency_ratio' can't be measured for {quoted_list(elsewhere)}: this machine "
                f"({host_summary()['instruction_set']}) is not that target.",
                "Build for this machine's instruction set, or drop the budget.",
            )
        if not recipe.measure.latency:
            raise PreconditionError(
                "The budget 'latency_ratio' needs measured latencies, but 'measure.latency' is off.",
                "Drop the budget, or measure.",
            )
    asked = [name for name in FIDELITY_BUDGETS if getattr(recipe.budget, name) is not None]
    if asked and not recipe.measure.fidelity:
        raise PreconditionError(
            f"The budget {quoted_list(asked)} needs compared outputs, but 'measure.fidelity' is off.",
            "Drop the budget, or measure.",
        )


def _untimed_reason(recipe: Recipe, targets: Sequence[Target[Any]]) -> str:
    """Why timings of this machine don't count in this run, or ""."""
    elsewhere = [target.name for target in targets if not target.is_host]
    if elsewhere:
        return f"this machine ({host_summary()['instruction_set']}) is not the target {quoted_list(elsewhere)}"
    return "" if recipe.measure.latency else "nothing is measured in this run ('measure.latency' is off)"


def _check_not_the_source(request: SourceRequest, recipe: Recipe, out: Path) -> None:
    if not isinstance(request.source, str | Path) or not Path(request.source).exists():
        return
    source = Path(request.source)
    for target in recipe.targets:
        if (out / target.name).resolve() in (source.resolve(), *source.resolve().parents):
            raise UsageError(
                f"The source '{source}' lies in '{out / target.name}', which the run would replace.",
                "Choose another folder with --out.",
            )


def _prepare(
    request: SourceRequest,
    recipe: Recipe,
    stages: tuple[Stage, ...],
    targets: tuple[Target[Any], ...],
    options: PipelineOptions,
) -> _Prepared:
    progress = options.progress
    progress.note(f"Reading {source_text(request.source)}")
    converted = open_source(request, progress=progress)
    source_hash = content_hash(converted.model)
    if options.lock is not None:
        check_lock(options.lock, source_hash=source_hash, recipe=recipe)
    runner = ort_runner_from_model(
        converted.model, threads=recipe.measure.threads, custom_op_libraries=request.custom_op_libraries
    )
    inputs = runner.inputs
    calibration = _open_calibration(recipe, inputs)
    evaluator = None
    if recipe.data.eval is not None:
        evaluator = open_evaluator(
            recipe.data.eval, inputs=inputs, preprocess=recipe.preprocess, limit=recipe.data.eval_samples
        )
    state = ModelState(model=converted.model)
    will_quantize = any(pass_.produces_quantization for pass_ in passes_of(stages))
    for stage in stages:
        # What can be seen from the source is the same each time around.
        for pass_ in stage.iterations[0] if isinstance(stage, RepeatedStage) else (stage,):
            pass_.check(state)
            if options.lock is None:
                pass_.check_files(state)
    for target in targets:
        target.check(state, will_quantize=will_quantize)
    warnings = tuple(w for w in (overlap_warning(calibration, evaluator), _version_warning(options.lock)) if w)
    context = PassContext(
        seed=recipe.seed,
        calibration=calibration,
        evaluator=evaluator,
        progress=progress,
        custom_op_libraries=request.custom_op_libraries,
    )
    return _Prepared(
        recipe=recipe,
        stages=stages,
        targets=targets,
        converted=converted,
        source_hash=source_hash,
        runner=runner,
        calibration=calibration,
        evaluator=evaluator,
        context=context,
        warnings=warnings,
    )


def _version_warning(lock: PlanLock | None) -> str:
    """Says that the plan was made with other versions, or ""."""
    if lock is None:
        return ""
    now = runtime_versions()
    other = [
        f"{name} {then} (now {now.get(name, 'missing')})"
        for name, then in lock.versions.items()
        if now.get(name) != then
    ]
    return f"The plan was made with other versions, so bytes may differ: {', '.join(other)}." if other else ""


def _open_calibration(recipe: Recipe, inputs: Sequence[TensorSpec]) -> CalibrationSource | None:
    if recipe.data.calibration is None:
        return None
    return open_data(
        recipe.data.calibration,
        inputs=inputs,
        preprocess=recipe.preprocess,
        limit=recipe.data.calibration_samples,
    )


# --- passes ---------------------------------------------------------------------------------------------------


def _run_passes(prepared: _Prepared, options: PipelineOptions, source_score: Score | None) -> PassesResult:
    evaluator = prepared.evaluator
    is_judged = any(isinstance(step, Repeat) and step.score_drop is not None for step in prepared.recipe.steps)
    if source_score is None and evaluator is not None and is_judged and options.lock is None:
        options.progress.note("source: scoring")
        source_score = evaluator.evaluate(prepared.runner)
    execution = Execution(
        context=prepared.context,
        start_key=chain_key(
            prepared.source_hash,
            versions=runtime_versions(),
            custom_op_libraries=[file_hash(path) for path in prepared.context.custom_op_libraries],
        ),
        cache=PassCache(options.cache, source_hash=prepared.source_hash) if options.cache is not None else None,
        lock=options.lock,
        source_score=source_score,
        threads=prepared.recipe.measure.threads,
    )
    return run_stages(prepared.stages, ModelState(model=prepared.converted.model), execution)


# --- artifacts and figures ------------------------------------------------------------------------------------


def _build(prepared: _Prepared, done: PassesResult, staging: Path, options: PipelineOptions) -> tuple[Artifact, ...]:
    recipe, state = prepared.recipe, done.state
    placements: Mapping[str, Placement] = placements_for(options.lock, recipe) if options.lock is not None else {}
    provenance: JsonObject = {
        "source_hash": prepared.source_hash,
        "preprocess": recipe.preprocess.model_dump(mode="json"),
        "passes": [
            {"id": report.pass_id, **portable_settings(report.pass_name, report.config)} for report in done.reports
        ],
        "seed": recipe.seed,
        "versions": runtime_versions(),
    }
    if state.quantization is not None:
        provenance["calibration_hash"] = state.quantization.calibration_hash
        provenance["calibration_method"] = state.quantization.method
        provenance["calibration_samples"] = state.quantization.num_samples
    artifacts = []
    for target, step in zip(prepared.targets, recipe.targets, strict=True):
        options.progress.note(f"Building for {step.name}")
        folder = staging / step.name
        folder.mkdir()
        artifacts.append(
            target.build(
                state,
                TargetContext(
                    folder=folder,
                    stem=_stem(prepared.converted.report.source_name),
                    provenance=provenance,
                    progress=options.progress,
                    custom_op_libraries=prepared.context.custom_op_libraries,
                    seed=recipe.seed,
                    placement=placements.get(step.name),
                    timing_threads=recipe.measure.threads if recipe.measure.latency and target.is_host else None,
                ),
            )
        )
    return tuple(artifacts)


def source_text(source: object) -> str:
    """The path or factory as it was given; of an object only its type, whose text can be pages long."""
    return str(source) if isinstance(source, str | Path) else f"a {type(source).__name__}"


def _stem(source: str) -> str:
    """File name without ending for artifacts: of the model file, or of the file that holds the factory."""
    return Path(source.partition(".py:")[0]).stem or "model"


def _yardstick(prepared: _Prepared, progress: Progress) -> Yardstick:
    options = prepared.recipe.measure
    batches, data = sample_batches(prepared.runner, prepared.calibration, seed=prepared.recipe.seed)
    score = None
    if prepared.evaluator is not None and options.score:
        progress.note("source: scoring")
        score = prepared.evaluator.evaluate(prepared.runner)
    return Yardstick(
        source=prepared.runner,
        batches=batches,
        data=data,
        evaluator=prepared.evaluator,
        source_score=score,
        options=options,
        custom_op_libraries=prepared.context.custom_op_libraries,
    )


def _measure_source(request: SourceRequest, prepared: _Prepared, yardstick: Yardstick) -> Measurements:
    if prepared.converted.report.kind is SourceKind.ONNX:
        source = Path(str(request.source))
        return measure_source(yardstick, path=source, data_files=external_data_files(source))
    # Sources in other formats are measured as the ONNX model that they became.
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        path = Path(folder) / "source.onnx"
        save_model(prepared.converted.model, path)
        return measure_source(yardstick, path=path, data_files=external_data_files(path))


def _budgets(recipe: Recipe, measurements: Sequence[Measurements], source: Measurements) -> tuple[BudgetOutcome, ...]:
    return tuple(
        outcome for measured in measurements for outcome in check_budget(recipe.budget, measured, source=source)
    )


def _describe_source(request: SourceRequest, prepared: _Prepared) -> JsonObject:
    report = prepared.converted.report
    return {
        "path": source_text(request.source),
        "sha256": prepared.source_hash,
        "conversion": to_jsonable_python(report, inf_nan_mode="strings"),
        "inputs": [{"name": s.name, "dtype": s.dtype, "shape": s.shape} for s in prepared.runner.inputs],
        "outputs": [{"name": s.name, "dtype": s.dtype, "shape": s.shape} for s in prepared.runner.outputs],
    }
