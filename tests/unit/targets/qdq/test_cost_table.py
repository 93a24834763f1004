"""The table of costs: complete, and different where processors are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from onnx import helper

from onnxprune.ops.planned import PlannedNode, planned_node
from onnxprune.ops.quant import QUANT
from onnxprune.targets.qdq.cost_table import FIGURES, INTEGER_HANDICAP, NODE_NS, TableCosts
from onnxprune.targets.qdq.kernels import KERNELS
from onnxprune.targets.qdq.spelling import SPELLINGS, SpellingName
from tests.builders import canonical, proto_of
from tests.quantization import normal_batches, plan_for


def planned(op_type: str, shape: tuple[int, ...]) -> PlannedNode:
    nodes = [
        helper.make_node(op_type, ["x"], ["a"], name="node"),
        helper.make_node("Conv", ["a", "w"], ["y"], name="conv"),
    ]
    weight = np.ones((8, shape[1], 3, 3), dtype=np.float32)
    model = canonical(proto_of(nodes, inputs={"x": shape}, outputs={"y": [None] * 4}, weights={"w": weight}))
    plan = plan_for(model, normal_batches(shape))
    found = planned_node(next(iter(model.graph)), plan)
    assert isinstance(found, PlannedNode)
    return found


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_kernel_without_weights_has_figures_for_every_processor(spelling: SpellingName) -> None:
    keys = list(KERNELS.keys())
    rows = {key.op_type: QUANT.find(key.domain, key.op_type, key.since_version) for key in keys}
    wanted = {op_type for op_type, row in rows.items() if row is not None and not row.is_compute}

    assert set(FIGURES[spelling].operators) == wanted


def test_cost_of_a_node_is_a_fixed_part_and_one_for_each_element() -> None:
    costs, figures = TableCosts("x86-vnni"), FIGURES["x86-vnni"]
    small, large = planned("Sigmoid", (1, 2, 3, 3)), planned("Sigmoid", (1, 2, 30, 30))

    assert costs.float_ns(small) == pytest.approx(NODE_NS + 18 * figures.operators["Sigmoid"].float_ns, rel=1e-9)
    integer_ns = INTEGER_HANDICAP * (NODE_NS + 1800 * figures.operators["Sigmoid"].int_ns)
    assert costs.integer_ns(large) == pytest.approx(integer_ns, rel=1e-9)
    assert costs.quantize_ns(large.inputs[0]) == pytest.approx(NODE_NS + 1800 * figures.quantize_ns, rel=1e-9)


def test_layer_with_weights_may_not_be_float() -> None:
    weight = np.ones((8, 2, 3, 3), dtype=np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv")
    model = canonical(proto_of([node], inputs={"x": (1, 2, 3, 3)}, outputs={"y": [None] * 4}, weights={"w": weight}))
    found = planned_node(next(iter(model.graph)), plan_for(model, normal_batches((1, 2, 3, 3))))
    assert isinstance(found, PlannedNode)

    assert (TableCosts("x86").float_ns(found), TableCosts("x86").integer_ns(found)) == (math.inf, 0.0)


def test_arm_has_no_figures_of_its_own() -> None:
    assert FIGURES["arm64"] is FIGURES["x86"]
    assert FIGURES["x86-vnni"] is not FIGURES["x86"]
