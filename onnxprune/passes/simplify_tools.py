"""What runs in the child process of a foreign graph tool; called by `graph.foreign.run_foreign_tool` only.

This file stands outside of `simplify/` so that the child imports nothing but the tool.
Both tools are told to leave large folded constants and quantization alone; `simplify/driver.py` checks that they did.
"""

from __future__ import annotations

import onnx

__all__ = ["run_onnxscript", "run_onnxsim"]


def run_onnxsim(model: onnx.ModelProto, *, max_folded_bytes: int) -> onnx.ModelProto:
    """The model after onnxsim's optimizers and constant folding; its own random check is off (ours counts)."""
    import onnxsim

    simplified: onnx.ModelProto = onnxsim.simplify(
        model, check_n=0, tensor_size_threshold=f"{max_folded_bytes}B", include_subgraph=True
    )[0]
    return simplified


def run_onnxscript(model: onnx.ModelProto, *, max_folded_bytes: int) -> onnx.ModelProto:
    """The model after onnxscript's default rewrite rules and its folding optimizer."""
    import onnx_ir as ir
    from onnxscript import optimizer, rewriter

    graph_model = ir.from_proto(model)
    optimizer.optimize_ir(
        graph_model,
        # Elements, not bytes: float32 is the type of most of them.
        input_size_limit=max_folded_bytes // 4,
        output_size_limit=max_folded_bytes // 4,
        should_fold=lambda node: False if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None,
        inline=False,
    )
    rewritten: ir.Model = rewriter.rewrite(graph_model)
    return ir.to_proto(rewritten)
