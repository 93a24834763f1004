"""Operators that let a positive factor for each channel through do so in ONNX Runtime; others are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from onnxprune.ops.homogeneous import HOMOGENEOUS, passes_channel_factors
from tests.builders import canonical, proto_of
from tests.layerwise import normal, outputs

FACTORS = np.array([0.25, 1.0, 3.0, 50.0], np.float32).reshape(1, -1, 1, 1)

CASES: dict[str, tuple[str, list[str], dict[str, Any], dict[str, Any]]] = {
    "Relu": ("Relu", ["x"], {}, {}),
    "LeakyRelu": ("LeakyRelu", ["x"], {"alpha": 0.2}, {}),
    "PRelu": ("PRelu", ["x", "slope"], {}, {"slope": normal(4, 1, 1)}),
    "Identity": ("Identity", ["x"], {}, {}),
    "AveragePool": ("AveragePool", ["x"], {"kernel_shape": [2, 2]}, {}),
    "GlobalAveragePool": ("GlobalAveragePool", ["x"], {}, {}),
    "GlobalMaxPool": ("GlobalMaxPool", ["x"], {}, {}),
    "MaxPool": ("MaxPool", ["x"], {"kernel_shape": [2, 2]}, {}),
    "Dropout": ("Dropout", ["x"], {}, {}),
    "Pad": ("Pad", ["x", "pads"], {}, {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)}),
    "Resize": ("Resize", ["x", "", "scales"], {"mode": "linear"}, {"scales": np.array([1, 1, 2, 2], np.float32)}),
    "ReduceMean": ("ReduceMean", ["x", "axes"], {}, {"axes": np.array([2, 3], np.int64)}),
    "ReduceMax": ("ReduceMax", ["x", "axes"], {}, {"axes": np.array([2, 3], np.int64)}),
    "Flatten": ("Flatten", ["x"], {}, {}),
    "Reshape": ("Reshape", ["x", "shape"], {}, {"shape": np.array([1, 4], np.int64)}),
    "Squeeze": ("Squeeze", ["x", "axes"], {}, {"axes": np.array([2, 3], np.int64)}),
}


def model_of(case: tuple[str, list[str], dict[str, Any], dict[str, Any]]) -> tuple[Any, ir.Node]:
    op_type, inputs, attributes, constants = case
    side = 1 if op_type in ("Flatten", "Reshape", "Squeeze") else 6
    # Two nodes, so that nothing is folded into an output.
    nodes = [
        helper.make_node(op_type, inputs, ["t"], name="node", **attributes),
        helper.make_node("Neg", ["t"], ["y"], name="last"),
    ]
    rank = 2 if side == 1 else 4
    proto = proto_of(nodes, inputs={"x": (1, 4, side, side)}, outputs={"y": [None] * rank}, weights=constants)
    model = canonical(proto)
    found = [node for node in model.graph if node.name == "node"]
    return model, found[0] if found else next(iter(model.graph))


def test_every_row_has_a_case() -> None:
    assert {key.op_type for key in list(HOMOGENEOUS.keys())} == set(CASES)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("Identity", "Dropout")])
def test_a_factor_goes_through(name: str) -> None:
    model, node = model_of(CASES[name])
    (given,) = model.graph.inputs
    data = normal(*given.shape.numpy(), scale=1.0)

    assert passes_channel_factors(node) is None

    plain, scaled = outputs(model, {"x": data}), outputs(model, {"x": data * FACTORS})
    np.testing.assert_allclose(scaled, plain * FACTORS.reshape((1, 4) + (1,) * (plain.ndim - 2)), rtol=1e-5)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (("Sigmoid", ["x"], {}, {}), "Sigmoid does not let a factor for each channel through"),
        (
            ("Pad", ["x", "pads", "one"], {}, {"pads": np.array([0] * 7 + [1], np.int64), "one": np.float32(1)}),
            "its padding value is not zero",
        ),
        (
            ("Pad", ["x", "pads"], {}, {"pads": np.array([0, 1, 0, 0, 0, 0, 0, 0], np.int64)}),
            "it pads channels, or their number is not known",
        ),
        (
            ("ReduceMean", ["x", "axes"], {}, {"axes": np.array([1, 2], np.int64)}),
            "it does not reduce exactly the spatial axes",
        ),
        (
            ("Resize", ["x", "", "scales"], {}, {"scales": np.array([1, 2, 1, 1], np.float32)}),
            "it resizes channels, or their number is not known",
        ),
        (
            ("Reshape", ["x", "shape"], {}, {"shape": np.array([1, 144, 1, 1], np.int64)}),
            "it may move numbers between channels",
        ),
    ],
    ids=["Sigmoid", "Pad of ones", "Pad of channels", "ReduceMean of channels", "Resize of channels", "Reshape"],
)
def test_what_crosses_channels_or_is_not_homogeneous_is_refused(case: Any, reason: str) -> None:
    op_type, inputs, attributes, constants = case
    node = helper.make_node(op_type, inputs, ["t"], name="node", **attributes)
    last = helper.make_node("Neg", ["t"], ["y"], name="last")
    proto = proto_of([node, last], inputs={"x": (1, 4, 6, 6)}, outputs={"y": None}, weights=constants)
    found = next(item for item in canonical(proto).graph if item.name == "node")
    assert passes_channel_factors(found) == reason
