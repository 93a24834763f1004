"""Stage 3 of layout assignment: the graph with every operator in its chosen form, and the transpositions left over.

Each order of a tensor that somebody wants and its producer does not give is made once, by one TRANSPOSE from what the
producer gives, or by a RESHAPE where only axes of length 1 move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from onnxprune.targets.tflite.build import tensor_type_of
from onnxprune.targets.tflite.graph import (
    Constant,
    Graph,
    Operator,
    OptionValue,
    Quantization,
    Tensor,
    compose,
    inverse,
    permuted_shape,
)
from onnxprune.targets.tflite.layout.axes import Form, Permutation, Port, identity
from onnxprune.targets.tflite.layout.cost import is_reshape
from onnxprune.targets.tflite.layout.flow import Flow, Origin
from onnxprune.targets.tflite.layout.rules import PERMUTABLE, Changes

__all__ = ["rewritten"]


def rewritten(flow: Flow, forms: Mapping[int, Form]) -> Graph:
    """The graph of `flow` with the operators of `forms` in these forms, and all others in their nominal one."""
    return _Rewriting(flow, forms).graph()


class _Rewriting:
    def __init__(self, flow: Flow, forms: Mapping[int, Form]) -> None:
        self.flow = flow
        self.forms = forms
        self.tensors: dict[str, Tensor] = {}
        self.operators: list[Operator] = []
        self.changes = {index: self._changes(index, form) for index, form in forms.items()}
        self.elsewhere = {
            place: constant for change in self.changes.values() for place, constant in change.elsewhere.items()
        }
        self.given = {source: self._given(source) for source in flow.producers}
        self.names = _names(flow, self.given, self._wanted())
        self.taken = {*flow.graph.tensors, *self.names.values()}
        self.made: dict[Origin, str] = {}

    def graph(self) -> Graph:
        before = self.flow.graph
        for name in before.inputs:
            self.tensors[name] = before.tensors[name]
        for index, operator in enumerate(before.operators):
            if any(name in self.flow.producers for name in operator.outputs):
                self._emit(index, operator)
        for name in before.outputs:
            self._leave(name)
        used = {*before.inputs, *before.outputs}
        for operator in self.operators:
            used.update((*operator.inputs, *operator.outputs))
        tensors = {name: tensor for name, tensor in self.tensors.items() if name in used}
        return replace(before, tensors=tensors, operators=tuple(self.operators))

    # --- what is given and wanted ---------------------------------------------------------------------------

    def _changes(self, index: int, form: Form) -> Changes:
        view = self.flow.view(index)
        return PERMUTABLE[view.operator.kind].permute(view, form)

    def _given(self, source: str) -> Permutation:
        """The order in which `source` is computed."""
        index = self.flow.producers.get(source)
        rank = self.flow.graph.tensors[source].rank
        if index is None or index not in self.forms:
            return identity(rank)
        port = Port(is_output=True, position=self.flow.graph.operators[index].outputs.index(source))
        return self.forms[index].permutations.get(port, identity(rank))

    def _order(self, index: int, position: int, path: Permutation) -> Permutation:
        """The order in which an operator wants the source of an input."""
        form = self.forms.get(index)
        moved = None if form is None else form.permutations.get(Port(is_output=False, position=position))
        return path if moved is None else compose(path, moved)

    def _wanted(self) -> set[Origin]:
        """All orders of computed or fed tensors that somebody wants."""
        found = {
            Origin(source, self._order(reader.place, reader.position, reader.path))
            for source, readers in self.flow.readers.items()
            for reader in readers
        }
        found.update(origin for origins in self.flow.leaving.values() for origin in origins)
        return found

    # --- operators ------------------------------------------------------------------------------------------

    def _emit(self, index: int, operator: Operator) -> None:
        changes = self.changes.get(index, Changes())
        inputs = tuple(
            self._input(index, position, name, changes) if name else "" for position, name in enumerate(operator.inputs)
        )
        outputs = tuple(self._output(name) for name in operator.outputs)
        options: dict[str, OptionValue] = {**operator.options, **changes.options}
        changed = replace(operator, inputs=inputs, outputs=outputs, options=options)
        if not changes.take:
            self.operators.append(changed)
            return
        (name,) = outputs
        before = self._add(replace(self.tensors[name], name=f"{name}/reordered"))
        indices = self._constant(Constant.of(np.array(changes.take, np.int32)), f"{name}/order")
        self.operators.append(replace(changed, outputs=(before.name,)))
        self.operators.append(
            Operator(
                kind="GATHER",
                inputs=(before.name, indices),
                outputs=(name,),
                options={"axis": 0},
                node=operator.node,
            )
        )

    def _input(self, index: int, position: int, name: str, changes: Changes) -> str:
        replaced = changes.constants.get(position) or self.elsewhere.get((index, position))
        origin = self.flow.origins[name]
        order = self._order(index, position, origin.path)
        if replaced is not None:
            return self._constant(replaced, name, self._quantization(name, identity(len(replaced.shape))))
        source = self.flow.graph.tensors[origin.source]
        if source.constant is None:
            return self._computed(Origin(origin.source, order))
        if order == identity(source.rank):
            self.tensors[origin.source] = source
            return origin.source
        known = self.made.get(Origin(origin.source, order))
        if known is None:
            known = self._constant(
                source.constant.transposed(order),
                f"{origin.source}/transposed",
                self._quantization(origin.source, order),
            )
            self.made[Origin(origin.source, order)] = known
        return known

    def _output(self, name: str) -> str:
        order = self.given[name]
        stored = self.names[Origin(name, order)]
        before = self.flow.graph.tensors[name]
        self.tensors[stored] = replace(
            before,
            name=stored,
            shape=permuted_shape(before.shape, order),
            quantization=self._quantization(name, order),
            layout=self._layout(name, stored, order),
        )
        return stored

    def _layout(self, source: str, stored: str, order: Permutation) -> Permutation | None:
        """How a tensor called `stored`, which is `source` in `order`, differs from the value of that name."""
        origin = self.flow.origins.get(stored)
        if origin is None or origin.source != source:
            return None
        named = self.flow.graph.tensors[stored]
        # stored = transpose(named, inverse(path) and then order); named = transpose(value, its layout).
        moved = compose(inverse(origin.path), order)
        whole = moved if named.layout is None else compose(named.layout, moved)
        return None if whole == identity(len(whole)) else whole

    def _quantization(self, name: str, order: Permutation) -> Quantization | None:
        found = self.flow.graph.tensors[name].quantization
        if found is None or not found.is_per_axis:
            return found
        return replace(found, axis=order.index(found.axis))

    # --- transpositions -------------------------------------------------------------------------------------

    def _computed(self, wanted: Origin) -> str:
        """The name of a source in the order that is wanted."""
        if wanted.source not in self.flow.producers:
            self.tensors[wanted.source] = self.flow.graph.tensors[wanted.source]
        given = self.given.get(wanted.source, identity(len(wanted.path)))
        if wanted.path == given:
            return self.names.get(wanted, wanted.source)
        known = self.made.get(wanted)
        if known is None:
            known = self.made[wanted] = self._transposed(wanted, given)
        return known

    def _transposed(self, wanted: Origin, given: Permutation) -> str:
        before = self.tensors[self.names.get(Origin(wanted.source, given), wanted.source)]
        order = compose(inverse(given), wanted.path)
        name = self.names.get(wanted)
        tensor = Tensor(
            name=self._unused(f"{before.name}/transposed") if name is None else name,
            type=before.type,
            shape=permuted_shape(before.shape, order),
            quantization=self._quantization(wanted.source, wanted.path),
            layout=None if name is None else self._layout(wanted.source, name, wanted.path),
        )
        self.tensors[tensor.name] = tensor
        node = self._node_of(wanted)
        if is_reshape(before.shape, order) and tensor.shape.count(-1) <= 1:
            self._reshape(before.name, tensor, node)
        else:
            numbers = self._constant(Constant.of(np.array(order, np.int32)), f"{tensor.name}/order")
            self.operators.append(
                Operator(kind="TRANSPOSE", inputs=(before.name, numbers), outputs=(tensor.name,), node=node)
            )
        return tensor.name

    def _node_of(self, wanted: Origin) -> str:
        """The node to blame for a transposition: the one that computes the source, or the first that reads it."""
        readers = self.flow.readers.get(wanted.source, ())
        place = self.flow.producers.get(wanted.source, readers[0].place if readers else None)
        return "" if place is None else self.flow.graph.operators[place].node

    def _leave(self, name: str) -> None:
        """Make sure that an operator computes the output called `name`."""
        found = self._computed(self.flow.origins[name])
        if found == name:
            return
        self.tensors[name] = self.flow.graph.tensors[name]
        self._copy(found, self.tensors[name])

    def _copy(self, source: str, copy: Tensor) -> None:
        if copy.shape.count(-1) <= 1:
            self._reshape(source, copy, "")
            return
        shape = self._add(Tensor(name=f"{copy.name}/shape", type="INT32", shape=(copy.rank,)))
        self.operators.append(
            Operator(kind="SHAPE", inputs=(source,), outputs=(shape.name,), options={"outType": "INT32"})
        )
        self.operators.append(Operator(kind="RESHAPE", inputs=(source, shape.name), outputs=(copy.name,)))

    def _reshape(self, source: str, output: Tensor, node: str) -> None:
        shape = self._constant(Constant.of(np.array(output.shape, np.int32)), f"{output.name}/shape")
        self.operators.append(
            Operator(
                kind="RESHAPE",
                inputs=(source, shape),
                outputs=(output.name,),
                options={"newShape": output.shape},
                node=node,
            )
        )

    # --- tensors --------------------------------------------------------------------------------------------

    def _constant(self, constant: Constant, name: str, quantization: Quantization | None = None) -> str:
        return self._add(
            Tensor(
                name=name,
                type=tensor_type_of(constant.dtype),
                shape=constant.shape,
                constant=constant,
                quantization=quantization,
            )
        ).name

    def _add(self, tensor: Tensor) -> Tensor:
        tensor = replace(tensor, name=self._unused(tensor.name))
        self.tensors[tensor.name] = tensor
        return tensor

    def _unused(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self.taken:
            number += 1
            name = f"{wanted}_{number}"
        self.taken.add(name)
        return name


def _names(flow: Flow, given: Mapping[str, Permutation], wanted: set[Origin]) -> dict[Origin, str]:
    """Names for sources in the orders in which they will stand in the graph.

    Outputs of the graph keep theirs. What stands for an ONNX value bears its name, where there is such a value.
    """
    graph = flow.graph
    names: dict[Origin, str] = {}
    for name in graph.outputs:
        origin = flow.origins[name]
        if origin.source in flow.producers or origin.path != identity(len(origin.path)):
            names.setdefault(origin, name)
    used = {*graph.inputs, *graph.outputs}
    aliases: dict[str, list[str]] = {}
    for name, origin in flow.origins.items():
        if name != origin.source and name not in used:
            aliases.setdefault(origin.source, []).append(name)
    for source, own in aliases.items():
        for name in own:
            origin = flow.origins[name]
            if (
                origin in wanted
                and origin not in names
                and origin.path != given.get(source, identity(len(origin.path)))
            ):
                names[origin] = name
                used.add(name)
    for source, order in given.items():
        stored = Origin(source, order)
        if stored in names:
            continue
        # An intermediate result of an emitter takes the name of a value that it stands for.
        free = [name for name in (source, *aliases.get(source, ())) if name not in used]
        name = next((name for name in free if name in graph.values), free[0] if free else f"{source}/stored")
        names[stored] = name
        used.add(name)
    return names
