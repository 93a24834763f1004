"""Where the time of a `.tflite` file goes: LiteRT's own profiler, in XNNPACK's operators as well as in LiteRT's.

XNNPACK takes parts of the graph and computes them with operators of its own: it joins some of the file's and adds
others. So a row is one of XNNPACK's operators, or an operator of the file that LiteRT kept. Where a part has as many
convolutions, fully connected layers and matrix products in XNNPACK as in the file, they stand in the same order, and a
row is led back to the file's operator.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxprune.contracts import Batch, JsonValue
from onnxprune.errors import ModelError, UsageError
from onnxprune.graph.tensor_graph import GraphNode, TensorGraph
from onnxprune.runtime.child import ChildFailure, call_in_child
from onnxprune.runtime.litert import litert_runner_from_path
from onnxprune.runtime.litert_native import FEEDS_FILE
from onnxprune.runtime.op_profile import NodeTime, OpProfile, by_op_type

__all__ = ["profile_tflite"]

# Kinds of the profiler's events (tflite/core/api/profiler.h).
_WHOLE_RUN, _OPERATOR, _DELEGATE, _IN_DELEGATE = 1, 2, 4, 8
_WHOLE_RUN_TAG = "Invoke"

_PRODUCTS = frozenset({"BATCH_MATMUL", "CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"})
_XNNPACK_PRODUCTS = ("Batch Matrix Multiply", "Convolution", "Deconvolution", "Fully Connected")
_WITH_BODIES = frozenset({"CALL_ONCE", "IF", "STABLEHLO_COMPOSITE", "STABLEHLO_WHILE", "WHILE"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """`part` is None for an operator that LiteRT kept; `number` counts in the file, or in XNNPACK's part."""

    part: int | None
    number: int
    tag: str


def profile_tflite(
    path: Path, feeds: Batch, *, runs: int = 20, warmup: int = 3, threads: int = 1, timeout_s: float = 600.0
) -> OpProfile:
    """Run the file `warmup` + `runs` times in a process of its own with LiteRT's profiler on.

    The profiler counts whole microseconds and rounds down: an operator that takes less shows as 0, and all together as
    less than the run. `module_path` is empty, and the name of a node that the file knows is that of its first output.

    Args:
        path: A `.tflite` file.
        feeds: One batch.
        runs: At least 1.
        warmup: Runs that are not counted.
        threads: Threads that one operator may use.
        timeout_s: For the process.

    Raises:
        UsageError: `runs` is below 1 or `warmup` below 0.
        BadDataError: As the runner's.
        ModelError: Likewise, or LiteRT's profiler can't be used.
    """
    if runs < 1 or warmup < 0:
        raise UsageError(f"Profiling needs at least 1 run and no negative warm-up, not {runs} and {warmup}.")
    runner = litert_runner_from_path(path, threads=threads)
    bodies = {node.op_type for node in runner.graph.nodes if node.op_type in _WITH_BODIES}
    if bodies:
        raise ModelError(
            f"'{path.name}' can't be profiled by operator: LiteRT counts the time in the body of {min(bodies)} twice."
        )
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        stored = runner.stored_feeds(feeds)
        np.savez(Path(folder) / FEEDS_FILE, *stored.values())
        try:
            events = call_in_child(
                "onnxprune.runtime.litert_native:profile_in_this_process",
                {
                    "path": str(path.resolve()),
                    "inputs": list(stored),
                    "threads": threads,
                    "warmup": warmup,
                    "runs": runs,
                },
                folder=Path(folder),
                timeout_s=timeout_s,
            )
        except ChildFailure as failure:
            raise ModelError(f"'{path.name}' can't be profiled by operator: LiteRT's profiler {failure}.") from failure
    return _profile(events, runner.graph, runner.delegated_parts(), threads=threads)


def _profile(
    runs: Sequence[Sequence[Sequence[JsonValue]]],
    graph: TensorGraph,
    parts: Sequence[Sequence[int]],
    *,
    threads: int,
) -> OpProfile:
    times_us: defaultdict[_Row, dict[int, float]] = defaultdict(dict)
    for number, events in enumerate(runs):
        for row, duration_us in _rows(events):
            times_us[row][number] = times_us[row].get(number, 0.0) + duration_us
    is_whole = (_WHOLE_RUN, _WHOLE_RUN_TAG)
    whole_us = [duration_us for events in runs for kind, tag, _, duration_us in events if (kind, tag) == is_whole]
    if not times_us or not whole_us:
        raise ModelError("LiteRT's profile holds no run of the model.")
    total_us = sum(sum(found.values()) for found in times_us.values())
    nodes_of = _nodes_of_rows(list(times_us), graph, parts)
    nodes = [
        _node_time(row, found, nodes_of.get(row), num_runs=len(runs), total_us=total_us or 1.0)
        for row, found in times_us.items()
    ]
    return OpProfile(
        nodes=tuple(sorted(nodes, key=lambda node: (-node.mean_ms, node.name))),
        op_types=by_op_type(nodes),
        run_ms=statistics.mean(whole_us) / 1e3,
        nodes_ms=total_us / len(runs) / 1e3,
        num_runs=len(runs),
        threads=threads,
        note=_note(graph, parts),
    )


def _rows(events: Sequence[Sequence[JsonValue]]) -> list[tuple[_Row, float]]:
    """The operators of one run in the order in which they ran."""
    found = []
    part = -1
    for kind, tag, operator, duration_us in events:
        if kind == _OPERATOR:
            found.append((_Row(part=None, number=operator, tag=tag), duration_us))
        elif kind == _DELEGATE:  # one that does not look inside
            part += 1
            found.append((_Row(part=part, number=0, tag=tag), duration_us))
        elif kind == _IN_DELEGATE:
            part += operator == 0
            found.append((_Row(part=part, number=operator, tag=tag), duration_us))
    return found


def _nodes_of_rows(
    rows: Sequence[_Row], graph: TensorGraph, parts: Sequence[Sequence[int]]
) -> Mapping[_Row, GraphNode]:
    """The file's operator for each row that certainly stands for one."""
    found = {row: graph.nodes[row.number] for row in rows if row.part is None and row.number < len(graph.nodes)}
    if len({row.part for row in rows if row.part is not None}) != len(parts):
        return found  # LiteRT split the graph otherwise here than there
    for number, members in enumerate(parts):
        products = [graph.nodes[index] for index in members if graph.nodes[index].op_type in _PRODUCTS]
        computed = [row for row in rows if row.part == number and row.tag.startswith(_XNNPACK_PRODUCTS)]
        if len(products) == len(computed):
            found.update(zip(computed, products, strict=True))
    return found


def _node_time(
    row: _Row, found: Mapping[int, float], node: GraphNode | None, *, num_runs: int, total_us: float
) -> NodeTime:
    run_us = [found.get(number, 0.0) for number in range(num_runs)]
    if row.part is None:
        name = node.name if node is not None else f"operator {row.number}"
    else:
        name = f"XNNPACK {row.part + 1}.{row.number + 1}"
    return NodeTime(
        name=name,
        op_type=row.tag,
        model_node=node.name if node is not None else "",
        module_path="",
        calls_per_run=1.0,
        mean_ms=sum(run_us) / num_runs / 1e3,
        p50_ms=statistics.median(run_us) / 1e3,
        share=sum(run_us) / total_us,
        undisturbed_ms=sorted(run_us)[num_runs // 5] / 1e3,
    )


def _note(graph: TensorGraph, parts: Sequence[Sequence[int]]) -> str:
    taken = sum(len(part) for part in parts)
    if not taken:
        return f"XNNPACK takes none of the {len(graph.nodes)} operators."
    split = f", in {len(parts)} parts" if len(parts) > 1 else ""
    return (
        f"XNNPACK takes {taken} of {len(graph.nodes)} operators{split}; its own, which compute them, are shown. "
        "Times are cut to whole microseconds."
    )
