"""What `Preprocess` accepts, and that pictures become exactly what torchvision makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from pydantic import ValidationError

from onnxprune.contracts import TensorSpec
from onnxprune.data.preprocess import Preprocess, image_to_sample, pixels_to_sample, resolve_image_input
from onnxprune.errors import BadDataError, UsageError

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
RAW = {"scale": 1.0}  # float inputs get pixel values as they are, which keeps expectations readable


def spec(*shape: int | str | None, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name="image", dtype=dtype, shape=shape)


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prepared(image: Image.Image, into: TensorSpec, **settings: Any) -> npt.NDArray[Any]:
    preprocess = Preprocess(**settings)
    return image_to_sample(image, preprocess, resolve_image_input(into, preprocess), where="'a.png'")


# --- settings -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BadSetting:
    id: str
    settings: dict[str, Any]
    says: str


BAD_SETTINGS = [
    BadSetting("unknown key", {"rezise": 3}, "Extra inputs are not permitted"),
    BadSetting("two resizes", {"resize": 8, "letterbox": [8, 8]}, "'resize' and 'letterbox' exclude each other"),
    BadSetting("letterbox and crop", {"letterbox": [8, 8], "center_crop": 4}, "'center_crop' would cut the frame"),
    BadSetting("fill without letterbox", {"fill": 0}, "'fill' is the frame of 'letterbox'"),
    BadSetting("std of zero", {"std": [1, 0, 1]}, "'std' must not hold 0"),
    BadSetting("lengths", {"mean": [1, 2, 3], "std": 2}, "'mean' has 3 values and 'std' has 1"),
    BadSetting("two channels", {"mean": [1, 2]}, "one number, or three numbers"),
    BadSetting("NaN mean", {"mean": [float("nan")]}, "one number, or three numbers"),
    BadSetting("gray with three", {"channel_order": "gray", "mean": [1, 2, 3]}, "'channel_order' gray has one channel"),
    BadSetting("crop above short side", {"resize": 200, "center_crop": 224}, "'center_crop' 224x224 is larger"),
    BadSetting("crop above exact size", {"resize": [300, 200], "center_crop": [250, 224]}, "'center_crop' 250x224"),
    BadSetting("lanczos alone", {"interpolation": "lanczos", "antialias": False}, "without 'antialias'"),
    BadSetting("zero side", {"resize": 0}, "a side must be a whole number from 1"),
    BadSetting("boolean side", {"resize": True}, "a side must be a whole number from 1"),
    BadSetting("three sides", {"resize": [1, 2, 3]}, "must be [height, width]"),
    BadSetting("negative scale", {"scale": -1}, "greater than 0"),
    BadSetting("fill too bright", {"letterbox": [8, 8], "fill": 256}, "less than or equal to 255"),
]


@pytest.mark.parametrize("case", BAD_SETTINGS, ids=lambda case: case.id)
def test_settings_that_contradict_each_other_are_refused(case: BadSetting) -> None:
    with pytest.raises(ValidationError) as caught:
        Preprocess(**case.settings)
    assert case.says in str(caught.value)


def test_settings_survive_json() -> None:
    given = Preprocess(letterbox=(8, 16), fill=3, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0), channel_order="bgr")
    assert Preprocess.model_validate(given.model_dump(mode="json")) == given
    assert Preprocess.model_validate(Preprocess().model_dump(mode="json")) == Preprocess()


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Preprocess.model_fields.values())


# --- which axes and channels an input has ----------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    id: str
    spec: TensorSpec
    layout: str
    order: str
    size: tuple[int | None, int | None]


LAYOUTS = [
    Layout("NCHW", spec(1, 3, 8, 9), "chw", "rgb", (8, 9)),
    Layout("NHWC", spec("batch", 8, 9, 3), "hwc", "rgb", (8, 9)),
    Layout("dynamic sides", spec(None, 3, None, "width"), "chw", "rgb", (None, None)),
    Layout("gray NCHW", spec(1, 1, 28, 28), "chw", "gray", (28, 28)),
    Layout("gray NHWC", spec(1, 96, 96, 1), "hwc", "gray", (96, 96)),
    Layout("without batch axis", spec(3, 8, 9), "chw", "rgb", (8, 9)),
    Layout("HWC without batch axis", spec(8, 9, 3), "hwc", "rgb", (8, 9)),
    Layout("gray without channel axis", spec("batch", 28, 28), "hw", "gray", (28, 28)),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.id)
def test_layout_and_channel_order_are_told_from_the_shape(case: Layout) -> None:
    target = resolve_image_input(case.spec, Preprocess())
    assert (target.layout, target.order, (target.height, target.width)) == (case.layout, case.order, case.size)


@pytest.mark.parametrize("shape", [(1, 3, 8, 3), (None, None, None, None), (1, 16, 8, 8)])
def test_shape_that_shows_no_channel_axis_asks_for_the_layout(shape: tuple[int | None, ...]) -> None:
    with pytest.raises(UsageError, match=r"can't be told .* Set preprocess\.layout"):
        resolve_image_input(spec(*shape), Preprocess())


def test_given_layout_decides_where_the_shape_does_not() -> None:
    assert resolve_image_input(spec(1, 3, 8, 3), Preprocess(layout="nhwc")).layout == "hwc"
    assert resolve_image_input(spec(None, None, None, None), Preprocess(layout="nchw")).layout == "chw"


@dataclass(frozen=True)
class BadInput:
    id: str
    spec: TensorSpec
    settings: dict[str, Any]
    says: str


BAD_INPUTS = [
    BadInput("tokens", spec(1, 128, dtype="int64"), {}, "does not take pictures"),
    BadInput("unknown rank", TensorSpec(name="image", dtype="float32", shape=None), {}, "does not take pictures"),
    BadInput("text", spec(1, 3, 8, 8, dtype="object"), {}, "is of type object"),
    BadInput("int8", spec(1, 3, 8, 8, dtype="int8"), {}, "how pixels (0 to 255) map to it is not known"),
    BadInput("rgb for gray", spec(1, 1, 8, 8), {"channel_order": "rgb"}, "has 1 channels, but channel_order 'rgb'"),
    BadInput("gray for rgb", spec(1, 3, 8, 8), {"channel_order": "gray"}, "has 3 channels, but channel_order 'gray'"),
    BadInput("means for gray", spec(1, 1, 8, 8), {"mean": [1, 2, 3]}, "has one channel"),
    BadInput("mean for bytes", spec(1, 3, 8, 8, dtype="uint8"), {"mean": 1}, "takes pixels as they are"),
]


@pytest.mark.parametrize("case", BAD_INPUTS, ids=lambda case: case.id)
def test_settings_that_contradict_the_input_are_refused_by_name(case: BadInput) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_image_input(case.spec, Preprocess(**case.settings))
    assert "'image'" in str(caught.value)
    assert case.says in str(caught.value)


# --- values ----------------------------------------------------------------------------------------------------


def torchvision_classic(image: Image.Image) -> npt.NDArray[np.float32]:
    """Resize(256), CenterCrop(224), ToTensor, Normalize, written out as torchvision does them on PIL images."""
    width, height = image.size
    if width <= height:
        image = image.resize((256, int(256 * height / width)), Image.Resampling.BILINEAR)
    else:
        image = image.resize((int(256 * width / height), 256), Image.Resampling.BILINEAR)
    left, top = round((image.width - 224) / 2.0), round((image.height - 224) / 2.0)
    image = image.crop((left, top, left + 224, top + 224))
    values = np.asarray(image).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    mean, std = (np.asarray(v, dtype=np.float32)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (values - mean) / std


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (256, 256), (90, 131)])
def test_short_side_256_and_crop_224_give_the_bits_of_torchvision(height: int, width: int) -> None:
    image = photo(height, width)
    found = prepared(image, spec(1, 3, 224, 224), resize=256, center_crop=224, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    np.testing.assert_array_equal(found, torchvision_classic(image))


def test_default_scale_maps_white_to_one_and_bytes_stay_bytes() -> None:
    white = Image.new("RGB", (4, 4), (255, 255, 255))
    assert prepared(white, spec(1, 3, 4, 4)).max() == np.float32(1)
    raw = prepared(white, spec(1, 3, 4, 4, dtype="uint8"))
    assert raw.dtype == np.uint8
    assert raw.min() == 255


def test_mean_and_std_are_applied_after_scale_in_channel_order() -> None:
    pixel = Image.new("RGB", (5, 5), (10, 20, 30))
    found = prepared(pixel, spec(1, 3, 5, 5), scale=0.5, mean=[1, 2, 3], std=[2, 4, 8], channel_order="bgr")
    np.testing.assert_array_equal(found[:, 0, 0], np.float32([(15 - 1) / 2, (10 - 2) / 4, (5 - 3) / 8]))


def test_exact_size_stretches_and_layouts_hold_the_same_pixels() -> None:
    image = photo(10, 20)
    chw = prepared(image, spec(1, 3, 5, 7), resize=[5, 7], **RAW)
    hwc = prepared(image, spec(1, 5, 7, 3), resize=[5, 7], **RAW)
    np.testing.assert_array_equal(chw, np.asarray(image.resize((7, 5), Image.Resampling.BILINEAR)).transpose(2, 0, 1))
    np.testing.assert_array_equal(chw.transpose(1, 2, 0), hwc)


def test_gray_input_takes_colour_pictures_as_pillow_greys_them() -> None:
    image = photo(6, 6)
    found = prepared(image, spec("batch", 6, 6), **RAW)
    np.testing.assert_array_equal(found, np.asarray(image.convert("L")))


def test_letterbox_keeps_the_aspect_ratio_and_fills_evenly() -> None:
    white = Image.new("RGB", (20, 10), (255, 255, 255))
    found = prepared(white, spec(1, 3, 8, 8), letterbox=[8, 8], **RAW)[0]
    np.testing.assert_array_equal(found[:2], 114)
    np.testing.assert_array_equal(found[2:6], 255)
    np.testing.assert_array_equal(found[6:], 114)


def test_letterbox_gives_an_odd_rest_to_the_bottom_and_takes_a_fill() -> None:
    white = Image.new("RGB", (8, 5), (255, 255, 255))
    rows = prepared(white, spec(1, 3, 8, 8), letterbox=[8, 8], fill=7, **RAW)[0, :, 0]
    assert rows.tolist() == [7, 255, 255, 255, 255, 255, 7, 7]


def test_without_antialias_shrinking_looks_at_the_nearest_pixels_only() -> None:
    image = photo(12, 12)
    found = prepared(image, spec(1, 3, 4, 4), resize=[4, 4], antialias=False, **RAW)
    # Half-pixel centres: output i looks at input 3 * (i + 0.5) - 0.5 = 3 * i + 1, a whole pixel.
    np.testing.assert_array_equal(found, np.asarray(image)[1::3, 1::3].transpose(2, 0, 1))


def test_half_precision_input_gets_half_precision_values() -> None:
    assert prepared(photo(4, 4), spec(1, 3, 4, 4, dtype="float16")).dtype == np.float16


def test_picture_of_another_size_names_the_file_and_both_sizes() -> None:
    with pytest.raises(BadDataError, match=r"'a\.png': the picture is 10x20 .* takes 8x8.*resize = \[8, 8\]"):
        prepared(photo(10, 20), spec(1, 3, 8, 8))


def test_picture_smaller_than_the_crop_is_refused() -> None:
    with pytest.raises(BadDataError, match=r"'a\.png': the picture is 10x20 .*, smaller than center_crop = \[16, 16\]"):
        prepared(photo(10, 20), spec(1, 3, 16, 16), center_crop=16)


def test_picture_too_long_for_the_short_side_is_refused() -> None:
    with pytest.raises(BadDataError, match="would have a side of 25600"):
        prepared(photo(1, 100), spec(1, 3, 256, 256), resize=256, center_crop=256)


# --- pixels in arrays ------------------------------------------------------------------------------------------


def from_pixels(pixels: npt.NDArray[np.uint8], into: TensorSpec, **settings: Any) -> npt.NDArray[Any]:
    preprocess = Preprocess(**settings)
    return pixels_to_sample(pixels, preprocess, resolve_image_input(into, preprocess), where="sample 0")


def test_pixels_in_an_array_become_what_the_same_picture_becomes() -> None:
    image = photo(9, 12)
    settings = {"resize": [6, 8], "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "channel_order": "bgr"}
    expected = prepared(image, spec(1, 3, 6, 8), **settings)
    pixels = np.asarray(image)
    np.testing.assert_array_equal(from_pixels(pixels, spec(1, 3, 6, 8), **settings), expected)
    np.testing.assert_array_equal(from_pixels(pixels.transpose(2, 0, 1), spec(1, 3, 6, 8), **settings), expected)


def test_gray_pixels_may_come_with_or_without_a_channel_axis() -> None:
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    for given in (pixels, pixels[None], pixels[:, :, None]):
        np.testing.assert_array_equal(from_pixels(given, spec(1, 1, 4, 4), **RAW), pixels[None])


def test_array_whose_axes_are_all_small_is_read_in_the_layout_of_the_input() -> None:
    pixels = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    chw, hwc = Preprocess(layout="nchw", scale=1.0), Preprocess(layout="nhwc", scale=1.0)
    as_chw = pixels_to_sample(pixels, chw, resolve_image_input(spec(1, 3, 3, 3), chw), where="s")
    as_hwc = pixels_to_sample(pixels, hwc, resolve_image_input(spec(1, 3, 3, 3), hwc), where="s")
    np.testing.assert_array_equal(as_chw, pixels)
    np.testing.assert_array_equal(as_hwc, pixels)
