"""Layout assignment on graphs made by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from onnxprune.targets.tflite.build import Builder
from onnxprune.targets.tflite.graph import Graph, Operator, Quantization, Tensor
from onnxprune.targets.tflite.interface import with_channels_last
from onnxprune.targets.tflite.layout import assign_layouts, moved_cost
from onnxprune.targets.tflite.layout.axes import AxisMap, Port, factor_reshape, spread
from tests.tflite_graphs import fed, feeds_for, finished, run_graph

RNG = np.random.default_rng(0)
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)

# Sums of a few dozen float32 numbers around 1, in another order.
TOLERANCE = 1e-4


def numbers(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def convolved(build: Builder, x: Tensor, outputs: int, name: str = "") -> Tensor:
    """A 1x1 convolution as lowering leaves it: transpositions on either side."""
    last = build.transposed(x, TO_LAST)
    filters, bias = build.constant(numbers(outputs, 1, 1, x.shape[1])), build.constant(numbers(outputs))
    y = build.op("CONV_2D", [last, filters, bias], shape=(*last.shape[:3], outputs), padding="VALID", strideH=1,
                 strideW=1, dilationHFactor=1, dilationWFactor=1)  # fmt: skip
    first = build.transposed(y, TO_FIRST)
    return build.renamed(first, name) if name else first


def kinds(graph: Graph) -> Counter[str]:
    return Counter(operator.kind for operator in graph.operators)


def assigned(graph: Graph) -> Graph:
    """The graph after the stage; it computes the same."""
    after = assign_layouts(graph)
    feeds = feeds_for(graph, np.random.default_rng(1))
    expected, actual = run_graph(graph, feeds), run_graph(after, feeds)
    for name in graph.outputs:
        np.testing.assert_allclose(actual[name], expected[name], rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)
    return after


# --- reshapes as runs of axes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "runs"),
    [
        ((2, 6, 5, 5), (2, 2, 3, 5, 5), (((0,), (1,), (2,), (3,)), ((0,), (1, 2), (3,), (4,)))),
        ((2, 3, 4), (6, 4), (((0, 1), (2,)), ((0,), (1,)))),
        ((4, 4), (2, 2, 4), (((0,), (1,)), ((0, 1), (2,)))),
        ((2, 3), (3, 2), (((0, 1),), ((0, 1),))),
        ((1, 3, 4), (1, 12), (((0,), (1, 2)), ((0,), (1,)))),
        ((3, 1, 1), (3,), (((0,), (1,), (2,)), ((0,), (), ()))),
        ((3, 4), (3, 1, 4), (((0,), (), (1,)), ((0,), (1,), (2,)))),
        ((2, 1, 3), (6,), (((0, 1, 2),), ((0,),))),
        ((-1, 4, 6), (-1, 24), (((0,), (1, 2)), ((0,), (1,)))),
        ((-1, 4, 6), (-1, 6), (((0, 1), (2,)), ((0,), (1,)))),
        ((-1, 8), (-1, 2, 2, 8), (((0,), (1,)), ((0, 1, 2), (3,)))),
        ((-1, 6), (2, 3, 6), (((0,), (1,)), ((0, 1), (2,)))),
    ],
)  # fmt: skip
def test_reshape_is_cut_into_the_shortest_runs_of_axes(before, after, runs) -> None:  # type: ignore[no-untyped-def]
    assert factor_reshape(before, after) == runs


@pytest.mark.parametrize(("before", "after"), [((0, 3), (3, 0)), ((-1, -1, 3), (-1, 3)), ((4,), (3,))])
def test_reshape_that_can_not_be_told_has_no_runs(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    assert factor_reshape(before, after) is None


def test_permutation_that_tears_a_run_apart_is_no_form() -> None:
    before, after = Port(is_output=False, position=0), Port(is_output=True, position=0)
    axes = AxisMap(runs={before: ((0, 1), (2,)), after: ((0,), (1,))})
    assert spread(axes, before, (0, 2, 1)) is None
    form = spread(axes, before, (2, 0, 1))
    assert form is not None
    assert form.permutations[after] == (1, 0)


# --- networks -----------------------------------------------------------------------------------------------------


def test_residual_block_keeps_no_transposition_but_those_of_the_interface() -> None:
    build = Builder()
    x = fed(build, "v_x", (2, 4, 4, 4))
    first = build.op("RELU", [convolved(build, x, 4)])
    scaled = build.binary("MUL", convolved(build, first, 4), build.constant(numbers(4, 1, 1)))
    joined = build.op("CONCATENATION", [build.binary("ADD", scaled, first), first], shape=(2, 8, 4, 4), axis=1)
    y = build.op("TANH", [convolved(build, joined, 4)])
    after = assigned(finished(build, [x], [y]))
    assert kinds(after)["TRANSPOSE"] == 2
    (concatenation,) = (operator for operator in after.operators if operator.kind == "CONCATENATION")
    assert concatenation.option("axis", 0) == 3


def test_tensor_read_in_the_other_order_by_several_is_transposed_once() -> None:
    build = Builder()
    x = fed(build, "v_x", (2, 3, 4, 5))
    outputs = [build.op("TANH", [convolved(build, x, 2)]) for _ in range(3)]
    after = assigned(finished(build, [x], outputs))
    readers = [operator for operator in after.operators if "v_x" in operator.inputs]
    assert [operator.kind for operator in readers] == ["TRANSPOSE"]


def test_flattening_in_front_of_a_constant_weight_moves_its_columns_instead() -> None:
    build = Builder()
    x = fed(build, "v_x", (-1, 3, 3, 3))
    flat = build.op("RELU", [build.reshaped(convolved(build, x, 3), (-1, 27))])
    rows = [build.op("FULLY_CONNECTED", [flat, build.constant(numbers(5, 27)), None], shape=(-1, 5)) for _ in range(2)]
    after = assigned(finished(build, [x], rows))
    assert kinds(after)["TRANSPOSE"] == 1


def test_columns_that_somebody_else_sees_stay() -> None:
    build = Builder()
    x = fed(build, "v_x", (2, 3, 3, 3))
    flat = build.reshaped(convolved(build, x, 3), (2, 27))
    rows = build.op("FULLY_CONNECTED", [flat, build.constant(numbers(5, 27)), None], shape=(2, 5))
    after = assigned(finished(build, [x], [rows, build.op("SOFTMAX", [flat], beta=1.0)]))
    assert kinds(after)["TRANSPOSE"] == 2


def test_scales_of_columns_follow_a_quantized_weight() -> None:
    build = Builder()
    x = fed(build, "v_x", (2, 3, 2, 2))
    flat = build.reshaped(convolved(build, x, 3), (2, 12))
    weight = build.constant(RNG.integers(-127, 128, (5, 12)).astype(np.int8))
    scales = Quantization(scales=tuple(float(scale) for scale in RNG.random(5) + 0.1), zero_points=(0,) * 5)
    weight = build.add(
        Tensor(name=weight.name, type="INT8", shape=(5, 12), constant=weight.constant, quantization=scales)
    )
    real = build.op("DEQUANTIZE", [weight], shape=(5, 12), type_="FLOAT32")
    y = build.op("FULLY_CONNECTED", [flat, real, None], shape=(2, 5))
    assert kinds(assigned(finished(build, [x], [y])))["TRANSPOSE"] == 1


def test_shuffled_channels_are_shuffled_in_place() -> None:
    build = Builder()
    x = fed(build, "v_x", (1, 4, 3, 3))
    split = build.reshaped(convolved(build, x, 4), (1, 2, 2, 3, 3))
    back = build.reshaped(build.transposed(split, (0, 2, 1, 3, 4)), (1, 4, 3, 3))
    y = build.op("MEAN", [convolved(build, back, 2), build.constant([2, 3])], shape=(1, 2), keepDims=False)
    after = assigned(finished(build, [x], [y]))
    moved = [
        tuple(after.tensors[operator.inputs[1]].array())  # type: ignore[arg-type]
        for operator in after.operators
        if operator.kind == "TRANSPOSE"
    ]
    assert moved == [TO_LAST, (0, 1, 2, 4, 3)]


def test_transposition_between_two_regions_that_can_both_turn_vanishes() -> None:
    # Channels first on the left, tokens on the right: the cut has to flip one of them.
    build = Builder()
    x = fed(build, "v_x", (1, 4, 3, 3))
    left = build.op("TANH", [convolved(build, x, 4)])
    left = build.op("RELU", [build.binary("MUL", left, build.constant(numbers(4, 1, 1)))])
    right = build.op("NEG", [build.transposed(left, TO_LAST)])
    right = build.binary("ADD", right, build.constant(numbers(4)))
    y = build.op("FULLY_CONNECTED", [right, build.constant(numbers(2, 4)), None], shape=(1, 3, 3, 2), keepNumDims=True)
    assert kinds(assigned(finished(build, [x], [y])))["TRANSPOSE"] == 1


def test_moving_axes_of_length_one_is_a_reshape() -> None:
    build = Builder()
    x = fed(build, "v_x", (-1, 5, 1, 1))
    y = build.op("MAX_POOL_2D", [build.transposed(x, TO_LAST)], shape=(-1, 1, 1, 5), padding="VALID", strideH=1,
                 strideW=1, filterHeight=1, filterWidth=1)  # fmt: skip
    after = assigned(finished(build, [x], [build.transposed(y, TO_FIRST)]))
    assert kinds(after) == {"RESHAPE": 2, "MAX_POOL_2D": 1}


def test_asking_for_a_shape_moves_nothing() -> None:
    build = Builder()
    x = fed(build, "v_x", (-1, 3, 4, 5))
    y = convolved(build, x, 2)
    shape = build.op("SHAPE", [y], shape=(4,), type_="INT32", outType="INT32")
    pooled = build.op("REDUCE_MAX", [y, build.constant([2, 3])], shape=(-1, 2), keepDims=False)
    after = assigned(finished(build, [x], [shape, pooled]))
    assert kinds(after)["TRANSPOSE"] == 1


def test_one_transposition_more_than_needed_is_not_made_for_unmovable_neighbours() -> None:
    build = Builder()
    x = fed(build, "v_x", (1, 4, 4, 4))
    y = build.op("SOFTMAX", [convolved(build, x, 4)], beta=1.0)
    after = assigned(finished(build, [x], [y]))
    assert kinds(after) == {"TRANSPOSE": 2, "CONV_2D": 1, "SOFTMAX": 1}


# --- what is said about tensors -----------------------------------------------------------------------------------


def test_values_say_how_they_are_stored_and_intermediate_names_go() -> None:
    build = Builder()
    x = fed(build, "v_x", (1, 3, 4, 4))
    conv = convolved(build, x, 2, "v_conv")
    relu = build.renamed(build.op("RELU", [conv]), "v_relu")
    y = build.renamed(build.op("MEAN", [relu, build.constant([2, 3])], shape=(1, 2), keepDims=False), "v_y")
    after = assigned(finished(build, [x], [y]))
    assert {name: tensor.layout for name, tensor in after.tensors.items() if tensor.constant is None} == {
        "v_x": None,
        "/transpose": None,
        "v_conv": TO_LAST,
        "v_relu": TO_LAST,
        "v_y": None,
    }


def test_two_outputs_of_one_tensor_are_two_tensors() -> None:
    build = Builder()
    x = fed(build, "v_x", (1, 3, 4, 4))
    y = build.renamed(build.op("TANH", [x]), "v_y")
    there = build.transposed(y, TO_LAST)
    back = build.op("TRANSPOSE", [there, build.constant(np.array(TO_FIRST, np.int32))], shape=y.shape, type_=y.type)
    back = build.renamed(back, "v_back")
    after = assigned(finished(build, [x], [y, there, back]))
    assert kinds(after) == {"TANH": 1, "TRANSPOSE": 1, "RESHAPE": 1}


def test_scales_of_an_axis_go_with_the_axis() -> None:
    build = Builder()
    x = fed(build, "v_x", (1, 3, 4, 4))
    weight = build.constant(RNG.integers(-127, 128, (3, 1, 1)).astype(np.int8))
    scales = Quantization(scales=(0.1, 0.2, 0.3), zero_points=(0, 0, 0), axis=1)
    weight = build.add(
        Tensor(
            name="q",
            type="INT8",
            shape=(1, 3, 1, 1),
            constant=weight.constant.reshaped((1, 3, 1, 1)),
            quantization=scales,
        )  # type: ignore[union-attr]
    )
    real = build.op("DEQUANTIZE", [weight], shape=(1, 3, 1, 1), type_="FLOAT32")
    y = build.op("MUL", [convolved(build, x, 3), real], shape=(1, 3, 4, 4))
    y = build.op("MEAN", [y, build.constant([2, 3])], shape=(1, 3), keepDims=False)
    after = assigned(finished(build, [x], [y]))
    assert kinds(after)["TRANSPOSE"] == 1
    (dequantize,) = (operator for operator in after.operators if operator.kind == "DEQUANTIZE")
    stored = after.tensors[dequantize.inputs[0]]
    # A tensor of one axis longer than 1 may be stored either way; its scales go along.
    assert stored.quantization is not None
    assert stored.shape[stored.quantization.axis] == 3


# --- the interface ------------------------------------------------------------------------------------------------


def classifier() -> Graph:
    build = Builder()
    x = fed(build, "v_x", (-1, 3, 4, 6))
    y = build.renamed(build.op("RELU", [convolved(build, x, 5)]), "v_y")
    return finished(build, [x], [y])


def test_channels_last_at_both_ends_leaves_no_transposition() -> None:
    before = classifier()
    after = assign_layouts(with_channels_last(before, inputs=True, outputs=True))
    assert kinds(after) == {"CONV_2D": 1, "RELU": 1}
    assert [after.tensors[name].shape for name in ("v_x", "v_y")] == [(-1, 4, 6, 3), (-1, 4, 6, 5)]
    assert [after.tensors[name].layout for name in ("v_x", "v_y")] == [TO_LAST, TO_LAST]
    feeds = feeds_for(before, np.random.default_rng(0))
    expected = run_graph(before, feeds)["v_y"]
    actual = run_graph(after, {"v_x": feeds["v_x"].transpose(TO_LAST)})["v_y"]
    np.testing.assert_allclose(actual, expected.transpose(TO_LAST), rtol=TOLERANCE, atol=TOLERANCE)


def test_model_that_is_fed_channels_last_already_keeps_no_transposition() -> None:
    # Networks that come from Keras begin and end with a Transpose.
    build = Builder()
    x = fed(build, "v_x", (-1, 4, 6, 3))
    y = build.op("RELU", [convolved(build, build.transposed(x, TO_FIRST), 5)])
    assert moved_cost(assigned(finished(build, [x], [build.transposed(y, TO_LAST)]))) == 0


def test_only_pictures_and_their_like_are_fed_channels_last() -> None:
    build = Builder()
    x, ids = fed(build, "v_x", (2, 3)), build.add(Tensor(name="v_ids", type="INT32", shape=(1, 2, 3, 4)))
    graph = finished(build, [x, ids], [build.op("TANH", [x]), build.op("NEG", [ids])])
    assert with_channels_last(graph, inputs=True, outputs=True) is graph


def test_computed_permutation_is_an_operator_like_any_other() -> None:
    build = Builder()
    x = fed(build, "v_x", (2, 3))
    order = build.add(Tensor(name="v_order", type="INT32", shape=(2,)))
    y = build.op("TRANSPOSE", [x, order], shape=(-1, -1), type_="FLOAT32")
    graph = finished(build, [x, order], [build.op("RELU", [y])])
    after = assign_layouts(graph)
    assert after.operators == graph.operators
    assert isinstance(after.operators[0], Operator)


# --- regions of flattened tensors ---------------------------------------------------------------------------------


def normalized(groups: int, *, factor: np.ndarray | None = None, is_read: bool = False) -> Graph:
    """Group normalization between two convolutions, as PyTorch exports it."""
    build = Builder()
    x = fed(build, "v_x", (2, 6, 4, 4))
    before = convolved(build, x, 6)
    flat = build.renamed(build.reshaped(before, (2, groups, 96 // groups)), "v_flat")
    axes, kept = build.constant([-1]), (2, groups, 1)
    mean = build.op("MEAN", [flat, axes], shape=kept, keepDims=True)
    spread_ = build.op("MEAN", [build.op("SQUARED_DIFFERENCE", [flat, mean]), axes], shape=kept, keepDims=True)
    scale = build.op("RSQRT", [build.op("ADD", [spread_, build.constant(1e-5)], shape=kept)])
    flat = build.op("MUL", [build.op("SUB", [flat, mean]), scale])
    if factor is not None:
        flat = build.op("MUL", [flat, build.constant(factor)], shape=flat.shape)
    back = build.reshaped(flat, (2, 6, 4, 4))
    y = build.op("REDUCE_MAX", [convolved(build, back, 2), build.constant([2, 3])], shape=(2, 2), keepDims=False)
    return finished(build, [x], [y, *([flat] if is_read else [])])


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_group_normalization_is_computed_with_channels_last(groups: int) -> None:
    after = assigned(normalized(groups))
    assert kinds(after)["TRANSPOSE"] == 1
    # With a group for each channel nothing is joined but space: the tensor can stay as it is.
    assert ("v_flat" in after.tensors) == (groups == 6)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2, 48), (48,), (1, 1, 1)], ids=str)
def test_constants_of_a_flattened_region_are_split_with_it(shape: tuple[int, ...]) -> None:
    assert kinds(assigned(normalized(2, factor=numbers(*shape))))["TRANSPOSE"] == 1


def test_flattened_tensor_that_leaves_the_graph_stays_flat() -> None:
    assert kinds(assigned(normalized(2, is_read=True)))["TRANSPOSE"] > 1
