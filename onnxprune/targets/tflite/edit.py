"""`Editor`: a graph that a stage takes apart and puts together again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from onnxprune.targets.tflite.build import tensor_type_of
from onnxprune.targets.tflite.graph import Constant, Graph, Operator, OptionValue, Shape, Tensor, TensorType

__all__ = ["Editor"]


class Editor:
    """A copy of `graph` whose operators can be replaced, one at a time, with look-ups that stay right.

    Operators keep their order: what replaces an operator stands in its place. `graph()` gives the result without what
    nobody reads. Tensors of the interface keep their names.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.tensors: dict[str, Tensor] = dict(graph.tensors)
        self._slots: list[list[Operator]] = [[operator] for operator in graph.operators]
        self._slot_of: dict[str, int] = {
            name: slot for slot, operator in enumerate(graph.operators) for name in operator.outputs
        }
        self._producers: dict[str, Operator] = graph.producers()
        self._consumers: dict[str, list[Operator]] = graph.consumers()
        self._outputs = frozenset(graph.outputs)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs."""
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph's outputs."""
        return self._graph.outputs

    @property
    def operators(self) -> tuple[Operator, ...]:
        """All operators in order."""
        return tuple(operator for slot in self._slots for operator in slot)

    def producer(self, name: str) -> Operator | None:
        """The operator that computes the tensor called `name`."""
        return self._producers.get(name)

    def consumers(self, name: str) -> tuple[Operator, ...]:
        """The operators that read it."""
        return tuple(self._consumers.get(name, ()))

    def is_output(self, name: str) -> bool:
        """True for an output of the graph."""
        return name in self._outputs

    def only_reader(self, name: str) -> Operator | None:
        """The one operator that reads the tensor, where there is just one and it leaves the graph nowhere."""
        readers = self._consumers.get(name, ())
        return readers[0] if len(readers) == 1 and not self.is_output(name) else None

    def add(self, tensor: Tensor) -> Tensor:
        """Add a tensor; its name gets a number behind it where that is taken."""
        name, number = tensor.name, 1
        while name in self.tensors:
            number += 1
            name = f"{tensor.name}_{number}"
        tensor = replace(tensor, name=name)
        self.tensors[name] = tensor
        return tensor

    def add_constant(self, constant: Constant, name: str) -> Tensor:
        """Add a constant tensor."""
        return self.add(Tensor(name=name, type=tensor_type_of(constant.dtype), shape=constant.shape, constant=constant))

    def update(self, tensor: Tensor) -> None:
        """Change what is known of the tensor of that name."""
        self.tensors[tensor.name] = tensor

    def replace(self, operator: Operator, *by: Operator) -> None:
        """Put `by` in the place of `operator`; none removes it. Outputs of `operator` that are read must stay made."""
        slot = self._slot(operator)
        position = next(index for index, one in enumerate(self._slots[slot]) if one is operator)
        self._forget(operator)
        self._slots[slot][position : position + 1] = by
        for one in by:
            self._note(one, slot)

    def insert_before(self, operator: Operator, *new: Operator) -> None:
        """Put `new` before `operator`."""
        self.replace(operator, *new, operator)

    def insert_after(self, operator: Operator, *new: Operator) -> None:
        """Put `new` behind `operator`."""
        self.replace(operator, operator, *new)

    def redirect(self, old: str, new: str, *, only: Iterable[Operator] | None = None) -> None:
        """Let all readers of `old` (or `only` these) read `new`, which is computed before them.

        An output of the graph keeps its name: `new` is renamed then, and must be computed by an operator.
        """
        wanted = None if only is None else {id(operator) for operator in only}
        for reader in self.consumers(old):
            if wanted is None or id(reader) in wanted:
                inputs = tuple(new if name == old else name for name in reader.inputs)
                self.replace(reader, replace(reader, inputs=inputs))
        if wanted is None and self.is_output(old):
            self._take_over(old, new)

    def graph(self) -> Graph:
        """The result, without operators and tensors that nobody reads."""
        live = set(self._graph.outputs)
        kept: list[Operator] = []
        for operator in reversed(self.operators):
            if live.intersection(operator.outputs):
                kept.append(operator)
                live.update(name for name in operator.inputs if name)
        kept.reverse()
        used = {*self._graph.inputs, *self._graph.outputs}
        for operator in kept:
            used.update((*operator.inputs, *operator.outputs))
        return replace(
            self._graph,
            tensors={name: tensor for name, tensor in self.tensors.items() if name in used},
            operators=tuple(kept),
        )

    def computed(
        self,
        kind: str,
        inputs: Sequence[str],
        *,
        name: str,
        shape: Shape,
        type_: TensorType,
        node: str,
        **options: OptionValue,
    ) -> tuple[Operator, Tensor]:
        """A new operator (not yet in the graph) and its output tensor (which is)."""
        tensor = self.add(Tensor(name=name, type=type_, shape=shape))
        return Operator(kind=kind, inputs=tuple(inputs), outputs=(tensor.name,), options=options, node=node), tensor

    def _take_over(self, old: str, new: str) -> None:
        producer = self._producers[new]
        tensor = self.tensors[new]
        former = self._producers.get(old)
        if former is not None:
            self.replace(former)
        readers = self.consumers(new)
        # The layout belongs to the name: it says how the ONNX value of that name is stored.
        self.tensors[old] = replace(tensor, name=old, layout=self.tensors[old].layout)
        self.replace(producer, replace(producer, outputs=_renamed(producer.outputs, new, old)))
        for reader in readers:
            self.replace(reader, replace(reader, inputs=_renamed(reader.inputs, new, old)))
        if not self.is_output(new):
            del self.tensors[new]

    def _slot(self, operator: Operator) -> int:
        return self._slot_of[operator.outputs[0]]

    def _forget(self, operator: Operator) -> None:
        for name in operator.outputs:
            if self._producers.get(name) is operator:
                del self._producers[name]
        for name in dict.fromkeys(operator.inputs):
            readers = self._consumers.get(name)
            if readers is not None:
                self._consumers[name] = [reader for reader in readers if reader is not operator]

    def _note(self, operator: Operator, slot: int) -> None:
        for name in operator.outputs:
            self._producers[name] = operator
            self._slot_of[name] = slot
        for name in dict.fromkeys(operator.inputs):
            if name:
                self._consumers.setdefault(name, []).append(operator)


def _renamed(names: tuple[str, ...], old: str, new: str) -> tuple[str, ...]:
    return tuple(new if name == old else name for name in names)
