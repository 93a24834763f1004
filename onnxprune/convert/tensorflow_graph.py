"""TensorFlow functions and graphs -> ONNX with tf2onnx, and as runners for the reference outputs."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxprune.contracts import Batch, TensorSpec
from onnxprune.convert.reference import ForeignConversion, ReferenceCase
from onnxprune.errors import BadDataError, ModelError, OnnxPruneError, quoted_list
from onnxprune.runtime.feeds import working_feeds

__all__ = [
    "OPSET",
    "CallableRunner",
    "check_operators",
    "function_to_onnx",
    "import_tensorflow",
    "reference_cases",
    "run_tf2onnx",
    "tidy_interface",
]

OPSET = 18
"""Where tf2onnx stops."""

# What tf2onnx appends to names to make them unique.
_COUNTER = re.compile(r"__(\d+)")
# Operators that run Python or touch files: nothing that a network for a phone needs.
_SIDE_EFFECTS = frozenset(
    {"PyFunc", "PyFuncStateless", "EagerPyFunc", "ReadFile", "WriteFile", "MatchingFiles", "LoadLibrary", "RemoteCall"}
)


def import_tensorflow() -> Any:
    """TensorFlow, silent, on the CPU, as the backend of Keras whatever the user's settings say."""
    os.environ |= {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_ENABLE_ONEDNN_OPTS": "0",
        "KERAS_BACKEND": "tensorflow",
    }
    import tensorflow as tf

    tf.get_logger().setLevel(logging.ERROR)
    return tf


def check_operators(nodes: Any, *, source: str) -> None:
    """Refuse a graph that would run Python or touch files when it is run.

    Raises:
        ModelError: Names the operators.
    """
    found = sorted({node.op for node in nodes} & _SIDE_EFFECTS)
    if found:
        raise ModelError(
            f"Source '{source}' is refused: its operators {quoted_list(found)} run Python code or touch files.",
            "Remove them, or give --trust-source if you trust whoever made the model.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CallableRunner:
    """A `contracts.Runner` over a function of arrays by name. What the function raises becomes a BadDataError."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    call: Callable[[Mapping[str, npt.NDArray[Any]]], Mapping[str, Any]]

    def run(self, feeds: Batch) -> dict[str, npt.NDArray[Any]]:
        """All outputs by name for one batch."""
        import tensorflow as tf

        try:
            return {name: np.array(value) for name, value in self.call(feeds).items()}
        except (tf.errors.OpError, ValueError, TypeError, RuntimeError) as error:
            lines = str(error).strip().splitlines()
            raise BadDataError(
                f"TensorFlow can't run the source on seeded inputs: {lines[0] if lines else type(error).__name__}",
                "Fix the sizes of its inputs with --shape.",
            ) from error


def reference_cases(
    runner: CallableRunner, shapes: Mapping[str, Sequence[int | str]], *, seed: int, num_samples: int = 1
) -> ForeignConversion:
    """What the source answers to `num_samples` seeded samples, and to a batch of three where axis 0 is dynamic."""
    fixed = {
        name: tuple(dim for dim in shape if isinstance(dim, int))
        for name, shape in shapes.items()
        if all(isinstance(dim, int) for dim in shape)
    }
    first = working_feeds(runner, seed=seed, shapes=fixed)
    outputs = runner.run(first)
    again = runner.run(first)
    is_same = all(
        np.allclose(outputs[name], again[name], rtol=1e-4, atol=1e-5, equal_nan=True)
        for name in outputs
        if outputs[name].dtype.kind in "fiub"
    )
    cases = [ReferenceCase(feeds=first, outputs=outputs)]
    for number in range(1, num_samples):
        feeds = working_feeds(runner, seed=seed + number, shapes=fixed)
        cases.append(ReferenceCase(feeds=feeds, outputs=runner.run(feeds)))
    has_dynamic_batch = any(
        spec.shape and not isinstance(spec.shape[0], int) and spec.name not in fixed for spec in runner.inputs
    )
    if has_dynamic_batch:
        try:
            batch = working_feeds(runner, seed=seed, shapes=fixed, batch=3)
            cases.append(ReferenceCase(feeds=batch, outputs=runner.run(batch)))
        except OnnxPruneError:
            pass  # the source itself takes one sample only
    return ForeignConversion(cases=tuple(cases), is_deterministic=is_same)


class _FedInputs:
    """A `tf.function` as tf2onnx needs it: what the function was traced over is not among its inputs.

    Tensors that it refers to from outside (mean and variance of a Normalization layer) are inputs of the traced graph,
    and tf2onnx would make them inputs of the model. Freezing turns them into constants, as it does with variables.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._concrete: Any = None

    def get_concrete_function(self, *signature: Any) -> _FedInputs:
        self._concrete = self._function.get_concrete_function(*signature)
        return self

    @property
    def inputs(self) -> list[Any]:
        """The traced inputs without the captured ones, which come last."""
        return list(self._concrete.inputs[: len(self._concrete.inputs) - len(self._concrete.captured_inputs)])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._concrete, name)


def function_to_onnx(function: Any, signature: Sequence[Any], *, source: str) -> onnx.ModelProto:
    """Convert a `tf.function` that returns its outputs by name; `signature` are named `tf.TensorSpec`s."""
    import tf2onnx

    return run_tf2onnx(
        lambda: tf2onnx.convert.from_function(_FedInputs(function), input_signature=list(signature), opset=OPSET),
        source=source,
    )


def run_tf2onnx(convert: Callable[[], tuple[onnx.ModelProto, Any]], *, source: str) -> onnx.ModelProto:
    """The model that tf2onnx makes.

    Raises:
        ModelError: It fails, or leaves operators that ONNX does not have; names all of them.
    """
    import tf2onnx

    tf2onnx.logging.set_level(logging.ERROR)
    try:
        model, _ = convert()
    except Exception as error:  # raises whatever its handlers raise (docs/adr/0007)
        text = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"tf2onnx can't convert '{source}': {type(error).__name__}: {text[:300]}",
            "Replace the offending layers, or export the model to ONNX in another way.",
        ) from error
    foreign = sorted(
        {
            f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
            for node in _nodes(model.graph)
            if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type)
        }
    )
    if foreign:
        raise ModelError(
            f"tf2onnx can't convert '{source}': it has no ONNX form for the operators {quoted_list(foreign)}.",
            "Replace the layers that they come from.",
        )
    return model


def _nodes(graph: onnx.GraphProto) -> Any:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _nodes(subgraph)


class _Renumbering:
    """Counters in names, numbered anew in the order in which the names appear along the graph.

    tf2onnx numbers what it makes in the order of sets of objects, which is another one in every process.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._interface = {value.name for value in (*graph.input, *graph.output)}
        self._numbers: dict[str, str] = {}
        taken = {number for name in self._interface for number in _COUNTER.findall(name)}
        self.order: dict[str, int] = {}
        """Settled names, and when each was seen first."""
        self._free = (str(n) for n in itertools.count() if str(n) not in taken)

    def of(self, name: str) -> str:
        """`name` with its counters replaced; names of the interface stay."""
        settled: str = name
        if name not in self._interface:
            settled = _COUNTER.sub(lambda match: f"__{self._number(match[1])}", name)
        self.order.setdefault(settled, len(self.order))
        return settled

    def _number(self, old: str) -> str:
        if old not in self._numbers:
            self._numbers[old] = next(self._free)
        return self._numbers[old]


def _renumber(graph: onnx.GraphProto, renumbering: _Renumbering) -> None:
    """Give every name of `graph` its settled counter, and bring its constants into the order of their first use."""
    for value in graph.input:
        value.name = renumbering.of(value.name)
    for node in graph.node:
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                names[position] = renumbering.of(name)
        node.name = renumbering.of(node.name)
        for attribute in node.attribute:
            for subgraph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _renumber(subgraph, renumbering)
    for value in graph.output:
        value.name = renumbering.of(value.name)
    copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in graph.initializer]
    for tensor in copies:
        tensor.name = renumbering.of(tensor.name)
    copies.sort(key=lambda tensor: renumbering.order[tensor.name])
    del graph.initializer[:]
    graph.initializer.extend(copies)


def tidy_interface(model: onnx.ModelProto, output_names: Sequence[str]) -> None:
    """Outputs in the source's order, dynamic axes named 'batch' or after their input, nothing named by a counter."""
    graph = model.graph
    by_name = {output.name: output for output in graph.output}
    ordered = [by_name[name] for name in output_names if name in by_name]
    if len(ordered) == len(by_name):
        copies = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in ordered]
        del graph.output[:]
        graph.output.extend(copies)
    for values, is_input in ((graph.input, True), (graph.output, False)):
        for value in values:
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if dim.dim_param.startswith("unk__"):
                    if axis == 0:
                        dim.dim_param = "batch"
                    elif is_input:
                        dim.dim_param = f"{value.name.partition(':')[0]}_axis{axis}"
                    else:
                        dim.ClearField("dim_param")
    _renumber(graph, _Renumbering(graph))
    # Says the name of a traced function, with a counter.
    model.doc_string = graph.doc_string = ""
    # Inner shapes are inferred anew; these carry counters that change with every version of tf2onnx.
    del graph.value_info[:]
