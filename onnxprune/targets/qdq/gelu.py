"""GELU that stays one float operator between integer layers.

Exporters write GELU with five operators:

    x -> Div(sqrt 2) -> Erf -> Add(1) -> Mul(x) -> Mul(1/2)

ONNX Runtime fuses them, but not behind DequantizeLinear: it first gives each reader of `x` a DequantizeLinear of its
own, and no longer sees one `x`. On [197, 768] the five took 168 us, the fused one 96. So where `x` comes from
integers, it is written as one operator: `Gelu` from opset 20 on, else ONNX Runtime's own of the same name.

    Hendrycks, Gimpel: Gaussian Error Linear Units. 2016.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxprune.graph.weights import constant_array

__all__ = ["find_gelu", "fuse_gelu_behind_integers", "is_bias_of_gelu"]

_FIRST_OPSET = 20
_MICROSOFT = "com.microsoft"
# Exporters write the constants in float16 as well: 1.414 for the square root of 2.
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class GeluPattern:
    """`nodes` in topological order compute `output` = GELU(`data`)."""

    data: ir.Value
    output: ir.Value
    nodes: tuple[ir.Node, ...]


def fuse_gelu_behind_integers(model: ir.Model) -> int:
    """Replace each GELU whose input comes out of DequantizeLinear by one operator.

    Args:
        model: A spelled model; changed in place. Its opset stays; below 20 it gets the domain com.microsoft.

    Returns:
        How many were replaced.
    """
    graph = model.graph
    count = 0
    for node in list(graph):
        pattern = find_gelu(node) if node.op_type == "Erf" and node.graph is graph else None
        if pattern is None or not _is_dequantized(pattern.data):
            continue
        _replace(model, pattern)
        count += 1
    return count


def find_gelu(erf: ir.Node) -> GeluPattern | None:
    """The GELU around `erf`, whose tensors nothing else reads; None where it is part of something else."""
    scaled = _maker(erf.inputs[0])
    data = None if scaled is None else _scaled_by(scaled, {"Mul": math.sqrt(0.5), "Div": math.sqrt(2)})
    shifted = _only_reader(erf.outputs[0])
    if (
        scaled is None
        or data is None
        or shifted is None
        or shifted.op_type != "Add"
        or _other(shifted, erf, 1.0) is None
    ):
        return None
    factors: list[ir.Node] = []
    # What is still missing from x * (1 + erf) * 1/2 shrinks with each Mul on the way.
    node, missing_data, missing_half = shifted, True, True
    while missing_data or missing_half:
        reader = _only_reader(node.outputs[0])
        if reader is None or reader.op_type != "Mul":
            return None
        other = reader.inputs[1] if reader.inputs[0] is node.outputs[0] else reader.inputs[0]
        half = _maker(other)
        if missing_data and other is data:
            missing_data = False
        elif missing_half and _is_number(other, 0.5):
            missing_half = False
        elif missing_data and missing_half and half is not None and _half_of(half, data, reader):
            missing_data = missing_half = False
            factors.append(half)
        else:
            return None
        factors.append(reader)
        node = reader
    return GeluPattern(data=data, output=node.outputs[0], nodes=(scaled, erf, shifted, *factors))


def is_bias_of_gelu(node: ir.Node) -> bool:
    """True for an Add of a constant row whose result only a GELU reads: ONNX Runtime's BiasGelu takes it in."""
    if node.op_type != "Add" or node.outputs[0].is_graph_output():
        return False
    bias = next((constant_array(value) for value in node.inputs if constant_array(value) is not None), None)
    if bias is None or bias.ndim != 1:
        return False
    readers = {reader for reader, _ in node.outputs[0].uses()}
    return any(
        pattern is not None and pattern.data is node.outputs[0] and readers <= set(pattern.nodes)
        for pattern in map(find_gelu, _erfs_behind(readers))
    )


def _erfs_behind(readers: set[ir.Node]) -> Iterator[ir.Node]:
    for reader in readers:
        found = _only_reader(reader.outputs[0]) if reader.op_type in ("Mul", "Div") else None
        if found is not None and found.op_type == "Erf":
            yield found


def _replace(model: ir.Model, pattern: GeluPattern) -> None:
    last = pattern.nodes[-1]
    is_standard = model.graph.opset_imports.get("", 0) >= _FIRST_OPSET
    domain = "" if is_standard else _MICROSOFT
    if not is_standard:
        model.graph.opset_imports.setdefault(_MICROSOFT, 1)
    fused = ir.Node(domain, "Gelu", [pattern.data], name=f"{last.name}_Gelu", metadata_props=dict(last.metadata_props))
    output = pattern.output
    new = fused.outputs[0]
    new.type, new.shape = output.type, output.shape
    new.metadata_props.update(output.metadata_props)
    model.graph.insert_before(last, fused)
    name = output.name
    output.replace_all_uses_with(new, replace_graph_outputs=True)
    output.name, new.name = f"{name}_unfused", name
    model.graph.remove(list(reversed(pattern.nodes)), safe=True)


def _is_dequantized(value: ir.Value) -> bool:
    maker = value.producer()
    return maker is not None and maker.op_type == "DequantizeLinear" and maker.domain in ("", "ai.onnx")


def _maker(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = value.uses()
    return next(iter(uses)).node if len(uses) == 1 and not value.is_graph_output() else None


def _scaled_by(node: ir.Node, numbers: dict[str, float]) -> ir.Value | None:
    """What `node` multiplies or divides by the number that belongs to its operator."""
    number = numbers.get(node.op_type)
    if number is None or _only_reader(node.outputs[0]) is None:
        return None
    first, second = node.inputs[0], node.inputs[1]
    if _is_number(second, number):
        return first
    return second if node.op_type == "Mul" and _is_number(first, number) else None


def _other(node: ir.Node, maker: ir.Node, number: float) -> ir.Value | None:
    """The operand beside the result of `maker`, if it is `number`."""
    other = node.inputs[1] if node.inputs[0] is maker.outputs[0] else node.inputs[0]
    return other if _is_number(other, number) else None


def _half_of(node: ir.Node, data: ir.Value, reader: ir.Node) -> bool:
    return _scaled_by(node, {"Mul": 0.5, "Div": 2.0}) is data and _only_reader(node.outputs[0]) is reader


def _is_number(value: ir.Value | None, number: float) -> bool:
    array = constant_array(value)
    return (
        array is not None and array.size == 1 and math.isclose(float(array.reshape(-1)[0]), number, rel_tol=_TOLERANCE)
    )
