"""`onnxprune passes`, `targets` and `ops`: what there is, with every setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
@click.option("--table", metavar="NAME", help="Only operators that this table knows.")
@click.option("--target", metavar="NAME", help="What this target writes for each operator, and what it can't express.")
@json_option
def ops(*, op_type: str | None, table: str | None, target: str | None, as_json: bool) -> None:
    """List the operators that each table knows, or what is known of OP_TYPE."""
    if target is not None and table is not None:
        raise UsageError("`--table` and `--target` ask for different lists.", "Give one of them.")
    if target is not None:
        _show_target_ops(target, op_type, as_json=as_json)
    else:
        _show_coverage(table, op_type, as_json=as_json)


def _show_coverage(table: str | None, op_type: str | None, *, as_json: bool) -> None:
    from onnxprune.ops.catalog import OP_TABLES
    from onnxprune.report.catalog import ops_coverage, print_ops
    from onnxprune.report.json import to_json_text

    if table is not None and table not in OP_TABLES:
        raise UsageError(f"There is no operator table '{table}'.", did_you_mean(table, list(OP_TABLES)))
    coverage = tuple(row for row in ops_coverage() if table is None or table in row.tables)
    if op_type is not None:
        found = tuple(row for row in coverage if row.op_type == op_type)
        if not found:
            subject = "No table knows" if table is None else f"Table '{table}' does not know"
            raise _unknown_operator(subject, op_type, {row.op_type for row in coverage})
        coverage = found
    with results_on_stdout():
        if as_json:
            click.echo(to_json_text(coverage))
        else:
            print_ops(coverage)


def _show_target_ops(target: str, op_type: str | None, *, as_json: bool) -> None:
    from onnxprune.report.catalog import print_target_ops, target_ops
    from onnxprune.report.json import to_json_text

    find_target(target)  # says which there are
    found = target_ops(target)
    if found is None:
        raise UsageError(
            f"Target '{target}' has no list of operators: it keeps ONNX's, whatever they are.",
            "Targets with a list: tflite.",
        )
    if op_type is not None:
        rows = tuple(row for row in found.operators if row.op_type == op_type)
        if not rows:
            known = {row.op_type for row in found.operators}
            raise _unknown_operator(f"Target '{target}' can't express", op_type, known)
        found = replace(found, operators=rows, exclusions=())
    with results_on_stdout():
        if as_json:
            click.echo(to_json_text(found))
        else:
            print_target_ops(found)


def _unknown_operator(subject: str, op_type: str, known: set[str]) -> UsageError:
    return UsageError(
        f"{subject} the operator '{op_type}'.", did_you_mean(op_type, sorted(known)).partition(" Known")[0]
    )


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
