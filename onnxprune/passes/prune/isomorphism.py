"""Groups of channels of the same structure.

Fang et al., "Isomorphic Pruning for Vision Models", ECCV 2024: scores of unlike structures (a residual stream, an
attention head, the inside of an MLP) can't be compared, those of like ones can. So each set of like groups is ranked
for itself, and each set loses the same part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from onnxprune.passes.prune.analysis import ChannelClasses, ChannelGroup, WeightSlices

__all__ = ["isomorphic_sets"]


def isomorphic_sets(classes: ChannelClasses, groups: Sequence[ChannelGroup]) -> list[tuple[ChannelGroup, ...]]:
    """`groups` by structure, in the order of the first of each set.

    Two groups are alike when the multisets of their places are equal; a place counts as its role, the operators and
    inputs that it is used by, its axis, its weight's rank and kernel (all sizes from the third axis on), and the
    indices that one channel owns. Numbers of channels don't count, nor does the order of layers.
    """
    sets: dict[Hashable, list[ChannelGroup]] = {}
    for group in groups:
        places = Counter(_structure(classes, slices) for slices in group.slices)
        sets.setdefault(frozenset(places.items()), []).append(group)
    return [tuple(alike) for alike in sets.values()]


def _structure(classes: ChannelClasses, slices: WeightSlices) -> Hashable:
    uses = Counter(
        (use.node.domain, use.node.op_type, use.position)
        for use in classes.labelling.weight_uses[slices.weight]
        if use.axis == slices.axis
    )
    shape = () if slices.weight.const_value is None else tuple(slices.weight.const_value.shape.numpy())
    owned = slices.positions.shape[1]
    return (slices.role, frozenset(uses.items()), slices.axis, len(shape), shape[2:], owned)
