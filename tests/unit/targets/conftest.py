"""States and contexts that targets build from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxprune.contracts import (
    ActivationQuantization,
    CanonicalModel,
    ModelState,
    QuantizationPlan,
    TargetContext,
    WeightQuantization,
)
from onnxprune.runtime.sessions import ort_runner_from_model
from tests.builders import conv_net

PROVENANCE = {"seed": 0, "versions": {"onnxprune": "0"}, "preprocess": {"mean": [0.5]}}


def min_max_plan(model: CanonicalModel) -> QuantizationPlan:
    """8-bit scales for every value and weight of `conv_net`, from the range on 32 random images."""
    values = [value.name for node in model.graph for value in node.outputs]
    images = {"x": np.random.default_rng(0).standard_normal((32, 3, 8, 8), dtype=np.float32)}
    arrays = ort_runner_from_model(model, extra_outputs=[v for v in values if v]).run(images) | images
    activations = {}
    for name, array in arrays.items():
        low, high = min(0.0, float(array.min())), max(0.0, float(array.max()))
        scale = float(np.float32((high - low) / 255))
        activations[name] = ActivationQuantization(
            scale=scale, zero_point=round(-128 - low / scale), num_bits=8, range_min=low, range_max=high
        )
    weights = {
        name: WeightQuantization(
            scales=tuple(
                float(np.float32(largest / 127))
                for largest in np.abs(value.const_value.numpy()).reshape(value.shape[0], -1).max(axis=1)
            ),
            axis=0,
            num_bits=8,
        )
        for name, value in model.graph.initializers.items()
        if name.endswith("weight")
    }
    return QuantizationPlan(
        activations=activations, weights=weights, method="minmax", calibration_hash="0" * 64, num_samples=32
    )


@pytest.fixture(scope="session")
def float_state() -> ModelState:
    return ModelState(model=conv_net())


@pytest.fixture(scope="session")
def int8_state() -> ModelState:
    model = conv_net()
    return ModelState(model=model, quantization=min_max_plan(model))


@pytest.fixture
def context(tmp_path: Path) -> Callable[..., TargetContext]:
    """Makes contexts with an empty folder each."""
    made = 0

    def make() -> TargetContext:
        nonlocal made
        folder = tmp_path / f"out{made}"
        made += 1
        folder.mkdir()
        return TargetContext(folder=folder, stem="net", provenance=PROVENANCE)

    return make
