"""What the report of the `quant` pass says about a plan."""

from __future__ import annotations

from onnxprune.contracts import Change, PassReport, QuantizationPlan, Skip
from onnxprune.passes.quant.accounting import account_changes, account_figures, account_notes, account_skips

__all__ = ["plan_report"]


def plan_report(pass_id: str, pass_name: str, plan: QuantizationPlan) -> PassReport:
    """Every scale, every node and tensor that stays float, and what the goals cost."""
    return PassReport(
        pass_id=pass_id,
        pass_name=pass_name,
        summary=_summary(plan),
        changes=(
            *_range_changes(plan),
            *(Change(what=why, where=name) for name, why in plan.adjusted.items()),
            *account_changes(plan),
        ),
        skips=(
            *(Skip(where=node, reason=reason) for node, reason in plan.excluded_nodes.items()),
            *account_skips(plan),
            *(Skip(where=tensor, reason=reason) for tensor, reason in plan.skipped.items()),
        ),
        notes=(*_notes(plan), *account_notes(plan)),
        figures={
            "quantized_activations": len(plan.activations),
            "quantized_weights": len(plan.weights),
            "float_nodes": len(plan.excluded_nodes) + len(plan.returned_nodes),
            "calibration_samples": plan.num_samples,
            **account_figures(plan),
        },
    )


def _summary(plan: QuantizationPlan) -> str:
    count = len(plan.excluded_nodes) + len(plan.returned_nodes)
    left = f"{count} {'node stays' if count == 1 else 'nodes stay'} float"
    if plan.mode != "static":
        return f"{len(plan.weights)} weights have scales ({plan.mode}, no calibration data); {left}"
    return (
        f"{len(plan.activations)} activations and {len(plan.weights)} weights have scales "
        f"({plan.method}, {plan.num_samples} samples); {left}"
    )


def _range_changes(plan: QuantizationPlan) -> list[Change]:
    activations = [
        Change(
            what="activation range",
            where=name,
            figures={
                "low": found.range_min,
                "high": found.range_max,
                "scale": found.scale,
                "zero_point": found.zero_point,
            },
        )
        for name, found in plan.activations.items()
    ]
    weights = [
        Change(
            what="weight scales",
            where=name,
            figures={
                "num_scales": len(found.scales),
                "smallest_scale": min(found.scales),
                "largest_scale": max(found.scales),
            },
        )
        for name, found in plan.weights.items()
    ]
    return [*activations, *weights]


def _notes(plan: QuantizationPlan) -> list[str]:
    notes = []
    if plan.mode == "static" and plan.num_samples < 8:
        notes.append(f"Only {plan.num_samples} calibration samples: ranges may be too narrow. 32 to 512 are usual.")
    if plan.adjusted:
        notes.append(f"{len(plan.adjusted)} scales of the engine were changed to fit; the report's changes say why.")
    return notes
