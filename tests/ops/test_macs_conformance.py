"""The MACs table against the list of all ONNX operators, and against published counts."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import defs, helper

from onnxprune.graph.canonical import CanonicalModel
from onnxprune.ops.macs import MACS, count_macs
from tests.builders import canonical, proto_of
from tests.light import light_topology

OPSET = 24

# Counted by what their bodies do, by nothing (how often a body runs is unknown), or not at all (transforms, losses).
WITHOUT_A_ROW = {
    "DFT",
    "Det",
    "If",
    "Loop",
    "NegativeLogLikelihoodLoss",
    "STFT",
    "Scan",
    "SequenceMap",
    "SoftmaxCrossEntropyLoss",
}


def test_every_onnx_operator_has_a_row_or_is_known_to_be_left_out() -> None:
    names = {
        schema.name
        for schema in defs.get_all_schemas_with_history()
        if schema.domain == "" and schema.since_version <= OPSET
    }
    assert {name for name in names if MACS.find("", name, OPSET) is None} == WITHOUT_A_ROW


# Millions of MACs for one 224x224 image as published, and how far the rounding of the publication goes.
PUBLISHED = {
    "resnet50": (4090, 5),  # torchvision's model table: 4.09 (stride in the 3x3 convolution)
    "vgg19": (19_600, 50),  # 19.6e9, Huang et al. 2017 and others, model E of Simonyan and Zisserman 2015
    "densenet121": (2830, 5),  # torchvision: 2.83
    "squeezenet": (350, 5),  # torchvision, SqueezeNet 1.1: 0.35
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_macs_of_known_topologies_equal_the_published_counts(name: str) -> None:
    millions, rounding = PUBLISHED[name]
    total = count_macs(light_topology(name)).total
    assert total is not None
    assert abs(total / 1e6 - millions) <= rounding


def test_macs_of_mobilenet_v2_equal_the_published_count() -> None:
    total = count_macs(mobilenet_v2()).total
    assert total is not None
    # Sandler et al. 2018, table 4: 300 million multiply-adds.
    assert abs(total / 1e6 - 300) <= 1


def mobilenet_v2() -> CanonicalModel:
    """Table 2 of Sandler et al. 2018 at 224x224, without BatchNorm."""
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, np.ndarray] = {}

    def conv(source: str, filters: tuple[int, ...], *, stride: int = 1, group: int = 1) -> str:
        name = f"c{len(nodes)}"
        weights[f"{name}.weight"] = np.zeros(filters, np.float32)
        pads = [filters[2] // 2] * 4
        nodes.append(
            helper.make_node(
                "Conv", [source, f"{name}.weight"], [name], name=name, strides=[stride] * 2, pads=pads, group=group
            )
        )
        return name

    feature, width = conv("x", (32, 3, 3, 3), stride=2), 32
    for expansion, out, repeats, stride in [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]:
        for repeat in range(repeats):
            hidden = width * expansion
            inner = conv(feature, (hidden, width, 1, 1)) if expansion > 1 else feature
            inner = conv(inner, (hidden, 1, 3, 3), stride=stride if repeat == 0 else 1, group=hidden)
            feature, width = conv(inner, (out, hidden, 1, 1)), out
    feature = conv(feature, (1280, 320, 1, 1))
    nodes.append(helper.make_node("GlobalAveragePool", [feature], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", "last"], ["y"], transB=1))
    weights["last"] = np.zeros((1000, 1280), np.float32)
    return canonical(proto_of(nodes, inputs={"x": [1, 3, 224, 224]}, outputs={"y": None}, weights=weights))
