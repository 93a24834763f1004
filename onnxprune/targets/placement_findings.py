"""What a report says about a placement: how many nodes are integer, who decided, and what it gained."""

from __future__ import annotations

from collections.abc import Sequence

from onnxprune.contracts import Finding, Placement, RegionTiming
from onnxprune.targets.qdq.measured import MeasuredPlacement
from onnxprune.targets.qdq.place import float_reasons

__all__ = ["measured_placement_findings", "planned_placement_finding", "table_placement_finding"]

_REASONS_SHOWN = 5
_DECIDED = {"measured": "measurement", "table": "the operator table"}


def table_placement_finding(placement: Placement) -> Finding:
    """The operator table decided."""
    return _finding(placement, "decided by the operator table: not measured on the target.")


def planned_placement_finding(placement: Placement) -> Finding:
    """An earlier run decided."""
    return _finding(placement, f"as in the plan, where {_DECIDED[placement.decided_by]} decided.")


def measured_placement_findings(measured: MeasuredPlacement) -> list[Finding]:
    """Timings of this machine decided, or could not."""
    placement = measured.placement
    notes = [Finding(topic="placement", text=note, severity="warning") for note in measured.notes]
    if placement.decided_by == "table":
        return [table_placement_finding(placement), *notes]
    if measured.float_ms is None or measured.integer_ms is None:
        return [_finding(placement, "decided by measurement on this machine."), *notes]
    if measured.is_all_float:
        text = (
            f"int8 does not pay on this machine, so all of the model stays float: it takes {measured.float_ms:.2f} ms, "
            f"and {measured.integer_ms:.2f} ms with int8. For a file of a quarter of the size that is slower, set "
            'placement = "table" for this target. ' + _reasons(placement)
        )
        return [Finding(topic="placement", text=text.strip(), severity="warning"), *notes]
    whole = f"the whole takes {measured.integer_ms:.2f} ms, and {measured.float_ms:.2f} ms in float."
    decided = f"decided by measurement on this machine: {_region_text(measured.regions)}; {whole}"
    return [_finding(placement, decided), *notes]


def _region_text(regions: Sequence[RegionTiming]) -> str:
    """What regions gained in integers, and what was gained by returning others."""
    kept = [region for region in regions if region.is_integer]
    returned = [region for region in regions if not region.is_integer]
    text = f"{sum(region.float_ms - region.integer_ms for region in kept):.2f} ms saved in {_count(len(kept))}"
    if not returned:
        return f"{text}, none returned to float"
    gained = sum(region.integer_ms - region.float_ms for region in returned)
    return f"{text}, {_count(len(returned))} returned to float ({gained:.2f} ms saved by that)"


def _count(regions: int) -> str:
    return f"{regions} region" if regions == 1 else f"{regions} regions"


def _finding(placement: Placement, decided: str) -> Finding:
    integer = len(placement.integer_nodes)
    counts = f"{integer} {'node is' if integer == 1 else 'nodes are'} integer and {len(placement.float_nodes)} float"
    return Finding(topic="placement", text=f"{counts}, {decided} {_reasons(placement)}".strip())


def _reasons(placement: Placement) -> str:
    """The most frequent reasons why nodes stay float."""
    found = float_reasons(placement)
    shown = [f"{reason} ({count})" for reason, count in list(found.items())[:_REASONS_SHOWN]]
    if len(found) > len(shown):
        shown.append(f"{len(found) - len(shown)} further reasons")
    return f"Float: {'; '.join(shown)}." if shown else ""
