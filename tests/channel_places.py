"""Places and groups of channels from arrays, for tests of criteria."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.passes.prune.channel_slices import (
    ChannelActivation,
    ChannelPlace,
    ChannelSlices,
    PlaceRole,
    SlicedArray,
)


def place(
    weight: npt.ArrayLike,
    *,
    axis: int = 0,
    role: PlaceRole = "filter",
    positions: npt.ArrayLike | None = None,
    is_normalization_scale: bool = False,
    input_rms: npt.ArrayLike | None = None,
    gradients: npt.ArrayLike | None = None,
) -> ChannelPlace:
    """Channel i owns index i of `axis`, or row i of `positions`; `gradients` is (minibatches, *shape of the weight)."""
    array = np.asarray(weight, dtype=np.float32)
    where = np.arange(array.shape[axis])[:, None] if positions is None else np.asarray(positions)

    def sliced(content: npt.NDArray[Any]) -> SlicedArray:
        return SlicedArray(array=content, axis=axis, positions=where)

    minibatches = None if gradients is None else np.asarray(gradients, dtype=np.float32)
    return ChannelPlace(
        weight="w",
        axis=axis,
        role=role,
        op_types=("Conv",),
        is_normalization_scale=is_normalization_scale,
        shape=array.shape,
        num_channels=len(where),
        positions_per_channel=where.shape[1],
        input_rms=None if input_rms is None else np.asarray(input_rms, dtype=np.float64),
        open_weight=lambda: sliced(array),
        open_gradients=None if minibatches is None else lambda: tuple(sliced(part) for part in minibatches),
    )


def activation(
    mean_abs: Sequence[float], *, tensor: str = "x", node: str = "n", has_weight: bool = True
) -> ChannelActivation:
    """A tensor whose channels have these means, and the same root mean squares."""
    values = np.asarray(mean_abs, dtype=np.float64)
    return ChannelActivation(
        tensor=tensor, node=node, op_type="Conv", has_weight=has_weight, mean_abs=values, rms=values
    )


def group(*places: ChannelPlace, activations: Sequence[ChannelActivation] = ()) -> ChannelSlices:
    """A group with these places."""
    count = places[0].num_channels if places else len(activations[0].mean_abs)
    return ChannelSlices(
        group="w[0]", layers=("conv",), num_channels=count, places=places, activations=tuple(activations)
    )
