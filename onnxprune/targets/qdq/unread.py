"""Removing what a rewritten graph leaves behind."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["drop_unread_conversions", "drop_unread_initializers"]


def drop_unread_conversions(graph: ir.Graph) -> None:
    """No DequantizeLinear is left whose result nothing reads: ONNX Runtime would compute it."""
    for node in list(graph):
        if node.op_type == "DequantizeLinear" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)


def drop_unread_initializers(graph: ir.Graph) -> None:
    """No initializer is left that nothing reads."""
    initializers = graph.initializers
    for name in [n for n, value in initializers.items() if not value.uses() and not value.is_graph_output()]:
        del initializers[name]
