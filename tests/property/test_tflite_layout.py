"""Random graphs compute the same, in LiteRT, before and after layout assignment and fusion."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxprune.targets.tflite.fusion import fuse
from onnxprune.targets.tflite.graph import Graph
from onnxprune.targets.tflite.layout import assign_layouts, moved_cost
from onnxprune.targets.tflite.layout.choice import chosen_forms
from onnxprune.targets.tflite.layout.flow import Flow
from onnxprune.targets.tflite.layout.forms import alternative_forms
from onnxprune.targets.tflite.layout.regions import with_split_regions
from onnxprune.targets.tflite.layout.rewrite import rewritten
from tests.litert import Feeds
from tests.tflite_graphs import feeds_for, random_graph, random_network, random_region, run_graph

# Kernels add in another order where axes are in another order: float32 sums of a few dozen numbers around 1.
TOLERANCE = 1e-4

# Random graphs have operators that move fewer numbers than a kernel's start costs: these are what a cut may miss.
NEGLIGIBLE = 200.0


def assert_same_values(before: Graph, after: Graph, feeds: Feeds) -> int:
    """Outputs, and tensors that stand for values, agree; gives how many of the latter are stored in another order."""
    names = [name for name, tensor in after.tensors.items() if name in before.values and tensor.constant is None]
    inside = [name for name in names if name not in before.inputs]
    expected, actual = (run_graph(graph, feeds, read=inside) for graph in (before, after))
    for name in {*before.outputs, *inside}:
        layout = after.tensors[name].layout
        wanted = expected[name] if layout is None else expected[name].transpose(layout)
        np.testing.assert_allclose(actual[name], wanted, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)
    return sum(after.tensors[name].layout is not None for name in inside)


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["known", "open-batch"])
def test_values_are_the_same_in_whatever_layout(is_dynamic: bool) -> None:
    permuted, before, after = 0, 0.0, 0.0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        graph = random_graph(rng, dynamic=is_dynamic)
        assigned = assign_layouts(graph)
        permuted += assert_same_values(graph, assigned, feeds_for(graph, rng))
        assert moved_cost(assigned) <= moved_cost(graph), seed
        before, after = before + moved_cost(graph), after + moved_cost(assigned)
    assert permuted > 5, "no random graph stores a value in another order: the test has nothing to look at"
    assert after < 0.9 * before


def test_the_cut_finds_the_cheapest_choice_that_trying_all_finds() -> None:
    compared, missed = 0, 0
    for seed in range(200):
        flow = Flow.of(random_graph(np.random.default_rng(seed), steps=9))
        forms = alternative_forms(flow, "nearest")
        if not 1 <= len(forms) <= 7:
            continue
        found = moved_cost(rewritten(flow, chosen_forms(flow, forms)))
        subsets = itertools.chain.from_iterable(itertools.combinations(forms, many) for many in range(len(forms) + 1))
        best = min(moved_cost(rewritten(flow, {index: forms[index] for index in subset})) for subset in subsets)
        compared += 1
        missed += found > best + NEGLIGIBLE
    assert compared > 80
    # Cycles of transpositions that contradict each other are charged too much.
    assert missed <= compared // 50


def test_fused_networks_compute_the_same() -> None:
    fused = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        graph = random_network(rng)
        smaller = fuse(graph)
        fused += len(graph.operators) - len(smaller.operators)
        feeds = feeds_for(graph, rng)
        expected, actual = run_graph(graph, feeds), run_graph(smaller, feeds)
        for name in graph.outputs:
            np.testing.assert_allclose(actual[name], expected[name], rtol=TOLERANCE, atol=TOLERANCE, err_msg=str(seed))
    assert fused > 200


def test_random_graphs_compute_the_same_after_both_stages() -> None:
    for seed in range(1000, 1080):
        rng = np.random.default_rng(seed)
        graph = random_graph(rng, dynamic=seed % 2 == 0)
        feeds = feeds_for(graph, rng)
        expected, actual = run_graph(graph, feeds), run_graph(fuse(assign_layouts(graph)), feeds)
        for name in graph.outputs:
            np.testing.assert_allclose(actual[name], expected[name], rtol=TOLERANCE, atol=TOLERANCE, err_msg=str(seed))


def test_regions_of_flattened_tensors_compute_the_same_when_split() -> None:
    split = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        graph = random_region(rng)
        changed = with_split_regions(graph)
        if changed is graph:
            continue
        split += 1
        feeds = feeds_for(graph, rng)
        expected, actual = run_graph(graph, feeds), run_graph(changed, feeds)
        for name in graph.outputs:
            np.testing.assert_allclose(actual[name], expected[name], rtol=TOLERANCE, atol=TOLERANCE, err_msg=str(seed))
    assert split > 60
