"""Structured pruning: whole channels are removed, wherever they reach.

- analysis: what must be removed together
- criteria: how important a channel is, from what `channel_slices` shows of it; `criterion_plugins` brings others
- scoring: applies a criterion, with `activations` on calibration data and `gradients` from a file
- selection: which channels go, within limits and costs
- reach: how much may go, and what is held back by which reason
- plan: the decision, as plain values
- surgery: cutting them out; trial checks the result and puts back what breaks
- oracle: what the result must compute, said without cutting
"""

from __future__ import annotations

from onnxprune.passes.prune.analysis import ChannelClasses, analyze_channels
from onnxprune.passes.prune.channel_slices import ChannelActivation, ChannelPlace, ChannelSlices
from onnxprune.passes.prune.config import PruneConfig, ScopeRatio
from onnxprune.passes.prune.plan import PrunedGroup, PruningPlan
from onnxprune.passes.prune.prune import PrunePass
from onnxprune.passes.prune.reach import ChannelReach, ChannelSummary, channel_reach, summarize_channels

__all__ = [
    "ChannelActivation",
    "ChannelClasses",
    "ChannelPlace",
    "ChannelReach",
    "ChannelSlices",
    "ChannelSummary",
    "PruneConfig",
    "PrunePass",
    "PrunedGroup",
    "PruningPlan",
    "ScopeRatio",
    "analyze_channels",
    "channel_reach",
    "summarize_channels",
]
