"""How far two spellings of one plan are apart, end to end: which share of a tensor's integers differs, and by how much.

An operator that is fed with the same integers gives the same ones in every spelling, up to one step where a sum lies
between two. Behind it the next operator is fed with other integers, so that differences spread: this is what is counted
here, over real samples. Where a spelling has other weights ("x86" with widened scales), that is counted too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import Batch
from onnxprune.errors import UsageError
from onnxprune.runtime.sessions import ort_runner_from_model
from onnxprune.targets.qdq.qoperator import as_qoperators

__all__ = ["TensorAgreement", "agreement_of"]

_INTEGER_TYPES = (ir.DataType.INT8, ir.DataType.UINT8)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorAgreement:
    """One tensor of integers in two spellings, over all samples.

    `is_at_output` is true where nothing but float operators, or nothing at all, stands between the tensor and an output
    of the model. Ratios are 0..1 of `num_elements`.
    """

    name: str
    is_at_output: bool
    num_elements: int
    differing_ratio: float
    beyond_one_step_ratio: float
    largest_steps: int


@dataclass(slots=True)
class _Counts:
    elements: int = 0
    differing: int = 0
    beyond_one_step: int = 0
    largest: int = 0

    def add(self, one: npt.NDArray[Any], other: npt.NDArray[Any]) -> None:
        steps = np.abs(_signed(one) - _signed(other))
        self.elements += steps.size
        self.differing += int(np.count_nonzero(steps))
        self.beyond_one_step += int(np.count_nonzero(steps > 1))
        self.largest = max(self.largest, int(steps.max(initial=0)))


def agreement_of(one: ir.Model, other: ir.Model, samples: Iterable[Batch]) -> tuple[TensorAgreement, ...]:
    """The integer tensors that both graphs have by name, in graph order.

    Both run as integer operators (`as_qoperators`) in ONNX Runtime on this machine, so that int8 activations are
    computed in integers on x86 as well. There a graph spelled "x86-vnni" saturates if the machine has no VNNI.

    Args:
        one: A model from `spell`.
        other: Another one of the same plan; the placements may differ.
        samples: Batches for both; one at least.

    Raises:
        UsageError: There is no sample, or no common integer tensor.
    """
    graphs = [as_qoperators(model) for model in (one, other)]
    types = [_integer_types(graph) for graph in graphs]
    names = [name for name in types[0] if name in types[1]]
    if not names:
        raise UsageError("The two graphs have no tensor of integers in common.", "Compare two spellings of one model.")
    runners = [ort_runner_from_model(graph, extra_outputs=names) for graph in graphs]
    counts = {name: _Counts() for name in names}
    for sample in samples:
        found = [runner.run(sample) for runner in runners]
        for name in names:
            counts[name].add(found[0][name], found[1][name])
    if not any(count.elements for count in counts.values()):
        raise UsageError("There is no sample to compare two spellings on.")
    last = _at_outputs(graphs[0], types[0])
    return tuple(_agreement(name, count, is_at_output=name in last) for name, count in counts.items())


def _agreement(name: str, count: _Counts, *, is_at_output: bool) -> TensorAgreement:
    size = max(count.elements, 1)
    return TensorAgreement(
        name=name,
        is_at_output=is_at_output,
        num_elements=count.elements,
        differing_ratio=count.differing / size,
        beyond_one_step_ratio=count.beyond_one_step / size,
        largest_steps=count.largest,
    )


def _signed(integers: npt.NDArray[Any]) -> npt.NDArray[np.int16]:
    """uint8 is int8 shifted by 128, and so is its zero point."""
    signed: npt.NDArray[np.int16] = integers.astype(np.int16) - (128 if integers.dtype == np.uint8 else 0)
    return signed


def _integer_types(model: ir.Model) -> Mapping[str, ir.DataType]:
    found: dict[str, ir.DataType] = {}
    for node in model.graph:
        for value in node.outputs:
            if value.name and value.dtype is not None and value.dtype in _INTEGER_TYPES:
                found[value.name] = value.dtype
    return found


def _at_outputs(model: ir.Model, integers: Mapping[str, ir.DataType]) -> frozenset[str]:
    """The integer tensors that a walk from the outputs to the inputs meets first."""
    found: set[str] = set()
    waiting: list[ir.Value] = list(model.graph.outputs)
    seen: set[ir.Value] = set()
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.name in integers:
            found.add(value.name or "")
            continue
        producer = value.producer()
        if producer is not None:
            waiting.extend(given for given in producer.inputs if given is not None)
    return frozenset(found)
