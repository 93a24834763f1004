"""Plans without calibration data on ONNX Runtime: which layers compute in integers, and how all of it is written.

    "dynamic"       DynamicQuantizeLinear -> MatMulInteger (or ConvInteger) -> Cast -> Mul, DynamicQuantizeLSTM;
                    every other weight is stored as int8 (`stored`)
    "weight-only"   MatMulNBits with 8 bits where that is faster than float; every other weight is stored as int8

Which layer is integer is decided by the costs of `data_free_costs`: one that would not be faster computes in float.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from onnxprune.contracts import Placement, QuantizationPlan
from onnxprune.errors import TargetError, quoted_list
from onnxprune.ops.stored_weights import stored_weights
from onnxprune.targets.qdq.block_wise import block_wise_refusal, write_block_wise
from onnxprune.targets.qdq.dynamic import dynamic_refusal, write_dynamic
from onnxprune.targets.qdq.graph_writer import GraphWriter
from onnxprune.targets.qdq.placements import check_placement, reasons_inside_bodies
from onnxprune.targets.qdq.spelling import Spelling, SpellingName, find_spelling
from onnxprune.targets.qdq.stored import StorageForm, store_weights

__all__ = ["FLOAT_REASON", "place_data_free", "spell_data_free"]

FLOAT_REASON = "it has no weight that is stored as integers"
STORED = "its weight is stored as int8 and computed with in float"
KEPT_FLOAT = "its weight stays float32, because converting it in each run would be slower"


def place_data_free(model: ir.Model, plan: QuantizationPlan, spelling: SpellingName, *, form: StorageForm) -> Placement:
    """Choose the layers that compute in integers; the others say why they do not.

    Args:
        model: The float model that `plan` was made for. It is not changed.
        plan: In the mode "dynamic" or "weight-only".
        spelling: The processor.
        form: How weights are stored that are computed with in float.
    """
    found = find_spelling(spelling)
    integer_nodes: list[str] = []
    reasons: dict[str, str] = {}
    for node in model.graph:
        name = node.name or ""
        reason = _float_reason(node, plan, found, form)
        if reason is None:
            integer_nodes.append(name)
        else:
            reasons[name] = reason
    reasons.update(reasons_inside_bodies(model))
    return Placement(
        target=found.placement_target, integer_nodes=tuple(integer_nodes), float_nodes=reasons, decided_by="table"
    )


def spell_data_free(
    model: ir.Model, plan: QuantizationPlan, placement: Placement, spelling: SpellingName, *, form: StorageForm
) -> ir.Model:
    """A copy of `model` with the weights of `plan` as int8, and integer operators where `placement` says so.

    Names of inputs, outputs, tensors and nodes stay. The copy shares the tensors of weights that stay float32.

    Args:
        model: The float model, canonical.
        plan: In the mode "dynamic" or "weight-only".
        placement: From `place_data_free`, or from an earlier run.
        spelling: The processor.
        form: How weights are stored that are computed with in float.

    Raises:
        TargetError: Plan or placement don't fit the model.
    """
    spelled = model.clone()
    _check(spelled, plan, placement)
    writer = GraphWriter(spelled, plan, find_spelling(spelling))
    integer = set(placement.integer_nodes)
    write: Callable[[GraphWriter, ir.Node], None] = write_dynamic if plan.mode == "dynamic" else write_block_wise
    for node in list(spelled.graph):
        writer.start(node)
        if node.name in integer:
            write(writer, node)
        elif plan.float_reason(node.name or "") is None and _is_stored(node, plan, form):
            store_weights(writer, node, form)
    writer.drop_unused_weights()
    return spelled


def _float_reason(node: ir.Node, plan: QuantizationPlan, spelling: Spelling, form: StorageForm) -> str | None:
    """Why `node` computes in float; None: it computes in integers."""
    reason = plan.float_reason(node.name or "")
    if reason is not None:
        return reason
    is_planned = [weight.value.name in plan.weights for weight in stored_weights(node)]
    if not any(is_planned):
        return FLOAT_REASON
    refusal = dynamic_refusal if plan.mode == "dynamic" else block_wise_refusal
    refused = refusal(node, spelling) if all(is_planned) else "another of its weights has no scales"
    if refused is None:
        return None
    return f"{STORED if _is_stored(node, plan, form) else KEPT_FLOAT}: {refused}"


def _is_stored(node: ir.Node, plan: QuantizationPlan, form: StorageForm) -> bool:
    """True when the weights of a layer that computes in float are integers in the file.

    Not in mode "dynamic" where they would have to be converted in each run: that mode is there for speed.
    """
    return plan.mode == "weight-only" or form == "folded" or node.op_type == "Gather"


def _check(model: ir.Model, plan: QuantizationPlan, placement: Placement) -> None:
    check_placement(model, placement)
    lost = [name for name in plan.weights if name not in model.graph.initializers]
    if lost:
        raise TargetError(
            f"The quantization plan was made for another model: this one has no weight {quoted_list(lost)}.",
            "Make the plan anew by running without `--plan`.",
        )
