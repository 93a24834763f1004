"""Pruning is exact: for any network and any plan, the result equals the masked original.

The oracle is `onnxprune.passes.prune.oracle`: the unpruned model, with removed channels masked to zero where they are
summed over. Each test also asserts that channels of the pattern under test really went.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxprune.contracts import CanonicalModel
from onnxprune.graph.verify import verify
from onnxprune.passes.prune.analysis import ChannelClasses, analyze_channels
from onnxprune.passes.prune.limits import width_limits
from onnxprune.passes.prune.oracle import largest_difference, masked_model
from onnxprune.passes.prune.surgery import remove_channels
from onnxprune.runtime.sessions import ort_runner_from_model
from tests import patterns_statistics
from tests.patterns import PATTERNS, network

# Importing it adds its patterns to PATTERNS.
assert patterns_statistics

# Single-precision sums in another order; a wrong cut changes outputs by whole percents.
TOLERANCE = 1e-4

# These merge batch and channels, or bring a constant with a batch axis: the batch must be 1.
STATIC_BATCH = {"batch_merged_shuffle", "concat_constant"}
COMBINABLE = sorted(set(PATTERNS) - STATIC_BATCH)


def random_plan(classes: ChannelClasses, rng: np.random.Generator, removed_ratio: float) -> np.ndarray:
    """One flag per class: any subset of what is not frozen, as long as no layer ends empty."""
    keeps = np.ones(classes.num_classes, dtype=np.bool_)
    for group in classes.groups:
        if group.frozen_reason is None:
            keeps[group.classes] = rng.random(len(group)) >= removed_ratio
    return width_limits(classes, min_channels=1, channel_multiple=1).repaired(keeps, rng.random(classes.num_classes))


def touched(classes: ChannelClasses, keeps: np.ndarray, prefix: str) -> bool:
    """True when a node of the pattern lost channels, on its way in or out."""
    for value, axes in classes.labelling.values.items():
        nodes = [value.producer(), *(use.node for use in value.uses())]
        if any(node is not None and (node.name or "").startswith(prefix) for node in nodes):
            for labels in axes:
                if labels is not None and not keeps[classes.classes_at(labels)].all():
                    return True
    return False


def prune_and_compare(model: CanonicalModel, keeps: np.ndarray, *, seed: int, batch: int) -> float:
    """Difference between the pruned and the masked model, as a part of the output's range."""
    pruned = model.clone()
    remove_channels(pruned, analyze_channels(pruned), keeps)
    verify(pruned)
    feeds = {"x": np.random.default_rng(seed).standard_normal((batch, 3, 8, 8)).astype(np.float32)}
    # Without optimizations: what is compared is the graph, not what ONNX Runtime makes of it.
    actual = ort_runner_from_model(pruned, optimization="disabled").run(feeds)
    expected = ort_runner_from_model(masked_model(model, keeps), optimization="disabled").run(feeds)
    return largest_difference(expected, actual)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_pruned_pattern_equals_the_masked_original(name: str) -> None:
    batch: int | str = 1 if name in STATIC_BATCH else "N"
    model = network([name], batch=batch)
    classes = analyze_channels(model)
    for seed, ratio in enumerate((0.2, 0.5, 0.9)):
        keeps = random_plan(classes, np.random.default_rng(seed), ratio)
        assert touched(classes, keeps, "p0/")
        assert prune_and_compare(model, keeps, seed=seed, batch=1 if batch == 1 else 2) < TOLERANCE


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    names=st.lists(st.sampled_from(COMBINABLE), min_size=2, max_size=4),
    seed=st.integers(0, 2**16),
    removed_ratio=st.floats(0.3, 0.8),
)
def test_any_plan_on_any_network_equals_the_masked_original(names: list[str], seed: int, removed_ratio: float) -> None:
    model = network(names, seed=seed)
    classes = analyze_channels(model)
    keeps = random_plan(classes, np.random.default_rng(seed), removed_ratio)
    assert all(touched(classes, keeps, f"p{index}/") for index in range(len(names)))
    assert prune_and_compare(model, keeps, seed=seed, batch=2) < TOLERANCE
