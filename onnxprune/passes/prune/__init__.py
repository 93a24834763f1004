"""Structured pruning: whole channels are removed, wherever they reach.

- analysis: what must be removed together
- criteria: how important a channel is; scoring applies a criterion to the weights
- selection: which channels go, within limits and costs
- plan: the decision, as plain values
- surgery: cutting them out; trial checks the result and puts back what breaks
- oracle: what the result must compute, said without cutting
"""

from __future__ import annotations

from onnxprune.passes.prune.analysis import ChannelClasses, ChannelSummary, analyze_channels, summarize_channels
from onnxprune.passes.prune.config import PruneConfig, ScopeRatio
from onnxprune.passes.prune.plan import PrunedGroup, PruningPlan
from onnxprune.passes.prune.prune import PrunePass

__all__ = [
    "ChannelClasses",
    "ChannelSummary",
    "PruneConfig",
    "PrunePass",
    "PrunedGroup",
    "PruningPlan",
    "ScopeRatio",
    "analyze_channels",
    "summarize_channels",
]
