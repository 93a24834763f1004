"""Plans of `prune` on real topologies, held as small JSON files.

A change here is a change of what users get: look at it, then write the files anew with
`ONNXPRUNE_WRITE_GOLDEN=1 pytest tests/golden/test_prune_plans.py`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from onnxprune.contracts import ModelState, PassContext
from onnxprune.passes.prune import PruneConfig, PrunePass, analyze_channels
from onnxprune.passes.prune.plan import flags_from_plan
from tests.light import LIGHT_TOPOLOGIES, light_topology

FOLDER = Path(__file__).parent / "prune_plans"


def described(name: str) -> dict[str, Any]:
    """What is frozen and why, and every layer's width before and after half of the channels went."""
    model = light_topology(name)
    classes = analyze_channels(model)
    plan = PrunePass(PruneConfig(ratio=0.5)).plan(ModelState(model=model), PassContext())
    keeps = flags_from_plan(classes, plan.groups)
    groups = [group for group in classes.groups if group.slices]
    frozen: Counter[str] = Counter()
    for group in groups:
        if group.frozen_reason is not None:
            frozen[group.frozen_reason] += group.num_channels
    return {
        "groups": len(groups),
        "classes": sum(len(group) for group in groups),
        "frozen_channels": dict(sorted(frozen.items())),
        "parameters": [plan.parameters_before, plan.parameters_after],
        "macs": [plan.macs_before, plan.macs_after],
        "widths": {width.layer: [len(width.classes), int(keeps[width.classes].sum())] for width in classes.widths},
    }


@pytest.mark.parametrize("name", LIGHT_TOPOLOGIES)
def test_plan_of_a_real_topology_is_as_it_was(name: str) -> None:
    path = FOLDER / f"{name}.json"
    found = described(name)
    if os.environ.get("ONNXPRUNE_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        rows = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
        path.write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")
    assert found == json.loads(path.read_text(encoding="utf-8"))


def test_half_of_every_layer_that_is_not_frozen_goes_in_a_densenet() -> None:
    golden = json.loads((FOLDER / "densenet121.json").read_text(encoding="utf-8"))
    assert list(golden["frozen_channels"].values()) == [1000]
    assert {after / before for before, after in golden["widths"].values() if before != 1000} == {0.5}
