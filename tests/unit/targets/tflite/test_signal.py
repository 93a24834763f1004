"""Fourier transforms in LiteRT against onnx's reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx.reference import ReferenceEvaluator

pytest.importorskip("ai_edge_litert")

from onnxprune.errors import TargetError
from tests.tflite_runs import emitted, kinds, litert_outputs, one_node

Array = npt.NDArray[Any]
# A sum of some dozens of numbers around 1.
TOLERANCES = {"rtol": 1e-4, "atol": 1e-5}


def noise(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("axis", [1, 2, -2])
@pytest.mark.parametrize("length", [None, 4, 5, 9])
@pytest.mark.parametrize(
    ("parts", "attributes"),
    [
        (1, {}),
        (1, {"onesided": 1}),
        (2, {}),
        (2, {"inverse": 1}),
        (2, {"inverse": 1, "onesided": 1}),
    ],
    ids=str,
)
def test_transform_along_any_axis_padded_or_cut(
    axis: int, length: int | None, parts: int, attributes: dict[str, int]
) -> None:
    feeds = {"x": noise(2, 6, 5, parts)}
    constants = {"axis": np.array(axis), **({} if length is None else {"length": np.array(length)})}
    inputs = ["x", "length" if length else "", "axis"]
    proto = one_node("DFT", feeds, constants=constants, inputs=inputs, opset=20, dynamic={"x": [0]}, **attributes)
    model = emitted(proto)
    (expected,) = ReferenceEvaluator(proto).run(None, feeds)
    np.testing.assert_allclose(litert_outputs(model, feeds)["y"], expected, **TOLERANCES)
    assert kinds(model).count("FULLY_CONNECTED") == 1


@pytest.mark.parametrize("has_window", [True, False])
@pytest.mark.parametrize(("parts", "onesided"), [(1, 1), (1, 0), (2, 0)])
def test_short_time_transform_is_one_convolution(has_window: bool, parts: int, onesided: int) -> None:
    feeds = {"x": noise(2, 100, parts)}
    constants = {"step": np.array(10), "window": noise(16), "length": np.array(16)}
    inputs = ["x", "step", "window"] if has_window else ["x", "step", "", "length"]
    given = {name: constants[name] for name in inputs if name in constants}
    proto = one_node("STFT", feeds, constants=given, inputs=inputs, opset=18, dynamic={"x": [0]}, onesided=onesided)
    model = emitted(proto)
    (expected,) = ReferenceEvaluator(proto).run(None, feeds)
    np.testing.assert_allclose(litert_outputs(model, feeds)["y"], expected, **TOLERANCES)
    assert kinds(model) == ["RESHAPE", "CONV_2D", "RESHAPE"]


def test_transform_whose_matrix_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(TargetError, match="would be a matrix of 65536 x 32768"):
        emitted(
            one_node(
                "DFT",
                {"x": np.zeros((1, 32768, 1), np.float32)},
                constants={"axis": np.array(1)},
                inputs=["x", "", "axis"],
                opset=20,
            )
        )


def test_signal_of_open_length_is_refused() -> None:
    with pytest.raises(TargetError, match="the length of the signal is known only when the model runs"):
        emitted(one_node("DFT", {"x": noise(1, 8, 1)}, opset=20, dynamic={"x": [1]}))
