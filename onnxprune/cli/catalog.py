"""`onnxprune passes`, `targets` and `ops`: what there is, with every setting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from onnxprune.cli.options import json_option
from onnxprune.cli.stdout import results_on_stdout
from onnxprune.contracts import Pass, Target
from onnxprune.errors import PluginError, UsageError, did_you_mean
from onnxprune.plugins import Kind, find_pass, find_target, list_plugins
from onnxprune.recipe import REPEAT, RepeatConfig

__all__ = ["ops", "passes", "targets"]

REPEAT_SUMMARY = "runs passes several times around (in recipes)"


@click.command("passes")
@click.argument("name", required=False)
@json_option
def passes(*, name: str | None, as_json: bool) -> None:
    """List the passes, or show every setting of the pass NAME."""
    _show("pass", name, as_json=as_json)


@click.command("targets")
@click.argument("name", required=False)
@json_option
def targets(*, name: str | None, as_json: bool) -> None:
    """List the targets, or show every setting of the target NAME."""
    _show("target", name, as_json=as_json)


@click.command("ops")
@click.argument("op_type", required=False)
@json_option
def ops(*, op_type: str | None, as_json: bool) -> None:
    """List the operators that each table knows, or what is known of OP_TYPE."""
    from onnxprune.report.catalog import ops_coverage, print_ops
    from onnxprune.report.json import to_json_text

    coverage = ops_coverage()
    if op_type is not None:
        found = tuple(row for row in coverage if row.op_type == op_type)
        if not found:
            known = sorted({row.op_type for row in coverage})
            raise UsageError(
                f"No table knows the operator '{op_type}'.", did_you_mean(op_type, known).partition(" Known")[0]
            )
        coverage = found
    with results_on_stdout():
        if as_json:
            click.echo(to_json_text(coverage))
        else:
            print_ops(coverage)


def _summary(find: Callable[[str], type[Pass[Any, Any] | Target[Any]]], name: str) -> str:
    """What it does; of a third party's that is broken, what is wrong with it: the others are listed all the same."""
    try:
        return find(name).summary
    except PluginError as error:
        return error.message


def _show(kind: Kind, name: str | None, *, as_json: bool) -> None:
    from onnxprune.report.catalog import describe_settings, print_plugins, print_settings
    from onnxprune.report.json import to_json_text

    find = find_pass if kind == "pass" else find_target
    if name is None:
        rows: list[dict[str, Any]] = [
            {"name": plugin.name, "summary": _summary(find, plugin.name), "from": plugin.origin}
            for plugin in list_plugins(kind)
        ]
        if kind == "pass":
            rows.append({"name": REPEAT, "summary": REPEAT_SUMMARY, "from": "onnxprune"})
        with results_on_stdout():
            if as_json:
                click.echo(to_json_text(rows))
            else:
                print_plugins(rows, kind=kind)
        return
    if kind == "pass" and name == REPEAT:
        summary, settings = REPEAT_SUMMARY, describe_settings(RepeatConfig)
    else:
        plugin_class = find(name)
        summary, settings = plugin_class.summary, describe_settings(plugin_class.config_type)
    with results_on_stdout():
        if as_json:
            click.echo(to_json_text({"name": name, "summary": summary, "settings": settings}))
        else:
            print_settings(name, summary, settings)
