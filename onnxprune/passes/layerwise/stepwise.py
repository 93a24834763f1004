"""Running a model part by part for a few batches, so that weights further on may change meanwhile.

Layer-by-layer correction needs, for each layer, the tensors that the corrected layers before it make. Running the
model from its start for each layer costs the square of its depth; here every node runs once. What lies between the
parts stays in memory, so the number of samples is chosen after the size of what is alive at once (`samples_that_fit`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import Batch
from onnxprune.graph.inference import captured_values
from onnxprune.passes.calibration import run_samples
from onnxprune.runtime.sessions import ort_runner_from_model

__all__ = ["MAX_STATE_BYTES", "StepwiseModel", "samples_that_fit"]

MAX_STATE_BYTES = 512 << 20
"""What tensors between the parts of one model may take."""

_UNKNOWN_TENSOR_BYTES = 4 << 20

Array = npt.NDArray[Any]


class StepwiseModel:
    """A model whose nodes run when their results are asked for, each once.

    Args:
        model: Not copied: an initializer that changes is seen by nodes that have not run yet.
        batches: What to run it on.
        custom_op_libraries: For models with custom operators.
    """

    def __init__(self, model: ir.Model, batches: Sequence[Batch], *, custom_op_libraries: Sequence[Path] = ()) -> None:
        self._model = model
        self._libraries = tuple(custom_op_libraries)
        self._pending: dict[ir.Node, None] = dict.fromkeys(model.graph)
        self._names = {value.name: value for node in model.graph for value in node.outputs}
        self._names.update({value.name: value for value in model.graph.inputs})
        self._num_batches = len(batches)
        self._state: dict[ir.Value, list[Array]] = {
            value: [batch[value.name or ""] for batch in batches]
            for value in model.graph.inputs
            if value.const_value is None
        }

    def advance(self, name: str) -> list[Array]:
        """The tensor called `name`, one array for each batch; everything it needs has run after this.

        Nodes must be asked for in the graph's order: what no node that is still to run needs is forgotten.
        """
        value = self._names[name]
        if value in self._state:
            return self._state[value]
        nodes = self._needed_for(value)
        running = set(nodes)
        used_later = {used for node in self._pending if node not in running for used in _used_by(node)}
        outputs = [output for node in nodes for output in node.outputs if output in used_later or output is value]
        made: dict[ir.Value, list[Array]] = {output: [] for output in outputs}
        for arrays in self._run(nodes, outputs):
            for output in outputs:
                made[output].append(arrays[output.name or ""])
        for node in nodes:
            del self._pending[node]
        self._state.update(made)
        self._state = {kept: arrays for kept, arrays in self._state.items() if kept in used_later or kept is value}
        return made[value]

    def peek(self, name: str) -> Iterator[Array]:
        """The tensor called `name` for each batch, as it would be now; nothing is remembered."""
        value = self._names[name]
        if value in self._state:
            yield from self._state[value]
            return
        for arrays in self._run(self._needed_for(value), [value]):
            yield arrays[name]

    def _needed_for(self, value: ir.Value) -> list[ir.Node]:
        """The nodes that have to run before `value` is known, in graph order."""
        needed: set[ir.Node] = set()
        waiting = [value]
        while waiting:
            one = waiting.pop()
            producer = one.producer()
            if one in self._state or producer is None or producer in needed:
                continue
            needed.add(producer)
            waiting.extend(_used_by(producer))
        return [node for node in self._pending if node in needed]

    def _run(self, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> Iterator[dict[str, Array]]:
        used = dict.fromkeys(value for node in nodes for value in _used_by(node))
        inputs = [value for value in used if value in self._state]
        constants = [value for value in used if value.const_value is not None]
        view = ir.GraphView(
            inputs,
            outputs,
            nodes=nodes,
            initializers=constants,
            opset_imports=self._model.opset_imports,
            name=self._model.graph.name,
        )
        part = ir.Model(view.clone(), ir_version=self._model.ir_version, functions=list(self._model.functions.values()))
        runner = ort_runner_from_model(part, custom_op_libraries=self._libraries)
        for number in range(self._num_batches):
            feeds = {value.name or "": self._state[value][number] for value in inputs}
            yield run_samples(runner, feeds, number)


def samples_that_fit(model: ir.Model, max_samples: int, *, max_bytes: int = MAX_STATE_BYTES) -> int:
    """How many samples, up to `max_samples`, keep what is alive at once within `max_bytes` (at least one)."""
    last_use: dict[ir.Value, int] = {}
    nodes = list(model.graph)
    for position, node in enumerate(nodes):
        last_use.update(dict.fromkeys(_used_by(node), position))
    alive = 0
    ends: dict[int, int] = {}
    for value in model.graph.inputs:
        if value.const_value is None and value in last_use:
            alive += _sample_bytes(value)
            ends[last_use[value]] = ends.get(last_use[value], 0) + _sample_bytes(value)
    peak = alive
    for position, node in enumerate(nodes):
        for output in node.outputs:
            size = _sample_bytes(output)
            alive += size
            end = last_use.get(output, position)
            ends[end] = ends.get(end, 0) + size
        peak = max(peak, alive)
        alive -= ends.pop(position, 0)
    return max(1, min(max_samples, max_bytes // max(peak, 1)))


def _used_by(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in node.inputs if value is not None)
    yield from captured_values(node)


def _sample_bytes(value: ir.Value) -> int:
    """Bytes of one sample's part of `value`; its first axis, if symbolic, counts samples."""
    if value.shape is None:
        return _UNKNOWN_TENSOR_BYTES
    dims = list(value.shape)
    sizes = [dim if isinstance(dim, int) else None for dim in dims]
    if sizes and sizes[0] is None:
        sizes[0] = 1
    if None in sizes:
        return _UNKNOWN_TENSOR_BYTES
    itemsize = value.dtype.itemsize if value.dtype is not None else np.dtype(np.float32).itemsize
    return int(math.prod(size for size in sizes if size is not None) * itemsize)
