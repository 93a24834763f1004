"""Where the time of a model goes, by node and by operator type, whatever runtime it was measured in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["NodeTime", "OpProfile", "OpTypeTime", "by_op_type"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTime:
    """One node of the graph as the runtime computes it; `mean_ms` is its time in one run, bodies of loops excluded.

    `p50_ms` is the median over the runs, `undisturbed_ms` the lower quintile: other programs only ever add time.
    `model_node` is the node of the model that it stands for, "" where that is unknown. `share` is of all nodes' time.
    """

    name: str
    op_type: str
    model_node: str
    module_path: str
    calls_per_run: float
    mean_ms: float
    p50_ms: float
    share: float
    undisturbed_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OpTypeTime:
    """All nodes of one operator type together."""

    op_type: str
    num_nodes: int
    mean_ms: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OpProfile:
    """Times by node and by operator type, the longest first.

    `run_ms` is the mean time of a whole run while profiling; `nodes_ms` the part of it spent inside nodes. `note` says
    what the figures leave out, or why there are none.
    """

    nodes: tuple[NodeTime, ...]
    op_types: tuple[OpTypeTime, ...]
    run_ms: float
    nodes_ms: float
    num_runs: int
    threads: int
    note: str = ""


def by_op_type(nodes: Iterable[NodeTime]) -> tuple[OpTypeTime, ...]:
    """The times of `nodes` together by their types, the longest first."""
    groups: dict[str, list[NodeTime]] = defaultdict(list)
    for node in nodes:
        groups[node.op_type].append(node)
    times = [
        OpTypeTime(
            op_type=op_type,
            num_nodes=len(group),
            mean_ms=sum(node.mean_ms for node in group),
            share=sum(node.share for node in group),
        )
        for op_type, group in groups.items()
    ]
    return tuple(sorted(times, key=lambda time: (-time.mean_ms, time.op_type)))
