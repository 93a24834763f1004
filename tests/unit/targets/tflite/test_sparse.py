"""What becomes of zeros in a `.tflite` file, and what the report says about them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onnxprune.targets.tflite.graph import Constant, Graph, Operator, Quantization, Tensor
from onnxprune.targets.tflite.serialize import serialize
from onnxprune.targets.tflite.sparse import SparseMode, make_sparse
from onnxprune.targets.tflite.sparse.weights import with_sparse_weights
from tests.sparse_cases import windows
from tests.sparse_nets import NhwcNet, mobile_net, model_of, sandwich, with_packed_weights
from tests.tflite_graphs import run_graph

RNG = np.random.default_rng(0)


def unpacked(graph: Graph) -> list[str]:
    return [operator.outputs[0] for operator in graph.operators if operator.kind == "DENSIFY"]


def without_stem(*, zeros: float = 0.8) -> Graph:
    net = NhwcNet(zeros=zeros)
    x = net.conv(net.input((1, 32, 32, 3)), 16, 3, 2, padding="SAME", name="stem")
    return net.graph(net.reshape(net.mean(net.conv(net.conv(x, 64, name="wide"), 16, name="narrow")), (1, 16)))


def test_a_network_that_qualifies_is_stored_sparse_and_the_report_says_what_for() -> None:
    graph = mobile_net()
    sparse, (finding,) = make_sparse(graph, "auto")
    assert len(serialize(model_of(sparse))) < 0.7 * len(serialize(model_of(graph)))
    assert finding.severity == "info"
    assert (
        "XNNPACK skips the zero weights of the 8 1x1 convolutions from 'node stem' to 'node pool' (80%" in finding.text
    )
    feeds = {"x": RNG.standard_normal((1, 32, 32, 3)).astype(np.float32)}
    name = graph.outputs[0]
    np.testing.assert_array_equal(run_graph(sparse, feeds)[name], run_graph(graph, feeds)[name])


@pytest.mark.parametrize("mode", ["auto", "storage", "never"])
def test_few_zeros_are_not_worth_a_word(mode: SparseMode) -> None:
    graph = mobile_net(zeros=0.1)
    assert make_sparse(graph, mode) == (graph, ())


def test_never_leaves_zeros_alone() -> None:
    graph = mobile_net()
    same, (finding,) = make_sparse(graph, "never")
    assert same is graph
    assert "sparse = never" in finding.text


def test_auto_leaves_a_network_alone_that_does_not_qualify_and_names_what_is_in_the_way() -> None:
    graph = sandwich(windows)
    same, (finding,) = make_sparse(graph, "auto")
    assert same is graph
    assert finding.severity == "warning"
    assert "MAX_POOL_2D has no place in sparse inference ('node broken'" in finding.text


def test_too_few_zeros_are_named_with_the_share_that_is_needed() -> None:
    same, (finding,) = make_sparse(mobile_net(zeros=0.6), "auto")
    assert unpacked(same) == []
    assert "more than 67% of their weights, and here they are 60." in finding.text


def test_zeros_that_nobody_made_for_speed_are_no_warning() -> None:
    (_, (few,)), (_, (many,)) = (make_sparse(mobile_net(zeros=zeros), "auto") for zeros in (0.3, 0.6))
    assert (few.severity, many.severity) == ("info", "warning")
    assert "save bytes only in a compressed download. " in few.text


def test_many_nodes_with_one_reason_are_one_reason() -> None:
    def towers(net: NhwcNet, x: str) -> str:
        for _ in range(5):
            x = net.depthwise(x, 7)
        return x

    _, (finding,) = make_sparse(sandwich(towers), "auto")
    assert finding.text.count("a depthwise convolution must be 3x3 or 5x5") == 1
    assert " and 2 more; " in finding.text


def test_zeros_without_convolutions_are_said_to_save_nothing() -> None:
    net = NhwcNet()
    net.zeros = 0.9
    weight = net.weights((16, 64), "weight", zeros=0.9)
    graph = net.graph(net.op("FULLY_CONNECTED", [net.input((1, 64)), weight], (1, 16)))
    same, (finding,) = make_sparse(graph, "auto")
    assert same is graph
    assert "no convolution" in finding.text


def test_storage_takes_fewer_bytes_where_nothing_can_switch_on() -> None:
    graph = without_stem()
    stored, (blocked, sizes) = make_sparse(graph, "storage")
    assert unpacked(stored) == ["wide/weight", "narrow/weight"]
    assert blocked.severity == "warning"
    assert sizes.text.startswith("2 weights are stored as non-zeros")
    feeds = {"x": RNG.standard_normal((1, 32, 32, 3)).astype(np.float32)}
    name = graph.outputs[0]
    np.testing.assert_array_equal(run_graph(stored, feeds)[name], run_graph(graph, feeds)[name])


def test_storage_refuses_where_phones_would_compute_wrong_results() -> None:
    graph = sandwich(windows)
    same, findings = make_sparse(graph, "storage")
    assert same is graph
    assert "'node stem' begins what XNNPACK can compute sparse, and 'node broken' breaks it" in findings[1].text


def test_storage_of_a_network_with_too_few_zeros_is_safe_where_its_cluster_is_whole() -> None:
    stored, _ = make_sparse(mobile_net(zeros=0.6), "storage")
    assert unpacked(stored)


def test_weights_that_would_not_shrink_stay_dense() -> None:
    graph = without_stem(zeros=0.15)
    same, (_, finding) = make_sparse(graph, "storage")
    assert same is graph
    assert finding.text.startswith("No weight takes fewer bytes")


# --- which weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["FLOAT16", "INT8"])
def test_packed_weights_are_unpacked_in_two_steps(how: str) -> None:
    stored = with_sparse_weights(with_packed_weights(mobile_net(size=64, zeros=0.9), how)).graph  # type: ignore[arg-type]
    producers = stored.producers()
    chains = [operator for operator in stored.operators if operator.kind == "DEQUANTIZE"]
    assert any(producers.get(operator.inputs[0], operator).kind == "DENSIFY" for operator in chains)


def test_a_weight_that_two_layers_share_is_unpacked_once() -> None:
    net = NhwcNet(zeros=0.9)
    x = net.conv(net.input((1, 8, 8, 32)), 32, name="first")
    first = net.operators[-1]
    x = net.op("CONV_2D", [x, *first.inputs[1:]], net.shape(x), "second", **first.options)
    stored = with_sparse_weights(net.graph(x))
    assert stored.tensors == 1
    assert len(unpacked(stored.graph)) == 1


def integer_layer(kind: str, *, activations: str = "INT8", zero_point: int = 0) -> Graph:
    """One layer with int8 weights, most of them zero."""
    shape = (64, 1, 1, 64) if kind == "CONV_2D" else (64, 64)
    array = RNG.integers(1, 127, shape).astype(np.int8)
    array[RNG.random(shape) < 0.9] = 0
    space = (1, 4, 4) if kind == "CONV_2D" else (1,)
    scale = Quantization(scales=(0.1,), zero_points=(zero_point,))
    given = Tensor(name="x", type=activations, shape=(*space, 64), quantization=scale)  # type: ignore[arg-type]
    weight = Tensor(name="w", type="INT8", shape=shape, constant=Constant.of(array), quantization=scale)
    options = {"padding": "VALID", "strideH": 1, "strideW": 1} if kind == "CONV_2D" else {}
    return Graph(
        name="main",
        tensors={"x": given, "w": weight, "y": replace(given, name="y")},
        operators=(Operator(kind=kind, inputs=("x", "w"), outputs=("y",), options=options),),
        inputs=("x",),
        outputs=("y",),
    )


def test_weights_of_an_integer_convolution_may_be_sparse() -> None:
    assert with_sparse_weights(integer_layer("CONV_2D")).tensors == 1


@pytest.mark.parametrize(
    "graph",
    [
        # XNNPACK's delegate refuses the model for the first two.
        integer_layer("FULLY_CONNECTED"),
        integer_layer("CONV_2D", activations="FLOAT32"),
        # Here a zero that is left out comes back as another number.
        integer_layer("CONV_2D", zero_point=3),
    ],
    ids=["FULLY_CONNECTED", "quantized while it runs", "zero point"],
)
def test_integer_weights_that_could_not_be_unpacked_stay_dense(graph: Graph) -> None:
    assert with_sparse_weights(graph).tensors == 0


def test_a_weight_that_something_else_reads_too_stays_dense() -> None:
    net = NhwcNet(zeros=0.9)
    x = net.conv(net.input((32, 1, 1, 32)), 32, name="layer")
    both = net.graph(net.binary("ADD", x, "layer/weight"))
    assert with_sparse_weights(both).tensors == 0
