"""Where decoding begins: found without a name, with the ranges that meet there, and only there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, helper

from onnxprune.contracts import Batch, CanonicalModel, QuantizationPlan
from onnxprune.passes.quant import tail_ranges
from onnxprune.passes.quant.candidates import find_candidates
from onnxprune.runtime.sessions import OrtRunner, ort_runner_from_model
from onnxprune.targets.qdq import place, spell
from tests import detectors
from tests.builders import canonical, conv_net, proto_of
from tests.quantization import ArraySource, normal_batches, plan_for, run, signal_to_noise_db

HEADS = [
    detectors.yolox,
    detectors.yolov8,
    detectors.ssd,
    detectors.two_stage,
    detectors.refined,
]
SOURCE = normal_batches(detectors.SHAPE)


def decoding(model: CanonicalModel) -> set[str]:
    """The nodes of a head that decode: named so, or the ones that give the outputs and are no layers."""
    names = {node.name or "" for node in model.graph if (node.name or "").startswith("decode")}
    last = {value.producer() for value in model.graph.outputs}
    return names | {node.name or "" for node in last if node is not None and node.op_type in ("Concat", "Sigmoid")}


@pytest.mark.parametrize("build", HEADS, ids=lambda build: build.__name__)
def test_exactly_the_nodes_that_decode_stay_float(build: Callable[[], CanonicalModel]) -> None:
    model = build()

    excluded = find_candidates(model).excluded_nodes

    # Exp, NonMaxSuppression and the like are float anyway, and indices are no floats.
    anyway = {name for name, reason in excluded.items() if "has no row" in reason or "not float" in reason}
    assert set(excluded) - anyway == decoding(model) - anyway
    assert all("decode arithmetic" in reason for name, reason in excluded.items() if name not in anyway)


def test_arithmetic_before_layers_is_no_tail_although_another_path_reaches_an_output() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("Add", ["x", "a"], ["r"], name="residual"),
        helper.make_node("Conv", ["r", "w"], ["b"], name="conv2"),
        helper.make_node("Add", ["r", "b"], ["y"], name="residual2"),
    ]
    weights = {"w": np.ones((8, 8, 1, 1), np.float32)}
    model = canonical(proto_of(nodes, inputs={"x": (1, 8, 8, 8)}, outputs={"y": (1, 8, 8, 8)}, weights=weights))

    assert set(find_candidates(model).excluded_nodes) == {"residual2"}


def test_layer_inside_a_body_counts_for_what_comes_before_it() -> None:
    branches = {}
    for name in ("then_branch", "else_branch"):
        body = [helper.make_node("Conv", ["a", "w"], [f"{name}.y"], name=name)]
        output = helper.make_tensor_value_info(f"{name}.y", 1, (1, 8, 8, 8))
        branches[name] = helper.make_graph(body, name, [], [output])
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Mul", ["c", "x"], ["a"], name="product"),
        helper.make_node("ReduceMax", ["c"], ["m"], name="most", keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["p"], name="positive"),
        helper.make_node("If", ["p"], ["y"], name="if", **branches),
    ]
    weights = {"w": np.ones((8, 8, 1, 1), np.float32), "zero": np.zeros((), np.float32)}
    model = canonical(proto_of(nodes, inputs={"x": (1, 8, 8, 8)}, outputs={"y": (1, 8, 8, 8)}, weights=weights))

    assert "product" not in find_candidates(model).excluded_nodes


def tied_language_model(*turn: NodeProto) -> CanonicalModel:
    """The table of the first layer, as `turn` makes it `t`, is the weight of the last one."""
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["e"], name="embed"),
        helper.make_node("MatMul", ["e", "w"], ["h"], name="down"),
        helper.make_node("Add", ["e", "h"], ["r"], name="residual"),
        helper.make_node("Mul", ["r", "gain"], ["n"], name="norm"),
        *turn,
        helper.make_node("MatMul", ["n", "t"], ["y"], name="head"),
    ]
    rng = np.random.default_rng(3)
    constants = {
        # More than folding may add to a model.
        "table": rng.standard_normal((5000, 64)).astype(np.float32),
        "w": (rng.standard_normal((64, 64)) * np.geomspace(0.001, 1, 64)).astype(np.float32),
        "gain": np.ones(64, np.float32),
    }
    return canonical(
        proto_of(nodes, inputs={"tokens": (1, 32)}, outputs={"y": (1, 32, 5000)}, weights=constants, input_type=7)
    )


def test_layer_whose_weight_is_a_turned_table_is_the_last_one_and_says_why_it_is_float() -> None:
    model = tied_language_model(helper.make_node("Transpose", ["table"], ["t"], name="turn", perm=[1, 0]))

    candidates = find_candidates(model)

    reasons = candidates.excluded_nodes
    assert "computed at run time, by Transpose from the constant 'table" in reasons["head"]
    assert "a copy of 'table', which other nodes read as well" in reasons["head"]
    # What comes before it is no decode arithmetic, and no last layer.
    assert not {"norm", "residual", "down"} & set(reasons)
    assert "turns or reshapes a constant" in reasons["turn"]
    assert not candidates.last_layers


def test_product_of_two_activations_is_no_layer_although_one_of_them_was_turned() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["q"], name="conv"),
        helper.make_node("Transpose", ["q"], ["k"], name="turn", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "k"], ["y"], name="scores"),
    ]
    weights = {"w": np.ones((8, 8, 1, 1), np.float32)}
    model = canonical(proto_of(nodes, inputs={"x": (1, 8, 8, 8)}, outputs={"y": (1, 8, 8, 8)}, weights=weights))

    candidates = find_candidates(model)

    assert "it multiplies two activations" in candidates.excluded_nodes["scores"]
    assert [item.name for item in candidates.last_layers] == ["conv"]


def test_reason_names_the_ranges_that_meet_and_is_the_same_for_nodes_that_hang_together() -> None:
    plan = plan_for(detectors.ssd(), SOURCE)

    boxes = [plan.excluded_nodes[name] for name in ("decode.mul", "decode.centres", "decode.half", "decode.boxes")]
    assert len(set(boxes)) == 1
    assert "meets" in boxes[0]
    assert "of 255 steps" in boxes[0]
    assert "operator Exp has no row" in plan.excluded_nodes["decode.exp"]
    assert "meets" in plan.excluded_nodes["decode.exp"]
    assert plan.excluded_nodes["decode.softmax"] != boxes[0]


def test_the_tail_is_run_with_the_libraries_of_custom_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def with_libraries(model: CanonicalModel, *, custom_op_libraries: Sequence[Path] = (), **options: Any) -> OrtRunner:
        asked.extend(custom_op_libraries)
        return ort_runner_from_model(model, **options)

    monkeypatch.setattr(tail_ranges, "ort_runner_from_model", with_libraries)
    model = detectors.ssd()
    reasons = tail_ranges.reasons_with_ranges(
        model, find_candidates(model), SOURCE, num_bits=8, custom_op_libraries=[Path("operators.so")]
    )
    assert reasons
    assert asked == [Path("operators.so")]


def test_without_a_tail_no_sample_is_read() -> None:
    model = conv_net(batch=1)

    class Unread(ArraySource):
        def __iter__(self) -> Iterator[Batch]:
            raise AssertionError("a sample was read")

    assert tail_ranges.reasons_with_ranges(model, find_candidates(model), Unread(()), num_bits=8) == {}


def test_masked_scores_in_the_tail_are_no_fault_of_the_data() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("Add", ["a", "mask"], ["m"], name="masked"),
        helper.make_node("Softmax", ["m"], ["y"], name="scores", axis=1),
    ]
    mask = np.zeros((1, 8, 1, 1), np.float32)
    mask[0, 3] = -np.inf
    weights = {"w": np.ones((8, 8, 1, 1), np.float32), "mask": mask}
    model = canonical(proto_of(nodes, inputs={"x": (1, 8, 8, 8)}, outputs={"y": (1, 8, 8, 8)}, weights=weights))

    plan = plan_for(model, normal_batches((1, 8, 8, 8)))

    assert set(plan.excluded_nodes) == {"masked", "scores"}


def spelled_output(model: CanonicalModel, plan: QuantizationPlan, source: ArraySource) -> list[np.ndarray]:
    # The 7-bit weights of "x86" are exact on every processor that tests run on.
    runner = ort_runner_from_model(spell(model, plan, place(model, plan, "x86"), "x86"))
    return [next(iter(runner.run(batch).values())) for batch in source]


@pytest.mark.parametrize("build", [detectors.yolox, detectors.yolov8], ids=lambda build: build.__name__)
def test_scores_beside_boxes_keep_their_digits_where_everything_integer_loses_them(
    build: Callable[[], CanonicalModel],
) -> None:
    model = build()
    scores = slice(-detectors.CLASSES, None)
    axis = 2 if build is detectors.yolox else 1
    plan = plan_for(model, SOURCE)

    expected = [run(model, batch)[0] for batch in SOURCE]
    actual = spelled_output(model, plan, SOURCE)

    def noise_db(results: list[np.ndarray]) -> float:
        pairs = [
            np.take(np.stack(arrays), range(*scores.indices(arrays[0].shape[axis])), axis + 1)
            for arrays in (expected, results)
        ]
        return signal_to_noise_db(*pairs)

    # One scale for the whole output, as naive quantization has it, leaves scores a few steps.
    step = max(float(array.max()) for array in expected) / 255
    naive = [np.rint(array / step) * step for array in actual]
    assert noise_db(actual) > 25
    assert noise_db(naive) < noise_db(actual) - 10


def test_last_convolution_with_channels_of_very_different_ranges_stays_float_and_says_which(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = detectors.one_convolution(box_gain=200.0)

    plan = plan_for(model, SOURCE)

    assert set(plan.excluded_nodes) == {"y"}
    assert "its channels are read one by one and can't share a scale: channel" in plan.excluded_nodes["y"]
    assert "y.weight" not in plan.weights
    expected = np.concatenate([run(model, batch)[0] for batch in SOURCE])
    actual = np.concatenate(spelled_output(model, plan, SOURCE))
    naive = np.concatenate(spelled_output(model, with_common_scale(model, monkeypatch), SOURCE))
    assert signal_to_noise_db(expected[:, 4:], actual[:, 4:]) > 30
    assert signal_to_noise_db(expected[:, 4:], naive[:, 4:]) < 15


def test_sixteen_bits_have_steps_enough_for_channels_that_eight_have_not() -> None:
    assert not plan_for(detectors.one_convolution(box_gain=200.0), SOURCE, activation_bits=16).excluded_nodes


def with_common_scale(model: CanonicalModel, monkeypatch: pytest.MonkeyPatch) -> QuantizationPlan:
    """A plan that doesn't look at channels."""
    monkeypatch.setattr(tail_ranges, "MIN_STEPS_OF_CHANNEL", 0)
    return plan_for(model, SOURCE)


def test_last_convolution_with_like_channels_is_integer() -> None:
    assert not plan_for(detectors.one_convolution(box_gain=2.0), SOURCE).excluded_nodes


def pooled(head: detectors.Head, scores: str) -> None:
    head.node("GlobalAveragePool", [scores], "y")


def silu_pooled(head: detectors.Head, scores: str) -> None:
    gate = head.node("Sigmoid", [scores], "gate")
    head.node("GlobalAveragePool", [head.node("Mul", [scores, gate], "silu")], "y")


def biased_and_most(head: detectors.Head, scores: str) -> None:
    rows = head.node("Transpose", [scores], "rows", perm=[0, 2, 3, 1])
    biased = head.node("Add", [rows, head.constant("shift", np.ones(10))], "biased")
    head.node("ReduceMax", [biased, head.constant("axes", [1, 2], np.int64)], "y")


def windows(head: detectors.Head, scores: str) -> None:
    head.node("AveragePool", [scores], "y", kernel_shape=[detectors.SIDE, detectors.SIDE])


def classes_of_places(head: detectors.Head, scores: str) -> None:
    head.node("Softmax", [head.reshape(scores, "rows", [1, 10, detectors.CELLS])], "y", axis=1)


def enlarged(head: detectors.Head, scores: str) -> None:
    sizes = head.constant("sizes", [1, 1, 2, 2])
    head.node("Resize", [scores, "", sizes], "y", mode="linear")


def added_to_features(head: detectors.Head, scores: str) -> None:
    other = head.node("Concat", ["x", head.constant("zeros", np.zeros((1, 2, 16, 16)))], "other", axis=1)
    other = head.node("MaxPool", [other], "smaller", kernel_shape=[2, 2], strides=[2, 2])
    head.node("Add", [other, scores], "y")


COMPARED = [pooled, silu_pooled, biased_and_most, windows, classes_of_places, enlarged, added_to_features]


def sliced(head: detectors.Head, scores: str) -> None:
    pooled(head, head.slice(head.node("Sigmoid", [scores], "gate"), "first", 0, 4, 1))


def delivered_too(head: detectors.Head, scores: str) -> None:
    head.node("GlobalAveragePool", [scores], "pooled")
    head.node("Tanh", [scores], "y")


def heat_maps(head: detectors.Head, scores: str) -> None:
    head.node("Softmax", [head.reshape(scores, "rows", [1, 10, detectors.CELLS])], "y", axis=2)


def windows_of_a_map(head: detectors.Head, scores: str) -> None:
    head.node("MaxPool", [scores], "y", kernel_shape=[2, 2])


READ_ONE_BY_ONE = [sliced, delivered_too, heat_maps, windows_of_a_map]


def reasons_with(build: Callable[[detectors.Head, str], None]) -> str:
    """Why the layer stays float that has one channel of a hundred times the range, read as `build` says."""
    head = detectors.Head()
    gain = np.array([100.0, *[1.0] * 9])
    build(head, head.conv(head.features, "scores", 10, 32, gain=gain))
    model = head.model({"y": None})
    return plan_for(model, SOURCE).excluded_nodes.get("scores", "")


@pytest.mark.parametrize("build", COMPARED, ids=lambda build: build.__name__)
def test_channels_that_are_compared_or_summed_share_a_scale_whatever_their_ranges(
    build: Callable[[detectors.Head, str], None],
) -> None:
    assert not reasons_with(build)


@pytest.mark.parametrize("build", READ_ONE_BY_ONE, ids=lambda build: build.__name__)
def test_channels_that_something_reads_one_by_one_get_no_common_scale(
    build: Callable[[detectors.Head, str], None],
) -> None:
    assert "its channels are read one by one" in reasons_with(build)
