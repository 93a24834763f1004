"""One recipe on several models: what became of each, on one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxprune.contracts import Measurements, RunReport
from onnxprune.errors import BudgetMissedError
from onnxprune.pipeline.run import DryRun
from onnxprune.report.figures import bytes_text, change_text, factor_text

__all__ = ["FamilyMember", "family_exit_code", "print_family"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyMember:
    """One model of several: its report, or why there is none.

    `exit_code` is what a run of this model alone would have ended with.
    """

    name: str
    source: str
    out: Path
    exit_code: int
    report: RunReport | None = None
    dry_run: DryRun | None = None
    error: str | None = None


def family_exit_code(members: Sequence[FamilyMember]) -> int:
    """The code of the first model that failed; where all were built, that of a missed budget; else 0."""
    codes = [member.exit_code for member in members if member.exit_code]
    failures = [code for code in codes if code != BudgetMissedError.exit_code]
    return next(iter((*failures, *codes)), 0)


def print_family(members: Sequence[FamilyMember], *, console: Console | None = None) -> None:
    """Print one line for each artifact, and one for each model that failed."""
    console = console or Console()
    rows = [(member, measured) for member in members if member.report for measured in member.report.measurements]
    several_targets = len({measured.target for _, measured in rows}) > 1
    with_scores = any(measured.score is not None for _, measured in rows)
    with_latencies = any(measured.latency is not None for _, measured in rows)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    headers = ["model", *(["target"] if several_targets else []), "parameters", "MACs", "file", ""]
    headers += [*(["speed-up"] if with_latencies else []), *(["score"] if with_scores else []), "result"]
    for header in headers:
        table.add_column(header, justify="left" if header in ("model", "target", "result") else "right")
    for member in members:
        if member.report is None:
            cells = [""] * (len(headers) - 2)
            table.add_row(member.name, *cells, Text(f"failed ({member.exit_code}): {member.error}", style="red"))
            continue
        for measured in member.report.measurements:
            table.add_row(
                member.name,
                *([measured.target] if several_targets else []),
                *_size_cells(member.report, measured),
                *([_latency_cell(measured)] if with_latencies else []),
                *([_score_cell(member.report, measured)] if with_scores else []),
                _result(member.report, measured),
            )
    console.print(table)
    if any(measured.latency is not None and not measured.latency_on_target for _, measured in rows):
        console.print(Text("* timed on this machine, which is not the target.", style="dim"))
    console.print(Text(f"\nThe reports are in {members[0].out.parent}/*/report.json.", style="dim"), soft_wrap=True)


def _size_cells(report: RunReport, measured: Measurements) -> tuple[str, str, str, str]:
    before, after = report.before, report.after
    size_before = report.source_measurements.size_bytes
    return (
        change_text(before.parameters, after.parameters),
        "unknown" if before.macs is None or after.macs is None else change_text(before.macs, after.macs),
        bytes_text(measured.size_bytes),
        factor_text(size_before, measured.size_bytes, better="smaller", worse="larger"),
    )


def _latency_cell(measured: Measurements) -> Text:
    if measured.latency is None:
        return Text("")
    mark = "" if measured.latency_on_target else " *"
    style = "green" if measured.latency.low >= 1 else "red" if measured.latency.high < 1 else "yellow"
    return Text(f"{measured.latency.ratio:.2f}x{mark}", style=style)


def _score_cell(report: RunReport, measured: Measurements) -> str:
    before, after = report.source_measurements.score, measured.score
    if before is None or after is None:
        return ""
    return f"{after.value:.4f} ({after.value - before.value:+.4f})"


def _result(report: RunReport, measured: Measurements) -> Text:
    missed = [outcome.name for outcome in report.budgets if outcome.target == measured.target and not outcome.met]
    if missed:
        return Text(f"budget missed: {', '.join(missed)}", style="bold red")
    warnings = len(report.warnings)
    return Text("built" + (f", {warnings} warnings" if warnings else ""), style="yellow" if warnings else "green")
