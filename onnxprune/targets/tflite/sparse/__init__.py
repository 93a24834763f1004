"""The stage that makes zeros pay: on phones with arm64, XNNPACK skips those of 1x1 convolutions (`clusters`).

"auto"     the form and the storage that switch it on, where the whole cluster qualifies; else plain zeros
"storage"  as "auto", and where it does not qualify, weights still take fewer bytes on disk
"never"    plain zeros
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from onnxprune.contracts import Finding
from onnxprune.targets.tflite.graph import Graph
from onnxprune.targets.tflite.sparse.clusters import (
    ZEROS_NEEDED,
    SparseCluster,
    SparseReport,
    count_non_zeros,
    qualify,
)
from onnxprune.targets.tflite.sparse.form import to_sparse_form
from onnxprune.targets.tflite.sparse.rules import SparseProblem
from onnxprune.targets.tflite.sparse.weights import SparseStorage, with_sparse_weights

__all__ = ["NOTABLE_ZEROS_RATIO", "SPARSE_TOPIC", "SparseMode", "make_sparse", "zeros_ratio"]

SparseMode: TypeAlias = Literal["auto", "storage", "never"]

NOTABLE_ZEROS_RATIO = 0.1
"""Share of zeros among all weights below which nothing is said and nothing is done."""

# Nobody made fewer than these for speed: training by groups and quantizing leave some.
_SPARSIFIED_RATIO = 0.35
_SHOWN_REASONS = 4
_SHOWN_NODES = 3
SPARSE_TOPIC = "sparse inference"
"""Of findings that say what zeros are worth to this target."""
_STORAGE_TOPIC = "sparse storage"


def make_sparse(graph: Graph, mode: SparseMode) -> tuple[Graph, tuple[Finding, ...]]:
    """The main graph as `mode` wants it, and what its zeros are worth."""
    ratio = zeros_ratio(graph)
    if ratio < NOTABLE_ZEROS_RATIO:
        return graph, ()
    if mode == "never":
        text = f"{ratio:.0%} of the weights are zero, and sparse = never stores and computes them like any number."
        return graph, (Finding(topic=SPARSE_TOPIC, text=text),)
    formed = to_sparse_form(graph)
    report = qualify(formed)
    if report.qualifies:
        stored = with_sparse_weights(formed)
        return stored.graph, (_switched_on(report, stored),)
    blocked = _switched_off(report, ratio)
    if mode == "auto":
        return graph, (blocked,)
    return _stored(graph, blocked)


def _stored(graph: Graph, blocked: Finding) -> tuple[Graph, tuple[Finding, ...]]:
    # In the form as it came: bringing it closer to the cluster's form could only make a DENSIFY dangerous.
    report = qualify(graph)
    if not report.is_safe:
        return graph, (blocked, _unsafe(report))
    stored = with_sparse_weights(graph)
    if not stored.tensors:
        text = "No weight takes fewer bytes as its non-zeros, or none that the runtime would unpack."
        return graph, (blocked, Finding(topic=_STORAGE_TOPIC, text=text))
    return stored.graph, (blocked, Finding(topic=_STORAGE_TOPIC, text=_sizes(stored)))


def zeros_ratio(graph: Graph) -> float:
    """Share of zeros among all constants of 2 and more axes that hold weights."""
    weights = non_zeros = 0
    for tensor in graph.tensors.values():
        if tensor.constant is None or tensor.rank < _MATRIX_RANK or tensor.type not in _WEIGHT_TYPES:
            continue
        weights += tensor.num_elements
        non_zeros += count_non_zeros(tensor)
    return 1 - non_zeros / weights if weights else 0.0


_MATRIX_RANK = 2
_WEIGHT_TYPES = frozenset({"FLOAT32", "FLOAT16", "INT8"})


def _switched_on(report: SparseReport, stored: SparseStorage) -> Finding:
    clusters = [_described(cluster) for cluster in report.clusters if cluster.qualifies]
    return Finding(
        topic=SPARSE_TOPIC,
        text=f"On phones with arm64, XNNPACK skips the zero weights {'; '.join(clusters)}. Processors with AVX, such "
        "as those of most PCs, compute them like any number, so a latency measured there does not show it. "
        f"{_sizes(stored)}",
    )


def _described(cluster: SparseCluster) -> str:
    ends = ", ".join(f"'{end}'" for end in cluster.ends[:_SHOWN_NODES])
    count = len(cluster.convolutions)
    layers = "the 1x1 convolution" if count == 1 else f"the {count} 1x1 convolutions"
    return f"of {layers} from '{cluster.stem}' to {ends} ({cluster.zeros_ratio:.0%} zeros)"


def _switched_off(report: SparseReport, ratio: float) -> Finding:
    zeros = f"{ratio:.0%} of the weights are zero, and save bytes only in a compressed download. "
    return Finding(
        topic=SPARSE_TOPIC,
        text=zeros + _why_off(report),
        severity="warning" if ratio >= _SPARSIFIED_RATIO else "info",
    )


def _why_off(report: SparseReport) -> str:
    if not report.clusters:
        return "XNNPACK skips zeros in 1x1 convolutions alone, and the model has no convolution."
    problems = [*report.problems, *(problem for cluster in report.clusters for problem in cluster.problems)]
    if problems:
        return f"No phone computes faster for them, because {_reasons(problems)}."
    cluster = max(report.clusters, key=lambda one: one.weights)
    if not cluster.weights:
        return f"No phone computes faster for them, because there is no 1x1 convolution behind '{cluster.stem}'."
    return (
        f"XNNPACK skips the zeros of 1x1 convolutions when they are more than {ZEROS_NEEDED:.0%} of their weights, "
        f"and here they are {cluster.zeros_ratio:.1%}. Nothing else is in the way: sparsify these convolutions "
        "with 0.7 or more."
    )


def _reasons(problems: list[SparseProblem]) -> str:
    """Problems with the same reason together, those that come first in the graph first."""
    nodes: dict[str, list[str]] = {}
    advice: dict[str, str] = {}
    for problem in problems:
        nodes.setdefault(problem.reason, []).append(problem.node)
        advice[problem.reason] = problem.advice
    shown = [
        f"{reason} ({_names(nodes[reason])}; {advice[reason][0].lower()}{advice[reason][1:]})"
        for reason in list(nodes)[:_SHOWN_REASONS]
    ]
    more = len(nodes) - _SHOWN_REASONS
    return "; ".join(shown) + (f"; and {more} more reasons" if more > 0 else "")


def _names(nodes: list[str]) -> str:
    nodes = list(dict.fromkeys(nodes))
    shown = ", ".join(f"'{node}'" for node in nodes[:_SHOWN_NODES])
    return shown + (f" and {len(nodes) - _SHOWN_NODES} more" if len(nodes) > _SHOWN_NODES else "")


def _unsafe(report: SparseReport) -> Finding:
    broken = next((cluster for cluster in report.clusters if cluster.has_stem and cluster.problems), None)
    why = (
        f"'{broken.stem}' begins what XNNPACK can compute sparse, and '{broken.problems[0].node}' breaks it: on arm64 "
        "the results would be silently wrong"
        if broken is not None
        else f"'{report.problems[0].node}': {report.problems[0].reason}"
    )
    return Finding(topic=_STORAGE_TOPIC, text=f"Weights are stored with their zeros. {why}.", severity="warning")


def _sizes(stored: SparseStorage) -> str:
    weights = "1 weight is" if stored.tensors == 1 else f"{stored.tensors} weights are"
    return (
        f"{weights} stored as non-zeros and their places: {_mb(stored.dense_bytes)} -> {_mb(stored.sparse_bytes)} MB "
        f"on disk, {_mb(stored.compressed_dense_bytes)} -> {_mb(stored.compressed_sparse_bytes)} MB in a compressed "
        "download."
    )


def _mb(number: int) -> str:
    return f"{number / 1e6:.2f}"
