"""What a plan costs is known before anything is built: parameters and MACs equal those of the pruned model."""

from __future__ import annotations

import numpy as np
import pytest

import tests.patterns_statistics  # noqa: F401 - registers its patterns
from onnxprune.evaluate.figures import holds_parameters
from onnxprune.ops.macs import count_macs_per_sample
from onnxprune.passes.prune.analysis import analyze_channels
from onnxprune.passes.prune.costs import CostModel
from onnxprune.passes.prune.surgery import remove_channels
from tests.patterns import PATTERNS, network
from tests.property.test_prune_oracle import STATIC_BATCH, random_plan


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_costs_of_a_plan_are_those_of_the_pruned_model(name: str) -> None:
    model = network([name], batch=1 if name in STATIC_BATCH else "N")
    classes = analyze_channels(model)
    keeps = random_plan(classes, np.random.default_rng(0), 0.5)
    predicted = CostModel(model, classes).costs(keeps)
    pruned = model.clone()
    remove_channels(pruned, analyze_channels(pruned), keeps)
    counted = count_macs_per_sample(pruned)
    weights = [value for value in pruned.graph.initializers.values() if holds_parameters(value)]
    parameters = sum(value.const_value.size for value in weights if value.const_value is not None)
    assert predicted.parameters == parameters
    assert predicted.macs is not None
    assert counted.total is not None
    # A node whose MACs are a sum of terms is rounded once for each of them.
    assert abs(predicted.macs - counted.total) <= 3 * len(list(model.graph))
