"""16-bit saturation: what is called safe never saturates in an emulation of VPMADDUBSW; a constructed layer does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.contracts import CanonicalModel, ModelState, Placement, QuantizationPlan
from onnxprune.graph.weights import constant_array
from onnxprune.ops.affine import quantize_array
from onnxprune.targets.qdq import SpellingName, find_spelling, place, spell
from onnxprune.targets.qdq.saturation import (
    LARGEST_SAFE_PAIR,
    LayerSaturation,
    paired_weights,
    saturating_layers,
    saturation_finding,
    saturation_findings,
    unsaturated_scales,
)
from tests.builders import canonical, proto_of
from tests.quantization import normal_batches, plan_for

Integers = npt.NDArray[np.integer]


def vpmaddubsw(activations: Integers, weights: Integers) -> npt.NDArray[np.int16]:
    """Intel's instruction: pairs along the last axis, uint8 times int8, added with saturation to int16."""
    assert activations.dtype == np.uint8
    assert weights.dtype == np.int8
    products = activations.astype(np.int32) * weights.astype(np.int32)
    return np.clip(products[..., 0::2] + products[..., 1::2], -(2**15), 2**15 - 1).astype(np.int16)


def saturates(activations: Integers, weights: Integers) -> bool:
    """True when a pair's exact sum is another one than the instruction's."""
    products = activations.astype(np.int32) * weights.astype(np.int32)
    exact = products[..., 0::2] + products[..., 1::2]
    return bool(np.any(exact != vpmaddubsw(activations, weights)))


def worst_activations(weights: Integers) -> tuple[Integers, Integers]:
    """The activations that drive every pair as high, and as low, as it goes."""
    return np.where(weights > 0, 255, 0).astype(np.uint8), np.where(weights < 0, 255, 0).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """One layer with the weight "w", fed with `shape`."""

    id: str
    node: Callable[[], object]
    weight_shape: tuple[int, ...]
    shape: tuple[int, ...]


CASES = [
    LayerCase(
        id="Conv",
        node=lambda: helper.make_node("Conv", ["x", "w"], ["y"], name="layer"),
        weight_shape=(6, 5, 3, 3),
        shape=(1, 5, 8, 8),
    ),
    LayerCase(
        id="grouped Conv of one axis",
        node=lambda: helper.make_node("Conv", ["x", "w"], ["y"], name="layer", group=2),
        weight_shape=(6, 3, 3),
        shape=(1, 6, 9),
    ),
    LayerCase(
        id="Conv with two filters for each channel",
        node=lambda: helper.make_node("Conv", ["x", "w"], ["y"], name="layer", group=3),
        weight_shape=(6, 1, 3, 3),
        shape=(1, 3, 8, 8),
    ),
    LayerCase(
        id="Gemm",
        node=lambda: helper.make_node("Gemm", ["x", "w"], ["y"], name="layer"),
        weight_shape=(11, 6),
        shape=(3, 11),
    ),
    LayerCase(
        id="Gemm with transposed weight",
        node=lambda: helper.make_node("Gemm", ["x", "w"], ["y"], name="layer", transB=1),
        weight_shape=(6, 11),
        shape=(3, 11),
    ),
    LayerCase(
        id="MatMul with a stack of matrices",
        node=lambda: helper.make_node("MatMul", ["x", "w"], ["y"], name="layer"),
        weight_shape=(2, 8, 6),
        shape=(2, 5, 8),
    ),
]


def layer_of(case: LayerCase, weight: npt.NDArray[np.float32]) -> CanonicalModel:
    proto = proto_of(
        [case.node()],
        inputs={"x": case.shape},
        outputs={"y": [None] * (3 if case.node().op_type == "MatMul" else len(case.shape))},
        weights={"w": weight},
    )
    return canonical(proto)


def outlier_weight(shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    """Heavy tails, so that some channels saturate and others don't."""
    return np.random.default_rng(seed).standard_t(2.5, shape).astype(np.float32)


def planned(model: CanonicalModel, shape: tuple[int, ...], **config: object) -> tuple[QuantizationPlan, Placement]:
    plan = plan_for(model, normal_batches(shape, count=2), **config)
    return plan, place(model, plan, "x86-vnni")


def stored_weight(model: ir.Model) -> Integers:
    array = constant_array(model.graph.initializers["w_quantized"])
    assert array is not None
    return array


def planned_integers(model: ir.Model, plan: QuantizationPlan) -> Integers:
    array = constant_array(model.graph.initializers["w"])
    weight = plan.weights["w"]
    assert array is not None
    return quantize_array(array, weight.scales, axis=weight.axis, smallest=-127, largest=127, dtype=np.int8)


def pairs_of(node: ir.Node, integers: Integers) -> Integers:
    pairs = paired_weights(node, integers)
    assert pairs is not None
    return pairs.reshape(pairs.shape[0], -1).astype(np.int8)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("per_channel", [True, False])
def test_spelling_x86_never_saturates_whatever_the_activations(case: LayerCase, *, per_channel: bool) -> None:
    for seed in range(10):
        model = layer_of(case, outlier_weight(case.weight_shape, seed))
        plan, placement = planned(model, case.shape, per_channel=per_channel)

        spelled = spell(model, plan, placement, "x86")
        # As it is written: a spelling may merge groups or add channels.
        weights = pairs_of(spelled.graph.node("layer"), stored_weight(spelled))

        assert not any(saturates(activations, weights) for activations in worst_activations(weights))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_prediction_names_exactly_the_channels_that_some_activations_saturate(case: LayerCase) -> None:
    found: set[int] = set()
    for seed in range(10):
        model = layer_of(case, outlier_weight(case.weight_shape, seed))
        plan, placement = planned(model, case.shape)
        weights = pairs_of(model.graph.node("layer"), planned_integers(model, plan))

        (layer,) = saturating_layers(model, plan, placement)

        unsafe = sum(any(saturates(given, row) for given in worst_activations(row)) for row in weights)
        assert (layer.unsafe_channels, layer.num_channels) == (unsafe, len(weights))
        products = [given.astype(np.int32) * weights for given in worst_activations(weights)]
        sums = [product[:, 0::2] + product[:, 1::2] for product in products]
        assert (layer.highest_sum, layer.lowest_sum) == (sums[0].max(), sums[1].min())
        found.add(unsafe)
    # The cases are such that both kinds occur.
    assert len(found) > 1


@pytest.mark.parametrize("sign", [1, -1])
def test_channel_with_two_large_neighbours_is_widened_and_the_others_keep_their_integers(sign: int) -> None:
    weight = np.zeros((3, 32, 1, 1), dtype=np.float32)
    weight[0, :4, 0, 0] = np.array([1.0, 1.0, 0.1, 0.1]) * sign  # neighbours in one pair
    weight[1, :4, 0, 0] = np.array([1.0, 0.1, 1.0, 0.1]) * sign  # in two pairs, but 127 + 13 is too much as well
    weight[2, :4, 0, 0] = np.array([1.0, -1.0, 0.001, 1.0]) * sign  # signs that cancel in one pair
    model = layer_of(LayerCase(id="", node=CASES[0].node, weight_shape=weight.shape, shape=(1, 32, 4, 4)), weight)
    plan, placement = planned(model, (1, 32, 4, 4))

    full, widened = (stored_weight(spell(model, plan, placement, name)) for name in ("x86-vnni", "x86"))

    assert full[:, :4, 0, 0].tolist() == [
        [127 * sign, 127 * sign, 13 * sign, 13 * sign],
        [127 * sign, 13 * sign, 127 * sign, 13 * sign],
        [127 * sign, -127 * sign, 0, 127 * sign],
    ]
    assert widened[:, :4, 0, 0].tolist() == [
        [64 * sign, 64 * sign, 6 * sign, 6 * sign],
        [116 * sign, 12 * sign, 116 * sign, 12 * sign],
        [127 * sign, -127 * sign, 0, 127 * sign],
    ]


def test_pairs_stand_in_the_order_of_a_channels_last_unfolded_picture() -> None:
    rng = np.random.default_rng(3)
    weight = rng.integers(-127, 128, (2, 4, 2, 3)).astype(np.int8)
    picture = rng.integers(0, 256, (4, 2, 3))
    model = layer_of(CASES[0], outlier_weight((6, 5, 3, 3), 0))

    pairs = pairs_of(model.graph.node("layer"), weight)

    unfolded = picture.transpose(1, 2, 0).reshape(-1)
    exact = np.einsum("oihw,ihw->o", weight.astype(np.int64), picture)
    assert (pairs.astype(np.int64) @ unfolded).tolist() == exact.tolist()
    assert pairs[0, :4].tolist() == [weight[0, 0, 0, 0], weight[0, 1, 0, 0], weight[0, 2, 0, 0], weight[0, 3, 0, 0]]


def test_depthwise_convolution_is_exact_and_keeps_its_range() -> None:
    case = LayerCase(
        id="",
        node=lambda: helper.make_node("Conv", ["x", "w"], ["y"], name="layer", group=4),
        weight_shape=(4, 1, 3, 3),
        shape=(1, 4, 8, 8),
    )
    model = layer_of(case, np.ones((4, 1, 3, 3), dtype=np.float32))
    plan, placement = planned(model, case.shape)

    stored = stored_weight(spell(model, plan, placement, "x86"))

    assert saturating_layers(model, plan, placement) == ()
    assert saturation_finding(model, plan, placement, widens_scales=True) is None
    assert np.unique(stored).tolist() == [127]


def test_scale_that_saturates_weights_itself_is_widened_until_their_pairs_fit() -> None:
    model = layer_of(CASES[3], np.full((11, 6), 3.0, dtype=np.float32))
    weight = model.graph.node("layer").inputs[1]
    assert weight is not None

    # 3.0 / 0.01 is far above 127: as an MSE-optimal scale does with outliers, only more so.
    scales = unsaturated_scales(
        weight, np.full((11, 6), 3.0, dtype=np.float32), np.full(6, 0.01, dtype=np.float32), axis=1, num_bits=8
    )

    assert np.all(np.rint(3.0 / scales) * 2 <= LARGEST_SAFE_PAIR)
    assert np.all(np.rint(3.0 / scales) >= 60)


def test_weight_that_two_layers_read_differently_is_safe_in_both() -> None:
    weight = np.full((12, 12), 0.001, dtype=np.float32)
    # Neighbours in a column only: the reader without transB pairs them, the other one does not.
    weight[:2, 0] = 1.0
    proto = proto_of(
        [
            helper.make_node("Gemm", ["x", "w"], ["a"], name="layer", transB=1),
            helper.make_node("Relu", ["a"], ["b"], name="relu"),
            helper.make_node("Gemm", ["b", "v"], ["y"], name="other"),
        ],
        inputs={"x": (2, 12)},
        outputs={"y": [None, None]},
        weights={"w": weight, "v": weight},
    )
    model = canonical(proto)
    model.graph.node("other").replace_input_with(1, model.graph.node("layer").inputs[1])
    plan, placement = planned(model, (2, 12))

    stored = stored_weight(spell(model, plan, placement, "x86"))

    for name in ("layer", "other"):
        weights = pairs_of(model.graph.node(name), stored)
        assert not any(saturates(activations, weights) for activations in worst_activations(weights))


def test_plan_with_seven_bits_is_spelled_as_it_is() -> None:
    model = layer_of(CASES[0], np.ones((6, 5, 3, 3), dtype=np.float32))
    plan, placement = planned(model, CASES[0].shape, weight_bits=7)

    assert np.unique(stored_weight(spell(model, plan, placement, "x86"))).tolist() == [63]
    assert [layer.can_saturate for layer in saturating_layers(model, plan, placement)] == [False]


def test_calibrated_range_tells_what_inputs_like_the_seen_ones_do() -> None:
    model = layer_of(CASES[0], np.ones((6, 5, 3, 3), dtype=np.float32))
    plan, placement = planned(model, CASES[0].shape)
    seen = plan.activations["x"]
    # A scale that leaves room for more than was seen, as a shared one may: 128 and 129 are all that occurs.
    wide = dataclasses.replace(seen, scale=1.0, zero_point=0, range_min=0.0, range_max=1.0)
    plan = dataclasses.replace(plan, activations={**plan.activations, "x": wide})

    (layer,) = saturating_layers(model, plan, placement)

    assert (layer.calibrated_lowest_sum, layer.calibrated_highest_sum) == (128 * 127, 129 * 127 * 2)
    assert layer.can_saturate
    assert not layer.can_saturate_as_calibrated
    assert layer.overshoot == pytest.approx(255 * 254 / 32767)


def test_finding_names_the_layers_and_what_each_spelling_does_about_it() -> None:
    model = layer_of(CASES[0], np.ones((6, 5, 3, 3), dtype=np.float32))
    plan, placement = planned(model, CASES[0].shape)

    widened = saturation_finding(model, plan, placement, widens_scales=True)
    full = saturation_finding(model, plan, placement, widens_scales=False)

    assert widened is not None
    assert full is not None
    assert widened.text.startswith("6 of 6 output channels, in 1 of 1 layers, have wider weight scales than the plan")
    assert "1 of 1 layers of this artifact can saturate at 16 bits (1 within the calibrated ranges)" in full.text
    assert "'layer' (1.98x)" in full.text


def test_finding_says_so_where_nothing_can_saturate() -> None:
    weight = np.zeros((6, 5, 3, 3), dtype=np.float32)
    weight[:, 0, 0, 0] = 1.0
    model = layer_of(CASES[0], weight)
    plan, placement = planned(model, CASES[0].shape)

    finding = saturation_finding(model, plan, placement, widens_scales=True)

    assert finding is not None
    assert finding.text.startswith("None of the 1 layers with 8-bit weights can saturate")


def test_layer_that_stays_float_is_not_predicted() -> None:
    model = layer_of(CASES[0], np.ones((6, 5, 3, 3), dtype=np.float32))
    plan, placement = planned(model, CASES[0].shape)

    found: tuple[LayerSaturation, ...] = saturating_layers(
        model, plan, dataclasses.replace(placement, integer_nodes=())
    )

    assert found == ()


def test_widened_weights_are_nearer_to_the_plans_than_seven_bits_for_all() -> None:
    shape = (64, 32, 3, 3)
    case = LayerCase(id="", node=CASES[0].node, weight_shape=shape, shape=(1, 32, 8, 8))
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    model = layer_of(case, weight)
    plan, placement = planned(model, case.shape)

    def error(bits: int, spelling: SpellingName) -> float:
        other = planned(model, case.shape, weight_bits=bits)[0] if bits != 8 else plan
        spelled = spell(model, other, placement, spelling)
        scales = constant_array(spelled.graph.initializers["w_quantized_scale"])
        assert scales is not None
        real = stored_weight(spelled).astype(np.float32) * scales.reshape(-1, 1, 1, 1)
        return float(np.square(real - weight).mean())

    full, widened, seven = error(8, "x86-vnni"), error(8, "x86"), error(7, "x86")

    # Noise grows with the square of the step: 4 times for one bit less. Normal weights are widened by 1.4 on average.
    assert full < widened < 2.3 * full
    assert seven > 3.9 * full


@pytest.mark.parametrize(("group", "inputs", "outputs"), [(1, 3, 8), (4, 3, 8), (4, 5, 4), (6, 1, 12)])
def test_odd_channels_are_safe_as_they_are_and_with_zero_channels_and_with_merged_groups(
    group: int, inputs: int, outputs: int
) -> None:
    case = LayerCase(
        id="",
        node=lambda: helper.make_node("Conv", ["x", "w"], ["y"], name="layer", group=group),
        weight_shape=(outputs, inputs, 3, 3),
        shape=(1, group * inputs, 8, 8),
    )
    for seed in range(5):
        model = layer_of(case, outlier_weight(case.weight_shape, seed))
        plan, _ = planned(model, case.shape)

        weight = model.graph.node("layer").inputs[1]
        assert weight is not None
        scales, _ = find_spelling("x86").weight_form(plan.weights["w"], weight, constant_array(weight))
        form = dataclasses.replace(plan.weights["w"], scales=tuple(scales.tolist()))
        stored = planned_integers(model, dataclasses.replace(plan, weights={"w": form}))

        for zeros_before, zeros_behind in ((0, 0), (0, 1), (0, 13), (inputs, 0), (inputs, inputs), (inputs, 1)):
            wider = np.pad(stored, ((0, 0), (zeros_before, zeros_behind), (0, 0), (0, 0)))
            rows = np.moveaxis(wider, 1, -1).reshape(outputs, -1)
            rows = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
            if group == 1 and zeros_before:
                continue  # a group alone has no neighbour before it
            assert not any(saturates(activations, rows) for activations in worst_activations(rows))


@pytest.mark.parametrize("inputs", [4, 5])
def test_pairs_of_a_transposed_convolution_run_along_its_input_channels(inputs: int) -> None:
    node = ir.node("ConvTranspose", [ir.Value(name="x"), ir.Value(name="w")])
    weight = np.random.default_rng(0).integers(-127, 128, (inputs, 3, 2, 2)).astype(np.int8)

    pairs = paired_weights(node, weight)

    assert pairs is not None
    for channel in range(3):
        for row, column in np.ndindex(2, 2):
            for first in range(0, inputs - 1, 2):
                met = weight[first : first + 2, channel, row, column].astype(np.int32)
                # With an odd number of channels each weight counts twice, which is at least as careful.
                wanted = np.maximum(met, 0).sum() if inputs == 4 else 2 * np.maximum(met, 0).max()
                assert np.maximum(pairs[channel], 0).sum(axis=1).max() >= wanted


def test_findings_are_for_artifacts_with_integers_on_x86_only() -> None:
    model = layer_of(CASES[0], np.ones((6, 5, 3, 3), dtype=np.float32))
    plan, placement = planned(model, CASES[0].shape)
    state = ModelState(model=model, quantization=plan)

    found = {
        name: [finding.topic for finding in saturation_findings(state, placement, name)]
        for name in ("x86", "x86-vnni", "arm64", None)
    }

    assert found == {"x86": ["16-bit saturation"], "x86-vnni": ["16-bit saturation"], "arm64": [], None: []}
    assert saturation_findings(state, None, "x86") == ()
    assert saturation_findings(ModelState(model=model), placement, "x86") == ()


def test_only_channels_that_are_still_unsafe_are_quantized_again(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.full((11, 6), 0.1, dtype=np.float32)
    numbers[:2, 4] = 1.0
    weight = layer_of(CASES[3], numbers).graph.node("layer").inputs[1]
    assert weight is not None
    sizes: list[int] = []

    def counted(array: npt.NDArray[np.floating], *given: object, **options: object) -> Integers:
        sizes.append(array.shape[1])
        return quantize_array(array, *given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("onnxprune.targets.qdq.saturation.quantize_array", counted)

    scales = unsaturated_scales(weight, numbers, np.full(6, 1 / 127, dtype=np.float32), axis=1, num_bits=8)

    assert np.flatnonzero(scales > np.float32(1 / 127)).tolist() == [4]
    assert sizes[0] == 6
    assert len(sizes) > 1
    assert set(sizes[1:]) == {1}


def test_weight_with_scales_along_the_summed_axis_is_widened_as_a_whole() -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"], name="layer")
    weight = np.full((6, 6), 0.1, dtype=np.float32)
    weight[:2, 5] = 1.0
    proto = proto_of([node], inputs={"x": (2, 6)}, outputs={"y": [None, None]}, weights={"w": weight})
    value = canonical(proto).graph.node("layer").inputs[1]
    assert value is not None

    # Scale 5 is not that of the column with the large pair: widening it alone would never end.
    scales = unsaturated_scales(value, weight, np.full(6, 1 / 127, dtype=np.float32), axis=0, num_bits=8)

    integers = quantize_array(weight, scales.tolist(), axis=0, smallest=-127, largest=127, dtype=np.int8)
    assert int(integers[:2, 5].sum()) <= LARGEST_SAFE_PAIR
