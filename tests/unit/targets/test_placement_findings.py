"""What a report says about a placement."""

from __future__ import annotations

from onnxprune.contracts import Placement, RegionTiming
from onnxprune.targets.placement_findings import (
    measured_placement_findings,
    planned_placement_finding,
    table_placement_finding,
)
from onnxprune.targets.qdq.measured import MeasuredPlacement

PLACEMENT = Placement(
    target="onnxruntime-x86", integer_nodes=("a", "b"), float_nodes={"c": "told so"}, decided_by="measured"
)
KEPT = RegionTiming(nodes=("a", "b"), float_ms=3.0, integer_ms=1.0, is_integer=True)
LOST = RegionTiming(nodes=("c",), float_ms=0.5, integer_ms=0.75, is_integer=False)


def text_of(measured: MeasuredPlacement) -> str:
    return measured_placement_findings(measured)[0].text


def test_table_says_that_nothing_was_measured_and_why_nodes_are_float() -> None:
    assert table_placement_finding(PLACEMENT).text == (
        "2 nodes are integer and 1 float, decided by the operator table: not measured on the target. "
        "Float: told so (1)."
    )


def test_plan_says_who_decided_then() -> None:
    assert "as in the plan, where measurement decided." in planned_placement_finding(PLACEMENT).text


def test_measurement_says_what_regions_saved_and_what_returning_others_did() -> None:
    measured = MeasuredPlacement(placement=PLACEMENT, regions=(KEPT, LOST), float_ms=4.0, integer_ms=2.0)
    assert (
        "decided by measurement on this machine: 2.00 ms saved in 1 region, 1 region returned to float (0.25 ms "
        "saved by that); the whole takes 2.00 ms, and 4.00 ms in float."
    ) in text_of(measured)


def test_measurement_without_losses_says_so() -> None:
    measured = MeasuredPlacement(placement=PLACEMENT, regions=(KEPT, KEPT), float_ms=4.0, integer_ms=2.0)
    assert "4.00 ms saved in 2 regions, none returned to float" in text_of(measured)


def test_model_that_is_slower_in_int8_gets_a_warning_with_both_times_and_the_way_to_a_small_file() -> None:
    placement = Placement(target="onnxruntime-x86", integer_nodes=(), float_nodes={"a": "slow"}, decided_by="measured")
    (finding,) = measured_placement_findings(
        MeasuredPlacement(placement=placement, float_ms=1.0, integer_ms=2.0, regions=(LOST,))
    )
    assert finding.severity == "warning"
    assert "it takes 1.00 ms, and 2.00 ms with int8" in finding.text
    assert 'set placement = "table"' in finding.text


def test_notes_are_warnings_beside_the_table_s_line() -> None:
    placement = Placement(target="onnxruntime-x86", integer_nodes=("a",), float_nodes={})
    first, second = measured_placement_findings(MeasuredPlacement(placement=placement, notes=("It failed.",)))
    assert first.text == "1 node is integer and 0 float, decided by the operator table: not measured on the target."
    assert (second.text, second.severity) == ("It failed.", "warning")
