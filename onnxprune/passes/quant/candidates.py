"""Which nodes, activations and weights of a model are to be quantized, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxprune.graph.metadata import module_path
from onnxprune.graph.scope import first_match, weight_names
from onnxprune.ops.quant import (
    QUANT,
    QuantRow,
    ScaleRule,
    absorbed_activation,
    activation_inputs,
    activation_outputs,
    bias_input,
    scale_rule_of,
    weight_input,
)

__all__ = ["MAX_ARITHMETIC_WEIGHTS", "Candidate", "Candidates", "find_candidates"]

MAX_ARITHMETIC_WEIGHTS = 16
"""A convolution with no more weights than this is arithmetic in disguise (the expectation over 16 bins that YOLO
detectors write as a 1x1 convolution, for one), not a layer that int8 makes faster."""

TAIL_REASON = "it comes after the last convolution or matrix product on its way to the outputs (decode arithmetic)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A node that may become integer, with its row. `weight` is its constant weight, if it has one."""

    node: ir.Node
    row: QuantRow
    weight: ir.Value | None
    absorbed: ir.Node | None
    """The Relu or Clip that disappears into this node."""

    @property
    def name(self) -> str:
        """The node's name; canonical nodes have one."""
        return self.node.name or ""

    @property
    def outputs(self) -> tuple[ir.Value, ...]:
        """The tensors that leave the node as integers: behind the absorbed activation, where there is one."""
        return tuple(self.absorbed.outputs) if self.absorbed is not None else activation_outputs(self.node, self.row)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The result of `find_candidates`, in the order of the graph."""

    nodes: tuple[Candidate, ...]
    excluded_nodes: Mapping[str, str]

    @property
    def activations(self) -> tuple[ir.Value, ...]:
        """Every tensor that is computed or fed at run time and would be integer, once, in graph order."""
        values = (value for item in self.nodes for value in (*activation_inputs(item.node, item.row), *item.outputs))
        return tuple(dict.fromkeys(value for value in values if value.const_value is None))

    @property
    def calibrated(self) -> tuple[ir.Value, ...]:
        """The `activations` whose range only samples can tell.

        What Sigmoid and its like give is known without. What merely comes out of moving, selecting or pooling other
        tensors lies in their range, and would cost as much to look at.
        """
        known = {
            value
            for item in self.nodes
            if item.row.fixed is not None or scale_rule_of(item.node, item.row) is not ScaleRule.FREE
            for value in item.outputs
        }
        return tuple(value for value in self.activations if value not in known)

    @property
    def constants(self) -> tuple[ir.Value, ...]:
        """Constants that stand where activations stand: the operand of an Add, a part of a Concat."""
        values = (value for item in self.nodes for value in activation_inputs(item.node, item.row))
        return tuple(dict.fromkeys(value for value in values if value.const_value is not None))


def find_candidates(model: ir.Model, *, exclude: Sequence[str] = ()) -> Candidates:
    """Sort the nodes of the main graph into candidates and excluded ones.

    A node is excluded, each with its reason, when

    1. the user's `exclude` matches its name, a weight's, or a module around it,
    2. its operator has no row in the table, or the row refuses it,
    3. its activations are not float32, or its weight is computed at run time,
    4. it stands in the model's tail: no layer with weights comes after it, so it is decode arithmetic (boxes, scores,
       NMS, Softmax), where int8 costs most and saves least. Operators that only move numbers follow their producer.

    Nodes inside the bodies of If, Loop and Scan stay float and are not listed one by one.
    """
    excluded: dict[str, str] = {}
    rows: dict[ir.Node, QuantRow] = {}
    for node in model.graph:
        reason, row = _sort_node(node, exclude)
        if row is None:
            excluded[node.name or ""] = reason
        else:
            rows[node] = row
    absorbed_by: dict[ir.Node, ir.Node] = {}
    for node in rows:
        activation = absorbed_activation(node, kept_apart=excluded)
        if activation is not None:
            absorbed_by[activation] = node
    tail = _tail(model, rows, absorbed_by)
    for node in tail:
        excluded[node.name or ""] = TAIL_REASON
    absorbs = {producer: activation for activation, producer in absorbed_by.items() if producer not in tail}
    nodes = tuple(
        Candidate(
            node=node,
            row=row,
            weight=weight_input(node, row),
            absorbed=absorbs.get(node),
        )
        for node, row in rows.items()
        if node not in tail and absorbed_by.get(node) not in absorbs
    )
    return Candidates(
        nodes=nodes,
        excluded_nodes=excluded,
    )


def _sort_node(node: ir.Node, exclude: Sequence[str]) -> tuple[str, QuantRow | None]:
    """The node's row, or the reason why it has none that counts."""
    if glob := first_match(exclude, node.name, *weight_names(node), module_paths=(module_path(node),)):
        return f"excluded by '{glob}'", None
    row = QUANT.get(node)
    if row is None:
        domain = f"{node.domain}::" if node.domain else ""
        return f"operator {domain}{node.op_type} has no row in the quantization table", None
    refusal = row.refuses(node)
    if refusal is not None:
        return refusal, None
    for value in (*activation_inputs(node, row), *activation_outputs(node, row)):
        if value.dtype != ir.DataType.FLOAT:
            found = "unknown" if value.dtype is None else value.dtype.name.lower()
            return f"'{value.name}' has element type {found}, not float", None
    return _sort_weight(node, row) if row.is_compute else ("", row)


def _sort_weight(node: ir.Node, row: QuantRow) -> tuple[str, QuantRow | None]:
    weight = weight_input(node, row)
    if weight is None or weight.const_value is None:
        return "its weight is computed at run time", None
    if weight.const_value.dtype != ir.DataType.FLOAT:
        return f"its weight has element type {weight.const_value.dtype.name.lower()}, not float", None
    bias = bias_input(node, row)
    if bias is not None and bias[1].const_value is None:
        return "its bias is computed at run time", None
    return "", row


def _is_layer(node: ir.Node, row: QuantRow) -> bool:
    weight = weight_input(node, row)
    return weight is not None and weight.const_value is not None and weight.const_value.size > MAX_ARITHMETIC_WEIGHTS


def _tail(
    model: ir.Model, rows: Mapping[ir.Node, QuantRow], absorbed_by: Mapping[ir.Node, ir.Node]
) -> frozenset[ir.Node]:
    """The nodes of `rows` from which no layer with weights can be reached, nor one that they belong to."""
    leads_to_layer: set[ir.Node] = set()
    tail: set[ir.Node] = set()
    for node in reversed(model.graph):
        row = rows.get(node)
        if any(user in leads_to_layer for output in node.outputs for user in output.consumers()):
            leads_to_layer.add(node)
            continue
        if row is not None and _is_layer(node, row):
            leads_to_layer.add(node)
            continue
        if row is None or _only_moves(node, row):
            continue
        producer = absorbed_by.get(node)
        if producer is not None and _is_layer(producer, rows[producer]):
            continue
        tail.add(node)
    return frozenset(tail)


def _only_moves(node: ir.Node, row: QuantRow) -> bool:
    return scale_rule_of(node, row) is ScaleRule.SAME and len(activation_inputs(node, row)) == 1
