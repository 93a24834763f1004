"""`TFLITE`: the table of emitters, and what an emitter sees of an ONNX node.

An emitter is a function of a `NodeView` and a `Builder` that gives the node's outputs: one tensor, or one for each
output in order (None for an output that nobody reads). It raises `UnsupportedError` with the reason where TFLite can't
express the node. *Unknown* means unsupported: the run ends with an error that names all such nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.ops.table import OpTable, opset_version_of
from onnxprune.targets.tflite.build import COMPUTED_AS, Builder, UnsupportedError
from onnxprune.targets.tflite.elements import Element, Elements
from onnxprune.targets.tflite.graph import Shape, Tensor, TensorType

__all__ = ["TFLITE", "TYPES", "Body", "Emitted", "Emitter", "NodeView", "Scope", "computed_type"]

TYPES: Mapping[ir.DataType, TensorType] = {
    ir.DataType.FLOAT: "FLOAT32",
    ir.DataType.FLOAT16: "FLOAT16",
    ir.DataType.BFLOAT16: "BFLOAT16",
    ir.DataType.DOUBLE: "FLOAT64",
    ir.DataType.INT8: "INT8",
    ir.DataType.UINT8: "UINT8",
    ir.DataType.INT16: "INT16",
    ir.DataType.UINT16: "UINT16",
    ir.DataType.INT32: "INT32",
    ir.DataType.UINT32: "UINT32",
    ir.DataType.INT64: "INT64",
    ir.DataType.UINT64: "UINT64",
    ir.DataType.BOOL: "BOOL",
    ir.DataType.COMPLEX64: "COMPLEX64",
    ir.DataType.STRING: "STRING",
}
"""TFLite's element types for ONNX's."""

Emitted: TypeAlias = "Tensor | Sequence[Tensor | None]"


class Body(Protocol):
    """A graph that IF or WHILE runs, while it is made."""

    @property
    def build(self) -> Builder:
        """Makes its operators."""

    def input(self, like: Tensor, shape: Shape) -> Tensor:
        """A new input of the type of `like`, a tensor of the graph around it."""

    def capture(self, values: Iterable[ir.Value]) -> list[Tensor]:
        """New inputs for values of the graphs around it."""

    def nodes(self, graph: ir.Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Emits the nodes of an ONNX graph whose inputs are `inputs`; gives its outputs."""

    def finish(self, outputs: Sequence[Tensor]) -> int:
        """The index of the graph in the model."""

    def discard(self) -> None:
        """Forget the graph, and those that were made since."""


class Scope(Protocol):
    """What a node with graphs of its own can ask of the lowering."""

    def captured(self, node: ir.Node) -> dict[ir.Value, Tensor]:
        """Computed values that the graphs of `node` use from outside. Constants are known everywhere."""

    def nodes(self, graph: ir.Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Emits the nodes of a graph as part of the graph at hand; gives its outputs."""

    def body(self, name: str) -> Body:
        """A new graph."""

    def lengths(self, value: ir.Value) -> tuple[Element, ...] | None:
        """The lengths of its axes: numbers or names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """An ONNX node with the tensors that stand for its inputs (None: left out)."""

    node: ir.Node
    inputs: tuple[Tensor | None, ...]
    scope: Scope
    known: tuple[Elements | None, ...] = ()
    """What is known of the elements of its inputs before the model runs."""

    @property
    def op_type(self) -> str:
        """The ONNX operator."""
        return self.node.op_type

    @property
    def version(self) -> int:
        """The opset version by which the node is read."""
        return opset_version_of(self.node)

    def body(self, name: str) -> ir.Graph:
        """A graph attribute."""
        return self.node.attributes[name].as_graph()

    def output_shape(self, position: int = 0) -> Shape | None:
        """What shape inference says of an output."""
        shape = self.node.outputs[position].shape
        return None if shape is None else tuple(dim if isinstance(dim, int) else -1 for dim in shape)

    @property
    def num_outputs(self) -> int:
        """Outputs, those that nobody reads included."""
        return len(self.node.outputs)

    def is_read(self, position: int) -> bool:
        """True when something reads the output, or it leaves the graph."""
        if position >= len(self.node.outputs):
            return False
        value = self.node.outputs[position]
        return bool(value.name) and (value.is_graph_output() or bool(value.uses()))

    def has(self, position: int) -> bool:
        """True when the input is given."""
        return position < len(self.inputs) and self.inputs[position] is not None

    def input(self, position: int) -> Tensor:
        """A required input."""
        tensor = self.optional(position)
        if tensor is None:
            raise UnsupportedError(f"its input {position} is missing")
        return tensor

    def optional(self, position: int) -> Tensor | None:
        """An input, or None where it is left out."""
        return self.inputs[position] if position < len(self.inputs) else None

    def array(self, position: int) -> npt.NDArray[Any] | None:
        """The numbers of a constant input; None where it is left out or computed."""
        tensor = self.optional(position)
        return None if tensor is None else tensor.array()

    def elements(self, position: int) -> Elements | None:
        """What is known ahead of an input that steers shapes."""
        return self.known[position] if position < len(self.known) else None

    def required_array(self, position: int, what: str) -> npt.NDArray[Any]:
        """The numbers of an input that TFLite must know beforehand; `what` names it in the reason."""
        array = self.array(position)
        if array is None:
            raise UnsupportedError(f"its {what} are computed when the model runs, and must be constant")
        return array

    def ints(self, name: str, default: Sequence[int] = ()) -> tuple[int, ...]:
        """A list attribute."""
        return tuple(int(number) for number in self.node.attributes.get_ints(name, default))

    def integer(self, name: str, default: int = 0) -> int:
        """An integer attribute."""
        return int(self.node.attributes.get_int(name, default))

    def number(self, name: str, default: float = 0.0) -> float:
        """A float attribute, rounded to float32 as ONNX stores it."""
        return float(np.float32(self.node.attributes.get_float(name, default)))

    def text(self, name: str, default: str = "") -> str:
        """A string attribute."""
        return str(self.node.attributes.get_string(name, default))

    def axis(self, rank: int, default: int = 0) -> int:
        """Attribute `axis`, counted from the front."""
        axis = self.integer("axis", default)
        # Its end is an axis too, for Flatten. Beyond, the node is in a branch that never runs with these shapes.
        if not -rank <= axis <= rank:
            raise UnsupportedError(f"it works on axis {axis}, and its input has {rank} axes")
        return axis + rank if axis < 0 else axis


def computed_type(declared: ir.DataType | None, what: str) -> TensorType:
    """The element type to compute in. `what` has it, in the reason if TFLite knows no such type."""
    type_ = None if declared is None else TYPES.get(declared)
    if type_ is None:
        raise UnsupportedError(f"its {what} has elements of a type that this target does not write")
    return COMPUTED_AS.get(type_, type_)


Emitter: TypeAlias = Callable[[NodeView, Builder], Emitted]

TFLITE: OpTable[Emitter] = OpTable("tflite")
