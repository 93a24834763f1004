"""The library: what the command line does, and single steps of it, as calls.

state = onnxprune.load("model.onnx")
state, report = onnxprune.apply(state, "prune", {"ratio": 0.3})
artifact = onnxprune.build(state, "ort-mobile", {"platform": "arm64"}, out="out")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnxprune.contracts import (
    Artifact,
    CalibrationSource,
    Evaluator,
    Iteration,
    ModelState,
    NullProgress,
    PassContext,
    PassReport,
    Progress,
    RunReport,
    TargetContext,
)
from onnxprune.convert.report import ConvertedModel
from onnxprune.convert.request import SourceRequest
from onnxprune.convert.source import open_source
from onnxprune.errors import disk_errors
from onnxprune.evaluate.model_diff import ModelComparison
from onnxprune.graph.io import save_model
from onnxprune.passes.harness import run_pass
from onnxprune.pipeline.comparison import RANDOM, compare_sources
from onnxprune.pipeline.lock import read_lock
from onnxprune.pipeline.output import staged_folder, write_text
from onnxprune.pipeline.run import DryRun, PipelineOptions, dry_run, run_pipeline
from onnxprune.plugins import find_pass, find_target
from onnxprune.recipe import (
    Recipe,
    decode_recipe,
    decode_step,
    overlay,
    overlay_pruning,
    overlay_quantization,
    read_recipe_file,
)
from onnxprune.report.json import to_json_text

__all__ = [
    "Job",
    "apply",
    "build",
    "compare",
    "convert_model",
    "default_name",
    "dry_run_job",
    "load",
    "prepare_job",
    "run",
    "run_job",
    "save",
]

REPORT_NAME = "report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A checked request to run: nothing has been opened or written yet."""

    request: SourceRequest
    recipe: Recipe
    options: PipelineOptions


def run(
    source: object,
    *,
    out: str | Path,
    passes: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    settings: Sequence[str] = (),
    calibration: str | None = None,
    evaluation: str | None = None,
    request: SourceRequest | None = None,
    keep_cache: bool = False,
    measure: bool = True,
    progress: Progress | None = None,
) -> RunReport:
    """Compress `source`, write artifacts, `plan.lock.json` and `report.json` to `out`, and return the report.

    Args:
        source: What `onnxprune run` takes, or a `torch.nn.Module`, `ExportedProgram` or Keras model.
        out: Output folder; what an earlier run left there for the same targets is replaced at the end.
        passes: Names in order; None: those of the recipe.
        targets: Names; None: those of the recipe, or "onnx".
        recipe: A TOML file, or its tables.
        settings: As `--set`, such as "prune.ratio=0.5".
        calibration: Unlabelled samples (folder, .npz, .npy, "module:function").
        evaluation: Labelled samples or "module:function(runner) -> score".
        request: Further options for reading the source; its `source` is replaced.
        keep_cache: Keep intermediate results in `out/.cache`, so that a rerun resumes.
        measure: False builds only.
        progress: Shows what goes on.

    Raises:
        OnnxPruneError: See `onnxprune.errors`. A missed budget is not raised: look at `report.within_budget`.
    """
    job = prepare_job(
        _request(source, request),
        recipe=recipe,
        passes=passes,
        targets=targets,
        settings=settings,
        calibration=calibration,
        evaluation=evaluation,
        out=Path(out),
        cache=None,
        keep_cache=keep_cache,
        lock=None,
        measure=measure,
        progress=progress or NullProgress(),
    )
    return run_job(job)


def prepare_job(
    request: SourceRequest,
    *,
    recipe: str | Path | Mapping[str, Any] | None,
    passes: Sequence[str] | None,
    targets: Sequence[str] | None,
    settings: Sequence[str],
    calibration: str | None,
    evaluation: str | None,
    out: Path | None,
    cache: Path | None,
    keep_cache: bool,
    lock: Path | None,
    measure: bool,
    progress: Progress,
    latency_ratio: float | None = None,
    verify_pruning: bool = False,
    max_drop: float | None = None,
    min_snr_db: float | None = None,
) -> Job:
    """Lay the options over the recipe (or over the plan's recipe) and check everything that needs no model."""
    read = read_lock(lock) if lock is not None else None
    tables: Mapping[str, Any] = read.recipe if read is not None else {}
    origin = "the command line"
    if isinstance(recipe, Mapping):
        tables = recipe
    elif recipe is not None:
        tables, origin = read_recipe_file(Path(recipe)), Path(recipe).name
    sections: dict[str, dict[str, Any]] = {"data": {"calibration": calibration, "eval": evaluation}}
    if not measure:
        sections["measure"] = {"latency": False, "load": False, "fidelity": False, "score": False}
    merged = overlay(tables, passes=passes, targets=targets, settings=settings, sections=sections)
    if latency_ratio is not None or verify_pruning:
        merged = overlay_pruning(merged, latency_ratio=latency_ratio, verify=verify_pruning, settings=settings)
    if max_drop is not None or min_snr_db is not None:
        merged = overlay_quantization(merged, max_drop=max_drop, min_snr_db=min_snr_db, settings=settings)
    folder = out if out is not None else Path("out") / default_name(request.source)
    return Job(
        request=request,
        recipe=decode_recipe(merged, origin=origin),
        options=PipelineOptions(
            out=folder,
            cache=(cache or folder / ".cache") if keep_cache else None,
            lock=read,
            progress=progress,
        ),
    )


def run_job(job: Job) -> RunReport:
    """Run it; the report is written beside the artifacts."""
    return run_pipeline(job.request, job.recipe, job.options, write_report=_write_report)


def _write_report(report: RunReport, folder: Path) -> None:
    write_text(folder / REPORT_NAME, to_json_text(report) + "\n")


def dry_run_job(job: Job) -> DryRun:
    """What `run_job` would do."""
    return dry_run(job.request, job.recipe, job.options)


def convert_model(source: object, *, request: SourceRequest | None = None) -> ConvertedModel:
    """The canonical model of any supported source, and the report about the conversion."""
    return open_source(_request(source, request))


def load(source: object, *, request: SourceRequest | None = None) -> ModelState:
    """What `apply` and `build` work on."""
    return ModelState(model=convert_model(source, request=request).model)


def apply(
    state: ModelState,
    pass_name: str,
    config: Mapping[str, Any] | None = None,
    *,
    calibration: CalibrationSource | None = None,
    evaluator: Evaluator | None = None,
    custom_op_libraries: Sequence[Path] = (),
    seed: int = 0,
    iteration: Iteration | None = None,
    progress: Progress | None = None,
) -> tuple[ModelState, PassReport]:
    """Run one pass; `state` stays as it was.

    Args:
        state: From `load` or an earlier `apply`.
        pass_name: As in `--passes`.
        config: The pass's settings (see `onnxprune passes`).
        calibration: See `onnxprune.data.source.open_data`.
        evaluator: See `onnxprune.evaluate.open_evaluator`.
        custom_op_libraries: Shared libraries with the model's custom operators.
        seed: Where the pass's randomness starts.
        iteration: Which time around, in a loop of your own that prunes in steps: ratios then count from its `original`.
        progress: Shows what goes on.
    """
    pass_class = find_pass(pass_name)
    step = decode_step(pass_name, config or {})
    context = PassContext(
        seed=seed,
        calibration=calibration,
        evaluator=evaluator,
        progress=progress or NullProgress(),
        custom_op_libraries=tuple(custom_op_libraries),
        iteration=iteration,
    )
    pass_ = pass_class(step.config)
    pass_.check(state)
    outcome = run_pass(pass_, state, context)
    return outcome.state, outcome.report


def build(
    state: ModelState,
    target_name: str,
    config: Mapping[str, Any] | None = None,
    *,
    out: str | Path,
    stem: str = "model",
    provenance: Mapping[str, Any] | None = None,
    custom_op_libraries: Sequence[Path] = (),
) -> Artifact:
    """Write the artifact of one target into `out/TARGET`, loaded and run once before it is there.

    Args:
        state: From `load` or `apply`.
        target_name: As in `--target`.
        config: The target's settings (see `onnxprune targets`).
        out: Output folder.
        stem: File name without ending.
        provenance: JSON values to store in the artifact, such as the preprocessing.
        custom_op_libraries: Shared libraries with the model's custom operators.
    """
    step = decode_recipe({"targets": {target_name: dict(config or {})}}).targets[0]
    target = find_target(target_name)(step.config)
    target.check(state, will_quantize=False)
    with staged_folder(Path(out)) as staging:
        folder = staging / target_name
        folder.mkdir()
        context = TargetContext(
            folder=folder,
            stem=stem,
            provenance=dict(provenance or {}),
            custom_op_libraries=tuple(custom_op_libraries),
        )
        artifact = target.build(state, context)
    return replace(artifact, folder=Path(out) / target_name)


def compare(
    reference: str | Path,
    actual: str | Path,
    *,
    data: str = RANDOM,
    samples: int = 8,
    per_tensor: bool = False,
    recipe: str | Path | None = None,
    threads: int = 1,
    custom_op_libraries: Sequence[Path] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> ModelComparison:
    """How far the model `actual` is from the model `reference`, and where they drift apart.

    Args:
        reference: A .onnx, .ort or .tflite file, or any other source.
        actual: The same, with the same inputs and outputs.
        data: Samples (folder, .npz, .npy, "module:function"), or "random".
        samples: At most so many.
        per_tensor: Compare every tensor inside that has the same name in both; not for .ort files.
        recipe: TOML file whose [preprocess] turns pictures into inputs; None: what an artifact was made with.
        threads: Threads of the runtime.
        custom_op_libraries: Shared libraries with the models' custom operators.
        seed: Where random samples start.
        progress: Shows what goes on.
    """
    return compare_sources(
        str(reference),
        str(actual),
        data=data,
        samples=samples,
        per_tensor=per_tensor,
        recipe=Path(recipe) if recipe is not None else None,
        threads=threads,
        custom_op_libraries=tuple(custom_op_libraries),
        seed=seed,
        progress=progress or NullProgress(),
    )


def save(state: ModelState, path: str | Path) -> None:
    """Write the float model to `path` as canonical ONNX."""
    with disk_errors(f"Writing '{path}'"):
        save_model(state.model, Path(path))


def _request(source: object, request: SourceRequest | None) -> SourceRequest:
    shown = str(source) if isinstance(source, Path) else source
    return replace(request, source=shown) if request is not None else SourceRequest(source=shown)


def default_name(source: object) -> str:
    """The folder in "out" for a source that is given without one: its file name without ending."""
    if not isinstance(source, str):
        return type(source).__name__
    return Path(source.partition(".py:")[0]).stem or "model"
