"""One layer's problem: what goes in when everything before it is integer, and what is to come out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.passes.layerwise.gain import NoiseMeter
from onnxprune.passes.layerwise.matrices import LayerMatrix

__all__ = ["LayerCase", "build_case"]

Array = npt.NDArray[Any]

# Every fourth row judges a layer's candidates.
_JUDGE_EVERY = 4
_MIN_ROWS_TO_JUDGE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCase:
    """Rows to fit and rows to judge on, [G, n, K] and [G, n, O]; weight [G, O, K]; scales and bias [G, O].

    Where the bias follows the rounding (`is_centred`), means are taken out of all rows: what a rounding does to the
    mean of an output costs nothing then.
    """

    weight: Array
    scales: Array
    largest: int
    bias: Array
    rows: Array
    wanted: Array
    judge_rows: Array
    judge_wanted: Array
    mean_input: Array
    mean_wanted: Array
    is_centred: bool

    def noise(self, integers: Array) -> NoiseMeter:
        """Of the layer's output, on rows that were not fitted to."""
        meter = NoiseMeter()
        found = self.judge_rows @ (integers * self.scales[:, :, np.newaxis]).astype(np.float32).transpose(0, 2, 1)
        meter.add(self.judge_wanted, found)
        return meter

    def bias_after(self, integers: Array) -> Array:
        """The bias [G, O] that keeps the mean of the output."""
        weight = integers * self.scales[:, :, np.newaxis]
        found: Array = self.mean_wanted[:, 0] - np.einsum("gok,gk->go", weight, self.mean_input[:, 0])
        return found


def build_case(
    matrix: LayerMatrix,
    weight: Array,
    scales: Array,
    largest: int,
    bias: Array,
    tensors: Iterable[tuple[Array, Array]],
    *,
    rows_each: int,
    is_centred: bool,
    rng: np.random.Generator,
) -> LayerCase:
    """The case of a layer.

    Args:
        matrix: Its geometry.
        weight: As stored.
        scales: As in the plan, [G, O].
        largest: Of its integers.
        bias: What the layer adds, [G, O].
        tensors: For each batch the integer layer's input, and the float layer's output with its bias.
        rows_each: Positions taken from each batch.
        is_centred: See `LayerCase`.
        rng: Draws the positions.
    """
    pairs = [matrix.rows(data, output, rows_each, rng) for data, output in tensors]
    rows = np.concatenate([x for x, _ in pairs], axis=1).astype(np.float32, copy=False)
    wanted = np.concatenate([y for _, y in pairs], axis=1).astype(np.float32, copy=False)
    wanted = wanted - bias[:, np.newaxis].astype(np.float32)
    mean_input = rows.mean(axis=1, keepdims=True, dtype=np.float64) if is_centred else np.zeros((len(rows), 1, 1))
    mean_wanted = wanted.mean(axis=1, keepdims=True, dtype=np.float64) if is_centred else np.zeros((len(rows), 1, 1))
    rows, wanted = rows - mean_input.astype(np.float32), wanted - mean_wanted.astype(np.float32)
    judges = np.zeros(rows.shape[1], dtype=bool)
    # Rows of one sample resemble each other, so whole samples judge: the last quarter.
    if rows.shape[1] >= _MIN_ROWS_TO_JUDGE:
        judges[-(rows.shape[1] // _JUDGE_EVERY) :] = True
    fits = ~judges if judges.any() else judges | True
    return LayerCase(
        weight=matrix.to_matrix(weight).astype(np.float32),
        scales=scales,
        largest=largest,
        bias=bias,
        rows=rows[:, fits],
        wanted=wanted[:, fits],
        judge_rows=rows[:, judges] if judges.any() else rows,
        judge_wanted=wanted[:, judges] if judges.any() else wanted,
        mean_input=mean_input,
        mean_wanted=mean_wanted,
        is_centred=is_centred,
    )
