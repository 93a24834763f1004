"""`onnxprune profile`: where the time goes."""

from __future__ import annotations

from pathlib import Path

import click

from onnxprune.cli.options import json_option, source_options, verbosity_options
from onnxprune.cli.progress import make_progress
from onnxprune.cli.stdout import results_on_stdout
from onnxprune.convert.request import SourceRequest
from onnxprune.convert.source import open_source
from onnxprune.errors import UsageError, quoted_list
from onnxprune.runtime.artifacts import ARTIFACT_SUFFIXES, check_artifact, refuse_useless_libraries

__all__ = ["profile"]


@click.command("profile")
@source_options
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="Threads of the runtime.")
@click.option("--against", type=click.Path(path_type=Path, exists=True), help="A second artifact, timed in turn.")
@click.option(
    "--seconds", default=2.0, show_default=True, type=click.FloatRange(min=0.01), help="Time at least so long."
)
@json_option
@verbosity_options
def profile(
    *,
    request: SourceRequest,
    threads: int,
    against: Path | None,
    seconds: float,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Time SOURCE and its operators on this machine; with --against the ratio of two models, timed in turn.

    A file that a runtime takes (.onnx, .ort, .tflite) is timed as it is; any other source as the ONNX model that it
    becomes.
    """
    from onnxprune.report.json import to_json_text
    from onnxprune.report.profile import print_profile, profile_model

    progress = make_progress(verbosity=-1 if quiet else verbose)
    source = Path(str(request.source))
    is_artifact = source.suffix in ARTIFACT_SUFFIXES
    useless = [
        option
        for option, value in (("--weights", request.weights), ("--signature", request.signature))
        if is_artifact and value is not None
    ]
    if useless:
        raise UsageError(f"{quoted_list(useless)} mean nothing for '{source.name}', which is timed as it is.")
    for name, shape in request.shapes.items():
        if not all(isinstance(size, int) for size in shape):
            raise UsageError(f"The shape of '{name}' has a named axis, and timing needs a size for every axis.")
    files = [path for path in (source if is_artifact else None, against) if path is not None]
    refuse_useless_libraries(request.custom_op_libraries, files if is_artifact else ())
    for path in files:
        check_artifact(path)
    model = source if is_artifact else open_source(request, progress=progress).model
    result = profile_model(
        model,
        shapes={name: tuple(dim for dim in shape if isinstance(dim, int)) for name, shape in request.shapes.items()},
        custom_op_libraries=request.custom_op_libraries,
        threads=threads,
        against=against,
        min_seconds=seconds,
    )
    with results_on_stdout():
        if as_json:
            click.echo(to_json_text(result))
        else:
            print_profile(result)
