"""DFT, STFT and MelWeightMatrix: Fourier transforms as products with constant matrices.

A complex number is two entries of the last axis. So a transform of n complex numbers into m is one real matrix of
2n columns and 2m rows, and a transform of windows that slide along a signal is a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Constant, Tensor
from onnxprune.targets.tflite.ops.contraction import linear
from onnxprune.targets.tflite.ops.sizes import reshaped_to, size_of
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

__all__: list[str] = []

_Array: TypeAlias = "npt.NDArray[Any]"

_MAX_MATRIX_BYTES = 128 << 20
"""A transform of 4,096 complex numbers. Beyond it the products take longer than any runtime's own transform."""


@TFLITE.register("DFT")
def dft(node: NodeView, build: Builder) -> Tensor:
    """FULLY_CONNECTED with the axis and the parts of complex numbers as one."""
    x = node.input(0)
    if node.version < 20:
        axis = node.axis(x.rank, 1)
    else:
        axis = int(node.required_array(2, "axis").item()) if node.has(2) else -2
        axis += x.rank if axis < 0 else 0
    is_inverse, is_onesided = bool(node.integer("inverse")), bool(node.integer("onesided"))
    given, parts = x.shape[axis], x.shape[-1]
    if given < 0 or parts < 0:
        raise UnsupportedError("the length of the signal is known only when the model runs")
    length = 2 * (given - 1) if is_inverse and is_onesided else given
    if node.has(1):
        length = int(node.required_array(1, "length").item())
    order = [*(a for a in range(x.rank - 1) if a != axis), axis, x.rank - 1]
    x = build.transposed(x, order)
    sizes = [size_of(x, a) for a in range(x.rank - 2)]
    matrix = _matrix(length, given, parts, is_inverse=is_inverse, is_onesided=is_onesided)
    results = 1 if is_inverse and is_onesided else 2
    y = linear(build, reshaped_to(build, x, [*sizes, given * parts]), build.constant_tensor(matrix))
    y = reshaped_to(build, y, [*sizes, matrix.shape[0] // results, results])
    return build.transposed(y, [order.index(a) for a in range(y.rank)])


@TFLITE.register("STFT")
def stft(node: NodeView, build: Builder) -> Tensor:
    """CONV_2D: filters are the rows of the transform's matrix, times the window; the stride is the step."""
    signal = node.input(0)
    parts = signal.shape[2] if signal.rank == 3 else 1
    step = int(node.required_array(1, "frame step").item())
    window = node.optional(2)
    if node.has(3):
        length = int(node.required_array(3, "frame length").item())
    elif window is not None:
        length = window.shape[0]
    else:
        raise UnsupportedError("neither a window nor a frame length is given")
    if window is not None and window.shape[0] != length:
        raise UnsupportedError(f"its window has {window.shape[0]} entries, and its frames {length}")
    samples = signal.shape[1]
    if 0 <= samples < length:
        raise UnsupportedError(f"frames of {length} samples of a signal of {samples}")
    matrix = _matrix(length, length, parts, is_inverse=False, is_onesided=bool(node.integer("onesided", 1)))
    rows = matrix.shape[0]
    filters = build.constant_tensor(matrix.reshaped((rows, 1, length, parts)))
    if window is not None:
        filters = build.binary("MUL", filters, build.reshaped(window, (1, 1, length, 1)))
    # (B, samples, parts) -> (B, 1, samples, parts)
    x = reshaped_to(build, signal, [size_of(signal, 0), 1, size_of(signal, 1), parts])
    frames = -1 if samples < 0 else (samples - length) // step + 1
    bias = build.constant(np.zeros(rows, np.float32))
    shape = (x.shape[0], 1, frames, rows)
    y = build.op(
        "CONV_2D", [x, filters, bias], shape=shape, type_=x.type, padding="VALID", strideH=1, strideW=step,
        dilationHFactor=1, dilationWFactor=1,
    )  # fmt: skip
    return reshaped_to(build, y, [size_of(y, 0), size_of(y, 2), rows // 2, 2])


@TFLITE.register("MelWeightMatrix")
def mel_weight_matrix(node: NodeView, build: Builder) -> Tensor:
    """A constant: triangles over the bins of a spectrum, evenly spaced by the mel scale, as ONNX defines them."""
    names = ("number of bins", "transform length", "sample rate", "lower edge", "upper edge")
    bins, length, rate, lower, upper = (node.required_array(i, name).item() for i, name in enumerate(names))
    mel = [2595 * math.log10(1 + edge / 700) for edge in (lower, upper)]
    places = mel[0] + np.arange(bins + 2) * (mel[1] - mel[0]) / (bins + 2)
    edges = ((length + 1) * (700 * (10 ** (places / 2595) - 1)) // rate).astype(np.int64)
    weights = np.zeros((length // 2 + 1, bins), np.float32)
    for column, (left, center, right) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        if left == center:
            weights[center, column] = 1
        rising, falling = np.arange(left, center + 1), np.arange(center, right)
        if left < center:
            weights[rising, column] = (rising - left) / (center - left)
        if center < right:
            weights[falling, column] = (right - falling) / (right - center)
    return build.constant(weights)


def _matrix(length: int, given: int, parts: int, *, is_inverse: bool, is_onesided: bool) -> Constant:
    """The transform of `length` numbers, of which the first `given` are there (the others are 0), by rows of results.

    Columns are (number, part), rows (result, part). One-sided: half of the results of a real signal, or, inverse, a
    real result (one part) of half of the spectrum.
    """
    results = length // 2 + 1 if is_onesided and not is_inverse else length
    to_real = is_inverse and is_onesided
    rows, columns = results * (1 if to_real else 2), given * parts
    if 4 * rows * columns > _MAX_MATRIX_BYTES:
        raise UnsupportedError(f"a Fourier transform of {length} numbers would be a matrix of {rows} x {columns}")
    load = _loader(length, given, parts, results, is_inverse=is_inverse, to_real=to_real)
    return Constant((rows, columns), np.dtype(np.float32), load)


def _loader(
    length: int, given: int, parts: int, results: int, *, is_inverse: bool, to_real: bool
) -> Callable[[], _Array]:
    def load() -> _Array:
        used = min(given, length // 2 + 1 if to_real else length)
        # Multiplied as integers and reduced first: angles are exact for any length.
        turns = np.outer(np.arange(results), np.arange(used)) % length
        angles = (2 * np.pi / length * (1 if is_inverse else -1)) * turns
        factor = np.ones(used)
        if to_real:
            # The other half of the spectrum is the conjugate of this one.
            factor[1 : (length + 1) // 2] = 2
        factor = factor / length if is_inverse else factor
        cosines, sines = np.cos(angles) * factor, np.sin(angles) * factor
        matrix = np.zeros((results, 2, given, parts), np.float32)
        matrix[:, 0, :used, 0], matrix[:, 1, :used, 0] = cosines, sines
        if parts == 2:
            matrix[:, 0, :used, 1], matrix[:, 1, :used, 1] = -sines, cosines
        kept = matrix[:, :1] if to_real else matrix
        return np.ascontiguousarray(kept.reshape(-1, given * parts))

    return load
