"""What is said to be computed sparse is, it is right, and what is refused would be wrong."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.targets.tflite.graph import Graph
from onnxprune.targets.tflite.sparse import make_sparse
from onnxprune.targets.tflite.sparse.clusters import qualify
from onnxprune.targets.tflite.sparse.form import to_sparse_form
from onnxprune.targets.tflite.sparse.weights import with_sparse_weights
from tests.sparse_cases import BROKEN, HEADS, MIDDLES, SOUND
from tests.sparse_nets import NhwcNet, mobile_net, sandwich, with_packed_weights
from tests.sparse_runs import Comparison, Outcome

# Float sums in another order.
MAX_ERROR = 1e-5
# Half the time or less is usual at 0.8 zeros; less than this means that nothing was skipped.
SPARSE_SPEED_UP = 1.3


def with_sparse_twin(graph: Graph) -> tuple[Graph, Graph]:
    sparse, (finding,) = make_sparse(graph, "auto")
    assert finding.severity == "info", finding.text
    return graph, sparse


def wrong(outcomes: dict[str, Outcome]) -> dict[str, float]:
    return {name: outcome.error for name, outcome in outcomes.items() if not outcome.error < MAX_ERROR}


def dense(outcomes: dict[str, Outcome]) -> dict[str, float]:
    return {name: outcome.speed_up for name, outcome in outcomes.items() if outcome.speed_up < SPARSE_SPEED_UP}


def test_a_mobile_network_runs_sparse(comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = comparison.one(*with_sparse_twin(mobile_net(size=96, width=24)))
    with capsys.disabled():
        print(f"\n0.8 zeros: {outcome.speed_up:.2f} times as fast as dense, relative error {outcome.error:.1e}")
    assert outcome.error < MAX_ERROR
    assert outcome.speed_up > SPARSE_SPEED_UP


def test_packed_weights_run_sparse(comparison: Comparison) -> None:
    graph = mobile_net(size=64, zeros=0.9)
    outcomes = comparison.all(
        {
            "FLOAT16": with_sparse_twin(with_packed_weights(graph, "FLOAT16")),
            "INT8": with_sparse_twin(with_packed_weights(graph, "INT8")),
        },
        rounds=10,
    )
    assert (wrong(outcomes), dense(outcomes)) == ({}, {})


def test_an_open_batch_runs_sparse(comparison: Comparison) -> None:
    outcome = comparison.one(*with_sparse_twin(mobile_net(batch=-1, size=64)), batch=3)
    assert outcome.error < MAX_ERROR
    assert outcome.speed_up > SPARSE_SPEED_UP


def test_what_a_cluster_may_hold_is_right(comparison: Comparison) -> None:
    pairs = {name: with_sparse_twin(sandwich(middle, zeros=0.9)) for name, middle in SOUND.items()}
    assert wrong(comparison.all(pairs)) == {}


def test_a_cluster_brought_into_form_is_right(comparison: Comparison) -> None:
    pairs = {name: with_sparse_twin(sandwich(middle, zeros=0.9)) for name, middle in MIDDLES.items()}
    pairs |= {f"head: {name}": with_sparse_twin(sandwich(end=end, zeros=0.9)) for name, end in HEADS.items()}
    assert wrong(comparison.all(pairs)) == {}


def random_mobile_network(seed: int) -> Graph:
    """Any order of what a cluster may hold, at any size."""
    rng = np.random.default_rng(seed)
    net = NhwcNet(seed=seed, zeros=0.85)
    height, width = (int(number) for number in rng.integers(20, 70, size=2))
    x = net.conv(net.pad(net.input((1, height, width, 3)), 1), 16, 3, 2, name="stem", activation="RELU6")
    parts = [part for name, part in SOUND.items() if name not in ("nothing", "resize")]
    for number in rng.permutation(len(parts))[:5]:
        x = net.conv(parts[number](net, x), 16)
    return net.graph(HEADS["1x1 convolution"](net, net.conv(x, 64)))


def test_random_mobile_networks_are_right(comparison: Comparison) -> None:
    graphs = {f"seed {seed}": random_mobile_network(seed) for seed in range(12)}
    assert all(qualify(to_sparse_form(graph)).qualifies for graph in graphs.values())
    assert wrong(comparison.all({name: with_sparse_twin(graph) for name, graph in graphs.items()})) == {}


def test_a_densify_in_a_broken_cluster_would_be_silently_wrong(comparison: Comparison) -> None:
    """The reason for `is_safe`. Where this fails, XNNPACK got better, and the rule can be looked at again."""
    cases = [case for case in BROKEN if case.id in ("max pooling", "prelu", "a further 3x3", "constant second")]
    graphs = {case.id: sandwich(case.middle, case.end) for case in cases}
    assert not any(qualify(graph).is_safe for graph in graphs.values())
    outcomes = comparison.all({name: (graph, with_sparse_weights(graph).graph) for name, graph in graphs.items()})
    assert len(outcomes) == 4
    assert min(outcome.error for outcome in outcomes.values()) > 0.01


def test_storage_without_a_stem_is_right(comparison: Comparison) -> None:
    net = NhwcNet(zeros=0.9)
    x = net.conv(net.input((1, 32, 32, 3)), 16, 3, 2, padding="SAME", name="stem")
    x = net.mean(net.conv(net.depthwise(net.conv(x, 64), stride=2), 64), "pool")
    graph = net.graph(net.dense(net.reshape(x, (1, 64)), 10))
    stored, findings = make_sparse(graph, "storage")
    assert [finding.severity for finding in findings] == ["warning", "info"]
    assert any(operator.kind == "DENSIFY" for operator in stored.operators)
    assert comparison.one(graph, stored, rounds=1).error < MAX_ERROR
