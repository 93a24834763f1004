"""What a fallback costs, in one sentence."""

from __future__ import annotations

from onnxprune.contracts import FallbackCost
from onnxprune.report.figures import ms_text

__all__ = ["fallback_text"]


def fallback_text(cost: FallbackCost) -> str:
    """'fallback of 3 layers costs 0.4 ms (5.1 ms -> 5.5 ms)', or why that is not known."""
    layers = f"fallback of {cost.num_layers} layer" + ("s" if cost.num_layers != 1 else "")
    if cost.latency is None:
        return f"what the {layers} costs is not measured: {cost.not_measured_reason}."
    before, after = cost.latency.before.p50_ms, cost.latency.after.p50_ms
    change = f"({ms_text(before)} -> {ms_text(after)})"
    if cost.latency.low <= 1.0 <= cost.latency.high:
        return f"{layers} costs nothing that can be measured {change}."
    verb = "costs" if after > before else "saves"
    return f"{layers} {verb} {ms_text(abs(after - before))} {change}."
