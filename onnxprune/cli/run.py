"""`onnxprune run`: the main job."""

from __future__ import annotations

from pathlib import Path

import click

from onnxprune import api
from onnxprune.cli.options import json_option, source_options, verbosity_options
from onnxprune.cli.progress import make_progress
from onnxprune.cli.stdout import nothing_on_stdout, results_on_stdout
from onnxprune.convert.request import SourceRequest
from onnxprune.errors import BudgetMissedError, UsageError

__all__ = ["run"]


def _names(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if value is not None else None


@click.command("run")
@source_options
@click.option("--recipe", type=click.Path(path_type=Path), help="TOML file that says what to do.")
@click.option("--passes", callback=_names, metavar="A,B", help="Passes in order, such as simplify,prune,quant.")
@click.option("--target", "targets", multiple=True, metavar="NAME", help="What to build for; repeatable.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="One setting, such as prune.ratio=0.5.")
@click.option("--calibration", metavar="DATA", help="Unlabelled samples: image folder, .npz, .npy, module:function.")
@click.option("--eval", "evaluation", metavar="DATA", help="Labelled samples, or module:function(runner) -> score.")
@click.option("--out", type=click.Path(path_type=Path), help="Output folder (default: out/NAME).")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder for intermediate results (default: OUT/.cache).")
@click.option("--no-cache", is_flag=True, help="Keep no intermediate results.")
@click.option("--plan", "lock", type=click.Path(path_type=Path), help="Repeat the decisions of a plan.lock.json.")
@click.option("--dry-run", is_flag=True, help="Print what every pass would do; write nothing.")
@click.option("--no-measure", is_flag=True, help="Build only: no scores, fidelity, latency or memory.")
@json_option
@verbosity_options
def run(
    *,
    request: SourceRequest,
    recipe: Path | None,
    passes: tuple[str, ...] | None,
    targets: tuple[str, ...],
    settings: tuple[str, ...],
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
    """Compress SOURCE, build artifacts and prove the result.

    SOURCE is a model file or folder (.onnx, .pt2, .keras, .h5, SavedModel, .pb, .tflite) or a PyTorch factory
    'file.py:function'. Factories, evaluators and data functions are code that this command runs.
    """
    from onnxprune.report.json import to_json_text
    from onnxprune.report.terminal import print_dry_run, print_report

    if cache is not None and no_cache:
        raise UsageError("'--cache' and '--no-cache' exclude each other.")
    job = api.prepare_job(
        request,
        recipe=recipe,
        passes=passes,
        targets=targets or None,
        settings=settings,
        calibration=calibration,
        evaluation=evaluation,
        out=out,
        cache=cache,
        keep_cache=not no_cache,
        lock=lock,
        measure=not no_measure,
        progress=make_progress(verbosity=-1 if quiet else verbose),
    )
    if dry_run:
        with nothing_on_stdout():
            dry = api.dry_run_job(job)
        with results_on_stdout():
            if as_json:
                click.echo(to_json_text(dry))
            else:
                print_dry_run(dry)
        return
    with nothing_on_stdout():
        report = api.run_job(job)
    with results_on_stdout():
        if as_json:
            click.echo(to_json_text(report))
        else:
            print_report(report, out=job.options.out)
    missed = [outcome for outcome in report.budgets if not outcome.met]
    if missed:
        described = "; ".join(
            f"{outcome.name} of '{outcome.target}' is "
            f"{'not measured' if outcome.actual is None else format(outcome.actual, '.6g')}, limit {outcome.limit:.6g}"
            for outcome in missed
        )
        raise BudgetMissedError(f"Budget missed: {described}.", f"The artifact is kept in '{job.options.out}'.")
