"""Plan and placement -> the QDQ graph that ONNX Runtime fuses into integer kernels."""

from __future__ import annotations

import onnx_ir as ir

from onnxprune.contracts import Placement, QuantizationPlan
from onnxprune.errors import TargetError
from onnxprune.targets.qdq.channel_padding import pad_depthwise_channels
from onnxprune.targets.qdq.gelu import fuse_gelu_behind_integers
from onnxprune.targets.qdq.guards import keep_float_layers_float
from onnxprune.targets.qdq.kernels import FUSED_BUT_SLOW, KERNELS
from onnxprune.targets.qdq.place import integer_units
from onnxprune.targets.qdq.placements import check_placement
from onnxprune.targets.qdq.rewrites import Rewrite, keep_operator
from onnxprune.targets.qdq.spelling import Spelling, SpellingName, find_spelling
from onnxprune.targets.qdq.unread import drop_unread_conversions, drop_unread_initializers
from onnxprune.targets.qdq.writer import IntegerWriter

__all__ = ["spell"]


def spell(
    model: ir.Model,
    plan: QuantizationPlan,
    placement: Placement,
    spelling: SpellingName,
    *,
    pad_channels: bool = True,
) -> ir.Model:
    """A copy of `model` in which the integer nodes of `placement` stand between QuantizeLinear and DequantizeLinear.

    Inputs and outputs stay float and keep their names; so do all tensors and nodes that are still there. Weights are
    int8 behind DequantizeLinear (one scale for each output channel), biases int32 with scale input * weight. A Relu
    or Clip behind an integer node is left out where saturation does its work. The copy shares the tensors of weights
    that stay float.

    Args:
        model: The float model, canonical (opset 18 or above, weights as initializers).
        plan: Scales of all tensors that the placement makes integer.
        placement: From `place`, or from an earlier run.
        spelling: How the integers are written.
        pad_channels: Let tensors around depthwise convolutions have more channels where that is faster on x86; False
            keeps every tensor's shape, for comparisons tensor by tensor.

    Raises:
        TargetError: Placement and plan don't fit the model or each other.
    """
    spelled = model.clone()
    form = find_spelling(spelling)
    writer = IntegerWriter(spelled, plan, form)
    check_placement(spelled, placement)
    for unit in integer_units(spelled, placement):
        rewrite = _rewrite_of(unit.node, form)
        writer.start(unit)
        rewrite(writer, unit)
        replaced = [unit.node] if unit.absorbed is None else [unit.absorbed, unit.node]
        spelled.graph.remove(replaced, safe=True)
    if not form.keeps_operators:
        keep_float_layers_float(spelled.graph, writer)
    drop_unread_conversions(spelled.graph)
    if not form.keeps_operators:
        _guard_float_operators(spelled, placement, writer)
        fuse_gelu_behind_integers(spelled)
    if pad_channels and form.unsigned_activations:
        pad_depthwise_channels(spelled)
    drop_unread_initializers(spelled.graph)
    return spelled


def _rewrite_of(node: ir.Node, spelling: Spelling) -> Rewrite:
    if spelling.keeps_operators:
        return keep_operator
    kernel = KERNELS.get(node)
    if kernel is None:
        raise TargetError(
            f"The placement makes '{node.name}' integer, but ONNX Runtime has no integer kernel for {node.op_type}.",
            "Make the placement anew by running without `--plan`.",
        )
    return kernel.rewrite


def _guard_float_operators(model: ir.Model, placement: Placement, writer: IntegerWriter) -> None:
    """Keep ONNX Runtime from fusing what was placed in float because its integer kernel is slow.

    The result passes through Max with the lowest float, which changes nothing and stands in the way of the pattern
    DequantizeLinear -> operator -> QuantizeLinear.
    """
    for node in list(model.graph):
        if (
            node.op_type not in FUSED_BUT_SLOW
            or node.domain not in ("", "ai.onnx")
            or node.name not in placement.float_nodes
        ):
            continue
        producer = node.inputs[0].producer() if node.inputs[0] is not None else None
        readers = node.outputs[0].consumers()
        between = producer is not None and producer.op_type == "DequantizeLinear"
        if between and any(reader.op_type == "QuantizeLinear" for reader in readers):
            writer.guard(node)
