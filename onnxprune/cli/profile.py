"""`onnxprune profile`: where the time goes."""

from __future__ import annotations

from pathlib import Path

import click

from onnxprune import api
from onnxprune.cli.options import json_option, request_from, source_options, verbosity_options
from onnxprune.cli.progress import make_progress

__all__ = ["profile"]


@click.command("profile")
@source_options
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="Threads of the runtime.")
@click.option("--against", type=click.Path(path_type=Path, exists=True), help="A second .onnx or .ort, timed in turn.")
@click.option(
    "--seconds", default=2.0, show_default=True, type=click.FloatRange(min=0.01), help="Time at least so long."
)
@json_option
@verbosity_options
def profile(
    *,
    source: str,
    weights: Path | None,
    shapes: tuple[str, ...],
    signature: str | None,
    inputs: str | None,
    outputs: str | None,
    trust_source: bool,
    custom_op_libraries: tuple[Path, ...],
    threads: int,
    against: Path | None,
    seconds: float,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Time SOURCE and its operators on this machine; with --against the ratio of two models, timed in turn.

    An artifact of onnxprune (.onnx, .ort) is timed as it is; any other source as the ONNX model that it becomes.
    """
    from onnxprune.report.json import to_json_text
    from onnxprune.report.profile import print_profile, profile_model

    make_progress(verbosity=-1 if quiet else verbose)
    request = request_from(
        source=source,
        weights=weights,
        shapes=shapes,
        signature=signature,
        inputs=inputs,
        outputs=outputs,
        trust_source=trust_source,
        custom_op_libraries=custom_op_libraries,
    )
    is_artifact = Path(source).suffix in (".ort", ".onnx")
    model = Path(source) if is_artifact else api.convert_model(source, request=request).model
    result = profile_model(
        model,
        shapes={name: tuple(dim for dim in shape if isinstance(dim, int)) for name, shape in request.shapes.items()},
        custom_op_libraries=request.custom_op_libraries,
        threads=threads,
        against=against,
        min_seconds=seconds,
    )
    if as_json:
        click.echo(to_json_text(result))
    else:
        print_profile(result)
