"""The form that sparse inference asks for computes the same, and is taken only where it does."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from onnxprune.targets.tflite.graph import Graph
from onnxprune.targets.tflite.sparse.clusters import qualify
from onnxprune.targets.tflite.sparse.form import to_sparse_form
from tests.sparse_cases import HEADS, MIDDLES, excited_by_dense_layers
from tests.sparse_nets import NhwcNet, classes, mobile_net, sandwich, with_packed_weights
from tests.tflite_graphs import run_graph


def assert_same(graph: Graph, formed: Graph) -> None:
    rng = np.random.default_rng(1)
    feeds = {name: rng.standard_normal(graph.tensors[name].shape).astype(np.float32) for name in graph.inputs}
    wanted, found = run_graph(graph, feeds), run_graph(formed, feeds)
    for name, output in wanted.items():
        assert found[name].shape == output.shape
        # The same products in another order of sums.
        np.testing.assert_allclose(found[name], output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MIDDLES)
def test_a_cluster_in_another_form_qualifies_afterwards(name: str) -> None:
    graph = sandwich(MIDDLES[name])
    assert not qualify(graph).qualifies
    formed = to_sparse_form(graph)
    assert qualify(formed).qualifies, qualify(formed).clusters[0].problems
    assert_same(graph, formed)


@pytest.mark.parametrize("keep_dims", [True, False])
def test_squeeze_and_excite_through_dense_layers_becomes_1x1_convolutions(keep_dims: bool) -> None:
    graph = sandwich(lambda net, x: excited_by_dense_layers(net, x, keep_dims=keep_dims))
    formed = to_sparse_form(graph)
    report = qualify(formed)
    # The weights of the dense layers are not sparse here, so that zeros are all that is missing.
    assert (report.is_safe, report.clusters[0].problems) == (True, ())
    assert Counter(operator.kind for operator in formed.operators)["FULLY_CONNECTED"] == 1
    assert_same(graph, formed)


@pytest.mark.parametrize("name", HEADS)
def test_what_follows_the_mean_is_computed_with_two_axes(name: str) -> None:
    graph = sandwich(end=HEADS[name])
    formed = to_sparse_form(graph)
    assert qualify(formed).qualifies, qualify(formed).clusters[0].problems
    assert formed.outputs == graph.outputs
    assert_same(graph, formed)


@pytest.mark.parametrize("how", ["FLOAT16", "INT8"])
def test_packed_weights_of_a_head_stay_packed(how: str) -> None:
    graph = with_packed_weights(sandwich(end=HEADS["two 1x1 convolutions"]), how)  # type: ignore[arg-type]
    formed = to_sparse_form(graph)
    assert qualify(formed).qualifies
    assert {tensor.type for tensor in formed.tensors.values() if tensor.constant is not None and tensor.rank == 2} >= {
        how
    }
    assert_same(graph, formed)


def stem_of(size: int, *, padding: tuple[int, int] | None, kernel: int = 3) -> Graph:
    """A stem with SAME, or with a PAD of (before, behind)."""
    net = NhwcNet()
    x = net.input((1, size, size, 3))
    if padding is not None:
        amounts = net.constant(np.array([[0, 0], padding, padding, [0, 0]], np.int32), "amounts")
        x = net.op("PAD", [x, amounts], (1, size + sum(padding), size + sum(padding), 3))
    x = net.conv(x, 16, 3, 2, padding="SAME" if padding is None else "VALID", name="stem")
    return net.graph(classes(net, net.conv(net.depthwise(x, kernel), 64)))


@pytest.mark.parametrize(
    "graph",
    [
        stem_of(33, padding=None),
        # The row that PAD adds behind an even size is read by no window.
        stem_of(32, padding=(1, 0)),
        stem_of(32, padding=(1, 1)),
    ],
    ids=["SAME at an odd size", "a row less", "as it must be"],
)
def test_a_stem_is_padded_on_all_sides_where_its_windows_stay(graph: Graph) -> None:
    formed = to_sparse_form(graph)
    assert qualify(formed).qualifies, qualify(formed).clusters[0].problems
    assert_same(graph, formed)


@pytest.mark.parametrize(
    "graph",
    [stem_of(32, padding=None), stem_of(33, padding=(1, 0)), stem_of(32, padding=(0, 1)), stem_of(32, padding=(2, 2))],
    ids=["SAME at an even size", "a window less", "shifted", "more"],
)
def test_a_stem_whose_windows_would_move_is_left_alone(graph: Graph) -> None:
    formed = to_sparse_form(graph)
    assert not qualify(formed).clusters[0].has_stem
    assert_same(graph, formed)


@pytest.mark.parametrize("kernel", [3, 5])
def test_depthwise_convolutions_with_stride_are_padded_where_their_windows_stay(kernel: int) -> None:
    net = NhwcNet()
    x = net.conv(net.pad(net.input((1, 65, 65, 3)), 1), 16, 3, 2, name="stem")
    graph = net.graph(classes(net, net.conv(net.depthwise(x, kernel, 2), 64)))
    assert not qualify(graph).qualifies
    formed = to_sparse_form(graph)
    assert qualify(formed).qualifies
    assert_same(graph, formed)


def test_two_convolutions_that_share_a_pad_get_one_each() -> None:
    net = NhwcNet()
    padded = net.pad(net.input((1, 32, 32, 3)), 1)
    stems = [net.conv(padded, 16, 3, 2, name=name) for name in ("stem", "other")]
    graph = net.graph(classes(net, net.conv(net.binary("ADD", *stems), 64)))
    formed = to_sparse_form(graph)
    assert qualify(formed).qualifies
    assert_same(graph, formed)


def test_a_second_run_changes_nothing() -> None:
    once = to_sparse_form(sandwich(excited_by_dense_layers, HEADS["two 1x1 convolutions"]))
    twice = to_sparse_form(once)
    assert [operator.kind for operator in twice.operators] == [operator.kind for operator in once.operators]


def test_a_network_in_the_right_form_keeps_its_operators() -> None:
    graph = mobile_net()
    kinds = [operator.kind for operator in graph.operators]
    assert [operator.kind for operator in to_sparse_form(graph).operators] == kinds


def test_an_open_batch_stays_open() -> None:
    graph = mobile_net(batch=-1)
    formed = to_sparse_form(graph)
    assert qualify(formed).qualifies
    rng = np.random.default_rng(1)
    feeds = {"x": rng.standard_normal((3, 32, 32, 3)).astype(np.float32)}
    name = graph.outputs[0]
    # The same products in another order of sums.
    np.testing.assert_allclose(run_graph(formed, feeds)[name], run_graph(graph, feeds)[name], rtol=1e-4, atol=1e-5)
