"""ConvTranspose as an ordinary convolution: ONNX Runtime has no integer kernel for it.

With stride s and padding p, output y gets weight t from input (y + p - t) / s, where that is whole. For all outputs
y = s * q + r of one phase r these are the inputs q + d, d = (r + p - t) / s. So each phase is an ordinary convolution
with stride 1 over the same offsets d, and all of them together are one with s * s times the filters:

    [N, C, H, W] -> Conv -> [N, s * s * C', Q, Q'] -> interleave the phases -> [N, C', s * Q, s * Q'] -> cut to size

A phase has no weight for some offsets; there it has zeros, which are exact. Interleaving happens on the integers with
channels last, in runs of s * C', and its first and last Transpose cancel against those around integer convolutions.

    Shi et al.: Is the deconvolution layer the same as a convolutional layer? 2016 (arXiv:1609.07009).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.graph.weights import constant_array

__all__ = ["Phases", "phases_of", "refuse_conv_transpose"]


@dataclass(frozen=True, slots=True)
class _Axis:
    """One spatial axis: `first` and `count` are of the offsets d."""

    stride: int
    kernel: int
    padding: int
    first: int
    count: int
    begin: int
    end: int
    size: int
    """Of the output."""

    @property
    def steps(self) -> int:
        """Outputs of one phase, q = 0 .. steps - 1."""
        return -(-self.size // self.stride)

    def weights_of(self, phase: int) -> list[tuple[int, int]]:
        """Which weight t stands at which place among the offsets."""
        return [
            ((phase + self.padding - t) // self.stride - self.first, t)
            for t in range(self.kernel)
            if (phase + self.padding - t) % self.stride == 0
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """A ConvTranspose with two spatial axes as one Conv."""

    rows: _Axis
    columns: _Axis

    @property
    def count(self) -> int:
        """How many phases there are."""
        return self.rows.stride * self.columns.stride

    @property
    def pads(self) -> list[int]:
        """Of the Conv."""
        return [self.rows.begin, self.columns.begin, self.rows.end, self.columns.end]

    def weight(self, array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """[in, out, kH, kW] -> [phases * out, in, offsets, offsets], phase by phase."""
        inputs, outputs = array.shape[:2]
        rows, columns = self.rows, self.columns
        made = np.zeros((rows.stride, columns.stride, outputs, inputs, rows.count, columns.count), dtype=array.dtype)
        for i in range(rows.stride):
            for j in range(columns.stride):
                for row, t in rows.weights_of(i):
                    for column, u in columns.weights_of(j):
                        made[i, j, :, :, row, column] = array[:, :, t, u].T
        return made.reshape(self.count * outputs, inputs, rows.count, columns.count)


def refuse_conv_transpose(node: ir.Node) -> str | None:
    """Why `node` can't be written as a convolution; None: it can."""
    return (
        None
        if phases_of(node) is not None
        else ("it is no ConvTranspose of known size over two axes without groups and dilation")
    )


def phases_of(node: ir.Node) -> Phases | None:
    """The phases of a ConvTranspose; None where it has groups, dilation, other than two axes, or unknown sizes."""
    weight = constant_array(node.inputs[1])
    before, after = _sides(node.inputs[0]), _sides(node.outputs[0])
    if weight is None or weight.ndim != 4 or before is None or after is None:
        return None
    if node.attributes.get_int("group", 1) != 1 or any(step != 1 for step in node.attributes.get_ints("dilations", ())):
        return None
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or "output_shape" in node.attributes:
        return None
    strides = list(node.attributes.get_ints("strides", ())) or [1, 1]
    pads = list(node.attributes.get_ints("pads", ())) or [0] * 4
    axes = [
        _axis(before[axis], after[axis], stride=strides[axis], kernel=weight.shape[2 + axis], padding=pads[axis])
        for axis in (0, 1)
    ]
    if axes[0] is None or axes[1] is None:
        return None
    return Phases(rows=axes[0], columns=axes[1])


def _axis(before: int, after: int, *, stride: int, kernel: int, padding: int) -> _Axis | None:
    offsets = [
        (phase + padding - t) // stride
        for phase in range(stride)
        for t in range(kernel)
        if (phase + padding - t) % stride == 0
    ]
    first, count = min(offsets), max(offsets) - min(offsets) + 1
    begin = -first
    end = -(-after // stride) - before - begin + count - 1
    # Conv has no negative padding: it can't leave out inputs.
    if begin < 0 or end < 0:
        return None
    return _Axis(stride, kernel, padding, first, count, begin, end, after)


def _sides(value: ir.Value | None) -> list[int] | None:
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    sides = [dim for dim in list(value.shape)[2:] if isinstance(dim, int)]
    return sides if len(sides) == 2 else None
