"""The oracle notices what it is there for."""

from __future__ import annotations

import numpy as np

from onnxprune.passes.prune.analysis import analyze_channels
from onnxprune.passes.prune.oracle import largest_difference, masked_model
from onnxprune.passes.prune.surgery import remove_channels
from onnxprune.runtime.sessions import ort_runner_from_model
from tests.patterns import network


def outputs(model: object, seed: int = 0) -> dict[str, np.ndarray]:
    feeds = {"x": np.random.default_rng(seed).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    return ort_runner_from_model(model, optimization="disabled").run(feeds)  # type: ignore[arg-type]


def test_a_cut_of_other_channels_than_the_masked_ones_is_noticed() -> None:
    model = network(["conv_batch_norm", "residual"])
    classes = analyze_channels(model)
    free = next(group for group in classes.groups if group.frozen_reason is None)
    masked, cut = np.ones(classes.num_classes, bool), np.ones(classes.num_classes, bool)
    masked[free.classes[:4]] = False
    cut[free.classes[4:8]] = False
    pruned = model.clone()
    remove_channels(pruned, analyze_channels(pruned), cut)
    assert largest_difference(outputs(masked_model(model, masked)), outputs(pruned)) > 0.01


def test_masking_keeps_what_a_shift_makes_out_of_a_removed_channel_out_of_the_sum() -> None:
    # BatchNorm's shift and Sigmoid(0) = 0.5 make something out of zeros; the mask stands behind them.
    model = network(["conv_batch_norm", "silu_diamond", "squeeze_excite"])
    classes = analyze_channels(model)
    keeps = np.ones(classes.num_classes, bool)
    for group in classes.groups:
        if group.frozen_reason is None:
            keeps[group.classes[::2]] = False
    pruned = model.clone()
    remove_channels(pruned, analyze_channels(pruned), keeps)
    # Single-precision sums in another order.
    assert largest_difference(outputs(masked_model(model, keeps)), outputs(pruned)) < 1e-5


def test_the_masked_model_leaves_the_original_as_it_is() -> None:
    model = network(["residual"])
    before = outputs(model)
    keeps = np.zeros(analyze_channels(model).num_classes, bool)
    masked_model(model, keeps)
    np.testing.assert_array_equal(outputs(model)[next(iter(before))], next(iter(before.values())))


def test_difference_is_a_part_of_the_output_s_range() -> None:
    assert largest_difference({"y": np.array([0.0, 10.0])}, {"y": np.array([0.5, 10.0])}) == 0.05


def test_difference_of_other_shapes_or_of_not_finite_against_finite_is_infinite() -> None:
    assert largest_difference({"y": np.zeros(2)}, {"y": np.zeros(3)}) == float("inf")
    assert largest_difference({"y": np.array([np.nan])}, {"y": np.zeros(1)}) == float("inf")
    assert largest_difference({"y": np.array([1, 2])}, {"y": np.array([1, 3])}) == float("inf")
    assert largest_difference({"y": np.array([np.inf, 1.0])}, {"y": np.array([np.inf, 1.0])}) == 0.0
