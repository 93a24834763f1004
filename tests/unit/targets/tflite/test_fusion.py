"""Fusion, rule by rule: where it acts, and where it must not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from onnxprune.targets.tflite.build import Builder
from onnxprune.targets.tflite.fusion import fuse
from onnxprune.targets.tflite.graph import Constant, Graph, Tensor
from tests.tflite_graphs import fed, feeds_for, finished, run_graph

RNG = np.random.default_rng(0)

# Factors move into sums of a few dozen float32 numbers around 1.
TOLERANCE = 1e-4


def numbers(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def convolved(build: Builder, x: Tensor, *, window: int = 1, stride: int = 1, padding: str = "VALID") -> Tensor:
    size = [-(-dim // stride) if padding == "SAME" else (dim - window) // stride + 1 for dim in x.shape[1:3]]
    filters, bias = build.constant(numbers(4, window, window, x.shape[3])), build.constant(numbers(4))
    return build.op("CONV_2D", [x, filters, bias], shape=(x.shape[0], *size, 4), padding=padding, strideH=stride,
                    strideW=stride, dilationHFactor=1, dilationWFactor=1)  # fmt: skip


def pooled(build: Builder, x: Tensor, *, kind: str = "MAX_POOL_2D", window: int = 3, stride: int = 2) -> Tensor:
    size = [(dim - window) // stride + 1 for dim in x.shape[1:3]]
    return build.op(kind, [x], shape=(x.shape[0], *size, x.shape[3]), padding="VALID", strideH=stride, strideW=stride,
                    filterHeight=window, filterWidth=window)  # fmt: skip


def padded(build: Builder, x: Tensor, rows: list[list[int]], value: float | None = None) -> Tensor:
    rows = [[0, 0], *rows, [0, 0]]
    shape = tuple(dim + sum(row) for dim, row in zip(x.shape, rows, strict=True))
    if value is None:
        return build.op("PAD", [x, build.constant(rows)], shape=shape)
    return build.op("PADV2", [x, build.constant(rows), build.constant(np.float32(value))], shape=shape)


def constant(build: Builder, kind: str, x: Tensor, *shape: int) -> Tensor:
    return build.op(kind, [x, build.constant(np.abs(numbers(*shape)) + 0.5)], shape=x.shape)


Layers = Callable[[Builder, Tensor], Tensor]


def fused(layers: Layers, shape: tuple[int, ...] = (2, 6, 6, 3)) -> Graph:
    """The network after the stage; it computes the same as before."""
    build = Builder()
    x = fed(build, "v_x", shape)
    graph = finished(build, [x], [build.renamed(layers(build, x), "v_y")])
    after = fuse(graph)
    feeds = feeds_for(graph, np.random.default_rng(1))
    expected, actual = run_graph(graph, feeds)["v_y"], run_graph(after, feeds)["v_y"]
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)
    return after


def described(graph: Graph) -> list[str]:
    """Operators with what is fused into them."""
    found = []
    for operator in graph.operators:
        activation = operator.option("fusedActivationFunction", "NONE")
        same = "/SAME" if operator.option("padding", "") == "SAME" else ""
        found.append(operator.kind + ("" if activation == "NONE" else f"+{activation}") + same)
    return found


CASES: dict[str, tuple[Layers, list[str]]] = {
    "padding as SAME pads it": (
        lambda b, x: convolved(b, padded(b, x, [[1, 1], [1, 1]]), window=3), ["CONV_2D/SAME"]
    ),
    "padding in front where SAME pads behind": (
        lambda b, x: convolved(b, padded(b, x, [[1, 0], [1, 0]]), window=3, stride=2), ["PAD", "CONV_2D"]
    ),
    "padding behind as SAME pads it": (
        lambda b, x: convolved(b, padded(b, x, [[0, 1], [0, 1]]), window=3, stride=2), ["CONV_2D/SAME"]
    ),
    "padding on both sides with stride 2, as PyTorch has it": (
        lambda b, x: convolved(b, padded(b, x, [[1, 1], [1, 1]]), window=3, stride=2), ["PAD", "CONV_2D"]
    ),
    "padding with something": (
        lambda b, x: convolved(b, padded(b, x, [[1, 1], [1, 1]], 0.5), window=3), ["PADV2", "CONV_2D"]
    ),
    "two paddings": (
        lambda b, x: convolved(b, padded(b, padded(b, x, [[1, 0], [0, 1]]), [[0, 1], [1, 0]]), window=3),
        ["CONV_2D/SAME"],
    ),
    "padding by nothing": (lambda b, x: b.op("TANH", [padded(b, x, [[0, 0], [0, 0]])]), ["TANH"]),
    "lowest numbers around a maximum": (
        lambda b, x: pooled(b, padded(b, x, [[0, 1], [0, 1]], -np.inf)), ["MAX_POOL_2D/SAME"]
    ),
    "zeros around a maximum of what may be below zero": (
        lambda b, x: pooled(b, padded(b, x, [[0, 1], [0, 1]])), ["PAD", "MAX_POOL_2D"]
    ),
    "zeros around a maximum of what is not below zero": (
        lambda b, x: pooled(b, padded(b, b.op("ABS", [x]), [[0, 1], [0, 1]])), ["ABS", "MAX_POOL_2D/SAME"]
    ),
    "lowest numbers that SAME would not pad, around what is not below zero": (
        lambda b, x: pooled(b, padded(b, b.op("ABS", [x]), [[1, 1], [1, 1]], -np.inf)), ["ABS", "PAD", "MAX_POOL_2D"]
    ),
    "sums of what is not below zero": (
        lambda b, x: pooled(b, padded(b, constant(b, "ADD", b.op("ABS", [x]), 3), [[0, 1], [0, 1]])),
        ["ABS", "ADD", "MAX_POOL_2D/SAME"],
    ),
    "zeros that an average counts": (
        lambda b, x: pooled(b, padded(b, x, [[0, 1], [0, 1]]), kind="AVERAGE_POOL_2D"), ["PAD", "AVERAGE_POOL_2D"]
    ),
    "an activation": (lambda b, x: b.op("RELU6", [convolved(b, x)]), ["CONV_2D+RELU6"]),
    "two activations": (lambda b, x: b.op("RELU", [b.op("RELU_N1_TO_1", [convolved(b, x)])]),
                        ["CONV_2D+RELU_N1_TO_1", "RELU"]),
    "an activation of what has none": (lambda b, x: b.op("RELU", [b.op("TANH", [x])]), ["TANH", "RELU"]),
    "a clamp": (
        lambda b, x: b.op("MINIMUM", [b.op("MAXIMUM", [convolved(b, x), b.constant(0.0)], shape=(2, 6, 6, 4)),
                                      b.constant(6.0)], shape=(2, 6, 6, 4)), ["CONV_2D+RELU6"],
    ),
    "a clamp from above first": (
        lambda b, x: b.op("MAXIMUM", [b.op("MINIMUM", [x, b.constant(1.0)]), b.constant(-1.0)]), ["RELU_N1_TO_1"],
    ),
    "a clamp whose bounds cross": (
        lambda b, x: b.op("MINIMUM", [b.op("MAXIMUM", [x, b.constant(6.0)]), b.constant(0.0)]), ["MAXIMUM", "MINIMUM"],
    ),
    "a clamp to other bounds": (
        lambda b, x: b.op("MINIMUM", [b.op("MAXIMUM", [x, b.constant(0.0)]), b.constant(2.0)]), ["RELU", "MINIMUM"],
    ),
    "a normalization behind": (
        lambda b, x: b.op("RELU", [constant(b, "ADD", constant(b, "MUL", convolved(b, x), 1, 1, 1, 4), 4)]),
        ["CONV_2D+RELU"],
    ),
    "a division and a difference behind": (
        lambda b, x: constant(b, "SUB", constant(b, "DIV", convolved(b, x), 4)), ["CONV_2D"]
    ),
    "a factor a row behind": (lambda b, x: constant(b, "MUL", convolved(b, x), 1, 6, 1, 1), ["CONV_2D", "MUL"]),
    "a factor behind an activation": (
        lambda b, x: constant(b, "MUL", b.op("RELU", [convolved(b, x)]), 4), ["CONV_2D+RELU", "MUL"]
    ),
    "a factor and a summand in front": (
        lambda b, x: convolved(b, constant(b, "ADD", constant(b, "MUL", x, 3), 3)), ["CONV_2D"]
    ),
    "a summand in front of zeros": (
        lambda b, x: convolved(b, constant(b, "ADD", x, 3), window=3, padding="SAME"), ["ADD", "CONV_2D/SAME"]
    ),
    "a factor in front of zeros": (
        lambda b, x: convolved(b, constant(b, "MUL", x, 3), window=3, padding="SAME"), ["CONV_2D/SAME"]
    ),
    "factors one after the other": (
        lambda b, x: constant(b, "DIV", constant(b, "MUL", x, 3), 1, 6, 1, 1), ["MUL"]
    ),
    "summands one after the other": (
        lambda b, x: constant(b, "ADD", constant(b, "SUB", x, 1, 6, 6, 1), 1, 1, 1, 3), ["SUB", "ADD"]
    ),
    "factors whose product is too small for float32": (
        lambda b, x: b.op("MUL", [b.op("MUL", [x, b.constant(1e-30)]), b.constant(1e-15)]), ["MUL", "MUL"]
    ),
    "a divisor that float32 can't turn round": (
        lambda b, x: b.op("DIV", [convolved(b, x), b.constant(1e-39)], shape=(2, 6, 6, 4)), ["CONV_2D", "DIV"]
    ),
    "a summand that the bias would swallow": (
        lambda b, x: b.op("ADD", [constant(b, "SUB", convolved(b, x), 4), b.constant(1e-20)], shape=(2, 6, 6, 4)),
        ["CONV_2D", "ADD"],
    ),
    "a factor and a summand": (lambda b, x: constant(b, "ADD", constant(b, "MUL", x, 3), 3), ["MUL", "ADD"]),
    "what changes nothing": (
        lambda b, x: b.op("ADD", [b.constant(np.zeros((1, 1, 1, 3), np.float32)),
                                  b.op("TANH", [b.op("MUL", [x, b.constant(1.0)])])]), ["TANH"],
    ),
    "one that makes a tensor longer": (
        lambda b, x: b.op("MUL", [b.op("MEAN", [x, b.constant([1, 2])], shape=(2, 1, 1, 3), keepDims=True),
                                  b.constant(np.ones((1, 2, 2, 1), np.float32))], shape=(2, 2, 2, 3)), ["MEAN", "MUL"],
    ),
    "reshapes one after the other": (
        lambda b, x: b.reshaped(b.op("EXPAND_DIMS", [b.reshaped(x, (2, 108)), b.constant(1)], shape=(2, 1, 108)),
                                (2, 36, 3)), ["RESHAPE"],
    ),
    "reshapes that end where they began": (
        lambda b, x: b.op("TANH", [b.reshaped(b.reshaped(x, (2, 108)), (2, 6, 6, 3))]), ["TANH"],
    ),
    "a transposed operand of a product": (
        lambda b, x: b.op("BATCH_MATMUL", [x, b.transposed(b.op("TANH", [x]), (0, 1, 3, 2))], shape=(2, 6, 6, 6)),
        ["TANH", "BATCH_MATMUL"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_neighbours_become_one_where_the_result_is_equal(name: str) -> None:
    layers, expected = CASES[name]
    assert described(fused(layers)) == expected


def test_another_order_of_a_products_operand_stays() -> None:
    def layers(build: Builder, x: Tensor) -> Tensor:
        order = build.constant(np.array([0, 3, 1, 2], np.int32))
        moved = build.op("TRANSPOSE", [build.op("TANH", [x]), order], shape=(2, 3, 3, 6))
        return build.op("BATCH_MATMUL", [x, moved], shape=(2, 3, 6, 6))

    assert described(fused(layers, (2, 3, 6, 3))) == ["TANH", "TRANSPOSE", "BATCH_MATMUL"]


def test_value_that_leaves_the_graph_is_not_fused_away() -> None:
    build = Builder()
    x = fed(build, "v_x", (1, 4, 4, 3))
    conv = build.renamed(convolved(build, x), "v_conv")
    relu = build.renamed(build.op("RELU", [conv]), "v_relu")
    after = fuse(finished(build, [x], [conv, relu]))
    assert described(after) == ["CONV_2D", "RELU"]
    assert after.outputs == ("v_conv", "v_relu")


def test_convolution_with_two_readers_keeps_its_activation_outside() -> None:
    build = Builder()
    x = fed(build, "v_x", (1, 4, 4, 3))
    conv = convolved(build, x)
    y = build.binary("ADD", build.op("RELU", [conv]), conv)
    assert described(fuse(finished(build, [x], [y]))) == ["CONV_2D", "RELU", "ADD"]


def test_each_reader_of_a_padding_takes_it_in() -> None:
    build = Builder()
    x = fed(build, "v_x", (1, 4, 4, 3))
    around = padded(build, x, [[1, 1], [1, 1]])
    outputs = [convolved(build, around, window=3), convolved(build, around, window=3), convolved(build, around)]
    assert described(fuse(finished(build, [x], outputs))) == ["PAD", "CONV_2D/SAME", "CONV_2D/SAME", "CONV_2D"]


def test_padding_of_an_open_size_stays() -> None:
    build = Builder()
    x = fed(build, "v_x", (1, -1, 4, 3))
    around = build.op("PAD", [x, build.constant([[0, 0], [1, 1], [1, 1], [0, 0]])], shape=(1, -1, 6, 3))
    filters, bias = build.constant(numbers(4, 3, 3, 3)), build.constant(numbers(4))
    y = build.op("CONV_2D", [around, filters, bias], shape=(1, -1, 4, 4), padding="VALID", strideH=1, strideW=1)
    assert described(fuse(finished(build, [x], [y]))) == ["PAD", "CONV_2D"]


def test_copy_of_an_input_stays_an_operator() -> None:
    build = Builder()
    x = fed(build, "v_x", (1, 4))
    y = build.op("RESHAPE", [x, build.constant([1, 4])], shape=(1, 4))
    assert described(fuse(finished(build, [x], [y]))) == ["RESHAPE"]


def test_weights_are_not_read_before_they_are_written() -> None:
    build = Builder()
    x = fed(build, "v_x", (1, 4, 4, 3))
    y = constant(build, "MUL", convolved(build, x), 4)
    (filters,) = (tensor for tensor in build.tensors.values() if tensor.constant is not None and tensor.rank == 4)
    reads: list[int] = []
    weight = filters.constant
    assert weight is not None

    def load() -> np.ndarray:
        reads.append(1)
        return weight.array()

    counted = Constant(weight.shape, weight.dtype, load)
    build.tensors[filters.name] = replace(filters, constant=counted)
    after = fuse(finished(build, [x], [y]))
    assert described(after) == ["CONV_2D"]
    assert not reads
