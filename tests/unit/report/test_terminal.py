"""What a person reads after a run."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from onnxprune.contracts import (
    Artifact,
    ArtifactFile,
    BudgetOutcome,
    Fidelity,
    Finding,
    LatencyRatio,
    LatencySummary,
    LoadFigures,
    Measurements,
    ModelFigures,
    OutputDifference,
    PassReport,
    RunReport,
    Score,
    Skip,
)
from onnxprune.report.json import to_json_text
from onnxprune.report.terminal import print_report

BEFORE = ModelFigures(
    parameters=1_000_000,
    nonzero_parameters=1_000_000,
    macs=50_000_000,
    weight_bytes=4_000_000,
    num_nodes=10,
    shape_used={"image": (1, 3, 8, 8)},
)
AFTER = replace(BEFORE, parameters=500_000, nonzero_parameters=500_000, macs=20_000_000)


def summary(p50_ms: float) -> LatencySummary:
    return LatencySummary(p50_ms=p50_ms, p90_ms=2 * p50_ms, p99_ms=3 * p50_ms, num_runs=99, num_warmup=3, threads=1)


LATENCY = LatencyRatio(ratio=2.5, low=2.4, high=2.6, before=summary(5.0), after=summary(2.0))
MEASURED = Measurements(
    target="ort-mobile",
    size_bytes=500_000,
    zipped_bytes=400_000,
    score=Score(metric="top1", value=0.89),
    fidelity=Fidelity(
        difference=OutputDifference(max_abs=0.5, max_rel=0.1, cosine=0.9987, snr_db=25.3),
        num_samples=8,
        data="calibration",
    ),
    latency=LATENCY,
    latency_on_target=True,
    load=LoadFigures(load_time_ms=4, peak_rss_bytes=100_000_000, baseline_rss_bytes=90_000_000),
)
SOURCE = Measurements(
    target="source",
    size_bytes=4_000_000,
    zipped_bytes=3_600_000,
    score=Score(metric="top1", value=0.9),
    load=LoadFigures(load_time_ms=9, peak_rss_bytes=120_000_000, baseline_rss_bytes=90_000_000),
)
REPORT = RunReport(
    schema=1,
    source={},
    recipe={},
    before=BEFORE,
    after=AFTER,
    source_measurements=SOURCE,
    passes=(
        PassReport(
            pass_id="prune",
            pass_name="prune",
            summary="half of it",
            notes=("LayerNorm is approximate",),
            skips=(Skip(where="conv9", reason="reaches an output"), Skip(where="conv8", reason="reaches an output")),
            duration_s=1.25,
        ),
    ),
    artifacts=(
        Artifact(
            target="ort-mobile",
            folder=Path("out/ort-mobile"),
            files=(ArtifactFile(path="m.ort", sha256="0" * 64, size_bytes=500_000, role="model"),),
            inputs=(),
            outputs=(),
            findings=(Finding(topic="NNAPI", text="Runs well. And much more."),),
        ),
    ),
    measurements=(MEASURED,),
    budgets=(BudgetOutcome(name="score_drop", target="ort-mobile", limit=0.005, actual=0.01, met=False),),
    warnings=("something to know",),
    versions={},
    host={"instruction_set": "x86-64 (AVX2)"},
    duration_s=3.0,
)


def printed(report: RunReport) -> str:
    stream = io.StringIO()
    print_report(report, out=Path("out"), console=Console(file=stream, width=120))
    return stream.getvalue()


def line_with(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_before_and_after_stand_in_one_line_with_the_change() -> None:
    text = printed(REPORT)
    assert line_with(text, "Parameters").split() == ["Parameters", "1", "M", "500", "k", "-50.0", "%"]
    assert "4 MB" in line_with(text, "File")
    assert "8.00x smaller" in line_with(text, "File")
    assert "2.50x faster [2.40, 2.60]" in line_with(text, "Latency p50, 1 thread")
    assert "-0.0100" in line_with(text, "Score: top1")
    assert "25.3 dB" in line_with(text, "Outputs, worst of 8 samples")


def test_passes_notes_warnings_findings_and_skips_are_all_there() -> None:
    text = printed(REPORT)
    assert "half of it" in text
    assert "1.2 s" in text
    assert "note: LayerNorm is approximate" in text
    assert "warning: something to know" in text
    assert "ort-mobile, NNAPI: Runs well." in text
    assert "And much more" not in text
    assert "reaches an output  (conv9 and 1 more)" in text
    assert "Wrote out/ort-mobile/m.ort" in text


def test_reasons_that_differ_in_names_only_are_one_and_those_that_keep_most_parameters_come_first() -> None:
    frozen = {"channels": 8.0, "parameters": 250_000.0}
    skips = (
        Skip(where="a", reason="skip = 'a'"),
        Skip(where="b, c", reason="frozen: is a setting of 'grid1' (GridSample)", figures=frozen),
        Skip(where="d", reason="frozen: is a setting of 'grid2' (GridSample)", figures=frozen),
    )
    pruned = replace(REPORT.passes[0], skips=skips, figures={"parameters_before": 1_000_000.0})
    lines = printed(replace(REPORT, passes=(pruned,))).splitlines()
    start = lines.index("Left alone by prune")
    assert lines[start + 1].startswith(
        "  16 channels, 50 % of the parameters: frozen: is a setting of 'grid1' (GridSample)"
    )
    assert lines[start + 1 : start + 4][-1] == "  skip = 'a'  (a)"


def test_of_a_repeated_pass_only_the_last_iteration_says_what_it_left_alone() -> None:
    reports = tuple(replace(REPORT.passes[0], pass_id=f"prune@{number}") for number in (1, 2, 3))
    text = printed(replace(REPORT, passes=reports))
    assert [line for line in text.splitlines() if line.startswith("Left alone")] == ["Left alone by prune@3"]


def test_a_missed_budget_stands_out() -> None:
    assert "budget MISSED ort-mobile score_drop: 0.01, limit 0.005" in printed(REPORT)


def test_a_latency_from_another_machine_is_marked() -> None:
    text = printed(replace(REPORT, measurements=(replace(MEASURED, latency_on_target=False),)))
    assert "2.50x faster [2.40, 2.60] *" in text
    assert "* timed on x86-64 (AVX2), which is not the target" in text


def test_a_slower_artifact_is_called_slower() -> None:
    slower = LatencyRatio(ratio=0.5, low=0.4, high=0.8, before=summary(1.0), after=summary(2.0))
    assert "2.00x slower [1.25, 2.50]" in printed(replace(REPORT, measurements=(replace(MEASURED, latency=slower),)))


def test_what_was_not_measured_has_no_row() -> None:
    bare = Measurements(target="ort-mobile", size_bytes=500_000)
    source = Measurements(target="source", size_bytes=1)
    text = printed(replace(REPORT, measurements=(bare,), source_measurements=source))
    for start in ("Latency", "Load", "Score", "Outputs"):
        assert not any(line.startswith(start) for line in text.splitlines())


def test_outputs_without_a_finite_number_are_not_shown_as_exact() -> None:
    nothing = OutputDifference(max_abs=0.0, max_rel=0.0, cosine=1.0, snr_db=math.inf, is_compared=False)
    idle = replace(MEASURED, fidelity=Fidelity(difference=nothing, num_samples=8, data="random"))
    line = line_with(printed(replace(REPORT, measurements=(idle,))), "Outputs")
    assert "nothing was compared" in line
    assert "not finite" in line


def test_unknown_macs_are_said_to_be_unknown() -> None:
    assert "unknown (dynamic shape)" in line_with(printed(replace(REPORT, before=replace(BEFORE, macs=None))), "MACs")


def test_a_pass_from_the_cache_says_so() -> None:
    report = replace(REPORT, passes=(replace(REPORT.passes[0], resumed=True),))
    assert "cached" in printed(report)


def test_json_holds_infinities_and_paths_as_text() -> None:
    equal = OutputDifference(max_abs=0, max_rel=0, cosine=1, snr_db=float("inf"))
    fidelity = Fidelity(difference=equal, num_samples=1, data="random")
    data = json.loads(to_json_text(replace(REPORT, measurements=(replace(MEASURED, fidelity=fidelity),))))
    assert data["measurements"][0]["fidelity"]["difference"]["snr_db"] == "Infinity"
    assert data["artifacts"][0]["folder"] == "out/ort-mobile"
