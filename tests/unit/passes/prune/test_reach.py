"""How much pruning can reach: every parameter counted once, and put down to the reason that keeps it."""

from __future__ import annotations

import numpy as np
from onnx import helper

from onnxprune.contracts import CanonicalModel
from onnxprune.passes.prune import analyze_channels, channel_reach, summarize_channels
from tests.builders import canonical, conv_net, proto_of


def two_layers() -> CanonicalModel:
    """x (N,3,4,4) -> a: 8 filters, bias -> b: 5 filters, bias -> y."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "a", "a.bias"], ["h"], name="first"),
        helper.make_node("Conv", ["h", "b", "b.bias"], ["y"], name="second"),
    ]
    shapes = {"a": (8, 3, 1, 1), "a.bias": (8,), "b": (5, 8, 1, 1), "b.bias": (5,)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return canonical(proto_of(nodes, inputs={"x": ["N", 3, 4, 4]}, outputs={"y": None}, weights=weights))


def test_a_parameter_can_go_when_one_of_its_channels_can() -> None:
    model = two_layers()
    reach = channel_reach(model, analyze_channels(model))
    assert reach.parameters == 24 + 8 + 40 + 5
    # The last layer's weights go with the channels that they read; its biases stay.
    assert (reach.unreachable, reach.unlabelled) == (5, 0)


def test_the_summary_says_names_figures_and_reasons() -> None:
    model = two_layers()
    classes = analyze_channels(model)
    rows = summarize_channels(classes, channel_reach(model, classes))
    assert [(row.name, row.num_channels, row.parameters, row.unreachable_parameters) for row in rows] == [
        ("a[0]", 8, 24 + 8 + 40, 0),
        ("b[0]", 5, 40 + 5, 5),
    ]
    assert [row.frozen_reason for row in rows] == [None, "reaches the model's output 'y'"]
    assert [row.layers for row in rows] == [("first",), ("second",)]


def test_what_is_unreachable_adds_up_over_groups_and_weights_without_a_rule() -> None:
    model = conv_net()
    classes = analyze_channels(model)
    reach = channel_reach(model, classes)
    assert reach.unreachable == reach.unlabelled + sum(group.unreachable for group in reach.groups)
    assert 0 < reach.unreachable < reach.parameters
    for group, figures in zip(classes.groups, reach.groups, strict=True):
        assert figures.unreachable <= figures.parameters
        assert group.frozen_reason is not None or figures.unreachable == 0


def test_a_layer_between_frozen_neighbours_is_wholly_unreachable() -> None:
    weights = {"a": np.ones((4, 3, 1, 1), np.float32)}
    nodes = [helper.make_node("Conv", ["x", "a"], ["y"], name="only")]
    model = canonical(proto_of(nodes, inputs={"x": ["N", 3, 4, 4]}, outputs={"y": None}, weights=weights))
    reach = channel_reach(model, analyze_channels(model))
    assert (reach.parameters, reach.unreachable) == (12, 12)
