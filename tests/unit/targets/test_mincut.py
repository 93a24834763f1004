"""The minimum cut against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from onnxprune.targets.mincut import CutGraph


def cost_of(one_side: frozenset[int], edges: list[tuple[int, int, float]]) -> float:
    return sum(cost for tail, head, cost in edges if tail in one_side and head not in one_side)


@pytest.mark.parametrize("seed", range(20))
def test_cut_costs_as_little_as_the_best_of_all_splits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_free = 7
    edges = [
        (int(tail), int(head), float(rng.integers(1, 10)))
        for tail, head in rng.integers(0, num_free + 2, size=(25, 2))
        if tail != head
    ]
    graph = CutGraph()
    for _ in range(num_free):
        graph.add_vertex()
    for tail, head, cost in edges:
        graph.add_cost(tail, head, cost)

    found = graph.one_side()

    free = range(2, num_free + 2)
    best = min(
        cost_of(frozenset({CutGraph.ONE, *chosen}), edges)
        for size in range(num_free + 1)
        for chosen in itertools.combinations(free, size)
    )
    assert cost_of(found, edges) == best
    assert CutGraph.ONE in found
    assert CutGraph.OTHER not in found


def test_infinite_cost_is_never_paid_and_ties_go_to_the_other_side() -> None:
    graph = CutGraph()
    forced, follows, indifferent = (graph.add_vertex() for _ in range(3))
    graph.add_cost(CutGraph.ONE, forced, math.inf)
    graph.add_cost(forced, follows, math.inf)
    graph.add_cost(follows, CutGraph.OTHER, 100.0)
    graph.add_cost(CutGraph.ONE, indifferent, 5.0)
    graph.add_cost(indifferent, CutGraph.OTHER, 5.0)

    assert graph.one_side() == {CutGraph.ONE, forced, follows}
