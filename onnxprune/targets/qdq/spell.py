"""Plan and placement -> the QDQ graph that ONNX Runtime fuses into integer kernels."""

from __future__ import annotations

import onnx_ir as ir

from onnxprune.contracts import Placement, QuantizationPlan
from onnxprune.errors import TargetError, quoted_list
from onnxprune.targets.qdq.kernels import FUSED_BUT_SLOW, KERNELS
from onnxprune.targets.qdq.place import integer_units
from onnxprune.targets.qdq.spelling import SpellingName, find_spelling
from onnxprune.targets.qdq.writer import IntegerWriter

__all__ = ["spell"]


def spell(model: ir.Model, plan: QuantizationPlan, placement: Placement, spelling: SpellingName) -> ir.Model:
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

    Raises:
        TargetError: Placement and plan don't fit the model or each other.
    """
    spelled = model.clone()
    writer = IntegerWriter(spelled, plan, find_spelling(spelling))
    _check_placement(spelled, placement)
    for unit in integer_units(spelled, placement):
        kernel = KERNELS.get(unit.node)
        if kernel is None:
            raise TargetError(
                f"The placement makes '{unit.node.name}' integer, but ONNX Runtime has no integer kernel for "
                f"{unit.node.op_type}.",
                "Make the placement anew by running without `--plan`.",
            )
        writer.start(unit)
        kernel.rewrite(writer, unit)
        replaced = [unit.node] if unit.absorbed is None else [unit.absorbed, unit.node]
        spelled.graph.remove(replaced, safe=True)
    _drop_unread_conversions(spelled.graph)
    _guard_float_operators(spelled, placement, writer)
    _drop_unused_initializers(spelled.graph)
    return spelled


def _check_placement(model: ir.Model, placement: Placement) -> None:
    known = {node.name for node in model.graph}
    unknown = [name for name in placement.integer_nodes if name not in known]
    if unknown:
        raise TargetError(
            f"The placement was made for another model: this one has no node {quoted_list(unknown)}.",
            "Make the placement anew by running without `--plan`.",
        )


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


def _drop_unread_conversions(graph: ir.Graph) -> None:
    """Remove the DequantizeLinear of tensors that are only read as integers; ONNX Runtime would compute it."""
    for node in list(graph):
        if node.op_type != "DequantizeLinear" or node.outputs[0].uses() or node.outputs[0].is_graph_output():
            continue
        graph.remove(node, safe=True)


def _drop_unused_initializers(graph: ir.Graph) -> None:
    for name in [
        name for name, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()
    ]:
        del graph.initializers[name]
