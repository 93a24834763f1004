"""Which networks XNNPACK computes sparse, and which node is named where it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from onnxprune.targets.tflite.graph import Graph
from onnxprune.targets.tflite.sparse.clusters import qualify
from tests.sparse_cases import BROKEN, SOUND, Broken, windows
from tests.sparse_nets import NhwcNet, mobile_net, sandwich, with_packed_weights


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.id)
def test_what_breaks_a_cluster_is_named(case: Broken) -> None:
    report = qualify(sandwich(case.middle, case.end))
    (cluster,) = report.clusters
    assert cluster.zeros_ratio > 2 / 3 or case.id == "a 1x1 head", "nothing but the operator may be in the way"
    assert not cluster.qualifies
    problem = cluster.problems[0]
    assert problem.node == f"node {case.node}"
    assert case.reason in problem.reason


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.id)
def test_a_broken_cluster_behind_a_stem_is_never_safe(case: Broken) -> None:
    assert not qualify(sandwich(case.middle, case.end)).is_safe


@pytest.mark.parametrize("name", SOUND)
def test_what_a_cluster_may_hold(name: str) -> None:
    report = qualify(sandwich(SOUND[name]))
    assert report.qualifies, report.clusters[0].problems


def test_depth_to_space_ends_a_cluster_whatever_reads_it() -> None:
    def end(net: NhwcNet, x: str) -> str:
        batch, height, width, channels = net.shape(x)
        larger = net.op("DEPTH_TO_SPACE", [x], (batch, 2 * height, 2 * width, channels // 4), "end", blockSize=2)
        return net.conv(larger, 3, 3, padding="SAME")

    report = qualify(sandwich(end=end))
    assert report.qualifies
    assert report.clusters[0].ends == ("node end",)


@pytest.mark.parametrize("how", ["FLOAT16", "INT8"])
def test_packed_weights_count_as_what_they_unpack_to(how: str) -> None:
    graph = mobile_net()
    packed = qualify(with_packed_weights(graph, how))  # type: ignore[arg-type]
    assert packed.qualifies
    assert packed.clusters[0].zeros >= qualify(graph).clusters[0].zeros


def test_zeros_count_over_the_whole_cluster_and_must_be_more_than_two_thirds() -> None:
    assert qualify(mobile_net(zeros=0.68)).qualifies
    few = qualify(mobile_net(zeros=0.66))
    assert few.is_safe
    assert not few.qualifies
    assert few.clusters[0].problems == ()
    assert few.clusters[0].zeros_ratio == pytest.approx(0.66, abs=0.005)


def test_zeros_of_the_stem_and_of_depthwise_convolutions_do_not_count() -> None:
    cluster = qualify(mobile_net()).clusters[0]
    graph = mobile_net()
    pointwise = [
        graph.tensors[operator.inputs[1]].num_elements
        for operator in graph.operators
        if operator.kind == "CONV_2D" and graph.tensors[operator.inputs[1]].shape[1:3] == (1, 1)
    ]
    assert cluster.weights == sum(pointwise)
    assert len(cluster.convolutions) == len(pointwise)


def first_convolution(kernel: int, stride: int, channels: int, padding: str = "VALID") -> Graph:
    net = NhwcNet()
    x = net.input((1, 32, 32, channels))
    if padding == "VALID":
        x = net.pad(x, kernel // 2)
    x = net.conv(x, 16, kernel, stride, padding=padding, name="stem")
    x = net.mean(net.conv(windows(net, net.depthwise(x)), 64))
    return net.graph(net.reshape(x, (1, 64)))


@pytest.mark.parametrize(
    ("graph", "shown"),
    [
        (first_convolution(7, 2, 3), "7x7 with stride 2"),
        (first_convolution(3, 1, 3), "3x3 with stride 1"),
        (first_convolution(3, 2, 4), "reads 4 channels"),
        (first_convolution(3, 2, 3, "SAME"), "padding SAME"),
    ],
)
def test_without_a_stem_the_first_convolution_and_all_that_follows_is_named(graph: Graph, shown: str) -> None:
    report = qualify(graph)
    (cluster,) = report.clusters
    assert not cluster.has_stem
    assert [problem.node for problem in cluster.problems] == ["node stem", "node broken"]
    assert shown in cluster.problems[0].reason
    assert report.is_safe, "nothing can switch on without a stem"


def test_a_pad_that_two_convolutions_read_is_not_fused_and_makes_no_stem() -> None:
    net = NhwcNet()
    padded = net.pad(net.input((1, 32, 32, 3)), 1)
    both = [net.conv(padded, 16, 3, 2, name=name) for name in ("stem", "other")]
    x = net.mean(net.conv(net.binary("ADD", *both), 64))
    assert not qualify(net.graph(net.reshape(x, (1, 64)))).clusters[0].has_stem


def test_two_stems_that_meet_are_one_cluster() -> None:
    net = NhwcNet()
    both = [net.conv(net.pad(net.input((1, 32, 32, 3), name), 1), 16, 3, 2, name=f"stem {name}") for name in ("a", "b")]
    x = net.mean(net.conv(net.binary("ADD", *both), 64))
    (cluster,) = qualify(net.graph(net.reshape(x, (1, 64)))).clusters
    assert cluster.qualifies


def test_one_broken_cluster_makes_another_one_unsafe() -> None:
    net = NhwcNet()
    stems = [net.conv(net.pad(net.input((1, 32, 32, 3), name), 1), 16, 3, 2) for name in ("a", "b")]
    good = net.reshape(net.mean(net.conv(stems[0], 64)), (1, 64))
    bad = net.reshape(net.mean(net.conv(windows(net, stems[1]), 64)), (1, 64))
    report = qualify(net.graph(good, bad))
    assert sorted(cluster.qualifies for cluster in report.clusters) == [False, True]
    assert not report.is_safe
    assert not report.qualifies


def test_a_computed_weight_beside_a_cluster_is_not_safe() -> None:
    def end(net: NhwcNet, x: str) -> str:
        flat = net.reshape(net.mean(x), (1, 64))
        return net.op("FULLY_CONNECTED", [flat, net.input((10, 64), "weight"), net.bias(10, "b")], (1, 10), "scores")

    report = qualify(sandwich(end=end))
    assert report.clusters[0].qualifies
    assert [problem.node for problem in report.problems] == ["node scores"]
    assert not report.is_safe


def test_integers_have_no_sparse_kernels() -> None:
    graph = mobile_net()
    integer = replace(
        graph,
        tensors={
            name: replace(tensor, type="INT8") if tensor.constant is None else tensor
            for name, tensor in graph.tensors.items()
        },
    )
    problems = qualify(integer).clusters[0].problems
    assert {problem.reason for problem in problems} == {"there are no sparse kernels for integers"}


def test_a_model_without_convolutions_has_no_cluster() -> None:
    net = NhwcNet()
    assert qualify(net.graph(net.dense(net.input((1, 8)), 4))).clusters == ()
