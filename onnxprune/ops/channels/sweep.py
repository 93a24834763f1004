"""One sweep over a model: every axis of every value gets its labels."""

from __future__ import annotations

import onnx_ir as ir

from onnxprune.graph.names import printable
from onnxprune.ops.channels.elements import Dimension
from onnxprune.ops.channels.flow import CHANNELS, Flow, Labelling
from onnxprune.ops.channels.movement import move_shape_elements

__all__ = ["label_channels", "label_node"]


def label_channels(model: ir.Model) -> Labelling:
    """Label the channels of `model`, whose nodes stand in topological order and whose shapes are fresh.

    Frozen, with the reason, is what reaches an output of the model, an operator without a rule, or the body of a
    control-flow operator, and what a weight has in common with a use that gives its axis no labels. Graph inputs
    have no labels at all.
    """
    labelling = Labelling()
    for node in model.graph:
        label_node(labelling, node)
    _freeze_outputs(model.graph, labelling)
    _freeze_half_labelled_weights(labelling)
    return labelling


def label_node(labelling: Labelling, node: ir.Node) -> None:
    """Run the rule of one node, whose inputs are labelled; without a rule, freeze what reaches it."""
    flow = Flow(labelling, node)
    rule = CHANNELS.get(flow.node)
    if not move_shape_elements(flow):
        if rule is None:
            reason = f"reaches {flow.where}, an operator without a channel rule"
            for position in range(flow.num_inputs):
                flow.freeze_input(position, reason)
        else:
            rule(flow)
            for position in flow.ignored_inputs():
                flow.freeze_input(position, f"is a setting of {flow.where}")
        for position in flow.ignored_elements():
            flow.freeze_elements(position, f"is a number that {flow.where} computes with")
    _freeze_captures(flow)


def _freeze_captures(flow: Flow) -> None:
    """Freeze what the bodies of a control-flow node read from outside."""
    for attribute in flow.node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            bodies = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            bodies = list(attribute.as_graphs())
        else:
            continue
        for body in bodies:
            for inner in body.all_nodes():
                for value in inner.inputs:
                    flow.freeze_value(value, f"is used in the body of {flow.where}")
            for value in body.outputs:
                flow.freeze_value(value, f"is used in the body of {flow.where}")


def _freeze_outputs(graph: ir.Graph, labelling: Labelling) -> None:
    for value in graph.outputs:
        reason = f"reaches the model's output '{printable(value.name or '')}'"
        for labels in (*labelling.values.get(value, ()), *labelling.weights.get(value, {}).values()):
            if labels is not None:
                labelling.space.freeze(labels, reason)
        for element in labelling.elements.get(value, ()):
            if isinstance(element, Dimension) and element.labels is not None:
                labelling.space.freeze(element.labels, reason)


def _freeze_half_labelled_weights(labelling: Labelling) -> None:
    """A weight can only lose indices of an axis that every one of its uses labels."""
    for value, axes in labelling.weights.items():
        uses = {(use.node, use.idx) for use in value.uses()}
        for axis, labels in axes.items():
            labelled = {(use.node, use.position) for use in labelling.weight_uses[value] if use.axis == axis}
            for node, _ in sorted(uses - labelled, key=lambda use: use[0].name or ""):
                other = f"'{printable(node.name or '')}' ({node.op_type})"
                reason = f"its weight '{printable(value.name or '')}' is also used by {other}, where it has no channels"
                labelling.space.freeze(labels, reason)
