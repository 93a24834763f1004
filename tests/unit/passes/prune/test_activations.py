"""Statistics of channels over calibration data, and the criteria that look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import helper

from onnxprune.contracts import Batch, CanonicalModel, ModelState, PassContext, PassOutcome
from onnxprune.errors import BadDataError, PreconditionError
from onnxprune.passes.harness import run_pass
from onnxprune.passes.prune import PruneConfig, PrunePass
from onnxprune.passes.prune.activations import ActivationStatistics, collect_activations
from onnxprune.passes.prune.analysis import ChannelClasses, analyze_channels
from onnxprune.passes.prune.channel_slices import ChannelSlices
from onnxprune.passes.prune.criteria import CRITERIA
from onnxprune.passes.prune.scoring import Scorer
from onnxprune.runtime.sessions import OrtRunner, ort_runner_from_model
from tests.builders import canonical, proto_of

RunVerified = Callable[..., PassOutcome]


class Samples:
    """Batches of seeded images (N,3,4,4)."""

    content_hash = "seeded"

    def __init__(self, batches: Sequence[int] = (2, 3), *, value: float | None = None) -> None:
        self._batches = batches
        self._value = value
        self.num_samples = sum(batches)

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng(0)
        for size in self._batches:
            images = rng.standard_normal((size, 3, 4, 4)).astype(np.float32)
            yield {"x": images if self._value is None else np.full_like(images, self._value)}


def weight(*shape: int, seed: int = 0) -> npt.NDArray[Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def conv(data: str, filters: str, out: str, **attributes: Any) -> Any:
    return helper.make_node("Conv", [data, filters], [out], name=out, **attributes)


def two_layers(*, dtype: type = np.float32) -> CanonicalModel:
    nodes = [conv("x", "w0", "h"), helper.make_node("Relu", ["h"], ["r"], name="relu"), conv("r", "w1", "y")]
    weights = {"w0": weight(6, 3, 1, 1).astype(dtype), "w1": weight(2, 6, 1, 1, seed=1).astype(dtype)}
    if dtype is np.float16:
        nodes = [
            helper.make_node("Cast", ["x"], ["x16"], name="in", to=10),
            conv("x16", "w0", "h"),
            helper.make_node("Relu", ["h"], ["r"], name="relu"),
            conv("r", "w1", "y16"),
            helper.make_node("Cast", ["y16"], ["y"], name="out", to=1),
        ]
    return canonical(proto_of(nodes, inputs={"x": ["N", 3, 4, 4]}, outputs={"y": None}, weights=weights))


def flattened() -> CanonicalModel:
    """Behind the Flatten each channel has 16 columns of the Gemm."""
    nodes = [
        conv("x", "w0", "h"),
        helper.make_node("Flatten", ["h"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w1"], ["y"], name="gemm", transB=1),
    ]
    weights = {"w0": weight(6, 3, 1, 1), "w1": weight(2, 96, seed=1)}
    return canonical(proto_of(nodes, inputs={"x": ["N", 3, 4, 4]}, outputs={"y": None}, weights=weights))


def tensor_values(model: CanonicalModel, name: str, samples: Samples) -> npt.NDArray[np.float64]:
    """All samples of one tensor, straight from ONNX Runtime."""
    runner = ort_runner_from_model(model, extra_outputs=[name])
    return np.concatenate([runner.run(batch)[name] for batch in samples]).astype(np.float64)


def analyzed(model: CanonicalModel, samples: Samples) -> tuple[ChannelClasses, ActivationStatistics]:
    classes = analyze_channels(model)
    return classes, collect_activations(model, classes, samples)


def slices_of(classes: ChannelClasses, statistics: ActivationStatistics) -> ChannelSlices:
    """What a criterion sees of the only group that may be pruned."""
    scorer = Scorer(criterion=CRITERIA["wanda"], rng=np.random.default_rng(0), activations=statistics)
    (group,) = [group for group in classes.groups if group.frozen_reason is None]
    return scorer.slices(classes, group, np.ones(classes.num_classes, dtype=np.bool_))


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float16, 1e-3)])
def test_means_over_batches_of_unequal_size_are_those_of_all_samples(dtype: type, tolerance: float) -> None:
    model, samples = two_layers(dtype=dtype), Samples([2, 3])
    (seen,) = slices_of(*analyzed(model, samples)).activations
    values = tensor_values(model, "r", samples)
    # Sums in single precision; in half precision the values themselves are rounded, in another order of fusions.
    np.testing.assert_allclose(seen.mean_abs, np.abs(values).mean(axis=(0, 2, 3)), rtol=tolerance)
    np.testing.assert_allclose(seen.rms, np.sqrt(np.square(values).mean(axis=(0, 2, 3))), rtol=tolerance)


def test_statistics_are_taken_where_channels_are_summed_over_and_not_where_they_are_made() -> None:
    (seen,) = slices_of(*analyzed(two_layers(), Samples())).activations
    assert (seen.tensor, seen.node, seen.has_weight) == ("r", "y", True)


def test_behind_a_flatten_every_column_has_its_own_statistics() -> None:
    model, samples = flattened(), Samples()
    slices = slices_of(*analyzed(model, samples))
    (reader,) = [place for place in slices.places if place.role == "input"]
    values = tensor_values(model, "f", samples)
    assert reader.input_rms is not None
    expected = np.sqrt(np.square(values).mean(axis=0)).reshape(6, 16)
    np.testing.assert_allclose(reader.input_rms, expected, rtol=1e-5)  # single precision


def grouped(*, is_output: bool) -> CanonicalModel:
    """8 channels into 4 groups; where the grouped convolution gives the output, its filters stay."""
    nodes = [conv("x", "w0", "h"), conv("h", "w1", "y" if is_output else "g", group=4)]
    weights = {"w0": weight(8, 3, 1, 1), "w1": weight(4, 2, 1, 1, seed=1)}
    if not is_output:
        nodes.append(conv("g", "w2", "y"))
        weights["w2"] = weight(2, 4, 1, 1, seed=2)
    return canonical(proto_of(nodes, inputs={"x": ["N", 3, 4, 4]}, outputs={"y": None}, weights=weights))


@pytest.mark.parametrize(
    ("is_output", "channels_of"),
    [(True, [[0, 2, 4, 6], [1, 3, 5, 7]]), (False, [[0, 1], [2, 3], [4, 5], [6, 7]])],
    ids=["the same position of every group", "whole groups"],
)
def test_a_grouped_convolution_weighs_with_the_mean_of_the_channels_that_go_together(
    is_output: bool, channels_of: list[list[int]]
) -> None:
    model, samples = grouped(is_output=is_output), Samples()
    slices = slices_of(*analyzed(model, samples))
    (reader,) = [place for place in slices.places if place.weight == "w1"]
    mean_squares = np.square(tensor_values(model, "h", samples)).mean(axis=(0, 2, 3))
    assert reader.input_rms is not None
    expected = np.sqrt(mean_squares[np.array(channels_of)].mean(axis=1))
    np.testing.assert_allclose(reader.input_rms[:, 0], expected, rtol=1e-5)  # single precision


def test_what_the_runtime_hands_out_does_not_grow_with_images_or_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def spy(*arguments: Any, **settings: Any) -> OrtRunner:
        runner = ort_runner_from_model(*arguments, **settings)
        run = runner.run

        def spied(feeds: Batch) -> dict[str, npt.NDArray[Any]]:
            outputs = run(feeds)
            sizes.append(sum(array.size for name, array in outputs.items() if name != "y"))
            return outputs

        monkeypatch.setattr(runner, "run", spied)
        return runner

    monkeypatch.setattr("onnxprune.passes.prune.activations.ort_runner_from_model", spy)
    analyzed(two_layers(), Samples([1, 8]))
    # Two sums of 6 channels and one count.
    assert sizes == [13, 13]


@pytest.mark.parametrize("criterion", ["activation", "wanda"])
def test_channels_that_carry_nothing_go_first(criterion: str, run_verified: RunVerified) -> None:
    model = two_layers()
    filters = np.array(model.graph.initializers["w0"].const_value.numpy())  # type: ignore[union-attr]
    # On images of 1 these filters give less than 0, and the Relu nothing; their weights are the largest.
    filters[[1, 4]] = -50.0
    filters[[0, 2, 3, 5]] = np.abs(filters[[0, 2, 3, 5]])
    nodes = [conv("x", "w0", "h"), helper.make_node("Relu", ["h"], ["r"], name="relu"), conv("r", "w1", "y")]
    weights = {"w0": filters, "w1": weight(2, 6, 1, 1, seed=1)}
    model = canonical(proto_of(nodes, inputs={"x": ["N", 3, 4, 4]}, outputs={"y": None}, weights=weights))
    pass_ = PrunePass(PruneConfig(criterion=criterion, ratio=0.34, min_channels=1, channel_multiple=1))
    context = PassContext(calibration=Samples(value=1.0))
    assert run_verified(pass_, model, context=context).plan.groups[0].removed == (1, 4)


# --- what is refused, and what is said ------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["activation", "wanda"])
def test_without_calibration_data_such_a_criterion_is_refused_before_anything_runs(criterion: str) -> None:
    with pytest.raises(PreconditionError, match="Pass 'prune' needs calibration data"):
        run_pass(PrunePass(PruneConfig(criterion=criterion)), ModelState(model=two_layers()), PassContext())


def test_a_criterion_of_weights_alone_does_not_depend_on_calibration_data() -> None:
    assert not PrunePass(PruneConfig(criterion="l1")).uses_calibration
    assert PrunePass(PruneConfig(criterion="wanda")).uses_calibration


def test_a_sample_that_makes_a_tensor_nan_is_named() -> None:
    with pytest.raises(BadDataError, match="samples 0 to 1 make tensor 'r' not finite"):
        analyzed(two_layers(), Samples(value=np.nan))


def test_data_without_a_sample_are_refused() -> None:
    with pytest.raises(BadDataError, match="no sample"):
        analyzed(two_layers(), Samples([]))


def test_groups_without_a_normalization_are_ranked_by_l2_and_the_report_says_so(run_verified: RunVerified) -> None:
    settings = {"ratio": 0.5, "min_channels": 1, "channel_multiple": 1}
    by_scale = run_verified(PrunePass(PruneConfig(criterion="bn-scale", **settings)), two_layers())
    by_l2 = run_verified(PrunePass(PruneConfig(criterion="l2", **settings)), two_layers())
    assert by_scale.plan.groups == by_l2.plan.groups
    assert (
        "Criterion 'bn-scale' can't score 1 of 1 groups of channels, 'w0[0]': no normalization scales it. They are "
        in (by_scale.report.notes[0])
    )
