"""From a picture to the values of a model's input.

The order of the steps is fixed:

    decode to 8-bit RGB (or gray)      H0 x W0 x C
    resize | letterbox                 H1 x W1 x C     PIL's filters, antialiased as in torchvision
    center_crop                        H x W x C
    channel order                      RGB -> BGR
    (value * scale - mean) / std       float32; pixels for integer inputs stay as they are
    layout                             C x H x W or H x W x C, and then the element type of the input

Sizes and crops are computed as torchvision does: with `resize = 256` and `center_crop = 224` the result is that of
`Resize(256), CenterCrop(224), ToTensor(), Normalize(mean, std)` on PIL images. The orientation tag of EXIF is ignored,
as it is there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, model_validator

from onnxprune.contracts import PassConfig, TensorSpec, numpy_dtype
from onnxprune.data.fit import is_float, shape_text
from onnxprune.errors import BadDataError, UsageError

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "ImageInput",
    "Preprocess",
    "image_to_sample",
    "numbers_to_sample",
    "pixels_to_sample",
    "resolve_image_input",
]

DEFAULT_FILL = 114  # the gray that YOLO models are trained with
MAX_SIDE = 16384  # of a resized picture: three channels of it take 768 MiB

Size: TypeAlias = int | tuple[int, int]


def _checked_side(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIDE:
        raise ValueError(f"a side must be a whole number from 1 to {MAX_SIDE}")
    return value


def _checked_pair(value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("must be [height, width]")
    return _checked_side(value[0]), _checked_side(value[1])


def _checked_size(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return _checked_pair(value)
    return _checked_side(value)


def _checked_numbers(value: Any) -> Any:
    numbers = value if isinstance(value, list | tuple) else [value]
    if len(numbers) not in (1, 3) or not all(
        isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers
    ):
        raise ValueError("must be one number, or three numbers (one for each channel)")
    return tuple(float(n) for n in numbers)


PairField = Annotated[tuple[int, int], BeforeValidator(_checked_pair)]
SizeField = Annotated[Size, BeforeValidator(_checked_size)]
NumbersField = Annotated[tuple[float, ...], BeforeValidator(_checked_numbers)]


class Preprocess(PassConfig):
    """How pictures become model inputs. Stored with every artifact, because the application must do the same."""

    resize: SizeField | None = Field(
        default=None,
        description="A number: the shorter side, the aspect ratio stays. [height, width]: exactly, stretched.",
    )
    letterbox: PairField | None = Field(
        default=None,
        description="[height, width]: fit the whole picture in, the aspect ratio stays, and fill the rest evenly.",
    )
    fill: int | None = Field(
        default=None,
        ge=0,
        le=255,
        strict=True,
        description=f"Gray level around a letterboxed picture (default {DEFAULT_FILL}).",
    )
    center_crop: SizeField | None = Field(
        default=None, description="Cut the middle out: one side of a square, or [height, width]."
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box"] = Field(
        default="bilinear", description="Filter for resize and letterbox."
    )
    antialias: bool = Field(
        default=True, description="False: look at the nearest pixels only when shrinking, as OpenCV's resize does."
    )
    scale: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Pixels times this, before mean and std (default 1/255 for float inputs, none for integer inputs).",
    )
    mean: NumbersField | None = Field(
        default=None, description="Subtracted after scale: one number, or one for each channel in channel order."
    )
    std: NumbersField | None = Field(
        default=None, description="Divided by at the end: one number, or one for each channel in channel order."
    )
    channel_order: Literal["auto", "rgb", "bgr", "gray"] = Field(
        default="auto", description="auto: gray where the input has one channel, else rgb."
    )
    layout: Literal["auto", "nchw", "nhwc"] = Field(
        default="auto", description="auto: told from where the input's shape has its 1 or 3 channels."
    )

    @model_validator(mode="after")
    def _check_contradictions(self) -> Preprocess:
        if self.letterbox is not None and self.resize is not None:
            raise ValueError("'resize' and 'letterbox' exclude each other: give one of them")
        if self.letterbox is not None and self.center_crop is not None:
            raise ValueError("'center_crop' would cut the frame of 'letterbox' off again: give one of them")
        if self.fill is not None and self.letterbox is None:
            raise ValueError("'fill' is the frame of 'letterbox', which is not set")
        if self.std is not None and 0.0 in self.std:
            raise ValueError("'std' must not hold 0")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(f"'mean' has {len(self.mean)} values and 'std' has {len(self.std)}")
        numbers = max(len(self.mean or ()), len(self.std or ()))
        if self.channel_order == "gray" and numbers > 1:
            raise ValueError("'channel_order' gray has one channel, but 'mean' or 'std' has three values")
        if not self.antialias and self.interpolation in ("lanczos", "box"):
            raise ValueError(f"'interpolation' {self.interpolation} can't be had without 'antialias'")
        if self.center_crop is not None and self.resize is not None:
            crop = _pair(self.center_crop)
            available = _pair(self.resize)
            if crop[0] > available[0] or crop[1] > available[1]:
                too_large = "x".join(map(str, crop))
                raise ValueError(f"'center_crop' {too_large} is larger than what 'resize' leaves")
        return self

    @property
    def changes_geometry(self) -> bool:
        """True where pictures are resized, letterboxed or cropped."""
        return self.resize is not None or self.letterbox is not None or self.center_crop is not None


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInput:
    """What pictures must become for one input of a model.

    `layout` is that of one sample: "chw", "hwc", or "hw" where the input has no channel axis.
    `height` and `width` are None where the input leaves them open.
    """

    name: str
    dtype: str
    layout: Literal["chw", "hwc", "hw"]
    order: Literal["rgb", "bgr", "gray"]
    height: int | None
    width: int | None

    @property
    def num_channels(self) -> int:
        """Channels of a picture in `order`."""
        return 1 if self.order == "gray" else 3


def resolve_image_input(spec: TensorSpec, preprocess: Preprocess) -> ImageInput:
    """Decide layout and channel order for `spec` and check that `preprocess` can serve it.

    Raises:
        UsageError: The input can't take pictures, its layout can't be told, or `preprocess` contradicts it.
    """
    layout, channels, height, width = _image_axes(spec, preprocess)
    order = preprocess.channel_order
    if order == "auto":
        order = "gray" if channels == 1 else "rgb"
    wanted = 1 if order == "gray" else 3
    if channels is not None and channels != wanted:
        raise UsageError(
            f"Input '{spec.name}' ({shape_text(spec.shape)}) has {channels} channels, but channel_order '{order}' "
            f"gives {wanted}.",
            "Set preprocess.channel_order (rgb, bgr, gray), or preprocess.layout where the axes were misread.",
        )
    numbers = max(len(preprocess.mean or ()), len(preprocess.std or ()))
    if numbers > wanted:
        raise UsageError(
            f"preprocess.mean and .std have {numbers} values, but input '{spec.name}' has one channel.",
            "Give one value.",
        )
    dtype = numpy_dtype(spec.dtype)
    if dtype.kind not in "iu" and not is_float(dtype):
        raise UsageError(
            f"Input '{spec.name}' is of type {spec.dtype} and can't take pictures.", "Give the data as .npz."
        )
    if dtype.kind in "iu":
        if dtype.itemsize == 1 and dtype.kind == "i":
            raise UsageError(
                f"Input '{spec.name}' is int8, and how pixels (0 to 255) map to it is not known.",
                "Give the data as .npz with int8 values.",
            )
        if preprocess.scale not in (None, 1.0) or preprocess.mean is not None or preprocess.std is not None:
            raise UsageError(
                f"Input '{spec.name}' is {spec.dtype} and takes pixels as they are, but preprocess has scale, mean or "
                "std.",
                "Drop them: the model does this itself.",
            )
    return ImageInput(name=spec.name, dtype=spec.dtype, layout=layout, order=order, height=height, width=width)


def _image_axes(
    spec: TensorSpec, preprocess: Preprocess
) -> tuple[Literal["chw", "hwc", "hw"], int | None, int | None, int | None]:
    """(sample layout, channels, height, width) of an input that takes pictures."""
    shape = None if spec.shape is None else tuple(dim if isinstance(dim, int) else None for dim in spec.shape)
    if shape is None or len(shape) not in (3, 4):
        raise UsageError(
            f"Input '{spec.name}' ({spec.dtype} {shape_text(spec.shape)}) does not take pictures: they need an input "
            "with height, width and channels.",
            "Give the data as .npz or module:function.",
        )
    sample = shape[1:] if len(shape) == 4 else shape
    first, last = sample[0] in (1, 3), sample[2] in (1, 3)
    if preprocess.layout != "auto":
        chw = preprocess.layout == "nchw"
    elif first != last:
        chw = first
    elif len(shape) == 3 and shape[0] is None and not last:
        # (batch, height, width): gray pictures without a channel axis.
        return "hw", 1, shape[1], shape[2]
    else:
        raise UsageError(
            f"Input '{spec.name}' ({shape_text(spec.shape)}): which axis holds the channels can't be told from the "
            "shape.",
            "Set preprocess.layout to 'nchw' or 'nhwc'.",
        )
    if chw:
        return "chw", sample[0], sample[1], sample[2]
    return "hwc", sample[2], sample[0], sample[1]


def image_to_sample(image: Image.Image, preprocess: Preprocess, target: ImageInput, *, where: str) -> npt.NDArray[Any]:
    """One decoded picture as a sample of `target`, without a batch axis.

    Args:
        image: Any 8-bit mode.
        preprocess: The steps.
        target: From `resolve_image_input`.
        where: Names the picture in messages.

    Returns:
        C x H x W, H x W x C or H x W, in the element type of the input.

    Raises:
        BadDataError: The picture is smaller than the crop, or the result does not have the size of the input.
    """
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")
    image = image.convert("L" if target.order == "gray" else "RGB")
    image = _reshaped(image, preprocess, where)
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[:, :, np.newaxis]
    return _normalized(pixels, preprocess, target, where)


def pixels_to_sample(
    pixels: npt.NDArray[np.uint8], preprocess: Preprocess, target: ImageInput, *, where: str
) -> npt.NDArray[Any]:
    """Like `image_to_sample` for pixels in an array: H x W, H x W x C or C x H x W with RGB or gray channels."""
    channels = target.num_channels
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3):
        is_hwc = pixels.shape[2] in (1, 3) and (pixels.shape[0] != channels or target.layout == "hwc")
        if not is_hwc:
            pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
        raise BadDataError(
            f"{where}: input '{target.name}' got pixels of shape {shape_text(pixels.shape)}, which is no picture.",
            "Give height x width x channels with 1 or 3 channels.",
        )
    if pixels.ndim == 2:
        pixels = pixels[:, :, np.newaxis]
    if not preprocess.changes_geometry and pixels.shape[2] == channels:
        return _normalized(pixels, preprocess, target, where)
    from onnxprune.data.images import image_from_pixels

    return image_to_sample(image_from_pixels(pixels), preprocess, target, where=where)


def numbers_to_sample(array: npt.NDArray[Any], preprocess: Preprocess, dtype: str) -> npt.NDArray[Any]:
    """Integers that are no pixels as float values: (number * scale - mean) / std, with one mean and one std."""
    values = array.astype(np.float32) * np.float32(1.0 if preprocess.scale is None else preprocess.scale)
    if preprocess.mean is not None:
        values -= np.float32(preprocess.mean[0])
    if preprocess.std is not None:
        values /= np.float32(preprocess.std[0])
    return values.astype(numpy_dtype(dtype), copy=False)


def _normalized(
    pixels: npt.NDArray[np.uint8], preprocess: Preprocess, target: ImageInput, where: str
) -> npt.NDArray[Any]:
    """H x W x C pixels (RGB or gray) -> the sample."""
    height, width = pixels.shape[:2]
    if (target.height or height, target.width or width) != (height, width):
        raise BadDataError(
            f"{where}: the picture is {height}x{width} (height x width) after preprocessing, but input "
            f"'{target.name}' takes {target.height or 'any'}x{target.width or 'any'}.",
            f"Set preprocess.resize, for example resize = [{target.height or height}, {target.width or width}], or "
            "resize and center_crop as in the model's training.",
        )
    if target.order == "bgr":
        pixels = pixels[:, :, ::-1]
    dtype = numpy_dtype(target.dtype)
    if dtype.kind in "iu":
        values: npt.NDArray[Any] = pixels.astype(dtype)
    else:
        values = pixels.astype(np.float32)
        # Divided, not multiplied by 1/255: the last bit is that of ToTensor.
        values = values / np.float32(255) if preprocess.scale is None else values * np.float32(preprocess.scale)
        if preprocess.mean is not None:
            values -= np.asarray(preprocess.mean, dtype=np.float32)
        if preprocess.std is not None:
            values /= np.asarray(preprocess.std, dtype=np.float32)
        values = values.astype(dtype, copy=False)
    if target.layout == "hw":
        return np.ascontiguousarray(values[:, :, 0])
    return np.ascontiguousarray(values.transpose(2, 0, 1) if target.layout == "chw" else values)


# --- geometry -------------------------------------------------------------------------------------------------


def _reshaped(image: Image.Image, preprocess: Preprocess, where: str) -> Image.Image:
    if preprocess.letterbox is not None:
        image = _letterboxed(image, preprocess.letterbox, preprocess)
    elif preprocess.resize is not None:
        image = _resized(image, _resized_size(image, preprocess.resize, where), preprocess)
    if preprocess.center_crop is not None:
        image = _cropped(image, _pair(preprocess.center_crop), where)
    return image


def _resized_size(image: Image.Image, resize: Size, where: str) -> tuple[int, int]:
    if not isinstance(resize, int):
        return resize
    width, height = image.size
    # As torchvision: the longer side is cut to a whole number, not rounded.
    longer = int(resize * max(width, height) / min(width, height))
    if longer > MAX_SIDE:
        raise BadDataError(
            f"{where}: the picture of {height}x{width} would have a side of {longer} after resize = {resize}.",
            "Leave it out, or give resize = [height, width].",
        )
    return (longer, resize) if height > width else (resize, longer)


def _resized(image: Image.Image, size: tuple[int, int], preprocess: Preprocess) -> Image.Image:
    from PIL import Image

    height, width = size
    if image.size == (width, height):
        return image
    filters = {
        "nearest": Image.Resampling.NEAREST,
        "bilinear": Image.Resampling.BILINEAR,
        "bicubic": Image.Resampling.BICUBIC,
        "lanczos": Image.Resampling.LANCZOS,
        "box": Image.Resampling.BOX,
    }
    chosen = filters[preprocess.interpolation]
    if preprocess.antialias:
        return image.resize((width, height), chosen)
    # An affine transform looks at the nearest pixels only; its pixel centres lie at .5, as those of OpenCV.
    steps = (image.width / width, 0.0, 0.0, 0.0, image.height / height, 0.0)
    return image.transform((width, height), Image.Transform.AFFINE, steps, chosen)


def _letterboxed(image: Image.Image, size: tuple[int, int], preprocess: Preprocess) -> Image.Image:
    from PIL import Image

    height, width = size
    ratio = min(height / image.height, width / image.width)
    inner = max(1, round(image.height * ratio)), max(1, round(image.width * ratio))
    picture = _resized(image, inner, preprocess)
    level = DEFAULT_FILL if preprocess.fill is None else preprocess.fill
    frame = Image.new(image.mode, (width, height), level if image.mode == "L" else (level,) * 3)
    # An odd rest goes to the right and bottom.
    frame.paste(picture, ((width - inner[1]) // 2, (height - inner[0]) // 2))
    return frame


def _cropped(image: Image.Image, size: tuple[int, int], where: str) -> Image.Image:
    height, width = size
    if image.height < height or image.width < width:
        raise BadDataError(
            f"{where}: the picture is {image.height}x{image.width} (height x width), smaller than center_crop = "
            f"[{height}, {width}].",
            "Set preprocess.resize to at least the crop, or leave the picture out.",
        )
    # As torchvision, which rounds halves to even.
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))
