"""Seeded data for the digits examples: splits, classification images and cluttered canvases.

Source: scikit-learn's `load_digits`, 1,797 real handwritten digits of 8x8 pixels with 17 grey levels.
A digit belongs to exactly one of train, validation and test; a canvas shows digits of one split only.
Everything random comes from a `numpy.random.Generator` that is handed in, so equal seeds give equal pixels.

Run as a script it writes the image folders and annotations that are committed next to it:

    python examples/digits/data.py
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

HERE = Path(__file__).resolve().parent
SplitName = Literal["train", "validation", "test"]
FloatArray = NDArray[np.float32]
PixelArray = NDArray[np.uint8]

SPLIT_SEED = 20_240_601
VALIDATION_RATIO = 0.13
TEST_RATIO = 0.20

CLASSIFIER_SIZE = 32
CANVAS_SIZE = 192
DIGITS_PER_CANVAS = (3, 7)
# Height of the 8x8 source cell on the canvas, in pixels; the ink is about as high as the cell.
CELL_HEIGHT = (22.0, 84.0)
MAX_OVERLAP = 0.03
MIN_CONTRAST = 75.0
JPEG_QUALITY = 85

CANVAS_SETS: Mapping[str, tuple[SplitName, int, int]] = {
    # folder: (digits it shows, number of canvases, seed)
    "calibration": ("train", 128, 101),
    "validation": ("validation", 96, 202),
    "test": ("test", 128, 303),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitSplit:
    """Digits of one split.

    Attributes:
        images: (N, 8, 8), ink from 0 (paper) to 1.
        labels: (N,), 0 to 9.
        indices: (N,), positions in `load_digits`, ascending.
    """

    images: FloatArray
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """One picture with the digits on it.

    Attributes:
        pixels: (CANVAS_SIZE, CANVAS_SIZE, 3), RGB.
        boxes: (D, 4), x0 y0 x1 y1 in pixels; tight around the ink, the right and lower edge excluded.
        labels: (D,), 0 to 9.
        digits: (D,), positions of the digits in `load_digits`.
    """

    pixels: PixelArray
    boxes: FloatArray
    labels: NDArray[np.int64]
    digits: NDArray[np.int64]


def load_splits() -> dict[SplitName, DigitSplit]:
    """Split the digits, stratified by class, into disjoint train, validation and test parts."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images / 16.0).astype(np.float32)
    labels = bunch.target.astype(np.int64)
    generator = np.random.default_rng(SPLIT_SEED)
    members: dict[SplitName, list[NDArray[np.int64]]] = {"train": [], "validation": [], "test": []}
    for digit in range(10):
        shuffled = generator.permutation(np.flatnonzero(labels == digit))
        test_end = round(len(shuffled) * TEST_RATIO)
        validation_end = test_end + round(len(shuffled) * VALIDATION_RATIO)
        members["test"].append(shuffled[:test_end])
        members["validation"].append(shuffled[test_end:validation_end])
        members["train"].append(shuffled[validation_end:])
    splits: dict[SplitName, DigitSplit] = {}
    for name, parts in members.items():
        indices = np.sort(np.concatenate(parts))
        splits[name] = DigitSplit(images=images[indices], labels=labels[indices], indices=indices)
    return splits


def render_digit(
    image: FloatArray,
    *,
    cell_height: float,
    stretch: float = 1.0,
    rotation: float = 0.0,
    shear: float = 0.0,
    edges: tuple[float, float] = (0.25, 0.60),
) -> FloatArray:
    """Draw a digit larger: bicubic from 8x8, then a soft threshold so that strokes have edges.

    Args:
        image: (8, 8) ink, 0 to 1.
        cell_height: Height in pixels that the 8 rows are scaled to.
        stretch: Width over height of the scaled cell.
        rotation: Radians, counter-clockwise positive.
        shear: Horizontal shift per unit of height.
        edges: Ink at which a stroke begins, and at which it is opaque.

    Returns:
        (side, side) opacity from 0 to 1, side about 1.6 `cell_height`, the digit in the middle.
    """
    padded = np.zeros((12, 12), np.float32)
    padded[2:10, 2:10] = image
    scale = cell_height / 8.0
    side = math.ceil(12 * scale * max(1.0, stretch) * 1.1)
    # Output pixel -> source pixel: undo rotation, then shear, then scale, around both centres.
    cosine, sine = math.cos(rotation), math.sin(rotation)
    x_x, x_y = cosine / (scale * stretch), -sine / (scale * stretch)
    y_x, y_y = sine / scale, cosine / scale
    x_x, x_y = x_x + shear * y_x, x_y + shear * y_y
    middle = side / 2
    coefficients = (
        x_x,
        x_y,
        6.0 - x_x * middle - x_y * middle,
        y_x,
        y_y,
        6.0 - y_x * middle - y_y * middle,
    )
    large = Image.fromarray(padded).transform(
        (side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC
    )
    start, end = edges
    opacity = np.clip((np.asarray(large, np.float32) - start) / (end - start), 0.0, 1.0)
    smooth: FloatArray = (opacity * opacity * (3.0 - 2.0 * opacity)).astype(np.float32)
    return smooth


def classifier_image(image: FloatArray, generator: np.random.Generator | None = None) -> PixelArray:
    """Give the (CLASSIFIER_SIZE, CLASSIFIER_SIZE) grey picture of a digit, white on black.

    With a generator the digit is shifted, turned, scaled and slanted a little (training); without
    one it stands upright in the middle (evaluation).
    """
    size = CLASSIFIER_SIZE
    if generator is None:
        opacity = render_digit(image, cell_height=24.0, edges=(0.1, 0.9))
        shift_x = shift_y = 0
    else:
        opacity = render_digit(
            image,
            cell_height=float(generator.uniform(20.0, 27.0)),
            stretch=float(generator.uniform(0.85, 1.15)),
            rotation=float(generator.normal(0.0, 0.12)),
            shear=float(generator.normal(0.0, 0.12)),
            edges=(float(generator.uniform(0.05, 0.2)), float(generator.uniform(0.75, 1.0))),
        )
        shift_x, shift_y = (int(value) for value in generator.integers(-2, 3, 2))
    padded = np.pad(opacity, size)
    top = (padded.shape[0] - size) // 2 + shift_y
    left = (padded.shape[1] - size) // 2 + shift_x
    grey = padded[top : top + size, left : left + size] * 255.0
    if generator is not None:
        grey = grey * generator.uniform(0.7, 1.0)
        grey = grey + generator.standard_normal(grey.shape, np.float32) * generator.uniform(0, 12)
    return _to_bytes(grey)


def make_canvas(split: DigitSplit, generator: np.random.Generator) -> Canvas:
    """Paste digits of `split` on a cluttered background."""
    background = _background(generator)
    _paste_fragments(background, split, generator)
    count = int(generator.integers(DIGITS_PER_CANVAS[0], DIGITS_PER_CANVAS[1] + 1))
    boxes: list[tuple[int, int, int, int]] = []
    chosen: list[int] = []
    for _ in range(count):
        which = int(generator.integers(len(split.labels)))
        ink = _trim(
            render_digit(
                split.images[which],
                cell_height=math.exp(generator.uniform(*np.log(CELL_HEIGHT))),
                stretch=float(generator.uniform(0.8, 1.2)),
                rotation=float(generator.normal(0.0, 0.12)),
                shear=float(generator.normal(0.0, 0.10)),
                edges=(0.25, float(generator.uniform(0.45, 0.7))),
            )
        )
        box = _free_place(ink.shape[0], ink.shape[1], boxes, generator)
        if box is None:
            continue
        _blend(background, ink, box, _contrasting_colour(background, box, generator))
        boxes.append(box)
        chosen.append(which)
    return Canvas(
        pixels=_photograph(background, generator),
        boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
        labels=split.labels[chosen],
        digits=split.indices[chosen],
    )


def canvases(split: DigitSplit, seed: int) -> Iterator[Canvas]:
    """Yield canvases without end; the same seed gives the same canvases in the same order."""
    generator = np.random.default_rng(seed)
    while True:
        yield make_canvas(split, generator)


def coco_annotations(pictures: Sequence[Canvas], file_names: Sequence[str]) -> dict[str, Any]:
    """Describe canvases in COCO's detection format; category ids are the digits, 0 to 9."""
    annotations: list[dict[str, Any]] = []
    for image_id, canvas in enumerate(pictures, start=1):
        for box, label, digit in zip(canvas.boxes, canvas.labels, canvas.digits, strict=True):
            x0, y0, x1, y1 = (int(value) for value in box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(label),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "source_digit": int(digit),
                }
            )
    return {
        "images": [
            {"id": number, "file_name": name, "width": CANVAS_SIZE, "height": CANVAS_SIZE}
            for number, name in enumerate(file_names, start=1)
        ],
        "categories": [{"id": digit, "name": str(digit)} for digit in range(10)],
        "annotations": annotations,
    }


def write_canvas_set(folder: Path, split: DigitSplit, count: int, seed: int) -> None:
    """Write `count` canvases as JPEG files and their `annotations.json` next to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = canvases(split, seed)
    pictures = [next(stream) for _ in range(count)]
    file_names = [f"{number:04d}.jpg" for number in range(count)]
    for canvas, name in zip(pictures, file_names, strict=True):
        Image.fromarray(canvas.pixels).save(folder / name, quality=JPEG_QUALITY, optimize=True)
    text = json.dumps(coco_annotations(pictures, file_names), separators=(",", ":"))
    folder.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def write_classifier_set(path: Path, split: DigitSplit) -> None:
    """Write `image` (N, 1, 32, 32) uint8 and `label` (N,) int64 as a compressed .npz file."""
    pictures = np.stack([classifier_image(image) for image in split.images])[:, np.newaxis]
    np.savez_compressed(path, image=pictures, label=split.labels)


def _background(generator: np.random.Generator) -> FloatArray:
    """Give (size, size, 3) RGB from 0 to 255: a soft colour field with shapes and strokes on it."""
    size = CANVAS_SIZE
    cells = int(generator.integers(2, 7))
    base = generator.uniform(25, 230, 3)
    field = base + generator.normal(0, 1, (cells, cells, 3)) * generator.uniform(5, 40)
    picture = Image.fromarray(np.clip(field, 0, 255).astype(np.uint8))
    picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture, "RGBA")
    for _ in range(int(generator.integers(0, 5))):
        x, y = (float(value) for value in generator.uniform(-30, size, 2))
        width, height = (float(value) for value in generator.uniform(15, 90, 2))
        corners = (x, y, x + width, y + height)
        if generator.random() < 0.5:
            draw.rectangle(corners, fill=_colour(generator, 40, 170))
        else:
            draw.ellipse(corners, fill=_colour(generator, 40, 170))
    for _ in range(int(generator.integers(2, 9))):
        _draw_stroke(draw, generator)
    return np.asarray(picture, np.float32).copy()


def _draw_stroke(draw: ImageDraw.ImageDraw, generator: np.random.Generator) -> None:
    """Draw a straight line, a wide arc or a dot: clutter that has a digit's stroke width."""
    size = CANVAS_SIZE
    colour = _colour(generator, 60, 220)
    width = int(generator.integers(1, 6))
    x, y = (float(value) for value in generator.uniform(0, size, 2))
    kind = int(generator.integers(3))
    if kind == 0:
        # Longer than the largest digit, so that no line is a "1".
        length = generator.uniform(100, 200)
        angle = generator.uniform(0, 2 * math.pi)
        end = (x + length * math.cos(angle), y + length * math.sin(angle))
        draw.line((x, y, *end), fill=colour, width=width)
    elif kind == 1:
        radius = float(generator.uniform(15, 60))
        start = float(generator.uniform(0, 360))
        sweep = float(generator.uniform(40, 110))
        draw.arc((x - radius, y - radius, x + radius, y + radius), start, start + sweep, colour, width)
    else:
        radius = float(generator.uniform(1, 6))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _paste_fragments(background: FloatArray, split: DigitSplit, generator: np.random.Generator) -> None:
    """Paste corners of digits, a quarter of their area each, turned on their side: real ink, no digit."""
    for _ in range(int(generator.integers(0, 5))):
        source = split.images[int(generator.integers(len(split.labels)))]
        top, left = (int(value) for value in generator.integers(0, 5, 2))
        corner = np.zeros_like(source)
        corner[top : top + 4, left : left + 4] = source[top : top + 4, left : left + 4]
        quarter_turns = 1 if generator.random() < 0.5 else 3
        opacity = render_digit(np.rot90(corner, quarter_turns), cell_height=float(generator.uniform(22, 70)))
        ink = _trim(opacity)
        if ink.size == 0:
            continue
        x = int(generator.integers(0, CANVAS_SIZE - ink.shape[1]))
        y = int(generator.integers(0, CANVAS_SIZE - ink.shape[0]))
        box = (x, y, x + ink.shape[1], y + ink.shape[0])
        _blend(background, ink, box, _contrasting_colour(background, box, generator))


def _photograph(picture: FloatArray, generator: np.random.Generator) -> PixelArray:
    """Change brightness and contrast, blur and add sensor noise, then round to bytes."""
    contrast = float(generator.uniform(0.7, 1.15))
    brightness = float(generator.uniform(-25, 25))
    changed = np.clip((picture - 128.0) * contrast + 128.0 + brightness, 0, 255)
    if generator.random() < 0.5:
        image = Image.fromarray(np.rint(changed).astype(np.uint8))
        blurred = image.filter(ImageFilter.GaussianBlur(float(generator.uniform(0.3, 1.0))))
        changed = np.asarray(blurred, np.float32)
    noise = generator.standard_normal(changed.shape, np.float32) * generator.uniform(0, 9)
    return _to_bytes(changed + noise)


def _to_bytes(values: NDArray[Any]) -> PixelArray:
    pixels: PixelArray = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return pixels


def _trim(opacity: FloatArray) -> FloatArray:
    """Cut the picture to the ink that is more than half opaque; (0, 0) when there is none."""
    rows = np.flatnonzero((opacity > 0.5).any(axis=1))
    columns = np.flatnonzero((opacity > 0.5).any(axis=0))
    if rows.size == 0:
        return np.zeros((0, 0), np.float32)
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _free_place(
    height: int,
    width: int,
    taken: Sequence[tuple[int, int, int, int]],
    generator: np.random.Generator,
) -> tuple[int, int, int, int] | None:
    """Find a box of this size that overlaps none of `taken` by more than `MAX_OVERLAP` of either."""
    if min(height, width) < 4:
        return None
    for _ in range(25):
        x = int(generator.integers(0, CANVAS_SIZE - width + 1))
        y = int(generator.integers(0, CANVAS_SIZE - height + 1))
        if all(
            max(0, min(x + width, x1) - max(x, x0)) * max(0, min(y + height, y1) - max(y, y0))
            <= MAX_OVERLAP * min(height * width, (x1 - x0) * (y1 - y0))
            for x0, y0, x1, y1 in taken
        ):
            return x, y, x + width, y + height
    return None


def _blend(
    background: FloatArray,
    ink: FloatArray,
    box: tuple[int, int, int, int],
    colour: NDArray[np.float64],
) -> None:
    x0, y0, x1, y1 = box
    region = background[y0:y1, x0:x1]
    region += ink[:, :, np.newaxis] * (colour.astype(np.float32) - region)


def _contrasting_colour(
    background: FloatArray, box: tuple[int, int, int, int], generator: np.random.Generator
) -> NDArray[np.float64]:
    """Choose an RGB colour whose mean is at least `MIN_CONTRAST` away from the paper under `box`."""
    x0, y0, x1, y1 = box
    paper = float(background[y0:y1, x0:x1].mean())
    darker, lighter = max(0.0, paper - MIN_CONTRAST), max(0.0, 255.0 - paper - MIN_CONTRAST)
    position = generator.uniform(0, darker + lighter)
    level = position if position < darker else position - darker + paper + MIN_CONTRAST
    tint = generator.normal(0, 18, 3)
    colour: NDArray[np.float64] = np.clip(level + tint - tint.mean(), 0, 255)
    return colour


def _colour(generator: np.random.Generator, min_opacity: int, max_opacity: int) -> tuple[int, int, int, int]:
    red, green, blue = (int(value) for value in generator.integers(0, 256, 3))
    return red, green, blue, int(generator.integers(min_opacity, max_opacity))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=HERE / "images")
    out: Path = parser.parse_args().out
    splits = load_splits()
    for folder, (split_name, count, seed) in CANVAS_SETS.items():
        write_canvas_set(out / folder, splits[split_name], count, seed)
    write_classifier_set(out / "classifier_calibration.npz", _first(splits["train"], 256))
    write_classifier_set(out / "classifier_test.npz", splits["test"])


def _first(split: DigitSplit, count: int) -> DigitSplit:
    return DigitSplit(images=split.images[:count], labels=split.labels[:count], indices=split.indices[:count])


if __name__ == "__main__":
    main()
