"""Chains of convolutions for tests that count widths."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, helper

from onnxprune.contracts import CanonicalModel
from tests.builders import canonical, proto_of


def chain(*channels: int, size: int = 8, kernel: int = 1, batch: int | str = "N") -> CanonicalModel:
    """x (N,3,size,size) -> convolutions of these widths, each but the last with a Relu -> y.

    Weights are w0, w1 ..., nodes conv0, relu0, conv1 ...
    """
    rng = np.random.default_rng(0)
    nodes: list[NodeProto] = []
    weights = {}
    source, incoming = "x", 3
    for index, width in enumerate(channels):
        scale = np.sqrt(2 / (incoming * kernel**2))
        weights[f"w{index}"] = (scale * rng.standard_normal((width, incoming, kernel, kernel))).astype(np.float32)
        pads = [kernel // 2] * 4
        nodes.append(helper.make_node("Conv", [source, f"w{index}"], [f"c{index}"], name=f"conv{index}", pads=pads))
        source, incoming = f"c{index}", width
        if index < len(channels) - 1:
            nodes.append(helper.make_node("Relu", [source], [f"r{index}"], name=f"relu{index}"))
            source = f"r{index}"
    return canonical(proto_of(nodes, inputs={"x": [batch, 3, size, size]}, outputs={source: None}, weights=weights))
