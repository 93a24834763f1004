"""Layout assignment: where each tensor is stored in which order of axes, so that as few numbers as possible are moved.

Lowering leaves a TRANSPOSE on either side of every operator that wants its channels last. Here they are looked through
(`flow`), operators that could be computed in another order are found (`forms`, by the `rules` of each kind), the
cheapest choice among those is made (`choice`), and the graph is written anew with the transpositions that are left
(`rewrite`).

Tensors that are flattened for a while are looked at split, too (`regions`).

An operator has one alternative at a time, found in one of two ways; the better result of a round is the start of the
next, until no round moves fewer numbers.
"""

from __future__ import annotations

from onnxprune.targets.tflite.graph import Graph
from onnxprune.targets.tflite.layout.choice import chosen_forms
from onnxprune.targets.tflite.layout.cost import transposition_cost
from onnxprune.targets.tflite.layout.flow import Flow, permutation_of
from onnxprune.targets.tflite.layout.forms import Precedence, alternative_forms
from onnxprune.targets.tflite.layout.regions import with_split_regions
from onnxprune.targets.tflite.layout.rewrite import rewritten

__all__ = ["assign_layouts", "moved_cost"]

# Each round gets rid of something, and the first of nearly all. Real networks end after two or three.
_MOST_ROUNDS = 6
_PRECEDENCES: tuple[Precedence, ...] = ("nearest", "heaviest")


def assign_layouts(graph: Graph) -> Graph:
    """The same computation with as few transpositions as the rules can do with, and never more than before.

    Tensors that stand for ONNX values say by `Tensor.layout` how they are stored. Inputs and outputs stay as they are.
    """
    if moved_cost(graph) == 0:
        return graph
    whole, split = _fewest_moves(graph), with_split_regions(graph)
    return whole if split is graph else min(whole, _fewest_moves(split), key=moved_cost)


def _fewest_moves(graph: Graph) -> Graph:
    best, cost = graph, moved_cost(graph)
    for round_ in range(_MOST_ROUNDS):
        if cost == 0:
            break
        flow = Flow.of(best)
        found = [rewritten(flow, chosen_forms(flow, alternative_forms(flow, order))) for order in _PRECEDENCES]
        cheapest = min(found, key=moved_cost)
        # The first round is taken even where it saves nothing: it moves transpositions away from convolutions, which
        # can be fused with what stands beside them.
        if moved_cost(cheapest) > cost or (round_ and moved_cost(cheapest) == cost):
            break
        best, cost = cheapest, moved_cost(cheapest)
    return best


def moved_cost(graph: Graph) -> float:
    """What the transpositions of a graph cost, in elements moved."""
    total = 0.0
    for operator in graph.operators:
        order = permutation_of(operator, graph.tensors)
        if order is not None:
            total += transposition_cost(graph.tensors[operator.inputs[0]].shape, order)
    return total
