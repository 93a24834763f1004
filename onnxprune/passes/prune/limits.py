"""What no plan may break: layers keep enough channels, in the right multiples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxprune.ops.channels import LabelArray
from onnxprune.passes.prune.analysis import ChannelClasses

__all__ = ["WidthLimits", "width_limits"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Limit:
    """`classes` are the different classes of an axis, `counts` how many positions each has on it."""

    classes: LabelArray
    counts: LabelArray
    least: int
    multiple: int
    width: int


class WidthLimits:
    """Repairs choices that leave a layer too narrow."""

    def __init__(self, limits: list[_Limit]) -> None:
        self._limits = limits

    def repaired(self, keeps: npt.NDArray[np.bool_], scores: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """`keeps` with as many of the most important removed classes put back as the limits ask for.

        Putting back is all that happens, so it ends; a layer that several limits meet in takes the strictest.
        """
        keeps = keeps.copy()
        changed = True
        while changed:
            changed = False
            for limit in self._limits:
                kept = int(limit.counts[keeps[limit.classes]].sum())
                missing = _wanted(kept, limit) - kept
                if missing <= 0:
                    continue
                gone = np.flatnonzero(~keeps[limit.classes])
                # Highest score first; equal scores in the order of the channels.
                order = gone[np.argsort(-scores[limit.classes[gone]], kind="stable")]
                enough = int(np.searchsorted(np.cumsum(limit.counts[order]), missing)) + 1
                keeps[limit.classes[order[:enough]]] = True
                changed = True
        return keeps


def _wanted(kept: int, limit: _Limit) -> int:
    if kept == limit.width:
        return kept
    wanted = max(kept, limit.least)
    return min(-(-wanted // limit.multiple) * limit.multiple, limit.width)


def width_limits(classes: ChannelClasses, *, min_channels: int | None, channel_multiple: int) -> WidthLimits:
    """The limits of every layer.

    Args:
        classes: Of the model.
        min_channels: What each layer keeps; None: the larger of 8 and an eighth of its width. No layer is ever emptied,
            and no part of a Split or of another cut either.
        channel_multiple: Widths that shrink stay multiples of this.
    """
    limits: dict[bytes, _Limit] = {}
    for width in classes.widths:
        size = len(width.classes)
        least = max(8, -(-size // 8)) if min_channels is None else min_channels
        members, counts = np.unique(width.classes, return_counts=True)
        limits[width.classes.tobytes()] = _Limit(
            classes=members, counts=counts, least=min(least, size), multiple=channel_multiple, width=size
        )
    for members in classes.inner_axes:
        limits.setdefault(
            members.tobytes(),
            _Limit(
                classes=members,
                counts=np.ones(len(members), dtype=np.int64),
                least=1,
                multiple=1,
                width=len(members),
            ),
        )
    return WidthLimits(list(limits.values()))
