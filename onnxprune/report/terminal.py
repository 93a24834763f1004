"""A run at a glance: what each pass did, before against after, what was left and why, what to know."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxprune.contracts import Measurements, PassReport, RunReport, Score
from onnxprune.convert.report import ConversionReport
from onnxprune.pipeline.run import DryRun
from onnxprune.recipe import ITERATION_MARK
from onnxprune.report.channels import Held, Reason, describe_reason, group_reasons
from onnxprune.report.fallback import fallback_text
from onnxprune.report.figures import bytes_text, change_text, count_text, factor_text, ms_text, part_text
from onnxprune.report.json import to_json_text

__all__ = ["print_conversion", "print_dry_run", "print_report"]

REASONS_SHOWN = 5
CHANGES_SHOWN = 15


def print_report(report: RunReport, *, out: Path, console: Console | None = None) -> None:
    """Print `report` on stdout; `out` is where the artifacts are."""
    console = console or Console()
    _print_passes(console, report.passes)
    console.print(_before_after(report))
    _print_footnotes(console, report)
    _print_skips(console, report.passes)
    _print_budgets(console, report)
    console.print()
    for artifact in report.artifacts:
        console.print(Text.assemble(("Wrote ", "bold"), str(artifact.model_path)), soft_wrap=True)
    console.print(Text(f"      {out / 'report.json'}, {out / 'plan.lock.json'}", style="dim"), soft_wrap=True)


def print_dry_run(dry: DryRun, *, with_plans: bool, console: Console | None = None) -> None:
    """Print what a run would do: each pass's line, its changes, what it would leave and why.

    `with_plans` prints every change, and the plans as JSON.
    """
    console = console or Console()
    _print_passes(console, dry.reports)
    for report in dry.reports:
        _print_changes(console, report, limit=None if with_plans else CHANGES_SHOWN)
    _print_skips(console, dry.reports, limit=None)
    if not with_plans:
        console.print(Text("\n-v prints every change and the plans, --json all of it as JSON.", style="dim"))
        return
    for step_id, plan in dry.plans.items():
        console.print(Text(f"\nPlan of {step_id}", style="bold"))
        console.print_json(to_json_text(plan))


def print_conversion(report: ConversionReport, *, out: Path, console: Console | None = None) -> None:
    """Print what a source became: interface, the comparison with the source, and what to know."""
    console = console or Console()
    console.print(Text.assemble((report.kind.value, "bold"), f" '{report.source_name}' -> opset {report.opset}"))
    for direction, specs in (("input", report.inputs), ("output", report.outputs)):
        for spec in specs:
            shape = "unknown rank" if spec.shape is None else "x".join(str(dim) for dim in spec.shape)
            console.print(Text(f"  {direction:7}{spec.name}: {spec.dtype} {shape}"))
    if report.difference is None:
        console.print(Text(f"Not compared with the source: {report.not_compared_reason}", style="yellow"))
    else:
        console.print(
            Text(
                f"Against the source on {report.num_comparisons} seeded input sets: largest difference "
                f"{report.difference.max_abs:.3g} absolute, {report.difference.max_rel:.3g} of the output's range "
                f"(limit {report.tolerance:g})."
            )
        )
    for note in report.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    console.print(Text.assemble(("Wrote ", "bold"), str(out)), soft_wrap=True)


def _print_passes(console: Console, reports: Iterable[PassReport]) -> None:
    table = Table.grid(padding=(0, 2))
    for report in reports:
        time = "cached" if report.resumed else f"{report.duration_s:.1f} s"
        table.add_row(Text(report.pass_id, style="bold"), Text(report.summary), Text(time, style="dim"))
        for note in report.notes:
            table.add_row("", Text(f"note: {note}", style="yellow"), "")
    if table.row_count:
        console.print(table)
        console.print()


def _before_after(report: RunReport) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    table.add_column("source", justify="right")
    for measured in report.measurements:
        table.add_column(measured.target, justify="right")
        table.add_column("", style="green")
    source = report.source_measurements
    before, after = report.before, report.after

    def row(name: str, first: str, cells: Callable[[Measurements], tuple[str, str | Text]]) -> None:
        table.add_row(name, first, *(cell for measured in report.measurements for cell in cells(measured)))

    def same_for_all(name: str, first: float | None, second: float | None) -> None:
        if first is None or second is None:
            row(name, "unknown (dynamic shape)", lambda _: ("", ""))
        else:
            row(name, count_text(first), lambda _: (count_text(second), change_text(first, second)))

    same_for_all("Parameters", before.parameters, after.parameters)
    if after.nonzero_parameters < 0.99 * after.parameters:
        same_for_all("  not zero", before.nonzero_parameters, after.nonzero_parameters)
    same_for_all("MACs", before.macs, after.macs)
    row(
        "File",
        bytes_text(source.size_bytes),
        lambda m: (bytes_text(m.size_bytes), _better_or_worse(source.size_bytes, m.size_bytes, "smaller", "larger")),
    )
    if source.zipped_bytes is not None:
        zipped = source.zipped_bytes
        row(
            "  zipped",
            bytes_text(zipped),
            lambda m: (
                bytes_text(m.zipped_bytes or 0),
                _better_or_worse(zipped, m.zipped_bytes or 0, "smaller", "larger"),
            ),
        )
    timed = next((m.latency for m in report.measurements if m.latency is not None), None)
    if timed is not None:
        threads = f"{timed.before.threads} thread" + ("s" if timed.before.threads > 1 else "")
        row(f"Latency p50, {threads}", ms_text(timed.before.p50_ms), _latency_cells)
        row("  p90", ms_text(timed.before.p90_ms), lambda m: (ms_text(m.latency.after.p90_ms) if m.latency else "", ""))
    if source.load is not None:
        load = source.load
        row("Load time", ms_text(load.load_time_ms), lambda m: (ms_text(m.load.load_time_ms) if m.load else "", ""))
        row(
            "Peak memory",
            bytes_text(load.peak_rss_bytes),
            lambda m: (
                (bytes_text(m.load.peak_rss_bytes), change_text(load.peak_rss_bytes, m.load.peak_rss_bytes))
                if m.load
                else ("", "")
            ),
        )
    if source.score is not None:
        score = source.score
        row(f"Score: {score.metric}", f"{score.value:.4f}", lambda m: _score_cells(score, m.score))
    if any(m.fidelity is not None for m in report.measurements):
        samples = next(m.fidelity.num_samples for m in report.measurements if m.fidelity is not None)
        row(f"Outputs, worst of {samples} samples", "", _fidelity_cells)
    return table


def _better_or_worse(before: float, after: float, better: str, worse: str) -> Text:
    return Text(factor_text(before, after, better=better, worse=worse), style="green" if after <= before else "red")


def _latency_cells(measured: Measurements) -> tuple[str, str | Text]:
    latency = measured.latency
    if latency is None:
        return "", ""
    word, factor = ("faster", latency.ratio) if latency.ratio >= 1 else ("slower", 1 / latency.ratio)
    bounds = (latency.low, latency.high) if latency.ratio >= 1 else (1 / latency.high, 1 / latency.low)
    mark = "" if measured.latency_on_target else " *"
    style = "green" if latency.low >= 1 else "red" if latency.high < 1 else "yellow"
    text = f"{factor:.2f}x {word} [{bounds[0]:.2f}, {bounds[1]:.2f}]{mark}"
    return ms_text(latency.after.p50_ms), Text(text, style=style)


def _score_cells(before: Score, after: Score | None) -> tuple[str, str | Text]:
    if after is None:
        return "", ""
    gain = after.value - before.value
    worse = gain < 0 if before.higher_is_better else gain > 0
    return f"{after.value:.4f}", Text(f"{gain:+.4f}", style="red" if worse else "green")


def _fidelity_cells(measured: Measurements) -> tuple[str, str | Text]:
    if measured.fidelity is None:
        return "", ""
    difference = measured.fidelity.difference
    if not difference.is_compared:
        return "not finite", Text("nothing was compared", style="red")
    return f"{difference.snr_db:.1f} dB", Text(f"cosine {difference.cosine:.5f}, max {difference.max_abs:.3g}")


def _print_footnotes(console: Console, report: RunReport) -> None:
    if any(m.latency is not None and not m.latency_on_target for m in report.measurements):
        isa = report.host.get("instruction_set", "this machine")
        console.print(
            Text(f"* timed on {isa}, which is not the target: it says nothing about the target's latency.", "dim")
        )
    shape = ", ".join(f"{name}={'x'.join(map(str, dims))}" for name, dims in report.before.shape_used.items())
    if shape:
        console.print(Text(f"MACs and latency at {shape}.", style="dim"))
    if report.before.uncounted_ops:
        console.print(Text(f"MACs not counted: {', '.join(report.before.uncounted_ops)}.", style="dim"))
    for measured in report.measurements:
        if measured.fallback is not None:
            console.print(Text(f"{measured.target}: {fallback_text(measured.fallback)}", style="dim"))
    for warning in report.warnings:
        console.print(Text.assemble(("warning: ", "bold yellow"), warning))
    for artifact in report.artifacts:
        for finding in artifact.findings:
            is_warning = finding.severity == "warning"
            text = finding.text if is_warning else _first_sentence(finding.text)
            console.print(Text(f"{artifact.target}, {finding.topic}: {text}", style="yellow" if is_warning else "dim"))


def _first_sentence(text: str) -> str:
    """The first sentence; the report file has all of them."""
    head, stop, _ = text.partition(". ")
    return head + "." if stop else text


def _print_changes(console: Console, report: PassReport, *, limit: int | None) -> None:
    if not report.changes:
        return
    console.print(Text(f"Changed by {report.pass_id}", style="bold"))
    for change in report.changes[:limit]:
        figures = ", ".join(f"{name} {value:g}" for name, value in change.figures.items())
        console.print(Text.assemble(f"  {change.where}: {change.what}", (f"  {figures}", "dim")))
    if limit is not None and len(report.changes) > limit:
        console.print(Text(f"  and {len(report.changes) - limit} more", style="dim"))


def _print_skips(console: Console, reports: Iterable[PassReport], *, limit: int | None = REASONS_SHOWN) -> None:
    # Of a pass in a block, what the last time around still left alone says it all.
    last = {report.pass_id.partition(ITERATION_MARK)[0]: report for report in reports}
    for report in last.values():
        reasons = group_reasons(
            Held(
                where=_first(skip.where),
                reason=skip.reason,
                channels=int(skip.figures.get("channels", 0)),
                unreachable=int(skip.figures.get("parameters", 0)),
            )
            for skip in report.skips
        )
        if not reasons:
            continue
        console.print(Text(f"\nLeft alone by {report.pass_id}", style="bold"))
        for reason in reasons[:limit]:
            held = _held_back(reason, report.figures.get("parameters_before", 0))
            console.print(Text.assemble("  ", (held, "bold"), describe_reason(reason)))
        if limit is not None and len(reasons) > limit:
            console.print(Text(f"  and {len(reasons) - limit} further reasons (see report.json)", style="dim"))


def _first(where: str) -> str:
    """Of many layers the first, and how many more there are."""
    first, *others = where.split(", ")
    return f"{first} and {len(others)} further layers" if others else first


def _held_back(reason: Reason, parameters: float) -> str:
    """'1000 channels, 4.2 % of the parameters: ', or "" where only the places are known."""
    parts = [f"{reason.channels} channels"] if reason.channels else []
    if reason.unreachable and parameters:
        parts.append(f"{part_text(reason.unreachable, parameters)} of the parameters")
    return f"{', '.join(parts)}: " if parts else ""


def _print_budgets(console: Console, report: RunReport) -> None:
    for outcome in report.budgets:
        mark, style = ("met   ", "green") if outcome.met else ("MISSED", "bold red")
        actual = "not measured" if outcome.actual is None else f"{outcome.actual:.6g}"
        note = f" ({outcome.note})" if outcome.note else ""
        console.print(
            Text.assemble(
                (f"budget {mark} ", style),
                f"{outcome.target} {outcome.name}: {actual}, limit {outcome.limit:.6g}{note}",
            )
        )
