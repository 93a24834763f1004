"""Group-sparse training: channels that a network does not need end as exact zeros.

Network slimming (Liu et al., ICCV 2017) puts an L1 penalty on the BatchNorm scales. Here the scale
*and* the shift of every BatchNorm that must live or die together form one group per channel, and the
penalty is the group lasso (Yuan and Lin, 2006), applied as its proximal operator after each step:

    v <- v * max(0, 1 - learning_rate * strength * sqrt(len(v)) / ||v||)

A channel whose group is zero gives zero whatever its input is, so its filter can be removed without
changing a single output. `settle` then writes that into the weights: they are set to zero as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelGroup:
    """BatchNorms of equal width whose channels are removed together.

    Attributes:
        name: For the log.
        norms: The BatchNorms that end a producer of these channels.
        producers: The convolutions before them, in the same order.
    """

    name: str
    norms: tuple[nn.BatchNorm2d, ...]
    producers: tuple[nn.Conv2d, ...]


def group_norms(group: ChannelGroup) -> torch.Tensor:
    """Give ||v|| per channel, shape (channels,)."""
    squares = [norm.weight.square() + norm.bias.square() for norm in group.norms]
    return torch.stack(squares).sum(dim=0).sqrt()


@torch.no_grad()
def start_low(groups: Sequence[ChannelGroup]) -> None:
    """Set every scale to 0.5, where Liu et al. start: the way to zero is shorter than from 1."""
    for group in groups:
        for norm in group.norms:
            nn.init.constant_(norm.weight, 0.5)


@torch.no_grad()
def shrink(groups: Sequence[ChannelGroup], *, step: float) -> None:
    """Apply the proximal operator; `step` is learning rate times strength.

    The strongest channels of a group, 8 or an eighth of its width, are left alone.
    """
    for group in groups:
        norms = group_norms(group)
        threshold = step * (2 * len(group.norms)) ** 0.5
        factor = (1.0 - threshold / norms.clamp_min(1e-12)).clamp_min(0.0)
        factor[norms.topk(min(len(norms), max(8, len(norms) // 8))).indices] = 1.0
        for norm in group.norms:
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)


@torch.no_grad()
def hold_zeros(groups: Sequence[ChannelGroup], alive: Sequence[torch.Tensor]) -> None:
    """Set the channels that are not alive to zero again after a plain optimizer step."""
    for group, mask in zip(groups, alive, strict=True):
        for norm in group.norms:
            norm.weight.mul_(mask)
            norm.bias.mul_(mask)


def alive_channels(groups: Sequence[ChannelGroup]) -> list[torch.Tensor]:
    """Give one 0/1 mask per group: 1 where the channel's group is not zero."""
    return [(group_norms(group) > 0).float().detach() for group in groups]


@torch.no_grad()
def settle(groups: Sequence[ChannelGroup]) -> None:
    """Zero the filters of dead channels; the network's function stays the same."""
    for group, mask in zip(groups, alive_channels(groups), strict=True):
        for producer in group.producers:
            producer.weight.mul_(mask[:, None, None, None])


def dead_ratio(groups: Sequence[ChannelGroup]) -> float:
    """Give the share of all channels that are zero."""
    masks = torch.cat(alive_channels(groups))
    return 1.0 - float(masks.mean())
