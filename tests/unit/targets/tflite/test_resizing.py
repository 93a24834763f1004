"""Resize through LiteRT against ONNX Runtime, and when TFLite's own operators do it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxprune.errors import TargetError
from onnxprune.targets.tflite.ops.interpolation import Resampling, Sampled
from tests.tflite_runs import assert_same_as_ort, emitted, kinds, litert_outputs, one_node

# Weights are rounded to float32, ours after they are computed and the runtimes' on the way.
RELATIVE, ABSOLUTE = 1e-4, 1e-5

COORDINATES = ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric"]
ROUNDINGS = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]


def _x(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _to_sizes(x: np.ndarray, sizes: list[int], **attributes: Any) -> onnx.ModelProto:
    constants = {"sizes": np.array([*x.shape[:2], *sizes], np.int64)}
    return one_node("Resize", {"x": x}, constants=constants, inputs=["x", "", "", "sizes"], opset=19, **attributes)


def _by_scales(
    x: np.ndarray, scales: list[float], *, dynamic: tuple[int, ...] = (), **attributes: Any
) -> onnx.ModelProto:
    constants = {"scales": np.array([1, 1, *scales], np.float32)}
    inputs = ["x", "", "scales"]
    return one_node(
        "Resize", {"x": x}, constants=constants, inputs=inputs, dynamic={"x": dynamic}, opset=19, **attributes
    )


def _run(proto: onnx.ModelProto, x: np.ndarray) -> list[str]:
    return kinds(assert_same_as_ort(proto, {"x": x}, relative=RELATIVE, absolute=ABSOLUTE))


@pytest.mark.parametrize(("coordinates", "rounding"), list(itertools.product(COORDINATES, ROUNDINGS)))
def test_nearest_takes_the_pixels_that_onnx_runtime_takes(coordinates: str, rounding: str) -> None:
    x = _x(1, 2, 5, 8)
    attributes = {"mode": "nearest", "coordinate_transformation_mode": coordinates, "nearest_mode": rounding}
    for sizes in ([10, 16], [13, 5], [2, 8]):
        _run(_to_sizes(x, sizes, **attributes), x)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_interpolation_agrees_with_onnx_runtime(mode: str, coordinates: str) -> None:
    x = _x(2, 3, 5, 6)
    for sizes in ([10, 12], [7, 3], [5, 13]):
        _run(_to_sizes(x, sizes, mode=mode, coordinate_transformation_mode=coordinates), x)
    if coordinates != "align_corners":
        # There runtimes disagree on a length that was rounded.
        _run(_by_scales(x, [1.5, 0.7], mode=mode, coordinate_transformation_mode=coordinates), x)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_antialiased_interpolation_agrees_with_onnx_runtime(mode: str) -> None:
    x = _x(1, 2, 12, 9)
    _run(_to_sizes(x, [5, 4], mode=mode, antialias=1, exclude_outside=1), x)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5, 3)], ids=["one axis", "three axes"])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_one_or_three_axes_are_resized_two_at_a_time(shape: tuple[int, ...], mode: str) -> None:
    x = _x(*shape)
    found = _run(_by_scales(x, [2.0] * (len(shape) - 2), mode=mode), x)
    wanted = "RESIZE_BILINEAR" if mode == "linear" else "RESIZE_NEAREST_NEIGHBOR"
    assert found.count(wanted) == len(shape) // 2 - (len(shape) == 4)


@pytest.mark.parametrize(
    ("attributes", "wanted"),
    [
        ({"mode": "linear"}, "RESIZE_BILINEAR"),
        ({"mode": "linear", "coordinate_transformation_mode": "align_corners"}, "RESIZE_BILINEAR"),
        ({"mode": "linear", "coordinate_transformation_mode": "asymmetric"}, "RESIZE_BILINEAR"),
        ({"mode": "nearest"}, "RESIZE_NEAREST_NEIGHBOR"),
        (
            {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
            "RESIZE_NEAREST_NEIGHBOR",
        ),
        ({"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "ceil"}, "GATHER"),
        ({"mode": "cubic"}, "FULLY_CONNECTED"),
    ],
)
def test_doubling_takes_tflites_operator_where_it_computes_the_same(attributes: dict[str, str], wanted: str) -> None:
    x = _x(1, 3, 6, 5)
    found = set(_run(_to_sizes(x, [12, 10], **attributes), x))
    assert found - {"TRANSPOSE"} == {wanted}


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_whole_scales_need_no_size(mode: str) -> None:
    x = _x(2, 3, 5, 4)
    _run(_by_scales(x, [2, 3], dynamic=(0, 2, 3), mode=mode), x)


def test_fractional_scale_of_an_open_size_is_refused() -> None:
    with pytest.raises(TargetError, match="its scale is fractional"):
        emitted(_by_scales(_x(1, 1, 4, 4), [1.5, 1.5], dynamic=(2, 3), mode="linear"))


def test_sizes_computed_from_an_open_batch_are_inferred() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 19]> g (float[N,3,5,6] x) => (float[N,3,10,9] y)
        <int64[1] zero = {0}, int64[1] two = {2}, int64[2] wanted = {10, 9}> {
            shape = Shape(x)
            kept = Slice(shape, zero, two)
            sizes = Concat<axis=0>(kept, wanted)
            y = Resize<mode="linear">(x, , , sizes)
        }"""
    )
    found = _run(proto, _x(2, 3, 5, 6))
    assert "RESIZE_BILINEAR" in found


def test_region_is_cut_out_and_what_lies_outside_gets_the_extrapolation_value() -> None:
    x = _x(1, 2, 5, 6)
    constants = {
        "roi": np.array([0, 0, -0.2, 0.3, 1, 1, 0.8, 1.4], np.float32),
        "sizes": np.array([1, 2, 4, 5], np.int64),
    }
    attributes = {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 7.5}
    for mode in ("linear", "nearest"):
        proto = one_node(
            "Resize", {"x": x}, constants=constants, inputs=["x", "roi", "", "sizes"], opset=19, mode=mode, **attributes
        )
        _run(proto, x)


def _doubled(x: np.ndarray, mode: str, output_type: int) -> onnx.ModelProto:
    constants, inputs = {"scales": np.array([1, 1, 2, 2], np.float32)}, ["x", "", "scales"]
    return one_node(
        "Resize", {"x": x}, constants=constants, inputs=inputs, output_type=output_type, opset=19, mode=mode
    )


def test_interpolation_of_integers_is_refused_because_runtimes_disagree_on_rounding() -> None:
    with pytest.raises(TargetError, match="are rounded"):
        emitted(_doubled(np.zeros((1, 1, 4, 4), np.uint8), "linear", onnx.TensorProto.UINT8))


def test_nearest_of_integers_keeps_all_their_bits() -> None:
    x = np.arange(20, dtype=np.int64).reshape(1, 1, 4, 5) + 2**40
    found = litert_outputs(emitted(_doubled(x, "nearest", onnx.TensorProto.INT64)), {"x": x})["y"]
    np.testing.assert_array_equal(found, x.repeat(2, axis=2).repeat(2, axis=3))


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("is_antialiased", [False, True])
def test_weights_add_up_to_one(mode: str, is_antialiased: bool) -> None:
    how = Resampling(
        mode=mode,
        coordinates="half_pixel",
        rounding="floor",
        cubic_a=-0.75,
        is_antialiased=is_antialiased,
        excludes_outside=True,
    )
    weights = how.weights(Sampled(axis=0, size=9, output=4, scale=4 / 9, width=4.0))
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)
