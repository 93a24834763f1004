"""What a criterion sees: everything that the channels of one group own, place by place.

Tables are read when a criterion asks for them and are not kept: a residual stream lies in every weight of a
transformer, and all of them together must never be in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["ChannelActivation", "ChannelPlace", "ChannelSlices", "PlaceRole", "Rows", "Scores", "SlicedArray"]

Rows: TypeAlias = npt.NDArray[np.float32]
"""(channels, numbers per channel)."""
Scores: TypeAlias = npt.NDArray[np.float64]
"""(channels,)."""
PlaceRole: TypeAlias = Literal["filter", "input", "parameter"]

# Rows that are read at a time, in bytes of float32.
_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlicedArray:
    """One array in memory, and where the channels lie on one of its axes: `positions` is (channels, per channel)."""

    array: npt.NDArray[Any]
    axis: int
    positions: npt.NDArray[np.int64]

    def rows(self, start: int = 0, stop: int | None = None) -> Rows:
        """What channels `start` to `stop` own: position after position, each with all that is on the other axes."""
        positions = self.positions[start:stop]
        moved = np.moveaxis(_picked(self.array, self.axis, positions.reshape(-1)), self.axis, 0)
        return moved.reshape(len(positions), -1).astype(np.float32, copy=False)

    def sums(self, of: Callable[[Rows], Rows]) -> npt.NDArray[np.float64]:
        """(channels, per channel): the sum of `of(x)` over all numbers x at each position; `of` goes by element.

        Sums along the axes as they lie in memory, which is several times faster than turning them into rows.
        """
        wanted = self.positions.reshape(-1)
        others = tuple(axis for axis in range(self.array.ndim) if axis != self.axis)
        step = max(1, _BLOCK_BYTES // max(4 * self.array[:1].size, 1))
        if self.axis == 0:
            blocks = (wanted[start : start + step] for start in range(0, len(wanted), step))
            found = [of(self._float(_picked(self.array, 0, block))).sum(others, dtype=np.float64) for block in blocks]
            sums = np.concatenate(found)
        else:
            sums = np.zeros(len(wanted))
            for start in range(0, len(self.array), step):
                window = self._float(_picked(self.array[start : start + step], self.axis, wanted))
                sums += of(window).sum(others, dtype=np.float64)
        return sums.reshape(self.positions.shape)

    @staticmethod
    def _float(array: npt.NDArray[Any]) -> Rows:
        return array.astype(np.float32, copy=False)

    def row_blocks(self) -> Iterator[tuple[int, int]]:
        """Start and stop of blocks of channels that are small enough to be copied."""
        count = len(self.positions)
        size = self.array.shape[self.axis]
        row_bytes = 4 * self.positions.shape[1] * (self.array.size // size if size else 0)
        step = max(1, _BLOCK_BYTES // max(row_bytes, 1))
        for start in range(0, count, step):
            yield start, min(start + step, count)


def _picked(array: npt.NDArray[Any], axis: int, indices: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """`array` at `indices` of `axis`: a view where they follow each other, else a copy."""
    first = int(indices[0]) if indices.size else 0
    if np.array_equal(indices, np.arange(first, first + indices.size)):
        return array[(slice(None),) * axis + (slice(first, first + indices.size),)]
    # Along the axis as it lies in memory; picking from a transposed view is several times slower.
    return np.take(array, indices, axis=axis)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelPlace:
    """One axis of one weight on which the channels of a group lie.

    Attributes:
        weight: Name of the initializer.
        axis: The axis.
        role: "filter": the axis enumerates what a node produces. "input": it is summed over against the channels that
            come in. "parameter": it holds a number or block per channel (bias, BatchNorm, broadcast constants).
        op_types: Operators that use the weight on this axis, each once.
        is_normalization_scale: True for the factor (gamma) of a BatchNorm, LayerNorm, InstanceNorm, GroupNorm or
            RMSNorm.
        shape: Of the whole weight.
        num_channels: Channels of the group that are still there: rows of every table.
        positions_per_channel: Indices of the axis that one channel owns (H*W where a Flatten stands before).
        input_rms: Only with calibration data, and where the weight is multiplied with these channels (role "input", and
            filters of grouped convolutions): root mean square of what each index is multiplied with, (channels,
            positions per channel).
        open_weight: Reads the weight. `rows` and `row_blocks` are the ways to its content.
        open_gradients: Reads the gradients, one array for each minibatch; None where the run has none for this weight.
    """

    weight: str
    axis: int
    role: PlaceRole
    op_types: tuple[str, ...]
    is_normalization_scale: bool
    shape: tuple[int, ...]
    num_channels: int
    positions_per_channel: int
    input_rms: npt.NDArray[np.float64] | None
    open_weight: Callable[[], SlicedArray] = field(repr=False)
    open_gradients: Callable[[], tuple[SlicedArray, ...]] | None = field(repr=False)

    def rows(self) -> Rows:
        """(channels, numbers per channel): all that each channel owns here. Don't write into it."""
        return self.open_weight().rows()

    def row_blocks(self) -> Iterator[Rows]:
        """The same in blocks of channels, of which only one is in memory at a time."""
        table = self.open_weight()
        for start, stop in table.row_blocks():
            yield table.rows(start, stop)

    def sums(self, of: Callable[[Rows], Rows]) -> npt.NDArray[np.float64]:
        """(channels, positions per channel): the sum of `of(w)` over the weights w at each position.

        The fast way where weights count one by one; `of` takes and gives arrays of any shape (`np.abs`).
        """
        return self.open_weight().sums(of)

    def gradient_blocks(self) -> Iterator[tuple[Rows, npt.NDArray[np.float32]]]:
        """As `row_blocks`, each with the gradients (minibatches, channels, numbers per channel).

        Raises:
            ValueError: The run has no gradients for this weight (`open_gradients` is None).
        """
        if self.open_gradients is None:
            raise ValueError(f"There are no gradients of '{self.weight}'.")
        table, gradients = self.open_weight(), self.open_gradients()
        for start, stop in table.row_blocks():
            yield table.rows(start, stop), np.stack([gradient.rows(start, stop) for gradient in gradients])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelActivation:
    """The channels in one tensor that a node sums over, on calibration data.

    Attributes:
        tensor: Name of the tensor.
        node: Name of the node that reads it.
        op_type: The node's operator.
        has_weight: True when the node multiplies it with a weight that is one of the group's places.
        mean_abs: Mean of the absolute values of each channel, over samples and all other axes.
        rms: Square root of the mean of their squares.
    """

    tensor: str
    node: str
    op_type: str
    has_weight: bool
    mean_abs: Scores
    rms: Scores


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelSlices:
    """The channels of one group, which are ranked against each other, and all that belongs to them.

    Attributes:
        group: The group's name, as `onnxprune inspect --channels` prints it.
        layers: Names of the nodes that produce these channels.
        num_channels: Rows of every table, and scores that are wanted; channels removed in an earlier step don't count.
        places: Every place; row i of all tables is the same channel.
        activations: Only with calibration data: one for each tensor and node that sums over these channels.
    """

    group: str
    layers: tuple[str, ...]
    num_channels: int
    places: tuple[ChannelPlace, ...]
    activations: tuple[ChannelActivation, ...] = ()
