"""What decides whether a step stays: samples that it was not made with, and a figure that can't be fooled."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from onnxprune.contracts import PassContext
from onnxprune.errors import BadDataError
from onnxprune.graph.weights import constant_array, replace_weight
from onnxprune.passes.layerwise.gain import BEST_DB, NoiseMeter, output_snr_db
from onnxprune.passes.layerwise.samples import count_samples, split_samples
from onnxprune.passes.layerwise.statistics import channel_statistics
from onnxprune.passes.layerwise.trial import trial_snr_db
from tests.builders import canonical, proto_of
from tests.layerwise import images, mobile_net, normal
from tests.quantization import ArraySource


def test_every_fourth_batch_judges_and_none_does_both() -> None:
    source = images(16)
    split = split_samples(source, max_samples=8)
    assert (len(split.fit), len(split.judge), split.is_held_out) == (6, 2, True)
    fits = {batch["x"].tobytes() for batch in split.fit}
    assert not fits & {batch["x"].tobytes() for batch in split.judge}
    assert split.judged_on == "2 held-out samples"


def test_samples_are_spread_over_the_set() -> None:
    source = ArraySource(tuple({"x": np.full((1, 1), n, np.float32)} for n in range(100)))
    split = split_samples(source, max_samples=4)
    assert sorted(int(batch["x"][0, 0]) for batch in (*split.fit, *split.judge)) == [0, 25, 50, 75]


def test_a_single_batch_serves_for_both_and_the_report_says_so() -> None:
    split = split_samples(images(1), max_samples=8)
    assert not split.is_held_out
    assert "there is one batch only" in split.judged_on
    assert count_samples(split.fit) == 1


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(BadDataError, match="no sample"):
        split_samples(ArraySource(()), max_samples=8)


def test_a_meter_gives_the_ratio_in_decibels() -> None:
    meter = NoiseMeter()
    meter.add(np.array([10.0, 0.0]), np.array([10.0, 1.0]))
    assert meter.snr_db == pytest.approx(20.0)


def test_a_meter_takes_what_is_not_finite_for_the_worst() -> None:
    meter = NoiseMeter()
    meter.add(np.array([1.0, 2.0]), np.array([1.0, np.nan]))
    assert meter.snr_db == -BEST_DB


def test_equal_models_are_as_good_as_can_be() -> None:
    assert output_snr_db(mobile_net(), mobile_net(), images(2)) == BEST_DB


def softmax_net(gain: float):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="layer"),
        helper.make_node("Softmax", ["m"], ["y"], name="softmax"),
    ]
    model = canonical(proto_of(nodes, inputs={"x": (1, 4)}, outputs={"y": (1, 6)}, weights={"w": normal(4, 6)}))
    weight = model.graph.initializers["w"]
    replace_weight(weight, constant_array(weight) * np.float32(gain))
    return model


def test_an_output_behind_a_softmax_is_judged_before_it() -> None:
    found = output_snr_db(softmax_net(1.0), softmax_net(1.1), images(4, shape=(1, 4)))
    # Everything before the Softmax is off by a tenth.
    assert found == pytest.approx(20.0, abs=1e-2)


def test_a_trial_quantization_finds_the_channels_that_differ() -> None:
    split = split_samples(images(), max_samples=24)
    context = PassContext()
    flat, spread = mobile_net(), mobile_net(spread=300.0)
    good, bad = (
        trial_snr_db(model, model, split, context, per_channel=False, weight_bits=8) for model in (flat, spread)
    )
    assert good > bad + 10


def test_statistics_of_channels_are_those_of_all_samples_together() -> None:
    source = images(5)
    found = channel_statistics(mobile_net(), {"x": 1, "r1": 1}, source)
    stacked = np.concatenate([batch["x"] for batch in source]).transpose(1, 0, 2, 3).reshape(4, -1)
    np.testing.assert_allclose(found["x"].mean, stacked.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found["x"].std, stacked.std(axis=1), rtol=1e-4)
    np.testing.assert_allclose(found["x"].magnitude, np.abs(stacked).max(axis=1))
    assert found["r1"].low.min() >= 0.0
