"""The two models that time a region: in integers, and its float twin.

Both have the same inputs and outputs. A tensor that is an integer on its other side as well goes in or out as integers,
so the float twin converts it; any other goes in or out as float, so the integer form does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import Batch, Placement, QuantizationPlan
from onnxprune.graph.weights import constant_array
from onnxprune.targets.qdq.guards import keep_float_layers_float
from onnxprune.targets.qdq.regions import Region
from onnxprune.targets.qdq.spell import spell
from onnxprune.targets.qdq.spelling import SpellingName, find_spelling
from onnxprune.targets.qdq.unread import drop_unread_conversions
from onnxprune.targets.qdq.writer import IntegerWriter

__all__ = ["Border", "RegionModels", "region_models"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Border:
    """A tensor that is fed as integers: its name in the whole model, and how it becomes them."""

    tensor: str
    scale: npt.NDArray[Any]
    zero_point: npt.NDArray[Any]

    def integers(self, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """`tensor` as QuantizeLinear writes it."""
        limits = np.iinfo(self.zero_point.dtype)
        steps = np.rint(tensor.astype(np.float64) / self.scale) + self.zero_point.astype(np.float64)
        integers: npt.NDArray[Any] = np.clip(steps, limits.min, limits.max).astype(self.zero_point.dtype)
        return integers


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionModels:
    """A region in integers and in float. `fed_integers` names the graph inputs that take integers."""

    integer: ir.Model
    float_twin: ir.Model
    fed_integers: Mapping[str, Border]

    def feeds(self, tensors: Batch) -> dict[str, npt.NDArray[Any]]:
        """What both take, of the whole model's float tensors by name."""
        fed: dict[str, npt.NDArray[Any]] = {}
        for name in (value.name or "" for value in self.integer.graph.inputs):
            border = self.fed_integers.get(name)
            fed[name] = tensors[name] if border is None else border.integers(tensors[border.tensor])
        return fed


def region_models(model: ir.Model, plan: QuantizationPlan, region: Region, spelling: SpellingName) -> RegionModels:
    """`region` as a model in integers, and as one in float with the same inputs and outputs."""
    alone = _submodel(model, region)
    placement = Placement(
        target=find_spelling(spelling).placement_target,
        integer_nodes=region.nodes,
        float_nodes={},
    )
    integer = spell(alone, plan, placement, spelling)
    fed = _feed_integers(integer.graph, region)
    returned = _return_integers(integer.graph, region)
    _convert_borders(alone.graph, fed, returned, region)
    keep_float_layers_float(alone.graph, IntegerWriter(alone, plan, find_spelling(spelling)))
    drop_unread_conversions(alone.graph)
    return RegionModels(integer=integer, float_twin=alone, fed_integers=fed)


def _submodel(model: ir.Model, region: Region) -> ir.Model:
    """The nodes of `region` as a float model; weights are shared."""
    wanted = set(region.nodes)
    copies: dict[ir.Value, ir.Value] = {}
    inputs: list[ir.Value] = []
    initializers: list[ir.Value] = []
    nodes: list[ir.Node] = []

    def copy_of(value: ir.Value | None) -> ir.Value | None:
        if value is None or value in copies:
            return None if value is None else copies[value]
        copies[value] = ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)
        (inputs if value.const_value is None else initializers).append(copies[value])
        return copies[value]

    for node in model.graph:
        if node.name not in wanted:
            continue
        copy = ir.Node(
            node.domain,
            node.op_type,
            [copy_of(value) for value in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            version=node.version,
            name=node.name,
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            copies[old] = new
        nodes.append(copy)
    by_name = {value.name: value for value in copies.values()}
    outputs = [by_name[name] for name in dict.fromkeys((*region.outputs, *sorted(region.integer_outputs)))]
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=nodes,
        initializers=initializers,
        opset_imports=dict(model.opset_imports),
        name="region",
    )
    return ir.Model(graph, ir_version=model.ir_version)


def _feed_integers(graph: ir.Graph, region: Region) -> dict[str, Border]:
    """Let the integer inputs of `region` begin behind their QuantizeLinear; by name of the new input."""
    fed: dict[str, Border] = {}
    for value in list(graph.inputs):
        readers = value.consumers()
        quantize = next((node for node in readers if node.op_type == "QuantizeLinear"), None)
        if value.name not in region.integer_inputs or quantize is None or len(readers) > 1:
            continue
        scale, zero_point = constant_array(quantize.inputs[1]), constant_array(quantize.inputs[2])
        if scale is None or zero_point is None:
            continue
        integers = quantize.outputs[0]
        name = f"{value.name}_integers"
        new = ir.Value(name=name, shape=value.shape, type=ir.TensorType(ir.DataType.from_numpy(zero_point.dtype)))
        integers.replace_all_uses_with(new)
        graph.remove(quantize, safe=True)
        graph.inputs[list(graph.inputs).index(value)] = new
        fed[name] = Border(tensor=value.name or "", scale=scale, zero_point=zero_point)
    return fed


def _return_integers(graph: ir.Graph, region: Region) -> dict[str, Border]:
    """Let the integer outputs of `region` end before their DequantizeLinear; by name of the tensor."""
    returned: dict[str, Border] = {}
    for position, value in reversed(list(enumerate(graph.outputs))):
        if value.name not in region.integer_outputs:
            continue
        dequantize = value.producer()
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        integers = dequantize.inputs[0]
        scale, zero_point = constant_array(dequantize.inputs[1]), constant_array(dequantize.inputs[2])
        if integers is None or scale is None or zero_point is None or integers.is_graph_output():
            continue
        integers.type = ir.TensorType(ir.DataType.from_numpy(zero_point.dtype))
        returned[value.name] = Border(tensor=value.name, scale=scale, zero_point=zero_point)
        if value.name in region.outputs:
            graph.outputs.append(integers)
            continue
        graph.outputs[position] = integers
        if not value.uses():
            graph.remove(dequantize, safe=True)
    return returned


def _convert_borders(
    graph: ir.Graph, fed: Mapping[str, Border], returned: Mapping[str, Border], region: Region
) -> None:
    """Let the float form in `graph` take `fed` and give `returned`, and convert them."""
    first = graph[0]
    for name, border in fed.items():
        value = next(value for value in graph.inputs if value.name == border.tensor)
        dtype = ir.TensorType(ir.DataType.from_numpy(border.zero_point.dtype))
        integers = ir.Value(name=name, shape=value.shape, type=dtype)
        dequantize = ir.node(
            "DequantizeLinear", [integers, *_parameters(graph, border, name)], name=f"{name}_DequantizeLinear"
        )
        graph.insert_before(first, dequantize)
        real = dequantize.outputs[0]
        real.name, real.type, real.shape = f"{border.tensor}_real", value.type, value.shape
        value.replace_all_uses_with(real)
        graph.inputs[list(graph.inputs).index(value)] = integers
    for position, value in list(enumerate(graph.outputs)):
        found = returned.get(value.name or "")
        if found is None:
            continue
        name = f"{value.name}_integers"
        quantize = ir.node("QuantizeLinear", [value, *_parameters(graph, found, name)], name=f"{name}_QuantizeLinear")
        graph.append(quantize)
        integers = quantize.outputs[0]
        integers.name, integers.shape = name, value.shape
        integers.type = ir.TensorType(ir.DataType.from_numpy(found.zero_point.dtype))
        if value.name in region.outputs:
            graph.outputs.append(integers)
        else:
            graph.outputs[position] = integers


def _parameters(graph: ir.Graph, border: Border, name: str) -> list[ir.Value]:
    values: list[ir.Value] = []
    for kind, array in (("scale", border.scale), ("zero_point", border.zero_point)):
        tensor = ir.tensor(array, name=f"{name}_{kind}")
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(value)
        values.append(value)
    return values
