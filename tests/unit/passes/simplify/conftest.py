"""One stage at a time, with its outputs compared."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onnxprune.contracts import CanonicalModel, PassOutcome
from onnxprune.passes.simplify import SimplifyConfig, SimplifyPass


@pytest.fixture
def simplified(run_verified, outputs_of) -> Callable[..., PassOutcome]:
    """The outcome of the stages named (default: all of our own), shown to give the same outputs."""

    def run(model: CanonicalModel, *stages: str, batch: int = 1) -> PassOutcome:
        config = SimplifyConfig(stages=stages) if stages else SimplifyConfig(skip_stages=("onnxsim", "onnxscript"))
        outcome = run_verified(SimplifyPass(config), model)
        before, after = outputs_of(model, batch=batch), outputs_of(outcome.state.model, batch=batch)
        assert list(after) == list(before)
        for name, array in before.items():
            # Folding rounds each weight once more: a few units of float32's 2**-24, of the largest value.
            np.testing.assert_allclose(after[name], array, rtol=0, atol=2e-6 * max(1.0, np.abs(array).max()))
        return outcome

    return run


@pytest.fixture
def op_types() -> Callable[[PassOutcome], list[str]]:
    """The operators of the main graph, in order."""
    return lambda outcome: [node.op_type for node in outcome.state.model.graph]
