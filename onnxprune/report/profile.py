"""What `onnxprune profile` shows: latency, the ratio to another model, and the time of each operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxprune.contracts import Batch, LatencyRatio, LatencySummary, LoadFigures
from onnxprune.errors import ModelError
from onnxprune.report.figures import bytes_text, ms_text
from onnxprune.runtime.artifacts import ArtifactRunner, is_tflite, runner_from_path
from onnxprune.runtime.feeds import working_feeds
from onnxprune.runtime.host import host_summary
from onnxprune.runtime.latency import interleaved_ratio, measure_latency
from onnxprune.runtime.litert_profile import profile_tflite
from onnxprune.runtime.memory import measure_load
from onnxprune.runtime.op_profile import OpProfile
from onnxprune.runtime.profile import profile_ops
from onnxprune.runtime.sessions import ort_runner_from_model

__all__ = ["ProfileResult", "print_profile", "profile_model"]

NODES_SHOWN = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileResult:
    """Everything that was timed. `against` is another model over this one: above 1, this one is faster.

    `load` is None for a model that has no file of its own.
    """

    latency: LatencySummary
    against: LatencyRatio | None
    load: LoadFigures | None
    ops: OpProfile
    input_shapes: dict[str, tuple[int, ...]]
    host: dict[str, str]


def profile_model(
    model: ir.Model | Path,
    *,
    shapes: dict[str, tuple[int, ...]],
    custom_op_libraries: Sequence[Path],
    threads: int,
    against: Path | None,
    min_seconds: float,
    seed: int = 0,
) -> ProfileResult:
    """Time a model or an artifact on seeded inputs.

    Args:
        model: A model, or an .onnx, .ort or .tflite file that is timed as it is.
        shapes: Full shapes of inputs with dynamic axes; the rest is found by trying common sizes.
        custom_op_libraries: Shared libraries with custom operators.
        threads: Threads of the runtime.
        against: Another such file with the same inputs, timed in turn.
        min_seconds: Time at least so long for each figure.
        seed: For the inputs.
    """
    runner: ArtifactRunner
    if isinstance(model, Path):
        runner = runner_from_path(model, threads=threads, custom_op_libraries=custom_op_libraries)
    else:
        runner = ort_runner_from_model(model, threads=threads, custom_op_libraries=custom_op_libraries)
    feeds = working_feeds(runner, seed=seed, shapes=shapes)
    ratio = None
    if against is not None:
        other = runner_from_path(against, threads=threads, custom_op_libraries=custom_op_libraries)
        ratio = interleaved_ratio(other, runner, feeds, min_seconds=min_seconds, threads=threads)
    return ProfileResult(
        latency=measure_latency(runner, feeds, min_seconds=min_seconds, threads=threads),
        against=ratio,
        load=measure_load(model, threads=threads, custom_op_libraries=custom_op_libraries)
        if isinstance(model, Path)
        else None,
        ops=_ops(model, feeds, threads=threads, custom_op_libraries=custom_op_libraries),
        input_shapes={name: array.shape for name, array in feeds.items()},
        host=host_summary(),
    )


def _ops(model: ir.Model | Path, feeds: Batch, *, threads: int, custom_op_libraries: Sequence[Path]) -> OpProfile:
    if not isinstance(model, Path) or not is_tflite(model):
        return profile_ops(model, feeds, threads=threads, custom_op_libraries=custom_op_libraries)
    try:
        return profile_tflite(model, feeds, threads=threads)
    except ModelError as error:
        # The model runs, as its latency shows: LiteRT's profiler is what fails, and the other figures stand.
        return OpProfile(
            nodes=(), op_types=(), run_ms=0.0, nodes_ms=0.0, num_runs=0, threads=threads, note=error.message
        )


def print_profile(result: ProfileResult, console: Console | None = None) -> None:
    """Latency, ratio and load figures, then operator types and the slowest nodes."""
    console = console or Console()
    shape = ", ".join(f"{name}={'x'.join(map(str, dims))}" for name, dims in result.input_shapes.items())
    threads = f"{result.latency.threads} thread" + ("s" if result.latency.threads > 1 else "")
    console.print(Text(f"{result.host['instruction_set']}, {threads}, {shape}", style="dim"))
    latency = result.latency
    console.print(
        Text.assemble(
            ("latency  ", "bold"),
            f"p50 {ms_text(latency.p50_ms)}   p90 {ms_text(latency.p90_ms)}   p99 {ms_text(latency.p99_ms)}   "
            f"({latency.num_runs} runs)",
        )
    )
    if result.load is not None:
        console.print(
            Text.assemble(
                ("load     ", "bold"),
                f"{ms_text(result.load.load_time_ms)}, peak memory {bytes_text(result.load.peak_rss_bytes)}",
            )
        )
    if result.against is not None:
        ratio = result.against
        word, factor = ("faster", ratio.ratio) if ratio.ratio >= 1 else ("slower", 1 / ratio.ratio)
        console.print(
            Text.assemble(
                ("against  ", "bold"),
                f"{factor:.2f}x {word} than the other ({ms_text(ratio.before.p50_ms)}); "
                f"95 % interval of the ratio {ratio.low:.2f} to {ratio.high:.2f}",
            )
        )
    console.print()
    if result.ops.note:
        console.print(Text(result.ops.note, style="dim"))
    if not result.ops.nodes:
        return
    by_type = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    by_node = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for table, first in ((by_type, "operator type"), (by_node, "node")):
        table.add_column(first)
        for header in ("", "ms", "share"):
            table.add_column(header, justify="right")
    for kind in result.ops.op_types:
        by_type.add_row(kind.op_type, f"{kind.num_nodes} nodes", f"{kind.mean_ms:.3f}", f"{kind.share:.1%}")
    for node in result.ops.nodes[:NODES_SHOWN]:
        by_node.add_row(node.model_node or node.name, node.op_type, f"{node.mean_ms:.3f}", f"{node.share:.1%}")
    console.print(by_type)
    console.print()
    console.print(by_node)
    if len(result.ops.nodes) > NODES_SHOWN:
        console.print(Text(f"and {len(result.ops.nodes) - NODES_SHOWN} faster nodes (--json has all)", style="dim"))
