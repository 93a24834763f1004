"""Whether XNNPACK's sparse inference switches on for a graph, and if not, because of which nodes.

A cluster is everything that is computed from a stem up to its ends. It pays where all of it is allowed (`rules`)
and more than two thirds of the weights of its 1x1 convolutions are zero.

XNNPACK itself asks less: it looks at what a cluster reads, and not at where its values go. So a cluster that is broken
in its middle is computed channels first up to there, and read channels last from there on: the results are silently
wrong, where a MEAN follows anywhere. It asks so in every partition with a DENSIFY. Therefore no weight may be stored
with DENSIFY in a graph with a stem whose cluster is broken (`SparseReport.is_safe`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.targets.tflite.graph import Graph, Operator, Tensor
from onnxprune.targets.tflite.sparse.rules import (
    GraphView,
    SparseProblem,
    is_pointwise,
    node_name,
    role_of,
    stem_problem,
)

__all__ = ["ZEROS_NEEDED", "SparseCluster", "SparseReport", "count_non_zeros", "qualify"]

ZEROS_NEEDED = 2 / 3
"""XNNPACK wants more zeros than this share of the weights of a cluster's 1x1 convolutions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseCluster:
    """What is computed from one stem, or from the first convolution where there is no stem."""

    stem: str
    has_stem: bool
    ends: tuple[str, ...]
    """Nodes that end it."""
    convolutions: tuple[str, ...]
    """Its 1x1 convolutions, by node."""
    weights: int
    zeros: int
    problems: tuple[SparseProblem, ...]
    """In graph order. Without any, every operator is allowed."""

    @property
    def zeros_ratio(self) -> float:
        """Share of zeros in the weights of the 1x1 convolutions."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def qualifies(self) -> bool:
        """True when XNNPACK computes it sparse, and right."""
        return not self.problems and self.zeros * 3 > self.weights * 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseReport:
    """Of a whole graph. `problems` are those of operators outside the clusters."""

    clusters: tuple[SparseCluster, ...]
    problems: tuple[SparseProblem, ...] = ()

    @property
    def is_safe(self) -> bool:
        """True when a DENSIFY can't make results wrong or end the process."""
        return not self.problems and all(not cluster.problems for cluster in self.clusters if cluster.has_stem)

    @property
    def qualifies(self) -> bool:
        """True when a cluster is computed sparse on phones, and all others are right."""
        return self.is_safe and any(cluster.qualifies for cluster in self.clusters)


def qualify(graph: Graph) -> SparseReport:
    """Follow every stem of `graph` to its ends.

    Where no convolution is a stem, the first one is followed instead, so that the report can name all that is in the
    way. Weights are read one at a time.
    """
    view = GraphView(graph)
    stems = [operator for operator in graph.operators if role_of(operator, view) == "stem"]
    first = next((operator for operator in graph.operators if operator.kind == "CONV_2D"), None)
    clusters = [_followed((stem,), view) for stem in stems]
    if not stems and first is not None:
        clusters = [_followed((first,), view)]
    return SparseReport(clusters=tuple(_merged(clusters, view)), problems=_unreadable_filters(view))


def count_non_zeros(tensor: Tensor) -> int:
    """Numbers of a constant that stand for anything but 0; of a sparse one, that are stored."""
    array = tensor.array()
    if array is None:
        return 0
    if tensor.quantization is not None and any(tensor.quantization.zero_points):
        axes = [1] * tensor.rank
        axes[tensor.quantization.axis] = -1
        array = array != np.array(tensor.quantization.zero_points).reshape(axes if tensor.rank else ())
    return int(np.count_nonzero(array))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Members:
    stems: tuple[Operator, ...]
    operators: tuple[Operator, ...]
    ends: tuple[Operator, ...]
    problems: tuple[SparseProblem, ...]


def _followed(stems: tuple[Operator, ...], view: GraphView) -> _Members:
    """Forward from the stems. What breaks the cluster is followed too, so that all problems are found at once."""
    members: dict[str, Operator] = {stem.outputs[0]: stem for stem in stems}
    ends: list[Operator] = []
    broken: dict[str, SparseProblem] = {}
    waiting = list(stems)
    while waiting:
        operator = waiting.pop(0)
        output = operator.outputs[0]
        readers = _readers(output, view)
        if output in view.graph.outputs and output not in broken:
            broken[output] = SparseProblem(
                node=node_name(operator),
                reason="an output of the model leaves the cluster before its end",
                advice=_END,
            )
        for reader in readers:
            if reader.outputs[0] in members:
                continue
            members[reader.outputs[0]] = reader
            role = role_of(reader, view)
            if role == "end":
                ends.append(reader)
            elif role == "inside":
                waiting.append(reader)
            else:
                broken[reader.outputs[0]] = _broken(reader, role)
                if view.tensor(reader.outputs[0]).rank == _RANK:
                    waiting.append(reader)
    computed = {name for member in members.values() for name in member.outputs}
    for output, member in members.items():
        foreign = [name for name in view.data_inputs(member) if name not in computed]
        if member not in stems and foreign and output not in broken:
            broken[output] = SparseProblem(
                node=node_name(member),
                reason=f"it also reads '{foreign[0]}', which comes from outside the cluster",
                advice="Everything in the cluster must be computed from its stem",
            )
    position = {operator.outputs[0]: index for index, operator in enumerate(view.graph.operators)}
    return _Members(
        stems=stems,
        operators=tuple(sorted(members.values(), key=lambda one: position[one.outputs[0]])),
        ends=tuple(ends),
        problems=tuple(broken[output] for output in sorted(broken, key=position.__getitem__)),
    )


_RANK = 4
_END = "End it with a mean over height and width (GlobalAveragePool), or a DepthToSpace"


def _broken(reader: Operator, role: SparseProblem | str) -> SparseProblem:
    if isinstance(role, SparseProblem):
        return role
    return SparseProblem(
        node=node_name(reader), reason="a second stem reads the first", advice="Replace it in the network"
    )


def _readers(name: str, view: GraphView) -> list[Operator]:
    """Operators that read a value, with a fused PAD seen through."""
    found = []
    for reader in view.readers.get(name, []):
        behind = view.readers.get(reader.outputs[0], [])
        is_fused = reader.kind == "PAD" and len(behind) == 1 and view.fused_padding(behind[0]) is reader
        found.append(behind[0] if is_fused else reader)
    return found


def _merged(clusters: list[_Members], view: GraphView) -> list[SparseCluster]:
    """Clusters that share operators are one."""
    merged: list[_Members] = []
    for cluster in clusters:
        outputs = {operator.outputs[0] for operator in cluster.operators}
        joined = [one for one in merged if outputs & {operator.outputs[0] for operator in one.operators}]
        merged = [one for one in merged if one not in joined]
        stems = tuple(dict.fromkeys(stem.outputs[0] for one in (*joined, cluster) for stem in one.stems))
        merged.append(_followed(tuple(view.producers[name] for name in stems), view) if joined else cluster)
    return [_cluster(one, view) for one in merged]


def _cluster(members: _Members, view: GraphView) -> SparseCluster:
    weights = zeros = 0
    pointwise = [operator for operator in members.operators if is_pointwise(operator, view)]
    for operator in pointwise:
        stored = view.stored(operator.inputs[1])
        if stored is None or stored.constant is None:
            continue
        size = view.tensor(operator.inputs[1]).num_elements
        weights += size
        zeros += size - count_non_zeros(stored)
    stem = members.stems[0]
    has_stem = role_of(stem, view) == "stem"
    problems = members.problems if has_stem else (stem_problem(stem, view), *members.problems)
    if not members.ends and not problems:
        problems = (
            SparseProblem(
                node=node_name(members.operators[-1]),
                reason="no mean over height and width and no DepthToSpace ends the cluster",
                advice=_END,
            ),
        )
    return SparseCluster(
        stem=node_name(stem),
        has_stem=has_stem,
        ends=tuple(node_name(end) for end in members.ends),
        convolutions=tuple(node_name(operator) for operator in pointwise),
        weights=weights,
        zeros=zeros,
        problems=problems,
    )


def _unreadable_filters(view: GraphView) -> tuple[SparseProblem, ...]:
    """Weights that end the process, or read memory that is not there, where XNNPACK counts zeros.

    It counts them in every FULLY_CONNECTED and 1x1 convolution of a graph with a MEAN or DEPTH_TO_SPACE of four axes,
    and takes it for granted that they are constant floats.
    """
    has_end = any(
        operator.kind in ("MEAN", "SUM", "DEPTH_TO_SPACE") and view.tensor(operator.inputs[0]).rank == _RANK
        for operator in view.graph.operators
        if view.tensor(operator.outputs[0]).type == "FLOAT32"
    )
    if not has_end:
        return ()
    return tuple(
        SparseProblem(
            node=node_name(operator),
            reason="its weight is computed or quantized, which XNNPACK does not expect beside sparse inference",
            advice='Set precision to "fp32" or "fp16"',
        )
        for operator in view.graph.operators
        if (operator.kind == "FULLY_CONNECTED" or is_pointwise(operator, view))
        and (view.stored(operator.inputs[1]) is None or view.tensor(operator.inputs[1]).type != "FLOAT32")
    )
