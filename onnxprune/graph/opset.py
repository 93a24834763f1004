"""Raising the opset of a model, in its graph, its subgraphs and its functions, without losing node metadata."""

from __future__ import annotations

import onnx_ir as ir

from onnxprune.errors import ModelError
from onnxprune.graph.names import printable
from onnxprune.graph.opset_rules import RULES, RuleContext

__all__ = ["raise_function_opsets", "raise_opset"]

_LOWEST = 7


def raise_opset(model: ir.Model, version: int) -> None:
    """Rewrite every node of ONNX's own domain to what it is called in opset `version`; functions must be inlined.

    Outputs stay equal up to rounding. Some rules need ranks and static sizes: infer shapes before. Other domains are
    left alone.

    Raises:
        ModelError: A node has no equal in the newer opset; names it.
    """
    current = model.opset_imports.get("", version)
    if current < _LOWEST:
        raise ModelError(
            f"The model is in opset {current}; the oldest supported one is {_LOWEST}.", "Export it with opset 18."
        )
    if current >= version:
        return
    _raise_nodes(model.graph, current, version)
    for graph in model.graphs():
        if graph.opset_imports or graph is model.graph:
            graph.opset_imports[""] = version


def raise_function_opsets(model: ir.Model) -> None:
    """Bring the model and all its functions to the highest opset that one of them is in, so that they can be inlined.

    Raises:
        ModelError: They import another domain in two versions, or a node can't be raised.
    """
    bodies = [function.graph for function in model.functions.values()]
    highest = max([model.opset_imports.get("", 0), *(body.opset_imports.get("", 0) for body in bodies)])
    for body in (model.graph, *bodies):
        current = body.opset_imports.get("")
        if current is not None and current < highest:
            _raise_nodes(body, current, highest)
            body.opset_imports[""] = highest
    for domain in {domain for body in bodies for domain in body.opset_imports if domain}:
        versions = {body.opset_imports[domain] for body in (model.graph, *bodies) if domain in body.opset_imports}
        if len(versions) > 1:
            raise ModelError(
                f"The model and its functions use the operator domain '{printable(domain)}' in the versions "
                f"{sorted(versions)}, so the functions can't be inlined.",
                "Export the model without functions.",
            )


def _raise_nodes(graph: ir.Graph, current: int, version: int) -> None:
    for body in (graph, *graph.subgraphs()):
        for node in list(body):
            if node.domain not in ("", "ai.onnx"):
                continue
            context = RuleContext(node, body)
            for step in range(current + 1, version + 1):
                rule = RULES.get((context.node.op_type, step))
                if rule is not None:
                    rule(context)
