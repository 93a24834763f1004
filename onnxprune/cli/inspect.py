"""`onnxprune inspect`: what is in a model, and what pruning could reach."""

from __future__ import annotations

import click

from onnxprune.cli.options import json_option, source_options, verbosity_options
from onnxprune.cli.progress import make_progress
from onnxprune.cli.stdout import results_on_stdout
from onnxprune.convert.request import SourceRequest
from onnxprune.convert.source import open_source

__all__ = ["inspect"]


@click.command("inspect")
@source_options
@click.option("--channels", is_flag=True, help="Show the channel classes, and why a class is frozen.")
@click.option("--all", "show_all", is_flag=True, help="Show every layer and class, not only the largest.")
@json_option
@verbosity_options
def inspect(
    *,
    request: SourceRequest,
    channels: bool,
    show_all: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Show the layers, parameters, MACs and bytes of SOURCE; with --channels what `prune` may remove."""
    from onnxprune.report.inspection import inspect_model, print_inspection
    from onnxprune.report.json import to_json_text

    progress = make_progress(verbosity=-1 if quiet else verbose)
    converted = open_source(request, progress=progress)
    inspection = inspect_model(converted.model, with_channels=channels)
    with results_on_stdout():
        if as_json:
            click.echo(to_json_text(inspection))
        else:
            print_inspection(inspection, max_layers=None if show_all else 40, max_groups=None if show_all else 15)
