"""Damage by group from calibration data, and a ranking that spares what the outputs depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir
import pytest

from onnxprune.contracts import Batch, CanonicalModel, NullProgress, PassContext, PassOutcome, Requirement
from onnxprune.errors import PreconditionError
from onnxprune.ops.channels import ChannelPolicy
from onnxprune.passes.prune import PruneConfig, PrunePass
from onnxprune.passes.prune.analysis import ChannelGroup, analyze_channels
from onnxprune.passes.prune.sensitivity import MAX_SAMPLES, damage_curves
from onnxprune.passes.prune.surgery import remove_channels
from onnxprune.runtime.sessions import ort_runner_from_model
from tests.layers import chain

RunVerified = Callable[..., PassOutcome]


class Samples:
    """Seeded images; counts how many were read."""

    content_hash = "seeded"

    def __init__(self, num_samples: int = 4) -> None:
        self.num_samples = num_samples
        self.num_read = 0

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng(1)
        for _ in range(self.num_samples):
            self.num_read += 1
            yield {"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)}


def scaled(model: CanonicalModel, weight: str, rows: slice, factor: float) -> CanonicalModel:
    """`model` with some filters of a weight multiplied."""
    value = model.graph.initializers[weight]
    array = value.const_value.numpy().copy()  # type: ignore[union-attr]
    array[rows] *= factor
    value.const_value = ir.tensor(array, name=weight)
    return model


def curves_of(model: CanonicalModel, samples: Samples) -> tuple[list[ChannelGroup], dict[str, tuple[float, float]]]:
    classes = analyze_channels(model)
    groups = [group for group in classes.groups if group.frozen_reason is None]
    scores = np.arange(1.0, classes.num_classes + 1)
    curves = damage_curves(
        model, ChannelPolicy(), groups, scores, samples, custom_op_libraries=(), progress=NullProgress()
    )
    return groups, {name: (curve.scale, curve.exponent) for name, curve in curves.items()}


def test_the_damage_of_a_probe_is_what_removing_those_channels_does_to_the_outputs() -> None:
    model = chain(8, 4)
    (group,), curves = curves_of(model, Samples())
    scale, exponent = curves[group.id]
    pruned = model.clone()
    classes = analyze_channels(pruned)
    keeps = np.ones(classes.num_classes, dtype=np.bool_)
    keeps[group.classes[:4]] = False
    remove_channels(pruned, classes, keeps)
    original, smaller = ort_runner_from_model(model), ort_runner_from_model(pruned)
    moved = whole = 0.0
    for batch in Samples():
        before, after = original.run(batch)["c1"].astype(float), smaller.run(batch)["c1"].astype(float)
        moved, whole = moved + np.square(after - before).sum(), whole + np.square(before).sum()
    scores = group.classes + 1.0
    share = scores[:4].sum() / scores.sum()
    # float32 sums in another order.
    assert scale * share**exponent == pytest.approx(moved / whole, rel=1e-4)


def test_a_group_that_the_outputs_hardly_depend_on_has_hardly_any_damage() -> None:
    # What the second layer makes of the first half of the first layer's channels is tiny.
    model = chain(16, 16, 4)
    scaled(model, "w0", slice(0, 8), 1e-4)
    groups, curves = curves_of(model, Samples())
    assert curves[groups[0].id][0] < 1e-3 * curves[groups[1].id][0]


def test_no_more_samples_are_run_than_the_cap() -> None:
    samples = Samples(num_samples=3 * MAX_SAMPLES)
    curves_of(chain(8, 4), samples)
    assert samples.num_read == MAX_SAMPLES


def test_channels_go_where_the_outputs_hardly_depend_on_them(run_verified: RunVerified) -> None:
    model = scaled(chain(64, 64, 64, 4), "w1", slice(0, 32), 1e-4)
    outcome = run_verified(
        PrunePass(PruneConfig(macs_ratio=0.3, ranking="sensitivity", channel_multiple=1)),
        model,
        context=PassContext(calibration=Samples()),
    )
    # The 32 filters of conv1 that do next to nothing are more than the budget needs.
    assert [change.where for change in outcome.report.changes] == ["conv1"]


@pytest.mark.parametrize("target", ["ratio", "macs_ratio", "params_ratio", "bytes_ratio"])
def test_every_target_can_be_reached_by_sensitivity(run_verified: RunVerified, target: str) -> None:
    outcome = run_verified(
        PrunePass(PruneConfig(ranking="sensitivity", channel_multiple=1, min_channels=1, **{target: 0.4})),
        chain(32, 32, 32, 4),
        context=PassContext(calibration=Samples()),
    )
    figures = outcome.report.figures
    names = {"ratio": "channels", "macs_ratio": "macs", "params_ratio": "parameters", "bytes_ratio": "weight_bytes"}
    name = names[target]
    # The 4 channels of the output are frozen: they count among the channels, but not for the ratio.
    before = figures[f"{name}_before"] - (4 if target == "ratio" else 0)
    removed = (figures[f"{name}_before"] - figures[f"{name}_after"]) / before
    assert 0.4 - 1 / 32 < removed < 0.4 + 1 / 16


def test_without_calibration_data_it_is_refused_before_anything_runs(run_verified: RunVerified) -> None:
    pass_ = PrunePass(PruneConfig(ranking="sensitivity"))
    assert pass_.requirements == {Requirement.CALIBRATION}
    with pytest.raises(PreconditionError, match="calibration data"):
        run_verified(pass_, chain(8, 4))
