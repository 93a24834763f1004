"""One small network as an ONNX model and as the `.tflite` file that an emitter would make of it."""

from __future__ import annotations

import json

import numpy as np
import onnx
from onnx import helper

from tests.builders import proto_of
from tests.tflite_files import Node, Tensor, tflite_file

CHANNELS_LAST = [0, 2, 3, 1]


def _weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "b": rng.standard_normal(4).astype(np.float32),
        "g": rng.standard_normal((5, 4)).astype(np.float32),
        "h": rng.standard_normal(5).astype(np.float32),
    }


def onnx_twin(height: int | str = 8, width: int | str = 8) -> onnx.ModelProto:
    """Conv 3x3, Relu, mean over the picture, Gemm: 'x' Nx3x8x8 -> 'y' Nx5, with 'c', 'r' and 'm' inside."""
    return proto_of(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv"),
            helper.make_node("Relu", ["c"], ["r"], name="relu"),
            helper.make_node("ReduceMean", ["r", "axes"], ["m"], name="mean", keepdims=0),
            helper.make_node("Gemm", ["m", "g", "h"], ["y"], name="gemm", transB=1),
        ],
        inputs={"x": ("N", 3, height, width)},
        outputs={"y": ("N", 5)},
        weights={**_weights(), "axes": np.array([2, 3], np.int64)},
    )


def tflite_twin(*, noise: float = 0.0, provenance: str = "{}") -> bytes:
    """The same with channels last, its layouts in the metadata, and `noise` on the weight of the convolution."""
    weights = _weights()
    kernel = weights["w"] + noise * np.random.default_rng(6).standard_normal(weights["w"].shape).astype(np.float32)
    f32 = np.float32
    constants = {
        "w": kernel.transpose(0, 2, 3, 1),
        "b": weights["b"],
        "g": weights["g"],
        "h": weights["h"],
    }
    tensors = {
        "x": Tensor(shape=(1, 8, 8, 3), open_shape=(-1, 8, 8, 3), dtype=f32),
        **{name: Tensor(shape=array.shape, dtype=f32, data=array) for name, array in constants.items()},
        "axes": Tensor(shape=(2,), dtype=np.int32, data=np.array([1, 2])),
        "c": Tensor(shape=(1, 6, 6, 4), open_shape=(-1, 6, 6, 4), dtype=f32),
        "r": Tensor(shape=(1, 6, 6, 4), open_shape=(-1, 6, 6, 4), dtype=f32),
        "m": Tensor(shape=(1, 4), open_shape=(-1, 4), dtype=f32),
        "scaled": Tensor(shape=(1, 4), open_shape=(-1, 4), dtype=f32),
        "one": Tensor(shape=(1,), dtype=f32, data=np.ones(1)),
        "y": Tensor(shape=(1, 5), open_shape=(-1, 5), dtype=f32),
    }
    conv = {"padding": 1, "strideH": 1, "strideW": 1, "dilationHFactor": 1, "dilationWFactor": 1}
    return tflite_file(
        tensors=tensors,
        operators=[
            Node(name="CONV_2D", inputs=["x", "w", "b"], outputs=["c"], options_type="Conv2DOptions", options=conv),
            Node(name="RELU", inputs=["c"], outputs=["r"]),
            Node(name="MEAN", inputs=["r", "axes"], outputs=["m"], options_type="ReducerOptions"),
            # An operator that the ONNX model does not have.
            Node(name="MUL", inputs=["m", "one"], outputs=["scaled"], options_type="MulOptions"),
            Node(
                name="FULLY_CONNECTED", inputs=["scaled", "g", "h"], outputs=["y"], options_type="FullyConnectedOptions"
            ),
        ],
        inputs=["x"],
        outputs=["y"],
        signatures={"serving_default": {"x": "x", "y": "y"}},
        metadata={
            "onnxprune": provenance.encode(),
            "onnxprune.layouts": json.dumps(dict.fromkeys(("x", "c", "r"), CHANNELS_LAST)).encode(),
        },
    )
