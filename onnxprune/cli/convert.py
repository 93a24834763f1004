"""`onnxprune convert`: any supported source into a canonical ONNX file."""

from __future__ import annotations

from pathlib import Path

import click

from onnxprune import api
from onnxprune.cli.options import json_option, source_options, verbosity_options
from onnxprune.cli.progress import make_progress
from onnxprune.cli.stdout import results_on_stdout
from onnxprune.contracts import ModelState
from onnxprune.convert.request import SourceRequest
from onnxprune.convert.source import open_source
from onnxprune.errors import UsageError

__all__ = ["convert"]


@click.command("convert")
@source_options
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The .onnx file to write.")
@json_option
@verbosity_options
def convert(
    *,
    request: SourceRequest,
    out: Path,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Turn SOURCE into canonical ONNX, and check that both compute the same on seeded inputs."""
    from onnxprune.report.json import to_json_text
    from onnxprune.report.terminal import print_conversion

    progress = make_progress(verbosity=-1 if quiet else verbose)
    if out.suffix != ".onnx":
        raise UsageError(f"The output '{out}' does not end in '.onnx'.", "Write: --out model.onnx.")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"The folder of the output '{out}' does not exist.", "Make it first.")
    progress.note(f"Reading {request.source}")
    converted = open_source(request, progress=progress)
    source = Path(str(request.source))
    if source.exists() and out.exists() and out.samefile(source):
        raise UsageError(f"The output '{out}' is the source itself.", "Choose another name with --out.")
    api.save(ModelState(model=converted.model), out)
    with results_on_stdout():
        if as_json:
            click.echo(to_json_text(converted.report))
        else:
            print_conversion(converted.report, out=out)
