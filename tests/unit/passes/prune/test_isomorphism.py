"""Isomorphic grouping: like is ranked against like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, helper

from onnxprune.contracts import CanonicalModel, PassOutcome
from onnxprune.passes.prune import PruneConfig, PrunePass
from onnxprune.passes.prune.analysis import analyze_channels
from onnxprune.passes.prune.isomorphism import isomorphic_sets
from tests.builders import canonical, proto_of

RunVerified = Callable[..., PassOutcome]


def network() -> CanonicalModel:
    """Stem, two residual blocks with 1x1 insides of 8 and 16 channels, one with a 3x3 inside, and a classifier.

    The insides of the first two blocks are alike, whatever their widths; the third's and the stream's are not.
    """
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {}
    nodes: list[NodeProto] = []

    def conv(data: str, name: str, shape: tuple[int, ...], scale: float = 1.0) -> str:
        weights[f"{name}.weight"] = (scale * rng.uniform(0.5, 1.5, shape)).astype(np.float32)
        pads = [shape[2] // 2] * 4
        nodes.append(helper.make_node("Conv", [data, f"{name}.weight"], [name], name=name, pads=pads))
        return name

    stream = conv("x", "stem", (8, 3, 1, 1))
    for index, (width, kernel) in enumerate([(8, 1), (16, 1), (8, 3)]):
        inside = conv(stream, f"in{index}", (width, 8, kernel, kernel))
        back = conv(inside, f"out{index}", (8, width, 1, 1))
        nodes.append(helper.make_node("Add", [stream, back], [f"sum{index}"], name=f"sum{index}"))
        stream = f"sum{index}"
    conv(stream, "y", (2, 8, 1, 1))
    return canonical(proto_of(nodes, inputs={"x": ["N", 3, 4, 4]}, outputs={"y": None}, weights=weights))


def test_groups_are_alike_by_operators_and_kernels_whatever_their_widths() -> None:
    classes = analyze_channels(network())
    free = [group for group in classes.groups if group.frozen_reason is None]
    sets = [tuple(group.id for group in alike) for alike in isomorphic_sets(classes, free)]
    assert sorted(sets) == [("in0.weight[0]", "in1.weight[0]"), ("in2.weight[0]",), ("stem.weight[0]",)]


def test_every_set_loses_the_same_part(run_verified: RunVerified) -> None:
    settings: dict[str, Any] = {"ratio": 0.5, "ranking": "global", "min_channels": 1, "channel_multiple": 1}
    outcome = run_verified(PrunePass(PruneConfig(grouping="isomorphic", **settings)), network())
    removed = {group.weight: len(group.removed) for group in outcome.plan.groups}
    assert (removed["stem.weight"], removed["in2.weight"]) == (4, 4)
    assert removed["in0.weight"] + removed["in1.weight"] == 12


def test_grouping_without_a_global_ranking_is_refused() -> None:
    with pytest.raises(ValueError, match="is for ranking = 'global'"):
        PruneConfig(grouping="isomorphic")
