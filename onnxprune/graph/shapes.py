"""Shapes that are true: cleared and inferred anew after every change.

Where a shape comes from, in this order:

1. ONNX's own inference;
2. for operators that ONNX does not define, or can't infer, a rule of the caller's table, and after them ONNX again;
3. `edited`: what the caller knows;
4. the shape that the value had before, if the node still gets the same inputs. Each node with such a shape remembers
   what it got (`_BASIS`), so that a shape can't silently outlive the inputs it was true for.

A value that had a shape and gets none by these is an error after a pass, and of unknown rank in a source model.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import onnx
import onnx_ir as ir

from onnxprune.errors import ModelError, UsageError, VerificationError, did_you_mean, quoted_list
from onnxprune.graph.inference import Contradiction, ValueType, captured_values, infer_types, is_defined_by_onnx
from onnxprune.graph.names import printable

__all__ = [
    "ShapeRule",
    "ShapeRules",
    "confirm_shapes",
    "fix_input_shapes",
    "infer_source_shapes",
    "refresh_shapes",
    "values_beyond_inference",
]

ShapeRule = Callable[[ir.Node], Sequence[tuple[ir.DataType | None, ir.Shape | None]]]
"""For an operator that ONNX can't infer: element type and shape of each output."""


class ShapeRules(Protocol):
    """Looks a shape rule up (`onnxprune.ops.shapes.SHAPES` is one); None: unknown operator."""

    def get(self, node: ir.Node) -> ShapeRule | None:
        """The rule for `node`, or None: unknown."""
        ...


class _Strictness(enum.Enum):
    EDITED = "a pass must leave no contradiction and lose no shape"
    SOURCE = "a contradiction is the model's fault; a shape that can't be confirmed is dropped"
    REBOUND = "inputs changed on purpose: what can't be derived again is dropped"


_BASIS = "onnxprune.shape_basis"
_INFERRED = ()
_DISPUTED = "onnxprune.inference_disputed"
_SMALL_CONSTANT_BYTES = 1024


def refresh_shapes(model: ir.Model, rules: ShapeRules, *, edited: Mapping[ir.Value, ir.Shape] | None = None) -> None:
    """Infer the type and shape of every value anew from the graph inputs and the initializers.

    Args:
        model: Canonical names; weights may have changed in any way.
        rules: For operators that ONNX does not define.
        edited: Shapes that the caller changed and knows; used only where neither ONNX nor a rule says anything.

    Raises:
        VerificationError: Nodes contradict each other, or a value's old shape is out of date and nothing says the new
            one. Both are mistakes of whoever changed the graph.
    """
    _refresh(model, rules, edited or {}, _Strictness.EDITED)


def infer_source_shapes(model: ir.Model, rules: ShapeRules) -> None:
    """Infer all types and shapes of a model that comes from outside.

    Raises:
        ModelError: Nodes contradict each other; ONNX Runtime would refuse the model too.
    """
    _refresh(model, rules, {}, _Strictness.SOURCE)


def fix_input_shapes(model: ir.Model, shapes: Mapping[str, Sequence[int]], rules: ShapeRules) -> None:
    """Give graph inputs static shapes; dimensions of the same name become the same number everywhere.

    Shapes behind them are inferred anew, but nodes that compute shapes stay: canonicalize (again) afterwards to fold
    them.

    Raises:
        UsageError: An input does not exist, or a shape does not fit what the model declares.
    """
    inputs = {value.name or "": value for value in model.graph.inputs}
    bindings: dict[str, int] = {}
    for name, wanted in shapes.items():
        if name not in inputs:
            raise UsageError(f"The model has no input '{printable(name)}'.", did_you_mean(name, sorted(inputs)))
        _bind(inputs[name], wanted, bindings)
    for name, wanted in shapes.items():
        inputs[name].shape = ir.Shape(wanted)
    for graph in model.graphs():
        for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
            if value.shape is not None:
                value.shape = _substituted(value.shape, bindings)
    _refresh(model, rules, {}, _Strictness.REBOUND)


def _bind(value: ir.Value, wanted: Sequence[int], bindings: dict[str, int]) -> None:
    declared = value.shape
    text = f"--shape {value.name}={','.join(map(str, wanted))}"
    if any(size < 0 for size in wanted):
        raise UsageError(f"{text}: a size can't be negative.")
    if declared is None:
        return
    if len(declared) != len(wanted):
        raise UsageError(
            f"{text}: the model declares {len(declared)} dimensions for it, {declared}, and not {len(wanted)}."
        )
    for axis, (dim, size) in enumerate(zip(declared, wanted, strict=True)):
        if isinstance(dim, int) and dim != size:
            raise UsageError(f"{text}: the model declares {dim} for axis {axis}; a fixed size can't be changed.")
        name = dim.value if isinstance(dim, ir.SymbolicDim) else None
        if name is not None and bindings.setdefault(name, size) != size:
            raise UsageError(f"{text}: dimension '{name}' is {bindings[name]} in another place.")


def _substituted(shape: ir.Shape, bindings: Mapping[str, int]) -> ir.Shape:
    if not any(isinstance(dim, ir.SymbolicDim) and dim.value in bindings for dim in shape):
        return shape
    return ir.Shape([bindings.get(d.value, d) if isinstance(d, ir.SymbolicDim) and d.value else d for d in shape])


def values_beyond_inference(model: ir.Model) -> frozenset[ir.Value]:
    """The inner values about which the model knows more than ONNX's inference finds by itself.

    These must be told in a file; everything else any reader derives again.
    """
    opsets = model.opset_imports
    undefined = {
        value: ValueType(value.type, value.shape)
        for node in model.graph.all_nodes()
        if not is_defined_by_onnx(node, opsets)
        for value in node.outputs
    }
    inferred = infer_types(model, model.graph, undefined, collect_errors=False).types
    beyond = set(undefined)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            found = inferred.get(value)
            if found is None or found.type is None or _knows_more(value.shape, found.shape):
                beyond.add(value)
    return frozenset(beyond)


def _knows_more(ours: ir.Shape | None, found: ir.Shape | None) -> bool:
    if ours is None:
        return False
    if found is None or len(found) != len(ours):
        return True
    return any(our != its and not _is_unknown(our) for our, its in zip(ours, found, strict=True))


# --- refreshing -------------------------------------------------------------------------------------------------


def _refresh(model: ir.Model, rules: ShapeRules, edited: Mapping[ir.Value, ir.Shape], strictness: _Strictness) -> None:
    for graph in model.graphs():
        if graph is not model.graph:
            # Operator tables look versions up in the node's own graph.
            graph.opset_imports.update(model.opset_imports)
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.shape = ir.Shape(value.const_value.shape.numpy())
                value.type = ir.TensorType(value.const_value.dtype)
    sweep = _Sweep(model, rules, edited)
    sweep.run()
    _refuse_contradictions(model, sweep.contradictions, strictness)
    if sweep.stale and strictness is _Strictness.EDITED:
        described = [f"{printable(value.name or '')} ({_producer(value)})" for value in sweep.stale]
        raise VerificationError(
            f"The shapes of {quoted_list(described)} are out of date and can't be inferred again: the inputs of these "
            "nodes changed, and neither ONNX nor a shape rule knows the operator's output.",
            "Add a rule to onnxprune/ops/shapes.py, or pass the new shape as `edited`.",
        )


def _producer(value: ir.Value) -> str:
    node = value.producer()
    return "no producer" if node is None else f"output of {node.domain or 'ai.onnx'}::{node.op_type}"


def _refuse_contradictions(model: ir.Model, contradictions: Sequence[Contradiction], strictness: _Strictness) -> None:
    """Raise for contradictions, but for those of operators that ONNX infers through a function body.

    Some bodies are written for older opsets, and inference through them fails for valid nodes. Such a node is marked
    when it comes from outside, so that a pass is not blamed for it.
    """
    serious: list[Contradiction] = []
    nodes = {node.name: node for node in model.graph.all_nodes()} if contradictions else {}
    for found in contradictions:
        node = nodes.get(found.node)
        if node is not None and any(value is not None and value.type is None for value in node.inputs):
            # Behind an operator that nothing knows; that its type is missing is no contradiction.
            continue
        if node is not None and (strictness is _Strictness.SOURCE and _has_body(node, model.opset_imports)):
            node.meta[_DISPUTED] = True
        if node is None or not node.meta.get(_DISPUTED):
            serious.append(found)
    if not serious:
        return
    shown = "; ".join(f"'{printable(found.node)}': {printable(found.text)}" for found in serious[:3])
    more = f" and {len(serious) - 3} more" if len(serious) > 3 else ""
    if strictness is _Strictness.EDITED:
        raise VerificationError(f"Shape inference finds contradictions in the graph: {shown}{more}.")
    if strictness is _Strictness.REBOUND:
        raise UsageError(f"The model can't work with the given input shapes: {shown}{more}.")
    raise ModelError(
        f"Nodes of the model contradict each other: {shown}{more}.",
        "ONNX Runtime refuses such a model as well; export it again.",
    )


def _has_body(node: ir.Node, opset_imports: Mapping[str, int]) -> bool:
    domain = "" if node.domain == "ai.onnx" else node.domain
    schema = onnx.defs.get_schema(node.op_type, opset_imports.get(domain, 1), domain)
    # The type stubs of onnx miss these two.
    return bool(schema.has_function or schema.has_context_dependent_function)  # type: ignore[attr-defined]


class _Sweep:
    """One walk through the main graph: stretches of ONNX operators by ONNX, the nodes between them one by one."""

    def __init__(self, model: ir.Model, rules: ShapeRules, edited: Mapping[ir.Value, ir.Shape]) -> None:
        self._model = model
        self._rules = rules
        self._edited = edited
        self._old: dict[ir.Value, ir.Shape | None] = {}
        self._known: dict[ir.Value, ValueType] = {}
        self.contradictions: list[Contradiction] = []
        self.stale: list[ir.Value] = []

    def run(self) -> None:
        for node in self._model.graph.all_nodes():
            for value in node.outputs:
                self._old[value] = value.shape
                # Nothing old may be left where a rule or a basis reads it.
                value.shape = None
        num_foreign = 0
        stretch: list[ir.Node] = []
        for node in self._model.graph:
            # A rule for an operator that ONNX defines is there because ONNX's own inference fails on valid nodes.
            if is_defined_by_onnx(node, self._model.opset_imports) and self._rules.get(node) is None:
                stretch.append(node)
                continue
            num_foreign += 1
            self._settle_stretch(stretch)
            stretch = []
            self._settle(node, self._by_rule(node))
        self._settle_stretch(stretch)
        if num_foreign:
            self._look_across()
        self.stale = [value for value in self.stale if value.shape is None]

    def _settle_stretch(self, nodes: Sequence[ir.Node]) -> None:
        if not nodes:
            return
        inferred = infer_types(self._model, nodes, self._known, collect_errors=True)
        self.contradictions.extend(inferred.contradictions)
        for node in nodes:
            self._settle(node, inferred.types)

    def _by_rule(self, node: ir.Node) -> dict[ir.Value, ValueType]:
        rule = self._rules.get(node)
        if rule is None:
            return {}
        return {
            value: ValueType(None if dtype is None else ir.TensorType(dtype), shape)
            for value, (dtype, shape) in zip(node.outputs, rule(node), strict=False)
        }

    def _look_across(self) -> None:
        # A shape that is computed before a foreign operator and used behind it falls between two stretches.
        whole = infer_types(self._model, self._model.graph, self._known, collect_errors=False)
        for value, found in whole.types.items():
            if not _is_complete(value.shape) and found.shape is not None:
                value.shape = found.shape if value.shape is None else _merged(found.shape, value.shape)

    def _settle(self, node: ir.Node, types: Mapping[ir.Value, ValueType]) -> None:
        """Write types and shapes of the outputs of `node`, whose inputs are settled already."""
        for inner in _inner_nodes(node):
            self._settle(inner, types)
        kept = False
        for value in node.outputs:
            found = types.get(value, ValueType(None, None))
            value.type = found.type or value.type
            if isinstance(value.type, ir.SequenceType | ir.OptionalType):
                value.shape = self._old[value]
                continue
            shape = found.shape
            edited, old = self._edited.get(value), self._old[value]
            if not _is_complete(shape) and edited is not None:
                kept = True
                shape = edited if shape is None else _merged(shape, edited)
            if not _is_complete(shape) and edited is None and old is not None:
                if _basis_holds(node):
                    kept = True
                    shape = old if shape is None else _merged(shape, old)
                elif shape is None:
                    self.stale.append(value)
            if value.is_graph_output() and shape is not None and old is not None:
                shape = _with_declared_names(shape, old)
            value.shape = shape
            self._known[value] = ValueType(value.type, shape)
        node.meta[_BASIS] = _basis(node) if kept else _INFERRED


def confirm_shapes(node: ir.Node) -> None:
    """Say that an edit of `node` left the shapes of its outputs as they were (a bias added to a convolution, say)."""
    basis = node.meta.get(_BASIS)
    if basis is not None and basis != _INFERRED:
        node.meta[_BASIS] = _basis(node)


def _inner_nodes(node: ir.Node) -> list[ir.Node]:
    return [
        inner
        for attribute in node.attributes.values()
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) and not attribute.is_ref()
        for graph in ([attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs())
        for inner in graph
    ]


def _is_complete(shape: ir.Shape | None) -> bool:
    return shape is not None and not any(_is_unknown(dim) for dim in shape)


def _is_unknown(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and dim.value is None


def _merged(found: ir.Shape, old: ir.Shape) -> ir.Shape:
    """`found`, with its unknown dimensions taken from `old`."""
    if len(found) != len(old):
        return found
    return ir.Shape([before if _is_unknown(now) else now for now, before in zip(found, old, strict=True)])


def _with_declared_names(found: ir.Shape, declared: ir.Shape) -> ir.Shape:
    """`found`, with the names that the model's interface gives to dynamic dimensions."""
    if len(found) != len(declared):
        return found
    both = zip(found, declared, strict=True)
    return ir.Shape([d if isinstance(f, ir.SymbolicDim) and not isinstance(d, int) else f for f, d in both])


# --- what a kept shape was true for -----------------------------------------------------------------------------


def _basis_holds(node: ir.Node) -> bool:
    """True when `node` gets what it got when its outputs' shapes were kept the last time.

    Also true for a node that was never looked at: its shapes are what its maker says.
    """
    basis = node.meta.get(_BASIS)
    return basis is None or (basis != _INFERRED and basis == _basis(node))


def _basis(node: ir.Node) -> tuple[object, ...]:
    inputs = tuple(_fingerprint(value) for value in (*node.inputs, *captured_values(node)))
    attributes = tuple(
        (name, str(attribute.value))
        for name, attribute in sorted(node.attributes.items())
        if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    )
    return node.op_type, inputs, attributes


def _fingerprint(value: ir.Value | None) -> tuple[object, ...]:
    if value is None:
        return ()
    content = b""
    tensor = value.const_value if value.is_initializer() else None
    if tensor is not None and tensor.nbytes <= _SMALL_CONSTANT_BYTES and not isinstance(tensor, ir.StringTensor):
        content = tensor.tobytes()
    return str(value.type), str(value.shape), content
