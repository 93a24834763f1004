"""Where the time of a model goes: time by node and by operator type, from ONNX Runtime's own profiler.

Times are those of the graph after ONNX Runtime's optimizations, so a node here may stand for several of the model's
(a convolution with its activation). It is led back to the model by its name or by the value it computes.
"""

from __future__ import annotations

import bisect
import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from onnxprune.contracts import Batch, JsonObject
from onnxprune.errors import ModelError, UsageError
from onnxprune.graph.io import load_model
from onnxprune.graph.metadata import adopt_module_paths, module_path
from onnxprune.runtime.op_profile import NodeTime, OpProfile, by_op_type
from onnxprune.runtime.sessions import Optimization, OrtRunner, ort_runner_from_model, ort_runner_from_path

__all__ = ["profile_ops"]

_KERNEL_SUFFIX = "_kernel_time"
# What ONNX Runtime's transformers append to the name of the node, or of the value, that a new node replaces.
_ADDED = re.compile(r"(_nchwc|_nhwc|_token_\d+|_quant|_fused|/?\w*Fusion/?|_gemm)$")
# The longest chain that ONNX Runtime fuses into a convolution: Conv, Add, and an activation between Q and DQ.
_MAX_FUSED_NODES = 5


@dataclass(slots=True)
class _Tally:
    op_type: str
    run_us: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    calls: int = 0

    @property
    def self_us(self) -> float:
        return sum(self.run_us.values())


def profile_ops(
    source: ir.Model | Path,
    feeds: Batch,
    *,
    runs: int = 20,
    warmup: int = 3,
    threads: int = 1,
    custom_op_libraries: Sequence[Path] = (),
    optimization: Optimization = "all",
    blocked_layout: bool = True,
) -> OpProfile:
    """Run `source` `warmup` + `runs` times with ONNX Runtime's profiler on, and sum the times of the last `runs`.

    Args:
        source: A model, or an `.onnx` or `.ort` file. A `.ort` file carries no module paths.
        feeds: One batch.
        runs: At least 1.
        warmup: Runs that are not counted.
        threads: Threads that one operator may use.
        custom_op_libraries: Shared libraries with custom operators.
        optimization: How far ONNX Runtime rewrites the graph first.
        blocked_layout: As in `ort_runner_from_model`; a file is run as it is.

    Raises:
        UsageError: `runs` is below 1 or `warmup` below 0.
        ModelError, BadDataError: As the runner's.
    """
    if runs < 1 or warmup < 0:
        raise UsageError(f"Profiling needs at least 1 run and no negative warm-up, not {runs} and {warmup}.")
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        prefix = Path(folder) / "profile"
        runner = _profiled_runner(source, prefix, threads, custom_op_libraries, optimization, blocked_layout)
        for _ in range(warmup + runs):
            runner.run(feeds)
        events = json.loads(runner.end_profiling().read_text(encoding="utf-8"))
    return _aggregate(events, _model_nodes(source), warmup=warmup, threads=threads)


def _profiled_runner(
    source: ir.Model | Path,
    prefix: Path,
    threads: int,
    custom_op_libraries: Sequence[Path],
    optimization: Optimization,
    blocked_layout: bool,  # noqa: FBT001 - passed on
) -> OrtRunner:
    if isinstance(source, Path):
        return ort_runner_from_path(
            source,
            threads=threads,
            custom_op_libraries=custom_op_libraries,
            optimization=optimization,
            profile_prefix=prefix,
        )
    return ort_runner_from_model(
        source,
        threads=threads,
        custom_op_libraries=custom_op_libraries,
        optimization=optimization,
        profile_prefix=prefix,
        blocked_layout=blocked_layout,
    )


def _model_nodes(source: ir.Model | Path) -> dict[str, ir.Node]:
    """The model's nodes by their name and by the names of their outputs; names win."""
    if isinstance(source, Path):
        if source.suffix == ".ort":
            return {}
        source = load_model(source)
        adopt_module_paths(source)
    nodes = list(source.graph.all_nodes())
    by_output = {value.name: node for node in nodes for value in node.outputs if value.name}
    return by_output | {node.name: node for node in nodes if node.name}


def _aggregate(
    events: Sequence[JsonObject], model_nodes: Mapping[str, ir.Node], *, warmup: int, threads: int
) -> OpProfile:
    runs = sorted((event for event in events if event["name"] == "model_run"), key=lambda event: event["ts"])[warmup:]
    if not runs:
        raise ModelError("ONNX Runtime's profile holds no run of the model.")
    tallies = _tally([event for event in events if event["name"].endswith(_KERNEL_SUFFIX)], runs)
    total_us = sum(tally.self_us for tally in tallies.values()) or 1.0
    nodes = [
        _node_time(name, tally, model_nodes, num_runs=len(runs), total_us=total_us) for name, tally in tallies.items()
    ]
    return OpProfile(
        nodes=tuple(sorted(nodes, key=lambda node: (-node.mean_ms, node.name))),
        op_types=by_op_type(nodes),
        run_ms=sum(run["dur"] for run in runs) / len(runs) / 1e3,
        nodes_ms=sum(tally.self_us for tally in tallies.values()) / len(runs) / 1e3,
        num_runs=len(runs),
        threads=threads,
    )


def _tally(kernels: Sequence[JsonObject], runs: Sequence[JsonObject]) -> dict[str, _Tally]:
    """Time of each node over all `runs` without the time of nodes inside it (bodies of If, Loop and Scan)."""
    starts = [run["ts"] for run in runs]
    tallies: dict[str, _Tally] = {}
    open_events: list[tuple[float, str]] = []  # (end, node) of the events that the current one may lie in
    # A body's node and the node that holds it can start in the same microsecond: the longer one is outside.
    for event in sorted(kernels, key=lambda event: (event["ts"], -event["dur"])):
        run = bisect.bisect_right(starts, event["ts"]) - 1
        if run < 0 or event["ts"] >= starts[run] + runs[run]["dur"]:
            continue  # warm-up
        name = event["name"].removesuffix(_KERNEL_SUFFIX)
        while open_events and open_events[-1][0] <= event["ts"]:
            open_events.pop()
        if open_events:
            tallies[open_events[-1][1]].run_us[run] -= event["dur"]
        tally = tallies.setdefault(name, _Tally(event["args"]["op_name"]))
        tally.run_us[run] += event["dur"]
        tally.calls += 1
        open_events.append((event["ts"] + event["dur"], name))
    return tallies


def _node_time(
    name: str, tally: _Tally, model_nodes: Mapping[str, ir.Node], *, num_runs: int, total_us: float
) -> NodeTime:
    node = _model_node(name, tally.op_type, model_nodes)
    run_us = [*tally.run_us.values(), *[0.0] * (num_runs - len(tally.run_us))]
    return NodeTime(
        name=name,
        op_type=tally.op_type,
        model_node=(node.name or "") if node is not None else "",
        module_path=module_path(node) if node is not None else "",
        calls_per_run=tally.calls / num_runs,
        mean_ms=tally.self_us / num_runs / 1e3,
        p50_ms=statistics.median(run_us) / 1e3,
        share=tally.self_us / total_us,
        undisturbed_ms=sorted(run_us)[num_runs // 5] / 1e3,
    )


def _model_node(name: str, op_type: str, model_nodes: Mapping[str, ir.Node]) -> ir.Node | None:
    """The node of the model that the optimized node `name` stands for."""
    while name not in model_nodes:
        shorter = _ADDED.sub("", name)
        if shorter == name:
            return None
        name = shorter
    named = model_nodes[name]
    # A fused node often has the name of its last part ("relu" for Conv+Relu): look for the part that gave the type.
    part: ir.Node | None = named
    for _ in range(_MAX_FUSED_NODES):
        if part is None or part.op_type in op_type:  # "Conv" in "QLinearConv", "FusedConv"
            break
        part = part.inputs[0].producer() if part.inputs and part.inputs[0] is not None else None
    return part if part is not None and part.op_type in op_type else named
