"""Pictures on disk: finding them in a folder, and decoding one of them without trusting it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxprune.errors import BadDataError, MissingExtraError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["IMAGE_SUFFIXES", "files_below", "image_from_pixels", "open_image", "require_pillow"]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# A header can claim any size; decoding allocates it. This is far above any camera.
MAX_PIXELS = 200_000_000
_EIGHT_BIT_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")


def require_pillow(needed_for: str) -> None:
    """Raise `MissingExtraError` where Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise MissingExtraError(package="pillow", extra="eval", needed_for=needed_for) from None


def files_below(folder: Path) -> Iterator[Path]:
    """All files below `folder`, in sorted order of their relative paths; hidden ones and link loops are left out."""
    found: list[Path] = []
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        found.extend(Path(root) / name for name in files if not name.startswith("."))
    yield from sorted(found, key=lambda path: path.relative_to(folder).parts)


def open_image(path: Path, *, where: str) -> Image.Image:
    """The decoded picture at `path`; of an animation, its first frame.

    Raises:
        BadDataError: It is damaged, too large, or has more than 8 bits a channel.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Its limit is ours, and it warns of harmless oddities in metadata.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                _check_image(image, where)
                image.load()
                # Leaves the file, keeps the pixels.
                return image.copy()
    except Image.DecompressionBombError:
        raise BadDataError(
            f"{where}: the picture claims far more than {MAX_PIXELS:,} pixels.", "Leave it out."
        ) from None
    except UnidentifiedImageError:
        raise BadDataError(
            f"{where}: this is no picture, or of an unknown format.", "Leave it out, or save it again."
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, OverflowError) as error:
        # Pillow raises all of these for damaged files, depending on the format.
        raise BadDataError(
            f"{where}: the picture can't be decoded ({error}).", "Leave it out, or copy it again."
        ) from error


def _check_image(image: Image.Image, where: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise BadDataError(
            f"{where}: the picture claims {image.height}x{image.width} pixels, more than {MAX_PIXELS:,}.",
            "Leave it out.",
        )
    if image.mode not in _EIGHT_BIT_MODES:
        raise BadDataError(
            f"{where}: the picture has more than 8 bits a channel (mode {image.mode}).",
            "Convert it to 8 bits, or give the data as .npz.",
        )


def image_from_pixels(pixels: npt.NDArray[Any]) -> Image.Image:
    """H x W x C pixels (uint8, 1 or 3 channels) as a picture."""
    require_pillow("Resizing, cropping or converting pictures")
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
