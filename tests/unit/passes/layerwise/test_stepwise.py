"""Running a model part by part gives what running it whole gives, and sees weights that change on the way."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.graph.weights import constant_array, replace_weight
from onnxprune.passes.layerwise.stepwise import StepwiseModel, samples_that_fit
from onnxprune.runtime.sessions import ort_runner_from_model
from tests.layerwise import images, mobile_net, outputs

BATCHES = images(3).batches


def test_parts_give_what_the_whole_model_gives() -> None:
    model = mobile_net()
    stepwise = StepwiseModel(model, BATCHES)
    runner = ort_runner_from_model(model, extra_outputs=["r1", "c3"])

    for name in ("r1", "c3", "y"):
        found = stepwise.advance(name)
        for array, batch in zip(found, BATCHES, strict=True):
            np.testing.assert_allclose(array, runner.run(batch)[name], rtol=1e-5, atol=1e-6)


def test_peeking_remembers_nothing_so_that_a_changed_weight_counts() -> None:
    model = mobile_net()
    stepwise = StepwiseModel(model, BATCHES)
    stepwise.advance("r1")
    before = [array.copy() for array in stepwise.peek("c2")]

    weight = model.graph.initializers["w2"]
    replace_weight(weight, 2 * constant_array(weight))
    bias = model.graph.initializers["b2"]
    replace_weight(bias, 2 * constant_array(bias))

    for old, new in zip(before, stepwise.peek("c2"), strict=True):
        np.testing.assert_allclose(new, 2 * old, rtol=1e-5, atol=1e-5)
    after = stepwise.advance("y")
    np.testing.assert_allclose(after[0], outputs(model, BATCHES[0]), rtol=1e-4, atol=1e-5)


def test_what_nobody_needs_any_more_is_forgotten() -> None:
    stepwise = StepwiseModel(mobile_net(), BATCHES)
    stepwise.advance("r1")
    stepwise.advance("c3")
    assert {value.name for value in stepwise._state} == {"c3"}


def test_an_input_is_known_from_the_start() -> None:
    stepwise = StepwiseModel(mobile_net(), BATCHES)
    assert stepwise.advance("x")[1] is BATCHES[1]["x"]
    assert next(stepwise.peek("x")) is BATCHES[0]["x"]


@pytest.mark.parametrize(("max_bytes", "expected"), [(1 << 30, 100), (3 * 4 * 2 * 8 * 64, 3), (1, 1)])
def test_the_number_of_samples_follows_what_is_alive_at_once(max_bytes: int, expected: int) -> None:
    # Most is alive where two tensors of 8 x 8 x 8 float32 numbers are.
    assert samples_that_fit(mobile_net(), 100, max_bytes=max_bytes) == expected
