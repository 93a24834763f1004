"""Stage 1: a canonical ONNX model becomes a TFLite graph, operator by operator, with ONNX's axes.

A node that can't be expressed does not end the work: its outputs are taken as given, so that one error can name all
such nodes, before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from onnxprune.errors import TargetError, quoted_list
from onnxprune.graph.inference import captured_values
from onnxprune.targets.tflite.build import COMPUTED_AS, Builder, UnsupportedError
from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.elements import Element, Elements, evaluate
from onnxprune.targets.tflite.graph import (
    NUMPY_TYPES,
    Constant,
    Graph,
    Grid,
    Model,
    Quantization,
    Shape,
    Tensor,
    TensorType,
)
from onnxprune.targets.tflite.ops import TFLITE, load_emitters
from onnxprune.targets.tflite.ops.impossible import REASONS
from onnxprune.targets.tflite.ops.table import TYPES, NodeView
from onnxprune.targets.tflite.patterns import find_fused

__all__ = ["Unsupported", "lower", "unsupported_error", "unsupported_nodes"]

# Half-precision constants are computed with as float32, and still stored in half precision.
_GRIDS: Mapping[TensorType, Grid] = {
    "FLOAT16": Grid(type="FLOAT16", quantization=Quantization(scales=(1.0,), zero_points=(0,)))
}
# Integers of fewer bits are constants only; DequantizeLinear makes them real.
_WIDENED: Mapping[ir.DataType, TensorType] = {ir.DataType.INT4: "INT8", ir.DataType.UINT4: "UINT8"}
# Of strings, emitters know comparisons only.
_TAKE_STRINGS = ("Equal", "Identity")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsupported:
    """A node that TFLite can't express, and why."""

    node: str
    op_type: str
    reason: str


def lower(model: ir.Model) -> Model:
    """The TFLite graph of `model` (canonical, or its QDQ spelling), with explicit transpositions.

    Raises:
        TargetError: Nodes can't be expressed; the message names all of them with the reasons.
    """
    lowered, problems = _lowered(model)
    if problems:
        raise unsupported_error(problems)
    return lowered


def unsupported_nodes(model: ir.Model) -> tuple[Unsupported, ...]:
    """Every node of `model` that TFLite can't express, in graph order."""
    return _lowered(model)[1]


def unsupported_error(problems: Sequence[Unsupported]) -> TargetError:
    """The error that names all of them."""
    return TargetError(_message(problems), "Run `onnxprune ops --target tflite` to see what can be expressed.")


def _message(problems: Sequence[Unsupported]) -> str:
    """One line for each operator and reason, with its nodes."""
    groups: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        groups.setdefault((problem.op_type, problem.reason), []).append(problem.node)
    lines = [f"  {op_type} {quoted_list(nodes)}: {reason}" for (op_type, reason), nodes in groups.items()]
    count = "1 node" if len(problems) == 1 else f"{len(problems)} nodes"
    return "\n".join([f"TFLite can't express {count} of this model:", *lines])


def _lowered(model: ir.Model) -> tuple[Model, tuple[Unsupported, ...]]:
    load_emitters()
    graphs: list[Graph | None] = []
    problems: list[Unsupported] = []
    _GraphLowering(model.graph.name or "main", graphs, problems).lower(model.graph)
    done = tuple(graph for graph in graphs if graph is not None)
    return (
        Model(
            graphs=done,
            input_names=tuple(value.name or "" for value in model.graph.inputs),
            output_names=tuple(value.name or "" for value in model.graph.outputs),
        ),
        tuple(problems),
    )


class _GraphLowering:
    """Lowers one graph; the bodies of IF and WHILE get a lowering of their own, with the same list of graphs.

    Is the `Scope` and the `Body` that emitters of control flow work with.
    """

    def __init__(
        self,
        name: str,
        graphs: list[Graph | None],
        problems: list[Unsupported],
        outer: _GraphLowering | None = None,
    ) -> None:
        self.name = name
        self.graphs = graphs
        """All graphs of the model, in which bodies of IF and WHILE get their index; None for one under way."""
        self.problems = problems
        self.outer = outer
        self.build = Builder()
        self.known: dict[ir.Value, Tensor] = {}
        self.bound: set[str] = set()
        """Names of tensors that stand for a value already."""
        self.lost: set[ir.Value] = set()
        """Values behind a node that can't be expressed, of which nothing is known: their readers can't be judged."""
        self.inputs: list[str] = []
        self._marks = len(graphs), len(problems)
        graphs.append(None)

    def lower(self, graph: ir.Graph) -> None:
        """The main graph, with the inputs and outputs of the ONNX graph."""
        self._reserve(graph)
        for value in graph.inputs:
            self._feed(value)
        for node in graph:
            self._emit(node)
        self.finish([self._result(value, position) for position, value in enumerate(graph.outputs)])

    # --- what emitters of control flow ask for --------------------------------------------------------------

    def captured(self, node: ir.Node) -> dict[ir.Value, Tensor]:
        """Computed values that the graphs of `node` use from outside."""
        used = {value: self._tensor(value) for value in captured_values(node)}
        if any(tensor.type == "STRING" for tensor in used.values()):
            raise UnsupportedError("its graphs use a tensor of strings from outside")
        return {value: tensor for value, tensor in used.items() if tensor.constant is None}

    def nodes(self, graph: ir.Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Emit the nodes of a graph whose inputs are `inputs`; gives its outputs."""
        node = self.build.node
        self._reserve(graph)
        self.known.update(zip(graph.inputs, inputs, strict=True))
        self.bound.update(tensor.name for tensor in inputs)
        for inner in graph:
            self._emit(inner)
        self.build.node = node
        if not self.lost.isdisjoint(graph.outputs):
            raise UnsupportedError("a result of its body comes from a node that can't be expressed")
        return [self._tensor(value) for value in graph.outputs]

    def body(self, name: str) -> _GraphLowering:
        """A new graph."""
        made = _GraphLowering(name, self.graphs, self.problems, self)
        made.build.node = self.build.node
        return made

    def input(self, like: Tensor, shape: Shape) -> Tensor:
        """A new input of the type of `like`."""
        made = self.build.add(Tensor(name=self.build.name(like.name), type=like.type, shape=shape))
        self.inputs.append(made.name)
        self.bound.add(made.name)
        return made

    def capture(self, values: Iterable[ir.Value]) -> list[Tensor]:
        """New inputs for values of the graphs around this one."""
        captured: list[Tensor] = []
        for value in values:
            tensor = self._from_outside(value)
            self.known[value] = self.input(tensor, tensor.shape)
            elements = None if self.outer is None else self.outer.build.known_elements(tensor)
            if elements is not None:
                self.build.note_elements(self.known[value], elements)
            if self.outer is not None and value in self.outer.lost:
                self.lost.add(value)
            captured.append(self.known[value])
        return captured

    def finish(self, outputs: Sequence[Tensor]) -> int:
        """The index of the graph in the model. Operators that nobody reads are gone: shapes that became known."""
        index = self._marks[0]
        graph = Graph(
            name=self.name,
            tensors=dict(self.build.tensors),
            operators=tuple(self.build.operators),
            inputs=tuple(self.inputs),
            outputs=tuple(tensor.name for tensor in outputs),
            values=frozenset(value.name for value in self.known if value.name),
        )
        self.graphs[index] = Editor(graph).graph()
        return index

    def discard(self) -> None:
        """Forget the graph, and those that were made since."""
        graphs, problems = self._marks
        del self.graphs[graphs:]
        del self.problems[problems:]

    def lengths(self, value: ir.Value) -> tuple[Element, ...] | None:
        """The lengths of its axes; a name for one that only the run knows."""
        tensor = self.known.get(value)
        if value.shape is None:
            dims: tuple[int, ...] | None = None if tensor is None else tensor.shape
            names: list[str | None] = [] if dims is None else [None] * len(dims)
        else:
            dims = self._shape(value) if tensor is None else tensor.shape
            names = [None if isinstance(dim, int) else dim.value for dim in value.shape]
        if dims is None:
            return None
        return tuple(
            dim if dim >= 0 else (name or f"axis {axis} of '{value.name}'")
            for axis, (dim, name) in enumerate(zip(dims, names, strict=True))
        )

    # --- values and nodes -----------------------------------------------------------------------------------

    def _reserve(self, graph: ir.Graph) -> None:
        values = (*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs))
        self.build.reserve([value.name for value in values if value.name])

    def _feed(self, value: ir.Value) -> None:
        self.build.node = name = value.name or ""
        self.inputs.append(name)
        try:
            tensor = self.build.add(Tensor(name=name, type=self._type(value), shape=self._shape(value)))
        except UnsupportedError as error:
            self.problems.append(Unsupported(node=name, op_type="input", reason=str(error)))
            tensor = self._placeholder(value)
        self.known[value] = self.build.cast(tensor, COMPUTED_AS.get(tensor.type, tensor.type))
        self.bound.update((tensor.name, self.known[value].name))

    def _result(self, value: ir.Value, position: int) -> Tensor:
        """The tensor that leaves the graph as `value`: computed, of its own, and of the declared type."""
        tensor = self._tensor(value)
        self.build.node = value.name or ""
        try:
            wanted = self._type(value) if value.dtype is not None else tensor.type
            if 0 in tensor.shape:
                raise UnsupportedError("it has no elements, and LiteRT's interpreter refuses to hand such a tensor out")
        except UnsupportedError as error:
            self.problems.append(Unsupported(node=value.name or "", op_type="output", reason=str(error)))
            wanted = tensor.type
        tensor = self.build.cast(tensor, wanted)
        is_computed = self.build.producer(tensor) is not None or tensor.name in self.inputs
        if not is_computed or tensor.name != value.name:
            name = value.name or f"output_{position}"
            if tensor.constant is not None:
                # The name is the output's now.
                tensor = self.build.constant_tensor(tensor.constant, name=f"{name}/constant")
            tensor = self.build.renamed(self.build.copied(tensor), name)
        return tensor

    def _emit(self, node: ir.Node) -> None:
        self.build.node = node.name or ""
        rollback = len(self.build.operators)
        if not self.lost.isdisjoint(node.inputs):
            for value in node.outputs:
                self.known[value] = self._placeholder(value)
            return
        try:
            inputs = tuple(None if value is None else self._tensor(value) for value in node.inputs)
            known = tuple(None if tensor is None else self.build.known_elements(tensor) for tensor in inputs)
            elements = evaluate(node, known, self.lengths)
            if elements is not None and elements.is_complete:
                (value,) = node.outputs
                self.known[value] = self._number(elements, value)
                return
            for value, tensor in zip(node.outputs, self._emitted(node, inputs, known), strict=False):
                if tensor is not None:
                    self._bind(value, tensor)
            if elements is not None:
                self.build.note_elements(self.known[node.outputs[0]], elements)
        except UnsupportedError as error:
            self.build.take_back(rollback)
            self.problems.append(Unsupported(node=node.name or "", op_type=node.op_type, reason=str(error)))
            for value in node.outputs:
                self.known[value] = self._placeholder(value)

    def _emitted(
        self, node: ir.Node, inputs: tuple[Tensor | None, ...], known: tuple[Elements | None, ...]
    ) -> Sequence[Tensor | None]:
        fused = find_fused(node)
        # None in a body where only a graph around it knows the value.
        data = None if fused is None else self.known.get(fused.data)
        if fused is not None and data is not None and data.type == "FLOAT32":
            return self.build.ops(fused.kind, [data], outputs=[(data.shape, data.type)], **fused.options)
        emitter = TFLITE.get(node)
        if emitter is None:
            raise UnsupportedError(REASONS.get(node.op_type, "there is no way to emit this operator"))
        if node.op_type not in _TAKE_STRINGS and any(tensor and tensor.type == "STRING" for tensor in inputs):
            raise UnsupportedError("its input is a tensor of strings, which can only be compared for equality")
        emitted = emitter(NodeView(node=node, inputs=inputs, scope=self, known=known), self.build)
        return [emitted] if isinstance(emitted, Tensor) else list(emitted)

    def _number(self, elements: Elements, value: ir.Value) -> Tensor:
        """A constant that inference has worked out."""
        type_ = self._type(value)
        return self.build.constant(elements.numbers(NUMPY_TYPES[type_]), type_)

    def _placeholder(self, value: ir.Value) -> Tensor:
        """Stands for what can't be expressed, so that the nodes behind it are looked at too."""
        if value.shape is None:
            self.lost.add(value)
        shape = () if value.shape is None else self._shape(value)
        self.bound.add(value.name or "")
        return self.build.add(Tensor(name=value.name or "", type=self._type_or_float(value), shape=shape))

    def _bind(self, value: ir.Value, tensor: Tensor) -> None:
        """Make `tensor` stand for `value`; what an emitter has just computed takes the value's name."""
        is_new = tensor.constant is None and tensor.name not in self.bound
        shape = self._shape(value) if value.shape is not None else tensor.shape
        if len(shape) != tensor.rank or any(
            one >= 0 and other >= 0 and one != other for one, other in zip(shape, tensor.shape, strict=True)
        ):
            raise ValueError(f"'{value.name}' has shape {shape}, and its emitter gave {tensor.shape}")
        if is_new:
            # What shape inference knows and the emitter does not, or the other way round.
            merged = tuple(max(one, other) for one, other in zip(shape, tensor.shape, strict=True))
            # A result that is computed in another type than it leaves the graph in keeps its name for the latter.
            is_cast_later = value.is_graph_output() and value.dtype is not None and self._type(value) != tensor.type
            name = tensor.name if is_cast_later else value.name or ""
            tensor = self.build.renamed(replace(tensor, shape=merged), name)
        self.known[value] = tensor
        self.bound.add(tensor.name)

    def _tensor(self, value: ir.Value) -> Tensor:
        found = self.known.get(value)
        if found is None:
            found = self.known[value] = self._constant(value)
        return found

    def _from_outside(self, value: ir.Value) -> Tensor:
        if self.outer is None:
            raise UnsupportedError(f"its input '{value.name}' has no value")
        return self.outer._tensor(value)  # noqa: SLF001 - of the same class

    def _constant(self, value: ir.Value) -> Tensor:
        stored = value.const_value
        if stored is None:
            tensor = self._from_outside(value)
            if tensor.constant is None:
                raise UnsupportedError(f"its input '{value.name}' has no value")
            return self.build.constant_tensor(tensor.constant, name=tensor.name)
        type_ = TYPES.get(stored.dtype) or _WIDENED.get(stored.dtype)
        if type_ == "STRING":
            raise UnsupportedError(f"its input '{value.name}' is a constant of strings")
        if type_ is None:
            raise UnsupportedError(f"TFLite has no tensors of {stored.dtype.name}, as '{value.name}' is")
        computed = COMPUTED_AS.get(type_, type_)
        shape = tuple(stored.shape.numpy())
        dtype = NUMPY_TYPES[computed]
        constant = Constant(
            shape, dtype, lambda: stored.numpy().astype(dtype, copy=False).reshape(shape), _GRIDS.get(type_)
        )
        return self.build.add(
            Tensor(name=value.name or self.build.name("constant"), type=computed, shape=shape, constant=constant)
        )

    def _type(self, value: ir.Value) -> TensorType:
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            kind = "an optional" if isinstance(value.type, ir.OptionalType) else "a sequence"
            raise UnsupportedError(f"'{value.name}' is {kind}, and TFLite has tensors only")
        type_ = TYPES.get(value.dtype) if value.dtype is not None else None
        if type_ is None:
            elements = "unknown type" if value.dtype is None else f"type {value.dtype.name}"
            raise UnsupportedError(f"'{value.name}' has elements of {elements}, which this target does not write")
        return type_

    def _type_or_float(self, value: ir.Value) -> TensorType:
        type_ = TYPES.get(value.dtype, "FLOAT32") if value.dtype is not None else "FLOAT32"
        return COMPUTED_AS.get(type_, type_)

    def _shape(self, value: ir.Value) -> Shape:
        if value.shape is None:
            raise UnsupportedError(f"the number of axes of '{value.name}' is not known")
        return tuple(dim if isinstance(dim, int) else -1 for dim in value.shape)
