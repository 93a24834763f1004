"""Mode "weights": stored as float16, cast to float32 when the model is loaded.

    W (64,3,7,7) float32 -> Conv     =>     W (64,3,7,7) float16 -> Cast to float32 -> Conv

ONNX Runtime folds the Cast once, at load: the arithmetic, its speed and the memory in use stay what they were.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxprune.graph.metadata import module_path
from onnxprune.graph.names import UniqueNames
from onnxprune.graph.scope import first_match
from onnxprune.graph.weights import replace_weight_by_windows
from onnxprune.passes.fp16.plan import Fp16Config, Fp16Plan, RoundedTensor
from onnxprune.passes.fp16.rounding import round_weight

__all__ = ["apply_weights_plan", "plan_weights", "store_as_float16"]

# Smaller ones save less than the Cast node takes in the file.
MIN_ELEMENTS = 128

# Their constants must be initializers for shape inference or for the kernels to find them.
_CONSTANTS_STAY = frozenset({"QuantizeLinear", "DequantizeLinear", "Resize", "Upsample", "RoiAlign"})


def plan_weights(model: ir.Model, config: Fp16Config) -> Fp16Plan:
    """Which weights become float16. Reads every weight once, a window at a time."""
    rounded: list[RoundedTensor] = []
    kept: dict[str, str] = {}
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.dtype is not ir.DataType.FLOAT or value.const_value is None or not value.uses():
                continue
            found = _reason_to_keep(value, config) or round_weight(value)
            if isinstance(found, RoundedTensor):
                rounded.append(found)
            else:
                kept[name] = found
    return Fp16Plan(
        mode="weights",
        weights=tuple(rounded),
        float32_weights=kept,
        float16_nodes=(),
        float32_nodes={},
        float32_io={},
    )


def _reason_to_keep(value: ir.Value, config: Fp16Config) -> str:
    if value.const_value is not None and value.const_value.size < MIN_ELEMENTS:
        return f"it has fewer than {MIN_ELEMENTS} elements"
    if value.is_graph_output():
        return "it is an output"
    for node in value.consumers():
        if node.op_type in _CONSTANTS_STAY:
            return f"'{node.name}' ({node.op_type}) needs it as a float32 constant"
        if glob := first_match(config.skip, value.name, node.name, node.op_type, module_paths=(module_path(node),)):
            return f"excluded by skip '{glob}'"
    return ""


def apply_weights_plan(model: ir.Model, plan: Fp16Plan) -> None:
    """Store the planned weights as float16, each with one Cast that all its readers share."""
    initializers = {name: value for graph in model.graphs() for name, value in graph.initializers.items()}
    value_names, node_names = UniqueNames.of_values(model), UniqueNames.of_nodes(model)
    for tensor in plan.weights:
        value = initializers[tensor.name]
        graph = value.graph
        readers = list(value.uses())
        if not isinstance(graph, ir.Graph):
            continue
        cast = ir.Node(
            "",
            "Cast",
            [value],
            [ir.AttrInt64("to", ir.DataType.FLOAT.value)],
            name=node_names.claim(f"{tensor.name}.to_float32"),
            metadata_props=dict(readers[0].node.metadata_props),
        )
        widened = cast.outputs[0]
        widened.name = value_names.claim(f"{tensor.name}.float32")
        widened.type = ir.TensorType(ir.DataType.FLOAT)
        widened.shape = value.shape
        for use in readers:
            use.node.replace_input_with(use.idx, widened)
        graph.insert_before(graph[0], cast)
        store_as_float16(value)


def store_as_float16(value: ir.Value) -> None:
    """Make the float32 initializer `value` float16; converted whenever it is read, so memory does not grow."""
    replace_weight_by_windows(value, lambda: lambda weights: weights.astype(np.float16), dtype=ir.DataType.FLOAT16)
