"""`onnxprune run`: the main job."""

from __future__ import annotations

from pathlib import Path

import click

from onnxprune import api
from onnxprune.cli.endings import missed_budget
from onnxprune.cli.family import family_folders, run_family
from onnxprune.cli.options import json_option, sources_options, verbosity_options
from onnxprune.cli.progress import make_progress
from onnxprune.cli.stdout import nothing_on_stdout, results_on_stdout
from onnxprune.convert.request import SourceRequest
from onnxprune.errors import UsageError

__all__ = ["run"]


def _names(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if value is not None else None


@click.command("run")
@sources_options
@click.option("--recipe", type=click.Path(path_type=Path), help="TOML file that says what to do.")
@click.option("--passes", callback=_names, metavar="A,B", help="Passes in order, such as simplify,prune,quant.")
@click.option("--target", "targets", multiple=True, metavar="NAME", help="What to build for; repeatable.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="One setting, such as prune.ratio=0.5.")
@click.option(
    "--latency-ratio",
    type=click.FloatRange(0.0, 1.0, min_open=True),
    help="Prune until the model takes this part of its time on this machine (0.5: half).",
)
@click.option("--verify-pruning", is_flag=True, help="Hold the pruned model against the original, masked with zeros.")
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0.0),
    help="Let the score of int8 fall by so much at most (0.01); damaging layers leave int8. Needs --eval.",
)
@click.option(
    "--min-snr", "min_snr_db", type=float, metavar="DB", help="The same without --eval: SNR of the outputs, at least."
)
@click.option("--calibration", metavar="DATA", help="Unlabelled samples: image folder, .npz, .npy, module:function.")
@click.option("--eval", "evaluation", metavar="DATA", help="Labelled samples, or module:function(runner) -> score.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Output folder (default: out/NAME); with several sources one folder for each in it.",
)
@click.option("--cache", type=click.Path(path_type=Path), help="Folder for intermediate results (default: OUT/.cache).")
@click.option("--no-cache", is_flag=True, help="Keep no intermediate results.")
@click.option("--plan", "lock", type=click.Path(path_type=Path), help="Repeat the decisions of a plan.lock.json.")
@click.option("--dry-run", is_flag=True, help="Print what every pass would do; write nothing.")
@click.option("--no-measure", is_flag=True, help="Build only: no scores, fidelity, latency or memory.")
@json_option
@verbosity_options
def run(
    *,
    requests: tuple[SourceRequest, ...],
    recipe: Path | None,
    passes: tuple[str, ...] | None,
    targets: tuple[str, ...],
    settings: tuple[str, ...],
    latency_ratio: float | None,
    verify_pruning: bool,
    max_drop: float | None,
    min_snr_db: float | None,
    calibration: str | None,
    evaluation: str | None,
    out: Path | None,
    cache: Path | None,
    no_cache: bool,
    lock: Path | None,
    dry_run: bool,
    no_measure: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Compress SOURCE, build artifacts and prove the result. Several sources go through the same recipe in turn.

    SOURCE is a model file or folder (.onnx, .pt2, .keras, .h5, SavedModel, .pb, .tflite) or a PyTorch factory
    'file.py:function'. Factories, evaluators and data functions are code that this command runs.
    """
    from onnxprune.report.json import to_json_text
    from onnxprune.report.terminal import print_dry_run, print_report

    if cache is not None and no_cache:
        raise UsageError("'--cache' and '--no-cache' exclude each other.")
    if lock is not None and len(requests) > 1:
        raise UsageError("'--plan' repeats the decisions for one model, and several are given.")
    progress = make_progress(verbosity=-1 if quiet else verbose)
    folders = family_folders([str(request.source) for request in requests], out) if len(requests) > 1 else (out,)
    jobs = [
        api.prepare_job(
            request,
            recipe=recipe,
            passes=passes,
            targets=targets or None,
            settings=settings,
            calibration=calibration,
            evaluation=evaluation,
            out=folder,
            cache=cache,
            keep_cache=not no_cache,
            lock=lock,
            measure=not no_measure,
            progress=progress,
            latency_ratio=latency_ratio,
            verify_pruning=verify_pruning,
            max_drop=max_drop,
            min_snr_db=min_snr_db,
        )
        for request, folder in zip(requests, folders, strict=True)
    ]
    if len(jobs) > 1:
        run_family(jobs, dry_run=dry_run, as_json=as_json, verbose=verbose, progress=progress)
        return
    (job,) = jobs
    if dry_run:
        with nothing_on_stdout():
            dry = api.dry_run_job(job)
        with results_on_stdout():
            if as_json:
                click.echo(to_json_text(dry))
            else:
                print_dry_run(dry, with_plans=verbose > 0)
        return
    with nothing_on_stdout():
        report = api.run_job(job)
    with results_on_stdout():
        if as_json:
            click.echo(to_json_text(report))
        else:
            print_report(report, out=job.options.out)
    missed = missed_budget(report, job.options.out)
    if missed is not None:
        raise missed
