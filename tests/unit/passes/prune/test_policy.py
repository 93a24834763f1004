"""What the user decides about attention and about statistics over channels."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest

from onnxprune.contracts import PassOutcome
from onnxprune.passes.prune import PruneConfig, PrunePass
from onnxprune.passes.prune.analysis import analyze_channels
from tests import patterns_statistics
from tests.patterns import network

RunVerified = Callable[..., PassOutcome]

# Importing it adds its patterns to those that `network` knows.
assert patterns_statistics


def weight_shapes(model: ir.Model, prefix: str, rank: int = 2) -> list[tuple[int, ...]]:
    """Shapes of the weights of a pattern with `rank` axes, in the order of their names' numbers."""
    found = [
        (int((value.name or "").rsplit("_", 1)[1]), tuple(value.shape.numpy()))
        for value in model.graph.initializers.values()
        if (value.name or "").startswith(f"{prefix}/weight") and value.shape is not None and len(value.shape) == rank
    ]
    return [shape for _, shape in sorted(found)]


# Four of eight heads of width four are 16 columns of the products that make queries, keys and values, and two places of
# every head are 16 columns as well: what tells them apart is the literal shape that they are reshaped to.
@pytest.mark.parametrize(
    ("pattern", "attention", "heads_and_width"),
    [
        ("attention_of_many_heads", "auto", (4, 4)),
        ("attention_of_many_heads", "heads", (4, 4)),
        ("attention_of_many_heads", "width", (8, 2)),
        ("attention_of_two_heads", "auto", (2, 4)),
        ("attention_of_two_heads", "width", (2, 4)),
        ("attention_of_two_heads", "heads", (1, 8)),
    ],
)
def test_attention_loses_heads_or_their_width_as_asked(
    run_verified: RunVerified, pattern: str, attention: str, heads_and_width: tuple[int, int]
) -> None:
    settings = {"ratio": 0.5, "attention": attention, "channel_multiple": 1, "min_channels": 1}
    pruned = run_verified(PrunePass(PruneConfig(**settings)), network([pattern])).state.model
    targets = {
        tuple(node.inputs[1].const_value.numpy()[2:].tolist())  # type: ignore[union-attr]
        for node in pruned.graph
        if node.op_type == "Reshape" and (node.name or "").startswith("p0/")
        if node.inputs[1] is not None and node.inputs[1].const_value is not None
        if node.inputs[1].const_value.size == 4 and node.outputs[0].shape is not None
        if any(use.node.op_type == "Transpose" for use in node.outputs[0].uses())
    }
    assert heads_and_width in targets


def test_whole_groups_are_no_approximation_and_parts_of_groups_are(run_verified: RunVerified) -> None:
    def notes(pattern: str) -> tuple[str, ...]:
        settings = PruneConfig(ratio=0.5, channel_multiple=1, min_channels=1)
        return run_verified(PrunePass(settings), network([pattern])).report.notes

    assert not any("Approximate" in note for note in notes("group_norm"))
    assert any("is averaged over with its group" in note for note in notes("group_norm_of_few_groups"))


def test_exact_leaves_channels_alone_that_a_layer_norm_averages_over(run_verified: RunVerified) -> None:
    outcome = run_verified(PrunePass(PruneConfig(ratio=0.5, exact=True)), network(["layer_norm"]))
    reasons = [skip.reason for skip in outcome.report.skips]
    assert any("is averaged over by 'p0/LayerNormalization" in reason for reason in reasons)
    assert weight_shapes(outcome.state.model, "p0", rank=4) == [(24, 8, 1, 1)]


def test_an_approximate_group_names_every_statistic() -> None:
    groups = analyze_channels(network(["layer_norm_decomposed"])).groups
    named = {what for group in groups if group.frozen_reason is None for what in group.approximate}
    assert len(named) == 2
    assert all(what.startswith("is reduced over by 'p0/ReduceMean") for what in named)
