"""Where one plan serves TFLite as it stands, and where TFLite wants another scale.

Source: the TFLite 8-bit quantization specification (ai.google.dev/edge/litert, "LiteRT 8-bit quantization
specification"), and what the int8 kernels check when they are prepared. In short:

    activations     int8, one scale and zero point; int16 with zero point 0
    weights         int8 in [-127, 127], zero point 0; a scale for each filter of CONV_2D, DEPTHWISE_CONV_2D and
                    TRANSPOSE_CONV, one scale elsewhere
    biases          int32, scale input * weight
    fixed outputs   LOGISTIC and SOFTMAX 1/256 and -128, TANH 1/128 and 0
    same scales     CONCATENATION, pooling, PAD, RESHAPE, TRANSPOSE, SLICE, SPLIT, GATHER, RESIZE ...: input = output

`QUANT` (`ops/quant.py`) was made so that plans keep to this; what is left is listed by `tflite_conflicts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import onnx_ir as ir

from onnxprune.contracts import ActivationQuantization, Placement, QuantizationPlan
from onnxprune.ops.planned import PlannedNode, planned_node, planned_nodes
from onnxprune.ops.quant import QuantRow, ScaleRule, scale_rule_of
from onnxprune.targets.qdq.placements import reasons_inside_bodies

__all__ = ["TFLITE_OPERATORS", "TfliteConflict", "place_tflite", "tflite_conflicts"]

Remedy: TypeAlias = Literal["requantize input", "requantize output", "one scale for the weight", "stay float"]

TFLITE_OPERATORS: dict[str, str] = {
    "Add": "ADD",
    "AveragePool": "AVERAGE_POOL_2D",
    "BatchNormalization": "DEPTHWISE_CONV_2D",
    "Clip": "RELU6, MINIMUM and MAXIMUM",
    "Concat": "CONCATENATION",
    "Conv": "CONV_2D, DEPTHWISE_CONV_2D",
    "ConvTranspose": "TRANSPOSE_CONV",
    "DepthToSpace": "DEPTH_TO_SPACE",
    "Div": "MUL",
    "Expand": "BROADCAST_TO",
    "Flatten": "RESHAPE",
    "Gather": "GATHER",
    "Gemm": "FULLY_CONNECTED",
    "GlobalAveragePool": "MEAN",
    "GlobalMaxPool": "REDUCE_MAX",
    "HardSigmoid": "ADD",
    "HardSwish": "HARD_SWISH",
    "LeakyRelu": "LEAKY_RELU",
    "MatMul": "FULLY_CONNECTED",
    "MaxPool": "MAX_POOL_2D",
    "Mul": "MUL",
    "Pad": "PAD, MIRROR_PAD",
    "ReduceMax": "REDUCE_MAX",
    "ReduceMean": "MEAN",
    "Relu": "RELU",
    "Reshape": "RESHAPE",
    "Resize": "RESIZE_NEAREST_NEIGHBOR, RESIZE_BILINEAR",
    "Sigmoid": "LOGISTIC",
    "Slice": "STRIDED_SLICE",
    "Softmax": "SOFTMAX",
    "SpaceToDepth": "SPACE_TO_DEPTH",
    "Split": "SPLIT_V",
    "Squeeze": "RESHAPE",
    "Sub": "SUB",
    "Sum": "ADD",
    "Tanh": "TANH",
    "Tile": "TILE",
    "Transpose": "TRANSPOSE",
    "Unsqueeze": "RESHAPE",
}
"""Operators with a row in `QUANT` that TFLite computes in int8, and by what."""


BESIDE_FLOAT = "it passes on what a float operator gives, and no integer operator reads that"
WIDE_REASON = "its activations have 16 bits, and the spelling for TFLite writes 8 only"


@dataclass(frozen=True, slots=True, kw_only=True)
class TfliteConflict:
    """One place where a plan breaks a rule of TFLite's.

    `tensors` are those with the wrong quantization, `rule` is what TFLite wants, `remedy` what a writer of TFLite files
    has to do: put a QUANTIZE (int8 to int8) before or behind the operator, quantize the weight anew, or leave the
    operator in float.
    """

    node: str
    op_type: str
    tensors: tuple[str, ...]
    rule: str
    remedy: Remedy


def place_tflite(model: ir.Model, plan: QuantizationPlan) -> Placement:
    """Every node that the plan has scales for and TFLite an int8 operator: TFLite files are best wholly integer.

    No costs are weighed: each border between int8 and float takes a QUANTIZE or DEQUANTIZE, and accelerators take
    integers only.
    """
    integer: list[str] = []
    absorbed: set[str] = set()
    reasons: dict[str, str] = {}
    found: list[PlannedNode] = []
    for node in model.graph:
        if node.name in absorbed:
            continue
        planned = planned_node(node, plan)
        if isinstance(planned, str):
            reasons[node.name or ""] = planned
        elif node.op_type not in TFLITE_OPERATORS:
            reasons[node.name or ""] = f"TFLite has no int8 operator for {node.op_type}"
        elif any(plan.activations[value.name or ""].num_bits != 8 for value in (*planned.inputs, *planned.outputs)):
            reasons[node.name or ""] = WIDE_REASON
        else:
            found.append(planned)
            absorbed.update(planned.names[1:])
    useful = _useful(found)
    for item in found:
        if item.names[0] in useful:
            integer.extend(item.names)
        else:
            reasons.update(dict.fromkeys(item.names, BESIDE_FLOAT))
    reasons.update(reasons_inside_bodies(model))
    return Placement(target="tflite", integer_nodes=tuple(integer), float_nodes=reasons, decided_by="table")


def _useful(found: list[PlannedNode]) -> set[str]:
    """Names without those that only pass on what float operators give to float operators: that rounds for nothing."""
    computing = [item for item in found if scale_rule_of(item.node, item.row) is not ScaleRule.SAME]
    passing = [item for item in found if scale_rule_of(item.node, item.row) is ScaleRule.SAME]
    given = {value for item in computing for value in item.outputs}
    wanted = {value for item in computing for value in item.inputs}
    for item in passing:
        if any(value in given or value.is_graph_input() for value in item.inputs):
            given.update(item.outputs)
    for item in reversed(passing):
        if any(value in wanted for value in item.outputs):
            wanted.update(item.inputs)
    kept = [item for item in passing if given.intersection(item.outputs) or wanted.intersection(item.inputs)]
    return {item.names[0] for item in (*computing, *kept)}


def tflite_conflicts(model: ir.Model, plan: QuantizationPlan, placement: Placement) -> tuple[TfliteConflict, ...]:
    """What stands between `plan` and TFLite's rules in the integer nodes of `placement`, in graph order.

    Args:
        model: The float model.
        plan: Its plan, as it is for all targets.
        placement: From `place_tflite`, or any other: nodes that stay float break no rule.
    """
    integer = set(placement.integer_nodes)
    found: list[TfliteConflict] = []
    for item in planned_nodes(model, plan):
        if item.node.name in integer:
            found.extend(_conflicts_of(item, plan))
    return tuple(found)


def _conflicts_of(item: PlannedNode, plan: QuantizationPlan) -> list[TfliteConflict]:
    if item.node.op_type not in TFLITE_OPERATORS:
        return [_conflict(item, (), f"TFLite has no int8 operator for {item.node.op_type}", "stay float")]
    found = [*_wide_activations(item, plan), *_unequal_scales(item, plan), *_unfixed_outputs(item, plan)]
    weight = _weight_conflict(item, plan)
    return found if weight is None else [*found, weight]


def _wide_activations(item: PlannedNode, plan: QuantizationPlan) -> list[TfliteConflict]:
    given = {value.name or "": plan.activations[value.name or ""] for value in (*item.inputs, *item.outputs)}
    wrong = tuple(
        name
        for name, quantization in given.items()
        if quantization.num_bits not in (8, 16) or (quantization.num_bits == 16 and quantization.zero_point != 0)
    )
    rule = "activations have 8 bits, or 16 with zero point 0"
    return [_conflict(item, wrong, rule, "stay float")] if wrong else []


def _unequal_scales(item: PlannedNode, plan: QuantizationPlan) -> list[TfliteConflict]:
    """Inputs and outputs of operators that rescale in ONNX Runtime (Concat) and don't in TFLite."""
    if scale_rule_of(item.node, item.row) is ScaleRule.FREE:
        return []
    name = TFLITE_OPERATORS[item.node.op_type]
    wanted = plan.activations[item.outputs[0].name or ""]
    inputs = _others(item.inputs, wanted, plan)
    outputs = _others(item.outputs, wanted, plan)
    rule = f"inputs and outputs of {name} share scale and zero point"
    found = []
    if inputs:
        found.append(_conflict(item, inputs, rule, "requantize input"))
    if outputs:
        found.append(_conflict(item, outputs, rule, "requantize output"))
    return found


def _unfixed_outputs(item: PlannedNode, plan: QuantizationPlan) -> list[TfliteConflict]:
    fixed = _fixed_of(item.row)
    if fixed is None:
        return []
    wrong = tuple(
        value.name or ""
        for value in item.outputs
        if (plan.activations[value.name or ""].scale, plan.activations[value.name or ""].zero_point) != fixed
    )
    rule = f"the output of {TFLITE_OPERATORS[item.node.op_type]} has scale {fixed[0]:g} and zero point {fixed[1]}"
    return [_conflict(item, wrong, rule, "requantize output")] if wrong else []


def _weight_conflict(item: PlannedNode, plan: QuantizationPlan) -> TfliteConflict | None:
    name = item.weight.name or "" if item.weight is not None else ""
    planned = plan.weights.get(name)
    if planned is None:
        return None
    if planned.num_bits > 8:
        return _conflict(item, (name,), "weights have at most 8 bits", "stay float")
    if planned.axis is None or len(set(planned.scales)) == 1 or item.node.op_type in ("Conv", "ConvTranspose"):
        return None
    rule = (
        "FULLY_CONNECTED has one scale for its weight (one for each unit only from version 12 of the operator on, "
        "which older interpreters and most accelerators refuse)"
    )
    return _conflict(item, (name,), rule, "one scale for the weight")


def _fixed_of(row: QuantRow) -> tuple[float, int] | None:
    return None if row.fixed is None else (row.fixed.scale, row.fixed.zero_point)


def _others(values: tuple[ir.Value, ...], wanted: ActivationQuantization, plan: QuantizationPlan) -> tuple[str, ...]:
    found = []
    for value in values:
        given = plan.activations[value.name or ""]
        if (given.scale, given.zero_point, given.num_bits) != (wanted.scale, wanted.zero_point, wanted.num_bits):
            found.append(value.name or "")
    return tuple(found)


def _conflict(item: PlannedNode, tensors: tuple[str, ...], rule: str, remedy: Remedy) -> TfliteConflict:
    return TfliteConflict(
        node=item.node.name or "", op_type=item.node.op_type, tensors=tensors, rule=rule, remedy=remedy
    )
