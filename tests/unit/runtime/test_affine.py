"""Floats as stored integers: the numbers of LiteRT's own QUANTIZE and DEQUANTIZE."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxprune.runtime.affine import real_values, stored_integers
from onnxprune.runtime.litert import litert_runner_from_path
from onnxprune.runtime.litert_file import LitertTensor
from tests.tflite_files import Node, Tensor, tflite_file

CASES = [
    (np.int8, 0.5847029, 83),
    (np.int8, 1.0, -128),
    (np.int8, 0.1, 0),
    (np.uint8, 0.0123, 3),
    (np.int16, 0.001, 0),
]


def converted(tmp_path: Path, operator: str, x: np.ndarray, source: Tensor, result: Tensor) -> np.ndarray:
    path = tmp_path / "convert.tflite"
    path.write_bytes(
        tflite_file(
            tensors={"x": source, "y": result},
            operators=[Node(name=operator, inputs=["x"], outputs=["y"])],
            inputs=["x"],
            outputs=["y"],
        )
    )
    return litert_runner_from_path(path, quantized_io="raw").run({"x": x})["y"]


@pytest.mark.parametrize(("dtype", "scale", "zero_point"), CASES)
def test_every_rounding_border_becomes_the_integer_that_litert_stores(
    tmp_path: Path, dtype: type[np.generic], scale: float, zero_point: int
) -> None:
    limits = np.iinfo(dtype)
    rng = np.random.default_rng(0)
    halves = (np.arange(limits.min, limits.max) + 0.5 - zero_point).astype(np.float32) * np.float32(scale)
    x = np.concatenate([halves, rng.normal(0, 80 * scale, 5000).astype(np.float32)])
    expected = converted(
        tmp_path,
        "QUANTIZE",
        x,
        Tensor(shape=x.shape, dtype=np.float32),
        Tensor(shape=x.shape, dtype=dtype, scales=(scale,), zero_point=zero_point),
    )
    tensor = LitertTensor(
        index=0,
        name="x",
        dtype=np.dtype(dtype).name,
        shape=x.shape,
        scales=(float(np.float32(scale)),),
        zero_points=(zero_point,),
    )
    np.testing.assert_array_equal(stored_integers(x, tensor), expected)
    back = converted(
        tmp_path,
        "DEQUANTIZE",
        expected,
        Tensor(shape=x.shape, dtype=dtype, scales=(scale,), zero_point=zero_point),
        Tensor(shape=x.shape, dtype=np.float32),
    )
    np.testing.assert_array_equal(real_values(expected, tensor), back)


def test_infinity_and_what_overflows_become_the_limits() -> None:
    tensor = LitertTensor(index=0, name="x", dtype="int8", shape=(4,), scales=(1e-3,), zero_points=(7,))
    x = np.array([np.inf, -np.inf, 3e38, -3e38], np.float32)
    np.testing.assert_array_equal(stored_integers(x, tensor), np.array([127, -128, 127, -128], np.int8))


def test_scales_of_an_axis_belong_to_its_indices() -> None:
    tensor = LitertTensor(index=0, name="x", dtype="int8", shape=(2, 2), scales=(1.0, 0.5), zero_points=(0, 10), axis=1)
    x = np.array([[3.0, 3.0], [-1.0, -1.0]], np.float32)
    stored = stored_integers(x, tensor)
    np.testing.assert_array_equal(stored, np.array([[3, 16], [-1, 8]], np.int8))
    np.testing.assert_array_equal(real_values(stored, tensor), x)
