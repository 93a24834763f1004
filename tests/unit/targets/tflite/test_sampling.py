"""GridSample, RoiAlign, blocks of pixels and columns through LiteRT against ONNX Runtime."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxprune.errors import TargetError
from tests.tflite_runs import assert_same_as_ort, emitted, kinds, litert_outputs, one_node

# Coordinates are rounded before their fractions become weights.
RELATIVE, ABSOLUTE = 1e-4, 5e-5


def _numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("mode", "padding", "is_aligned"),
    [
        case
        for case in itertools.product(["linear", "nearest", "cubic"], ["zeros", "border", "reflection"], [0, 1])
        if case[:2] != ("cubic", "border")
    ],
)
def test_grid_sampling_agrees_with_onnx_runtime(mode: str, padding: str, is_aligned: int) -> None:
    # Far outside as well.
    feeds = {"x": _numbers(2, 3, 5, 6), "grid": np.clip(_numbers(2, 4, 7, 2, seed=1), -2.5, 2.5)}
    attributes = {"mode": mode, "padding_mode": padding, "align_corners": is_aligned}
    proto = one_node("GridSample", feeds, dynamic={"x": (0,), "grid": (0,)}, opset=20, **attributes)
    assert_same_as_ort(proto, feeds, relative=RELATIVE, absolute=ABSOLUTE)


def test_cubic_grid_sampling_with_a_border_is_refused_because_runtimes_disagree() -> None:
    feeds = {"x": _numbers(1, 1, 4, 4), "grid": _numbers(1, 2, 2, 2)}
    with pytest.raises(TargetError, match="runtimes disagree on cubic samples"):
        emitted(one_node("GridSample", feeds, opset=20, mode="cubic", padding_mode="border"))


def test_grid_sampling_of_an_image_of_open_size_is_refused() -> None:
    feeds = {"x": _numbers(1, 1, 4, 4), "grid": _numbers(1, 2, 2, 2)}
    with pytest.raises(TargetError, match="depends on the size of its input"):
        emitted(one_node("GridSample", feeds, dynamic={"x": (2, 3)}, opset=20))


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "output_half_pixel"])
def test_regions_agree_with_onnx_runtime(mode: str, coordinates: str) -> None:
    feeds = {
        "x": np.abs(_numbers(2, 3, 8, 9)),
        "rois": np.array([[0, 0, 12, 10], [3.3, 2.1, 17, 15], [-4, -3, 5, 40], [6, 6, 6.2, 6.1]], np.float32),
        "batch": np.array([0, 1, 1, 0], np.int64),
    }
    attributes = {
        "output_height": 3,
        "output_width": 2,
        "sampling_ratio": 2,
        "spatial_scale": 0.5,
        "mode": mode,
        "coordinate_transformation_mode": coordinates,
    }
    proto = one_node("RoiAlign", feeds, dynamic={"rois": (0,), "batch": (0,)}, opset=21, **attributes)
    assert_same_as_ort(proto, feeds, relative=RELATIVE, absolute=ABSOLUTE)


def test_regions_with_as_many_samples_as_each_needs_are_refused() -> None:
    feeds = {"x": _numbers(1, 1, 4, 4), "rois": _numbers(1, 4), "batch": np.zeros(1, np.int64)}
    with pytest.raises(TargetError, match="sampling_ratio 0"):
        emitted(one_node("RoiAlign", feeds, opset=21))


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
@pytest.mark.parametrize("channels", [4, 12])
def test_blocks_of_channels_become_blocks_of_pixels(mode: str, channels: int) -> None:
    feeds = {"x": _numbers(2, channels, 3, 5)}
    proto = one_node("DepthToSpace", feeds, dynamic={"x": (0, 2, 3)}, blocksize=2, mode=mode)
    found = kinds(assert_same_as_ort(proto, feeds, relative=0, absolute=0))
    assert ("GATHER" in found) == (mode == "CRD" and channels > 4)


def test_blocks_of_pixels_become_blocks_of_channels() -> None:
    feeds = {"x": _numbers(2, 3, 4, 6)}
    proto = one_node("SpaceToDepth", feeds, dynamic={"x": (0,)}, blocksize=2)
    assert_same_as_ort(proto, feeds, relative=0, absolute=0)


def test_columns_of_an_open_batch_are_summed_where_their_blocks_overlap() -> None:
    feeds = {"x": _numbers(2, 3 * 6, 4 * 3)}
    constants = {"image": np.array([7, 6], np.int64), "block": np.array([3, 2], np.int64)}
    attributes = {"strides": [2, 2], "pads": [1, 0, 1, 1], "dilations": [1, 2]}
    proto = one_node("Col2Im", feeds, constants=constants, dynamic={"x": (0,)}, **attributes)
    assert_same_as_ort(proto, feeds, relative=RELATIVE, absolute=ABSOLUTE)


@pytest.mark.parametrize("is_masked", [False, True])
def test_deformable_convolution_without_offsets_is_a_convolution(is_masked: bool) -> None:
    x, weight, bias = _numbers(2, 4, 6, 7), _numbers(6, 2, 3, 3, seed=1), _numbers(6, seed=2)
    attributes = {"pads": [1, 1, 1, 1], "strides": [2, 1], "group": 2}
    feeds = {"x": x, "offset": np.zeros((2, 2 * 18, 3, 7), np.float32)}
    constants = {"weight": weight, "bias": bias}
    inputs = ["x", "weight", "offset", "bias"]
    if is_masked:
        constants["mask"] = np.full((2, 2 * 9, 3, 7), 0.5, np.float32)
        inputs.append("mask")
    proto = one_node("DeformConv", feeds, constants=constants, inputs=inputs, opset=19, offset_group=2, **attributes)
    plain = one_node(
        "Conv", {"x": x}, constants={"weight": weight * (0.5 if is_masked else 1), "bias": bias}, **attributes
    )
    wanted = litert_outputs(emitted(plain), {"x": x})["y"]
    found = litert_outputs(emitted(proto), feeds)["y"]
    np.testing.assert_allclose(found, wanted, rtol=RELATIVE, atol=ABSOLUTE)
