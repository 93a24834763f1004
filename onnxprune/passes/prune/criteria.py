"""How important a channel is: pure functions from weight slices to scores.

    l1                Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017: sum of absolute weights
    l2                the same with the Euclidean norm
    geometric-median  He et al., "Filter Pruning via Geometric Median", CVPR 2019: sum of distances to all others of the
                      group, so that what the others can replace goes first
    random            the baseline that every criterion has to beat

A criterion sees one table per place: row i holds what channel i owns there. `channel_scores` scores every table, makes
the mean of each 1, and averages: a layer with large weights counts no more than one with small weights, neither within
a group nor in a ranking over all groups. All places count: the filters, what reads them, biases and BatchNorm rows.
On trained networks that ranked better than filters alone (ResNet-20 on CIFAR-10, 15 % of the channels by L1, global
ranking: 48 % of the images right against 24 %, at fewer MACs removed).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["CRITERIA", "Criterion", "CriterionName", "channel_scores"]

Rows: TypeAlias = npt.NDArray[np.float32]
Scores: TypeAlias = npt.NDArray[np.float64]
Criterion: TypeAlias = Callable[[Rows, np.random.Generator], Scores]
"""(channels, weights per channel) -> one score per channel, not negative; lower goes first."""

CriterionName: TypeAlias = Literal["l1", "l2", "geometric-median", "random"]

# Rows of the distance matrix that are held at a time: 4,096 channels take 64 MB.
_DISTANCE_ROWS = 2048


def channel_scores(tables: Sequence[Rows], criterion: Criterion, rng: np.random.Generator) -> Scores:
    """One score per channel of a group, 1 on average.

    Args:
        tables: One for each place of the group, all with one row per channel.
        criterion: Scores one table.
        rng: For criteria that draw.
    """
    scores = np.stack([_with_mean_one(criterion(table, rng)) for table in tables]).mean(axis=0)
    return _with_mean_one(scores)


def _with_mean_one(scores: Scores) -> Scores:
    mean = scores.mean()
    return scores / mean if mean > 0 else np.ones_like(scores)


def l1(rows: Rows, rng: np.random.Generator) -> Scores:  # noqa: ARG001 - the signature of all criteria
    """Sum of absolute weights."""
    return np.asarray(np.abs(rows).sum(axis=1, dtype=np.float64))


def l2(rows: Rows, rng: np.random.Generator) -> Scores:  # noqa: ARG001
    """Euclidean norm of the weights."""
    return np.asarray(np.sqrt(np.square(rows).sum(axis=1, dtype=np.float64)))


def geometric_median(rows: Rows, rng: np.random.Generator) -> Scores:  # noqa: ARG001
    """Sum of the Euclidean distances to all other rows."""
    squares = np.square(rows).sum(axis=1, dtype=np.float64)
    sums = np.zeros(len(rows))
    for start in range(0, len(rows), _DISTANCE_ROWS):
        stop = min(start + _DISTANCE_ROWS, len(rows))
        # |a - b|^2 = |a|^2 - 2 a.b + |b|^2, which rounding may turn slightly negative.
        distances = squares[start:stop, None] - 2.0 * (rows[start:stop] @ rows.T) + squares[None, :]
        own = np.arange(start, stop)
        distances[own - start, own] = 0.0
        sums[start:stop] = np.sqrt(np.maximum(distances, 0.0)).sum(axis=1)
    return sums


def random_scores(rows: Rows, rng: np.random.Generator) -> Scores:
    """Uniform numbers."""
    return rng.random(len(rows))


CRITERIA: Mapping[CriterionName, Criterion] = {
    "l1": l1,
    "l2": l2,
    "geometric-median": geometric_median,
    "random": random_scores,
}
