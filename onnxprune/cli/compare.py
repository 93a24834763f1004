"""`onnxprune compare`: how far two models are from each other, and where they drift apart."""

from __future__ import annotations

from pathlib import Path

import click

from onnxprune import api
from onnxprune.cli.options import json_option, verbosity_options
from onnxprune.cli.progress import make_progress
from onnxprune.cli.stdout import nothing_on_stdout, results_on_stdout
from onnxprune.errors import UsageError

__all__ = ["compare"]


@click.command("compare")
@click.argument("reference")
@click.argument("actual")
@click.option(
    "--data",
    default="random",
    show_default=True,
    metavar="DATA",
    help="Samples: image folder, .npz, .npy, module:function, or 'random'.",
)
@click.option("--samples", default=8, show_default=True, type=click.IntRange(min=1), help="At most so many samples.")
@click.option("--per-tensor", is_flag=True, help="Compare every tensor inside that has the same name in both.")
@click.option("--worst-first", is_flag=True, help="With --per-tensor: the worst tensors on top, not the graph's order.")
@click.option("--all", "show_all", is_flag=True, help="With --per-tensor: show every tensor.")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="TOML file whose [preprocess] turns pictures into inputs (default: what an artifact was made with).",
)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="Threads of the runtime.")
@click.option(
    "--custom-op-library",
    "custom_op_libraries",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Shared library with custom ONNX Runtime operators; repeatable.",
)
@json_option
@verbosity_options
def compare(
    *,
    reference: str,
    actual: str,
    data: str,
    samples: int,
    per_tensor: bool,
    worst_first: bool,
    show_all: bool,
    recipe: Path | None,
    threads: int,
    custom_op_libraries: tuple[Path, ...],
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Compare the model ACTUAL with the model REFERENCE, on the same samples.

    Both are .onnx, .ort or .tflite files with the same inputs and outputs, such as a source and its int8 artifact;
    REFERENCE may be any other source as well. SNR is signal over noise, 'arises' the error that a layer adds to that of
    its inputs.
    """
    from onnxprune.report.comparison import print_comparison
    from onnxprune.report.json import to_json_text

    if (worst_first or show_all) and not per_tensor:
        raise UsageError("'--worst-first' and '--all' are about tensors.", "Give --per-tensor as well.")
    with nothing_on_stdout():
        found = api.compare(
            reference,
            actual,
            data=data,
            samples=samples,
            per_tensor=per_tensor,
            recipe=recipe,
            threads=threads,
            custom_op_libraries=custom_op_libraries,
            progress=make_progress(verbosity=-1 if quiet else verbose),
        )
    with results_on_stdout():
        if as_json:
            click.echo(to_json_text(found))
        else:
            print_comparison(found, worst_first=worst_first, show_all=show_all)
