"""One sweep over a model: every axis of every value gets its labels."""

from __future__ import annotations

import onnx_ir as ir

from onnxprune.graph.names import printable
from onnxprune.ops.channels.elements import Dimension
from onnxprune.ops.channels.flow import CHANNELS, Flow
from onnxprune.ops.channels.grids import ChannelPolicy, settle_grids
from onnxprune.ops.channels.labelling import Labelling
from onnxprune.ops.channels.movement import move_shape_elements
from onnxprune.ops.channels.whole_model import drop_tentative_axes, settle_literals, tie_copies

__all__ = ["label_channels", "label_node"]


def label_channels(model: ir.Model, policy: ChannelPolicy | None = None) -> Labelling:
    """Label the channels of `model`, whose nodes stand in topological order and whose shapes are fresh.

    Frozen, with the reason, is what reaches an output of the model, an operator without a rule, or the body of a
    control-flow operator, and what a weight has in common with a use that gives its axis no labels. Graph inputs
    have no labels at all.
    """
    labelling = Labelling(policy=policy or ChannelPolicy())
    for node in model.graph:
        label_node(labelling, node)
    _freeze_outputs(model.graph, labelling)
    _freeze_half_labelled_weights(labelling)
    settle_literals(labelling)
    tie_copies(model, labelling)
    drop_tentative_axes(labelling)
    axes = [labels for axes_of_weight in labelling.weights.values() for labels in axes_of_weight.values()]
    settle_grids(labelling.space, labelling.grids, labelling.policy.units, axes)
    return labelling


def label_node(labelling: Labelling, node: ir.Node) -> None:
    """Run the rule of one node, whose inputs are labelled; without a rule, freeze what reaches it."""
    flow = Flow(labelling, node)
    rule = CHANNELS.get(flow.node)
    _label_derived(flow)
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


# Operators that hand on a weight behind which a layer may stand: a Cast of half-precision weights, a class token that
# is expanded to the batch. Constant folding leaves them where the result would be larger.
_HAND_ON = frozenset(
    {"Cast", "CastLike", "Expand", "Flatten", "Identity", "Neg", "Reshape", "Resize", "Slice", "Split", "Squeeze"}
    | {"Tile", "Transpose", "Unsqueeze"}
)


def _label_derived(flow: Flow) -> None:
    """Note that what the node computes comes from constants; label the axes of a weight that it hands on."""
    hands_on = flow.node.op_type in _HAND_ON
    if not flow.num_inputs or not flow.is_derived([0] if hands_on else range(flow.num_inputs)):
        return
    flow.mark_derived()
    if hands_on and flow.is_trainable(0):
        for axis, size in enumerate(flow.dims(0) or ()):
            if size != 1:
                flow.own_tentatively(0, axis)


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
