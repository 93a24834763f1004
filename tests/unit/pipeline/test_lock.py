"""plan.lock.json: written and read back, damaged ones refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onnxprune.contracts import Placement
from onnxprune.errors import UsageError
from onnxprune.pipeline.lock import PlanLock, PlannedPass, read_lock, render_lock

LOCK = PlanLock(
    schema=1,
    source_hash="ab" * 32,
    recipe={"schema": 1, "passes": [{"name": "prune", "id": "prune", "ratio": 0.5}]},
    passes=(PlannedPass(step_id="prune", name="prune", plan={"removed": [1, 2], "threshold": float("inf")}),),
    placements={"onnx": Placement(target="onnx", integer_nodes=("a",), float_nodes={"b": "unknown operator"})},
    versions={"onnxprune": "0.1.0"},
)


def test_a_lock_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.lock.json"
    path.write_text(render_lock(LOCK), encoding="utf-8")
    read = read_lock(path)
    assert read.placements == LOCK.placements
    assert read.source_hash == LOCK.source_hash
    assert read.plan_of("prune") == {"removed": [1, 2], "threshold": "Infinity"}
    assert read.plan_of("quant") is None
    assert render_lock(read) == render_lock(LOCK)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a plan of schema 1"),
        ('{"schema": 2}', "not a plan of schema 1"),
        (json.dumps({"schema": 1, "source_hash": "x", "recipe": {}, "passes": [{"name": "prune"}]}), "damaged at"),
    ],
    ids=["truncated", "list", "schema", "incomplete"],
)
def test_a_damaged_lock_is_refused_with_the_place(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "plan.lock.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=says):
        read_lock(path)


def test_a_missing_lock_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_lock(tmp_path / "none.json")
