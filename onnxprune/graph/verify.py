"""The rules of the canonical form, checked."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxprune.errors import VerificationError
from onnxprune.graph.cleanup import is_inference_dropout, is_removable_identity
from onnxprune.graph.form import MAX_IR_VERSION, MAX_OPSET, MIN_OPSET, node_faults
from onnxprune.graph.names import is_safe_name, printable

__all__ = ["verify"]

_MAX_SHOWN_FAULTS = 5


def verify(model: ir.Model) -> None:
    """Check that `model` keeps the canonical form (the list in `canonicalize`). Reads no weights.

    Raises:
        VerificationError: Names the first broken rules, with node and value.
    """
    faults = [fault for _, fault in zip(range(_MAX_SHOWN_FAULTS), _faults(model), strict=False)]
    if not faults:
        # The checker stops at structural faults with less helpful words, so it comes last.
        checker = node_faults(model)
        faults = [f"ONNX's checker: {checker}"] if checker else []
    if faults:
        raise VerificationError(f"The model is not in canonical form: {'; '.join(faults)}.")


def _faults(model: ir.Model) -> Iterator[str]:
    yield from _model_faults(model)
    yield from _name_faults(model)
    for graph in model.graphs():
        yield from _initializer_faults(graph)
        for node in graph:
            yield from _node_faults(node)
    yield from _order_faults(model.graph, set())


def _model_faults(model: ir.Model) -> Iterator[str]:
    opset = model.opset_imports.get("")
    if opset is None or not MIN_OPSET <= opset <= MAX_OPSET:
        yield f"opset {opset} is outside {MIN_OPSET} to {MAX_OPSET}"
    if not model.ir_version or model.ir_version > MAX_IR_VERSION:
        yield f"IR version {model.ir_version} is above {MAX_IR_VERSION}"
    if model.functions:
        yield f"function '{printable(next(iter(model.functions))[1])}' is not inlined"


def _name_faults(model: ir.Model) -> Iterator[str]:
    nodes: set[str] = set()
    values: dict[str, ir.Value] = {}
    for graph in model.graphs():
        for node in graph:
            if not node.name:
                yield f"a node of type {node.op_type} has no name"
            elif node.name in nodes:
                yield f"two nodes are named '{printable(node.name)}'"
            nodes.add(node.name or "")
        inner = (value for node in graph for value in node.outputs if value.name != "" or value.uses())
        for value in (*graph.inputs, *graph.initializers.values(), *inner, *graph.outputs):
            if not value.name:
                yield f"a value of {_producer(value)} has no name"
                continue
            if values.setdefault(value.name, value) is not value:
                yield f"two values are named '{printable(value.name)}'"
            if not is_safe_name(value.name):
                yield f"the value name '{printable(value.name)}' holds control characters"


def _initializer_faults(graph: ir.Graph) -> Iterator[str]:
    inputs = set(graph.inputs)
    for key, value in graph.initializers.items():
        name = f"initializer '{printable(key)}'"
        tensor = value.const_value
        if key != value.name:
            yield f"{name} is registered under another name than its own, '{printable(value.name or '')}'"
        if tensor is None:
            yield f"{name} has no tensor"
            continue
        if value in inputs:
            yield f"{name} is an input of its graph"
        if value.dtype != tensor.dtype:
            yield f"{name} is declared {value.dtype} but its tensor is {tensor.dtype}"
        if value.shape is None or list(value.shape) != list(tensor.shape):
            yield f"{name} is declared {value.shape} but its tensor is {tensor.shape}"
        num_users = len(value.uses()) + (1 if value.is_graph_output() else 0)
        if num_users > 1:
            yield f"{name} has {num_users} users instead of one"


def _node_faults(node: ir.Node) -> Iterator[str]:
    name = f"node '{printable(node.name or '')}'"
    if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
        yield f"{name} is a Constant, not an initializer"
    if is_removable_identity(node):
        yield f"{name} is an Identity that does nothing"
    if is_inference_dropout(node):
        yield f"{name} is a Dropout that does nothing"
    for attribute in node.attributes.values():
        if attribute.is_ref():
            yield f"{name} refers to a function's attribute '{printable(attribute.name)}'"


def _order_faults(graph: ir.Graph, outer: set[ir.Value]) -> Iterator[str]:
    visible = outer | set(graph.inputs) | set(graph.initializers.values())
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in visible:
                yield (
                    f"node '{printable(node.name or '')}' uses '{printable(value.name or '')}', "
                    f"which is not defined before it ({_producer(value)})"
                )
        for attribute in node.attributes.values():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _order_faults(attribute.as_graph(), visible)
            elif attribute.type == ir.AttributeType.GRAPHS:
                for body in attribute.as_graphs():
                    yield from _order_faults(body, visible)
        visible.update(node.outputs)
    for value in graph.outputs:
        if value not in visible:
            yield f"output '{printable(value.name or '')}' is not defined by any node ({_producer(value)})"


def _producer(value: ir.Value) -> str:
    node = value.producer()
    return "no producer" if node is None else f"output of '{printable(node.name or node.op_type)}'"
