"""Passes, targets, their settings and the operator tables, as people read them."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from onnxprune.ops.catalog import OP_TABLES

__all__ = [
    "EmittedOp",
    "Exclusion",
    "OpCoverage",
    "SettingRow",
    "TargetOps",
    "describe_settings",
    "ops_coverage",
    "print_ops",
    "print_plugins",
    "print_settings",
    "print_target_ops",
    "target_ops",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingRow:
    """One setting; `default` is None-able JSON, and `required` says that there is none."""

    name: str
    type: str
    default: Any
    required: bool
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCoverage:
    """The opset versions from which each table has a row for an operator."""

    domain: str
    op_type: str
    tables: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmittedOp:
    """An operator that a target writes, the opset versions from which it has a way of its own, and the first way."""

    domain: str
    op_type: str
    since_versions: tuple[int, ...]
    becomes: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusion:
    """Cases of the `onnx` package (a pattern of their names) that a target can't write, and the fact behind it."""

    cases: str
    fact: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOps:
    """All that a target writes; `onnx_operators` counts those of ONNX's own domain."""

    target: str
    onnx_operators: int
    operators: tuple[EmittedOp, ...]
    exclusions: tuple[Exclusion, ...]


def describe_settings(config_type: type[BaseModel]) -> tuple[SettingRow, ...]:
    """All settings of a configuration, in the order of their declaration."""
    rows = []
    for name, info in config_type.model_fields.items():
        default = info.get_default(call_default_factory=True)
        rows.append(
            SettingRow(
                name=name,
                type=_type_text(info.annotation),
                default=None if default is PydanticUndefined else to_jsonable_python(default),
                required=info.is_required(),
                description=info.description or "",
            )
        )
    return tuple(rows)


def _type_text(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _type_text(typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(annotation))
    if origin is None:
        return "none" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
    arguments = [_type_text(argument) for argument in typing.get_args(annotation) if argument is not Ellipsis]
    if origin in (tuple, list):
        return f"list of {' | '.join(dict.fromkeys(arguments))}"
    if origin is dict:
        return f"table of {arguments[-1]}"
    return " | ".join(arguments)


def ops_coverage() -> tuple[OpCoverage, ...]:
    """Every operator that a table knows, by domain and name."""
    found: dict[tuple[str, str], dict[str, list[int]]] = {}
    for table_name, table in OP_TABLES.items():
        for key in table.keys():  # noqa: SIM118 - a table is no dict
            found.setdefault((key.domain, key.op_type), {}).setdefault(table_name, []).append(key.since_version)
    return tuple(
        OpCoverage(domain=domain, op_type=op_type, tables={name: tuple(versions) for name, versions in tables.items()})
        for (domain, op_type), tables in sorted(found.items())
    )


def print_ops(coverage: Sequence[OpCoverage], console: Console | None = None) -> None:
    """A row for each operator, a column for each table, and the counts."""
    console = console or Console()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("operator")
    for name in OP_TABLES:
        table.add_column(name)
    for row in coverage:
        label = row.op_type if not row.domain else f"{row.domain}::{row.op_type}"
        cells = [("from " + ", ".join(map(str, row.tables[name]))) if name in row.tables else "" for name in OP_TABLES]
        table.add_row(label, *cells)
    console.print(table)
    counts = ", ".join(f"{sum(name in row.tables for row in coverage)} {name}" for name in OP_TABLES)
    console.print(Text(f"{len(coverage)} operators: {counts}.", style="dim"))


def target_ops(target: str) -> TargetOps | None:
    """What `target` can express; None for a target that takes ONNX as it is."""
    if target != "tflite":
        return None
    from onnxprune.targets.tflite.ops import TFLITE, exclusions, load_emitters

    load_emitters()
    found: dict[tuple[str, str], list[int]] = {}
    for key in TFLITE.keys():  # noqa: SIM118 - a table is no dict
        found.setdefault((key.domain, key.op_type), []).append(key.since_version)
    rows = []
    for (domain, op_type), versions in found.items():
        emitter = TFLITE.find(domain, op_type, max(versions))
        becomes = (emitter.__doc__ or "").strip().partition("\n")[0]
        rows.append(EmittedOp(domain=domain, op_type=op_type, since_versions=tuple(versions), becomes=becomes))
    return TargetOps(
        target=target,
        onnx_operators=sum(not row.domain for row in rows),
        operators=tuple(rows),
        exclusions=tuple(Exclusion(cases=cases, fact=fact) for cases, fact in exclusions().items()),
    )


def print_target_ops(ops: TargetOps, console: Console | None = None) -> None:
    """A line for operators that become the same, one for each fact of what can't be expressed, and the counts."""
    console = console or Console()
    alike: dict[str, list[str]] = {}
    for row in ops.operators:
        label = row.op_type if not row.domain else f"{row.domain}::{row.op_type}"
        versions = "" if row.since_versions == (1,) else f" (from {', '.join(map(str, row.since_versions))})"
        alike.setdefault(row.becomes, []).append(label + versions)
    console.print(_listed(("operators", "become"), alike))
    facts: dict[str, list[str]] = {}
    for exclusion in ops.exclusions:
        facts.setdefault(exclusion.fact, []).append(exclusion.cases)
    if facts:
        console.print("")
        console.print(_listed(("not these official cases", "because"), facts))
    counts = f"{ops.onnx_operators} ONNX operators, {len(ops.operators) - ops.onnx_operators} of other domains, "
    console.print(Text(f"{counts}{len(ops.exclusions)} exclusions.", style="dim"))


def _listed(headings: tuple[str, str], names_by_text: Mapping[str, Sequence[str]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(headings[0], overflow="fold", max_width=36)
    table.add_column(headings[1])
    for text, names in names_by_text.items():
        table.add_row(Text(", ".join(names)), Text(text.removesuffix(".")))
    return table


def print_plugins(rows: Sequence[Mapping[str, Any]], *, kind: str, console: Console | None = None) -> None:
    """Name, summary and origin of each pass or target."""
    console = console or Console()
    table = Table.grid(padding=(0, 2))
    for row in rows:
        origin = "" if row["from"] == "onnxprune" else f"from {row['from']}"
        table.add_row(Text(row["name"], style="bold"), row["summary"], Text(origin, style="dim"))
    console.print(table)
    plural = "passes" if kind == "pass" else "targets"
    console.print(Text(f"Settings of one: onnxprune {plural} NAME", style="dim"))


def print_settings(name: str, summary: str, settings: Sequence[SettingRow], console: Console | None = None) -> None:
    """Every setting with type and default, and under it what it means."""
    console = console or Console()
    console.print(Text.assemble((name, "bold"), "  ", summary))
    for row in settings:
        default = "required" if row.required else f"default {row.default}"
        console.print(Text.assemble("\n", (row.name, "bold"), (f"  {row.type}, {default}", "dim")))
        console.print(Padding(Text(row.description), (0, 0, 0, 2)))
