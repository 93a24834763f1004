"""Where Resize takes its numbers from: ONNX's coordinates and weights along one axis, and TFLite's.

Along an axis a resize is y = M x, with M of (output, input). What TFLite's operators compute is compared with what ONNX
asks for as such a matrix, or as indices for nearest: no mode is taken for equal by its name alone.

Coordinates are computed in float32 as ONNX Runtime does, since whether one falls on the middle between two pixels
decides what nearest takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxprune.targets.tflite.build import UnsupportedError

__all__ = ["Resampling", "Sampled", "nearest_of_tflite", "weights_of_tflite"]

Floats: TypeAlias = npt.NDArray[np.float32]
_ONE = np.float32(1)
_HALF = np.float32(0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One axis that is resized. `scale` may be fractional where `output` is rounded."""

    axis: int
    size: int
    output: int
    scale: float
    width: float
    """The output's length before it was rounded."""
    start: float = 0.0
    end: float = 1.0
    """The region of interest, in parts of the input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampling:
    """The attributes of Resize that say how."""

    mode: str
    coordinates: str
    rounding: str
    cubic_a: float
    is_antialiased: bool
    excludes_outside: bool

    def nearest(self, axis: Sampled) -> npt.NDArray[np.int64]:
        """The input element of each output element."""
        at = self.places(axis)
        if self.rounding == "floor":
            found = np.floor(at)
        elif self.rounding == "ceil":
            found = np.ceil(at)
        elif self.rounding == "round_prefer_floor":
            found = np.ceil(at - _HALF)
        elif self.rounding == "round_prefer_ceil":
            found = np.floor(at + _HALF)
        else:
            raise UnsupportedError(f"ONNX defines no nearest_mode '{self.rounding}'")
        elements: npt.NDArray[np.int64] = np.clip(found, 0, axis.size - 1).astype(np.int64)
        return elements

    def weights(self, axis: Sampled) -> npt.NDArray[np.float64]:
        """The matrix M of linear and cubic."""
        at = self.places(axis).astype(np.float64)
        # In (0, 1]: of a coordinate on an element, that element is the second of its neighbours.
        first = np.ceil(at) - 1
        matrix = np.zeros((axis.output, axis.size))
        for row in range(axis.output):
            offsets, weights = self._taps(at[row] - first[row], axis.scale)
            places = int(first[row]) + offsets
            if self.excludes_outside:
                weights = np.where((places >= 0) & (places < axis.size), weights, 0.0)
                weights = weights / weights.sum()
            np.add.at(matrix[row], np.clip(places, 0, axis.size - 1), weights)
        return matrix

    def outside(self, axis: Sampled) -> npt.NDArray[np.bool_] | None:
        """Which output elements lie outside the input and get the extrapolation value; None where none can."""
        if self.coordinates != "tf_crop_and_resize":
            return None
        at = self.places(axis)
        return (at < 0) | (at > axis.size - 1)

    def places(self, axis: Sampled) -> Floats:
        """The coordinate in the input of each output element."""
        at = np.arange(axis.output, dtype=np.float32)
        scale, last, width = np.float32(axis.scale), np.float32(axis.size - 1), np.float32(axis.width)
        half_pixel = (at + _HALF) / scale - _HALF
        if self.coordinates == "half_pixel":
            return half_pixel
        if self.coordinates == "pytorch_half_pixel":
            return half_pixel if axis.output > 1 else np.full_like(at, -0.5)
        if self.coordinates == "half_pixel_symmetric":
            centre = np.float32(axis.size) * _HALF
            return centre * (_ONE - np.float32(axis.output) / width) + (at + _HALF) / scale - _HALF
        if self.coordinates == "asymmetric":
            return at / scale
        if self.coordinates == "align_corners":
            return np.zeros_like(at) if axis.width == 1 else at * last / (width - _ONE)
        if self.coordinates == "tf_crop_and_resize":
            start, end = np.float32(axis.start), np.float32(axis.end)
            if axis.output == 1:
                return np.full_like(at, (start + end) / 2 * last)
            return start * last + at * ((end - start) * last / (width - _ONE))
        raise UnsupportedError(f"ONNX defines no coordinate_transformation_mode '{self.coordinates}'")

    def _taps(self, ratio: float, scale: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Offsets from the element before a coordinate, and their weights, which add up to 1."""
        reach = {"linear": 1, "cubic": 2}.get(self.mode)
        if reach is None:
            raise UnsupportedError(f"ONNX defines no mode '{self.mode}'")
        # Shrinking, the filter is stretched over all that becomes one element.
        stretch = min(scale, 1.0) if self.is_antialiased else 1.0
        begin = int(np.floor(-reach / stretch)) + 1
        offsets = np.arange(begin, 2 - begin)
        distance = np.abs(offsets - ratio) * stretch
        weights = np.maximum(1 - distance, 0) if self.mode == "linear" else _keys(distance, self.cubic_a)
        return offsets, weights / weights.sum()


def _keys(distance: npt.NDArray[Any], a: float) -> npt.NDArray[np.float64]:
    """The cubic convolution of R. Keys, "Cubic convolution interpolation for digital image processing", 1981."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


def _scale_of_tflite(size: int, output: int, *, align_corners: bool) -> np.float32:
    if align_corners and output > 1:
        return np.float32(size - 1) / np.float32(output - 1)
    return np.float32(size) / np.float32(output)


def nearest_of_tflite(size: int, output: int, *, align_corners: bool, half_pixel: bool) -> npt.NDArray[np.int64]:
    """The input elements that RESIZE_NEAREST_NEIGHBOR takes along an axis."""
    scale = _scale_of_tflite(size, output, align_corners=align_corners)
    at = (np.arange(output, dtype=np.float32) + (_HALF if half_pixel else np.float32(0))) * scale
    found = np.floor(at + _HALF) if align_corners else np.floor(at)
    elements: npt.NDArray[np.int64] = np.clip(found, 0, size - 1).astype(np.int64)
    return elements


def weights_of_tflite(size: int, output: int, *, align_corners: bool, half_pixel: bool) -> npt.NDArray[np.float64]:
    """The matrix of RESIZE_BILINEAR along an axis."""
    scale = _scale_of_tflite(size, output, align_corners=align_corners)
    at = np.arange(output, dtype=np.float32)
    at = (at + _HALF) * scale - _HALF if half_pixel else at * scale
    below = np.clip(np.floor(at), 0, size - 1).astype(np.int64)
    above = np.clip(np.ceil(at), 0, size - 1).astype(np.int64)
    share = (at - below).astype(np.float64)
    matrix = np.zeros((output, size))
    rows = np.arange(output)
    np.add.at(matrix, (rows, below), 1 - share)
    np.add.at(matrix, (rows, above), share)
    return matrix
