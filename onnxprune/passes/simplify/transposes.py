"""Transposes that cancel.

Notation: Transpose(p) makes axis k of its result from axis p[k] of its input, so Transpose(q) after Transpose(p) is
Transpose(r) with r[k] = p[q[k]].

1. Two in a row are one, and none where they cancel:

    x (1,8,4,4) -> Transpose(0,2,3,1) -> Transpose(0,3,1,2) -> y   =>   x -> y

2. A region of element-wise nodes computes the same in any order of the axes. It is moved to the other side of the
   Transposes at its border where fewer of them are left then:

    x (1,8,4,4) -> Transpose(0,2,3,1) -> Relu -> Add -> Transpose(0,3,1,2) -> y      =>   x -> Relu -> Add -> y
                      x' (1,8,4,4) -> Transpose(0,2,3,1) ---^                        x' ---------------^

   Constants of the region are transposed, scalars stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxprune.graph.names import UniqueNames
from onnxprune.graph.weights import add_initializer, constant_array
from onnxprune.passes.simplify.edits import attribute_ints, bypass, is_standard

__all__ = ["cancel_transposes"]

Axes = tuple[int, ...]

# Operators that work on each element by itself and broadcast their inputs; no attribute of theirs names an axis.
_ELEMENTWISE = frozenset(
    {
        *("Abs", "Add", "Ceil", "Celu", "Clip", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater"),
        *(
            "GreaterOrEqual",
            "HardSigmoid",
            "HardSwish",
            "LeakyRelu",
            "Less",
            "LessOrEqual",
            "Log",
            "Max",
            "Min",
            "Mish",
        ),
        *(
            "Mul",
            "Neg",
            "Not",
            "And",
            "Or",
            "Pow",
            "PRelu",
            "Reciprocal",
            "Relu",
            "Round",
            "Selu",
            "Sigmoid",
            "Sign",
            "Softplus",
        ),
        *("Softsign", "Sqrt", "Sub", "Sum", "Tanh", "ThresholdedRelu", "Where", "Cast", "Sin", "Cos"),
    }
)


def cancel_transposes(model: ir.Model) -> int:
    """No two Transposes are left that cancel, next to each other or across element-wise nodes.

    Not done: across nodes whose ranks differ or are unknown (broadcasting aligns them at the last axis), and for a
    region that leaves the graph it is in.

    Returns:
        How many Transposes went.
    """
    before = _count(model)
    names = UniqueNames.of_values(model)
    for node in list(model.graph.all_nodes()):
        if node.graph is not None and is_standard(node, "Transpose"):
            _merge_with_previous(node)
    for region in _regions(model):
        _move(region, names)
    return before - _count(model)


def _count(model: ir.Model) -> int:
    return sum(is_standard(node, "Transpose") for node in model.graph.all_nodes())


def _axes(node: ir.Node) -> Axes:
    """The permutation; without the attribute the axes are reversed."""
    given = attribute_ints(node, "perm", ())
    value = node.inputs[0]
    if given or value is None or value.shape is None:
        return given
    return tuple(reversed(range(value.shape.rank())))


def _inverse(axes: Axes) -> Axes:
    return tuple(int(axis) for axis in np.argsort(axes))


def _merge_with_previous(node: ir.Node) -> None:
    """Let a Transpose read what the Transpose before it reads."""
    value = node.inputs[0]
    previous = value.producer() if value is not None else None
    if value is None or previous is None or previous.graph is not node.graph or not is_standard(previous, "Transpose"):
        return
    source, first, second = previous.inputs[0], _axes(previous), _axes(node)
    if source is None or len(first) != len(second):
        return
    merged = tuple(first[axis] for axis in second)
    if merged == tuple(range(len(merged))):
        if not bypass(node, source):
            return
    else:
        node.replace_input_with(0, source)
        node.attributes["perm"] = ir.AttrInt64s("perm", merged)
    if not value.uses() and not value.is_graph_output() and previous.graph is not None:
        previous.graph.remove(previous, safe=True)


# --- regions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Region:
    """Connected element-wise nodes of one graph, and the values at their border.

    `inputs` come in from other nodes, `constants` are initializers of more than one element, `outputs` leave.
    """

    graph: ir.Graph
    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    constants: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    rank: int


def _regions(model: ir.Model) -> Iterator[_Region]:
    seen: set[ir.Node] = set()
    for node in list(model.graph.all_nodes()):
        # A region without a Transpose at its border is never worth moving: start at one.
        if node.graph is None or not is_standard(node, "Transpose"):
            continue
        for neighbour in (
            *(value.producer() for value in node.inputs if value is not None),
            *node.outputs[0].consumers(),
        ):
            if neighbour is not None and neighbour not in seen and neighbour.graph is node.graph:
                region = _grow(neighbour)
                if region is not None:
                    seen.update(region.nodes)
                    yield region


def _is_elementwise(node: ir.Node | None, rank: int, graph: ir.Graph | ir.Function | None) -> bool:
    """True when every input is a constant or of `rank`, so that moving the axes moves them all alike."""
    if node is None or node.graph is not graph or node.op_type not in _ELEMENTWISE:
        return False
    if not is_standard(node, node.op_type) or len(node.outputs) != 1:
        return False
    return _rank(node.outputs[0]) == rank and all(
        value is None or _rank(value) == rank or value.const_value is not None for value in node.inputs
    )


def _rank(value: ir.Value) -> int | None:
    return value.shape.rank() if value.shape is not None else None


def _grow(start: ir.Node) -> _Region | None:
    """The largest region around `start`, or None where `start` is not element-wise."""
    rank = _rank(start.outputs[0]) if len(start.outputs) == 1 else None
    graph = start.graph
    if rank is None or not isinstance(graph, ir.Graph) or not _is_elementwise(start, rank, graph):
        return None
    nodes: dict[ir.Node, None] = {start: None}
    waiting = [start]
    while waiting:
        node = waiting.pop()
        producers = (value.producer() for value in node.inputs if value is not None)
        for neighbour in (*producers, *node.outputs[0].consumers()):
            if neighbour is not None and neighbour not in nodes and _is_elementwise(neighbour, rank, graph):
                nodes[neighbour] = None
                waiting.append(neighbour)
    read = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None)
    made = [node.outputs[0] for node in nodes]
    outside = [value for value in read if value.producer() not in nodes]
    return _Region(
        graph=graph,
        nodes=tuple(nodes),
        inputs=tuple(value for value in outside if value.const_value is None),
        constants=tuple(value for value in outside if value.const_value is not None and value.const_value.size > 1),
        outputs=tuple(
            value
            for value in made
            if value.is_graph_output() or any(reader not in nodes for reader in value.consumers())
        ),
        rank=rank,
    )


def _move(region: _Region, names: UniqueNames) -> None:
    """Compute `region` in the axis order that needs the fewest Transposes at its border."""
    incoming = Counter(
        _axes(producer)
        for value in region.inputs
        if (producer := value.producer()) is not None and is_standard(producer, "Transpose")
    )
    outgoing = Counter(
        _inverse(_axes(reader))
        for value in region.outputs
        for reader in value.consumers()
        if is_standard(reader, "Transpose") and reader.graph is region.graph
    )
    candidates = sorted((incoming + outgoing).items(), key=lambda item: (-item[1], item[0]))
    for axes, _ in candidates:
        if len(axes) == region.rank and _saved(region, axes) > 0:
            _move_across(region, axes, names)
            return


def _transpose_before(value: ir.Value) -> ir.Node | None:
    producer = value.producer()
    return producer if is_standard(producer, "Transpose") else None


def _transposes_after(region: _Region, value: ir.Value, axes: Axes) -> list[ir.Node]:
    """Readers of `value` that take back Transpose(`axes`)."""
    return [
        reader
        for reader in value.consumers()
        if is_standard(reader, "Transpose") and reader.graph is region.graph and _axes(reader) == _inverse(axes)
    ]


def _saved(region: _Region, axes: Axes) -> int:
    """Transposes fewer when `region` computes what came before Transpose(`axes`)."""
    inside = set(region.nodes)
    saved = 0
    for value in region.inputs:
        transpose = _transpose_before(value)
        leaves_region = value.is_graph_output() or any(reader not in inside for reader in value.consumers())
        if transpose is None:
            saved -= 1
        elif _axes(transpose) == axes:
            saved += 0 if leaves_region else 1
        else:
            saved -= 1 if leaves_region else 0  # merged with the one that has to be added
    for value in region.outputs:
        saved += len(_transposes_after(region, value, axes))
        others = [reader for reader in value.consumers() if reader not in inside]
        if value.is_graph_output() or any(
            not is_standard(reader, "Transpose") or reader.graph is not region.graph for reader in others
        ):
            saved -= 1
    return saved


def _move_across(region: _Region, axes: Axes, names: UniqueNames) -> None:
    """Let `region` compute v' with v = Transpose(`axes`)(v') in the place of every v."""
    inside = set(region.nodes)
    replacements: dict[ir.Value, ir.Value] = {}
    for value in region.inputs:
        transpose = _transpose_before(value)
        source = transpose.inputs[0] if transpose is not None and _axes(transpose) == axes else None
        replacements[value] = source or _add_transpose(region, value, _inverse(axes), names)
    for value in region.constants:
        replacements[value] = _transposed_constant(region, value, _inverse(axes), names)
    for node in region.nodes:
        for position, read in enumerate(node.inputs):
            if read in replacements:
                node.replace_input_with(position, replacements[read])
        made = node.outputs[0]
        if made.shape is not None:
            made.shape = ir.Shape([made.shape[axis] for axis in _inverse(axes)])
    for value in region.outputs:
        _restore_order(region, value, axes, inside, names)
    for value in region.inputs:
        transpose = _transpose_before(value)
        if transpose is not None and not value.uses() and not value.is_graph_output():
            region.graph.remove(transpose, safe=True)


def _restore_order(region: _Region, value: ir.Value, axes: Axes, inside: set[ir.Node], names: UniqueNames) -> None:
    """Give the readers of `value` outside the region what they read before."""
    cancelled = _transposes_after(region, value, axes)
    others = [use for use in value.uses() if use.node not in inside and use.node not in cancelled]
    is_output = value.is_graph_output()
    if others or is_output:
        restored = _add_transpose(region, value, axes, names)
        for use in others:
            use.node.replace_input_with(use.idx, restored)
        if is_output:
            value.name, restored.name = restored.name, value.name
            outputs = region.graph.outputs
            for position, output in enumerate(outputs):
                if output is value:
                    outputs[position] = restored
        for use in others:
            if use.node.graph is region.graph and is_standard(use.node, "Transpose"):
                _merge_with_previous(use.node)
    for transpose in cancelled:
        if not bypass(transpose, value):
            # Its result is an output, and so is another's: it stays, and turns what is there now.
            transpose.attributes["perm"] = ir.AttrInt64s("perm", range(region.rank))


def _add_transpose(region: _Region, value: ir.Value, axes: Axes, names: UniqueNames) -> ir.Value:
    """A new Transpose of `value`, right after what makes it; its result."""
    stem = value.name or "value"
    node = ir.Node(
        "",
        "Transpose",
        [value],
        [ir.AttrInt64s("perm", axes)],
        num_outputs=1,
        name=names.claim(f"{stem}.transpose"),
    )
    result = node.outputs[0]
    result.name = names.claim(f"{stem}.transposed")
    result.type = value.type
    if value.shape is not None:
        result.shape = ir.Shape([value.shape[axis] for axis in axes])
    producer = value.producer()
    neighbour = producer or next(iter(value.consumers()))
    node.metadata_props.update(neighbour.metadata_props)
    if producer is not None and producer.graph is region.graph:
        region.graph.insert_after(producer, node)
    else:
        region.graph.insert_before(region.graph[0], node)
    return result


def _transposed_constant(region: _Region, value: ir.Value, axes: Axes, names: UniqueNames) -> ir.Value:
    array = constant_array(value)
    if array is None:
        return value
    # Broadcasting aligns at the last axis: a constant of lower rank has leading axes of size 1.
    full = array.reshape((1,) * (region.rank - array.ndim) + array.shape)
    return add_initializer(region.graph, value.name or "constant", np.ascontiguousarray(full.transpose(axes)), names)
