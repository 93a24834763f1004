"""Nodes that do nothing are taken out, and with them what nobody uses any more."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["hand_over", "is_inference_dropout", "is_removable_identity", "remove_dead_code", "remove_no_ops"]


def hand_over(old: ir.Value, new: ir.Value) -> None:
    """Let `new` stand wherever `old` stood; where `old` is an output of its graph, `new` takes its name.

    In the second case `new` must be of the same graph and not be one of its inputs, initializers or outputs already.
    """
    name, is_output = old.name, old.is_graph_output()
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if not is_output:
        return
    old.name = None
    new.name = name
    # The interface keeps what it declares (dimension names), as far as the graph does not know better.
    new.type = old.type or new.type
    new.shape = old.shape or new.shape
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)


def is_removable_identity(node: ir.Node) -> bool:
    """True unless the Identity is the only way to spell the graph.

    It is where an output of a graph is an input, an initializer, another output or a value from outside of it.
    """
    if node.op_type != "Identity" or node.domain not in ("", "ai.onnx"):
        return False
    source, result = node.inputs[0], node.outputs[0]
    if source is None:
        return False
    if not result.is_graph_output():
        return True
    producer = source.producer()
    return producer is not None and producer.graph is node.graph and not source.is_graph_output()


def is_inference_dropout(node: ir.Node) -> bool:
    """True for a Dropout (opset 12 and later) that is known to let everything through."""
    if node.op_type != "Dropout" or node.domain not in ("", "ai.onnx"):
        return False
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    if mode is None:
        return True
    return mode.const_value is not None and mode.is_initializer() and not bool(mode.const_value.numpy())


def remove_no_ops(model: ir.Model) -> bool:
    """Remove every Identity that can go and every Dropout in inference mode; True if any was there."""
    removed = False
    for graph in list(model.graphs()):
        for node in graph:
            if is_inference_dropout(node):
                _dropout_to_identity(node)
                removed = True
        for node in graph:
            if is_removable_identity(node):
                source = node.inputs[0]
                if source is not None:
                    hand_over(node.outputs[0], source)
                    graph.remove(node, safe=True)
                    removed = True
    return removed


def _dropout_to_identity(node: ir.Node) -> None:
    graph, source = node.graph, node.inputs[0]
    if graph is None or source is None:
        return
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        # The mask says what was let through: everything.
        shape = ir.node("Shape", [source])
        mask = ir.node("ConstantOfShape", [shape.outputs[0]], {"value": ir.tensor(np.array([True]))})
        graph.insert_before(node, [shape, mask])
        hand_over(node.outputs[1], mask.outputs[0])
    identity = ir.node("Identity", [source], metadata_props=dict(node.metadata_props))
    identity.outputs[0].type, identity.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    graph.insert_before(node, identity)
    name = node.outputs[0].name
    is_output = node.outputs[0].is_graph_output()
    hand_over(node.outputs[0], identity.outputs[0])
    graph.remove(node, safe=True)
    if not is_output:
        identity.outputs[0].name = name


def remove_dead_code(model: ir.Model) -> bool:
    """Remove nodes and initializers that no output depends on, in subgraphs too; True if any was there."""
    removed = False
    # Inner graphs first: what they no longer use may be dead outside.
    for graph in reversed(list(model.graphs())):
        for node in reversed(graph):
            if node.outputs and not any(value.uses() or value.is_graph_output() for value in node.outputs):
                graph.remove(node, safe=True)
                removed = True
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del graph.initializers[name]
                removed = True
    return removed
