"""What a shrink hook works with: which labels stay, and constants that may be rewritten."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.graph.names import UniqueNames
from onnxprune.graph.weights import add_initializer, constant_array, replace_weight
from onnxprune.ops.channels.labels import LabelArray

__all__ = ["Removal"]


class Removal:
    """One decision about all labels of a model, and the model's names."""

    def __init__(self, keeps: npt.NDArray[np.bool_], names: UniqueNames) -> None:
        self._keeps = keeps
        self._names = names

    def kept(self, labels: LabelArray) -> npt.NDArray[np.bool_]:
        """For each position of `labels`: True where the channel stays."""
        return self._keeps[labels]

    def count(self, labels: LabelArray) -> int:
        """How many positions of `labels` stay."""
        return int(self._keeps[labels].sum())

    def private_constant(self, node: ir.Node, position: int) -> ir.Value:
        """The constant at an input of `node`, copied first when something else uses it as well."""
        value = node.inputs[position]
        if value is None:
            raise ValueError(f"Input {position} of '{node.name}' is left out.")
        array = constant_array(value)
        if array is None:
            raise ValueError(f"Input {position} of '{node.name}' is not a constant.")
        if len(value.uses()) == 1 and not value.is_graph_output():
            return value
        copy = self.new_constant(node, f"{value.name}_of_{node.name}", np.array(array))
        node.replace_input_with(position, copy)
        return copy

    def rewrite(self, node: ir.Node, position: int, array: npt.NDArray[Any]) -> None:
        """Make `array` the constant at an input of `node`, for this node only."""
        replace_weight(self.private_constant(node, position), array)

    def new_constant(self, node: ir.Node, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """A new initializer in the graph of `node`."""
        graph = node.graph
        if not isinstance(graph, ir.Graph):
            raise TypeError(f"'{node.name}' is in no graph.")
        return add_initializer(graph, name, array, self._names)
