"""How important a channel is: pure functions from a group's slices to one score per channel; lower goes first.

    l1                Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017: sum of absolute weights
    l2                the same with the Euclidean norm
    geometric-median  He et al., "Filter Pruning via Geometric Median", CVPR 2019: sum of distances to all others of the
                      group, so that what the others can replace goes first
    bn-scale          Liu et al., "Network Slimming", ICCV 2017: |gamma| of the normalizations the channel goes through
    activation        Molchanov et al., "Pruning Convolutional Neural Networks", ICLR 2017: mean |x| of the channel
                      where it is read, over calibration data
    wanda             Sun et al., "A Simple and Effective Pruning Approach for LLMs", ICLR 2024: |W| * rms(x), summed
                      over everything that reads the channel; rms(x) from calibration data
    taylor            Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019: the square of the
                      sum of w * dL/dw over all that reads the channel, averaged over minibatches
    fisher            LeCun et al., "Optimal Brain Damage", 1989, with the diagonal of the empirical Fisher matrix for
                      that of the Hessian (Theis et al. 2018): sum of w^2 * (dL/dw)^2, averaged over minibatches
    random            the baseline that every criterion has to beat

**Normalization.** A criterion makes one table t[p, c] for each place p that it looks at. The score of channel c is

    s[c] = mean over p of ( t[p, c] / mean over c of t[p, c] ),     divided by its mean over c

so a layer with large weights counts no more than one with small weights, neither within a group nor in a ranking over
all groups. Criteria of weights look at all places: the filters, what reads them, biases and BatchNorm rows. On trained
networks that ranked better than filters alone (ResNet-20 on CIFAR-10, 15 % of the channels by L1, global ranking: 48 %
of the images right against 24 %, at fewer MACs removed).

`taylor` alone is not normalized: its score is a change of the loss, to first order, when the channel is zero wherever
it is read, and so it compares across groups. (The same network, 15 % of the channels, global ranking: 60 % right,
against 31 % with a normalized table for each place, at equal MACs.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxprune.passes.prune.channel_slices import ChannelPlace, ChannelSlices, Rows, Scores

__all__ = ["CRITERIA", "Criterion", "CriterionRow", "Need", "with_mean_one"]

Criterion: TypeAlias = Callable[[ChannelSlices, np.random.Generator], Scores]
"""One score per channel, finite and not negative, on any scale; lower goes first."""

Need: TypeAlias = Literal["calibration", "gradients"]

# Rows of the distance matrix that are held at a time: 4,096 channels take 64 MB.
_DISTANCE_ROWS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class CriterionRow:
    """A criterion and what it needs.

    Attributes:
        score: The function.
        needs: Data that the run must have.
        lacks: Says what a group lacks to be scored so, or None; None: every group can be. A group that lacks something
            is scored by `l2` instead, and the report says so.
        is_absolute: True when scores of different groups have one unit and are compared as they are.
    """

    score: Criterion
    needs: Need | None = None
    lacks: Callable[[ChannelSlices], str | None] | None = None
    is_absolute: bool = False


def with_mean_one(scores: Scores) -> Scores:
    """`scores` divided by their mean; ones where all are 0."""
    mean = scores.mean()
    return scores / mean if mean > 0 else np.ones_like(scores)


def _average(tables: Iterable[Scores]) -> Scores:
    """The mean of tables that count alike: each is divided by its mean."""
    return with_mean_one(np.mean([with_mean_one(table) for table in tables], axis=0))


# --- weights --------------------------------------------------------------------------------------------------


def l1(place: ChannelPlace) -> Scores:
    """Sum of absolute weights."""
    return np.asarray(place.sums(np.abs).sum(axis=1))


def l2(place: ChannelPlace) -> Scores:
    """Euclidean norm of the weights."""
    return np.asarray(np.sqrt(place.sums(np.square).sum(axis=1)))


def geometric_median(rows: Rows) -> Scores:
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


def _by_place(score: Callable[[ChannelPlace], Scores]) -> Criterion:
    def criterion(slices: ChannelSlices, rng: np.random.Generator) -> Scores:  # noqa: ARG001 - all have one signature
        return _average(score(place) for place in slices.places)

    return criterion


def _bn_scale(slices: ChannelSlices, rng: np.random.Generator) -> Scores:  # noqa: ARG001
    return _average(l1(place) for place in slices.places if place.is_normalization_scale)


def _lacks_scale(slices: ChannelSlices) -> str | None:
    return None if any(place.is_normalization_scale for place in slices.places) else "no normalization scales it"


def _random(slices: ChannelSlices, rng: np.random.Generator) -> Scores:
    return with_mean_one(rng.random(slices.num_channels))


# --- calibration data -----------------------------------------------------------------------------------------


def _activation(slices: ChannelSlices, rng: np.random.Generator) -> Scores:  # noqa: ARG001
    # A tensor that several nodes read counts once.
    tensors = {activation.tensor: activation.mean_abs for activation in slices.activations}
    return _average(tensors.values())


def wanda(place: ChannelPlace, input_rms: npt.NDArray[np.float64]) -> Scores:
    """Sum of |w| * rms(x) over all weights w of a channel; `input_rms` is (channels, positions per channel)."""
    return np.asarray((place.sums(np.abs) * input_rms).sum(axis=1))


def _wanda(slices: ChannelSlices, rng: np.random.Generator) -> Scores:  # noqa: ARG001
    weighed = [wanda(place, place.input_rms) for place in slices.places if place.input_rms is not None]
    return _average([*weighed, *_products(slices)])


def _products(slices: ChannelSlices) -> Iterable[Scores]:
    """Where a node multiplies two activations (queries and keys), the other one stands for the weight."""
    products: dict[str, Scores] = {}
    for activation in slices.activations:
        if not activation.has_weight:
            products[activation.node] = products.get(activation.node, np.ones(slices.num_channels)) * activation.rms
    return products.values()


def _lacks_activation(slices: ChannelSlices) -> str | None:
    return None if slices.activations else "no operator sums over it"


# --- gradients ------------------------------------------------------------------------------------------------


def loss_changes(rows: Rows, gradients: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """(minibatches, channels): the sum of w * g, which is the loss less what it becomes, to first order, without a row.

    `gradients` is (minibatches, channels, numbers per channel).
    """
    return np.asarray(np.einsum("cn,bcn->bc", rows, gradients, dtype=np.float64))


def taylor(places: Sequence[ChannelPlace]) -> Scores:
    """Mean over minibatches of the squared change of the loss when all that reads a channel is set to zero at once."""
    changes = sum(
        np.concatenate([loss_changes(rows, gradients) for rows, gradients in place.gradient_blocks()], axis=1)
        for place in places
    )
    return np.asarray(np.square(changes).mean(axis=0))


def _taylor(slices: ChannelSlices, rng: np.random.Generator) -> Scores:  # noqa: ARG001
    known = [place for place in slices.places if place.open_gradients is not None]
    readers = [place for place in known if place.role == "input"]
    filters = [place for place in known if place.role == "filter"]
    # Where no weight reads the channel (queries meet keys), what makes it is set to zero instead.
    return taylor(readers or filters or known)


def fisher(rows: Rows, gradients: npt.NDArray[np.float32]) -> Scores:
    """Sum of w^2 times the mean over minibatches of g^2, which is the Fisher matrix' diagonal."""
    diagonal = np.square(gradients, dtype=np.float64).mean(axis=0)
    return np.asarray((np.square(rows) * diagonal).sum(axis=1))


def _fisher(slices: ChannelSlices, rng: np.random.Generator) -> Scores:  # noqa: ARG001
    return _average(
        np.concatenate([fisher(rows, gradients) for rows, gradients in place.gradient_blocks()])
        for place in slices.places
        if place.open_gradients is not None
    )


def _lacks_gradients(slices: ChannelSlices) -> str | None:
    return None if any(place.open_gradients is not None for place in slices.places) else "no gradient is given for it"


CRITERIA: Mapping[str, CriterionRow] = {
    "l1": CriterionRow(score=_by_place(l1)),
    "l2": CriterionRow(score=_by_place(l2)),
    "geometric-median": CriterionRow(score=_by_place(lambda place: geometric_median(place.rows()))),
    "bn-scale": CriterionRow(score=_bn_scale, lacks=_lacks_scale),
    "activation": CriterionRow(score=_activation, needs="calibration", lacks=_lacks_activation),
    "wanda": CriterionRow(score=_wanda, needs="calibration", lacks=_lacks_activation),
    "taylor": CriterionRow(score=_taylor, needs="gradients", lacks=_lacks_gradients, is_absolute=True),
    "fisher": CriterionRow(score=_fisher, needs="gradients", lacks=_lacks_gradients),
    "random": CriterionRow(score=_random),
}
