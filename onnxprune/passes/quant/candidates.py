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
    stored_constant,
    weight_input,
)
from onnxprune.passes.quant.tail import find_tail

__all__ = ["Candidate", "Candidates", "find_candidates"]


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
    """The result of `find_candidates`, in the order of the graph.

    `tail` has the nodes that decode what the last layers give; those that compute are among the excluded ones.
    """

    nodes: tuple[Candidate, ...]
    excluded_nodes: Mapping[str, str]
    last_layers: tuple[Candidate, ...] = ()
    tail: tuple[ir.Node, ...] = ()

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


def find_candidates(
    model: ir.Model, *, exclude: Sequence[str] = (), kept_float: Mapping[str, str] | None = None
) -> Candidates:
    """Sort the nodes of the main graph into candidates and excluded ones.

    A node is excluded, each with its reason, when

    1. the user's `exclude` matches its name, a weight's, or a module around it,
    2. its operator has no row in the table, or the row refuses it,
    3. its activations are not float32, or its weight is computed at run time,
    4. it stands in the model's tail (`tail.py`): decode arithmetic (boxes, scores, Softmax), where int8 costs most and
       saves least.

    Nodes inside the bodies of If, Loop and Scan stay float and are not listed one by one.

    Args:
        model: The float model.
        exclude: The user's globs.
        kept_float: Names of further nodes that stay float, with reasons.
    """
    kept_float = kept_float or {}
    excluded: dict[str, str] = {}
    rows: dict[ir.Node, QuantRow] = {}
    for node in model.graph:
        kept_reason = kept_float.get(node.name or "")
        reason, row = _sort_node(node, exclude) if kept_reason is None else (kept_reason, None)
        if row is None:
            excluded[node.name or ""] = reason
        else:
            rows[node] = row
    absorbed_by: dict[ir.Node, ir.Node] = {}
    for node in rows:
        activation = absorbed_activation(node, kept_apart=excluded)
        if activation is not None:
            absorbed_by[activation] = node
    tail = find_tail(model, rows, absorbed_by)
    excluded.update({node.name or "": reason for node, reason in tail.reasons.items()})
    absorbs = {producer: activation for activation, producer in absorbed_by.items() if producer not in tail.reasons}
    nodes = tuple(
        Candidate(
            node=node,
            row=row,
            weight=weight_input(node, row),
            absorbed=absorbs.get(node),
        )
        for node, row in rows.items()
        if node not in tail.reasons and absorbed_by.get(node) not in absorbs
    )
    return Candidates(
        nodes=nodes,
        excluded_nodes=excluded,
        last_layers=tuple(item for item in nodes if item.node in tail.last_layers),
        tail=tail.nodes,
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
    if stored_constant(next(iter(activation_outputs(node, row)), None)) is not None:
        return "it turns or reshapes a constant, no activation", None
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
