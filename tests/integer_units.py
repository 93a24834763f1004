"""Single integer nodes of a placement, each as a model of its own, run on the integers that it reads in the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import utils

from onnxprune.contracts import Batch, Placement, QuantizationPlan
from onnxprune.ops.planned import PlannedNode, planned_nodes
from onnxprune.runtime.sessions import ort_runner_from_model
from onnxprune.targets.qdq import SpellingName, spell
from tests.integer_reference import Integers
from tests.quantization import run


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A planned node, the float model that is this node alone, and its inputs as signed integers."""

    item: PlannedNode
    model: ir.Model
    integers: Mapping[str, Integers]

    @property
    def name(self) -> str:
        return self.item.node.name or ""


def to_integers(real: npt.NDArray[np.float32], plan: QuantizationPlan, name: str) -> Integers:
    """Signed integers of numbers that are multiples of the scale, or of any that are to be rounded."""
    found = plan.activations[name]
    return np.clip(np.rint(real / np.float32(found.scale)).astype(np.int64) + found.zero_point, -128, 127)


def to_real(integers: Integers, plan: QuantizationPlan, name: str) -> npt.NDArray[np.float32]:
    found = plan.activations[name]
    return ((integers - found.zero_point) * np.float32(found.scale)).astype(np.float32)


def units_of(model: ir.Model, plan: QuantizationPlan, placement: Placement, feeds: Batch) -> Iterator[Unit]:
    """The integer nodes of `placement`, fed with what they read when the float network runs on `feeds`."""
    integer = set(placement.integer_nodes)
    items = [item for item in planned_nodes(model, plan) if item.node.name in integer]
    names = sorted({value.name or "" for item in items for value in item.inputs if value.producer() is not None})
    arrays = dict(feeds) | ort_runner_from_model(model, extra_outputs=names, optimization="disabled").run(feeds)
    proto = ir.to_proto(model)
    extractor = utils.Extractor(proto)
    for item in items:
        read = [value.name or "" for value in item.inputs if value.const_value is None]
        read = list(dict.fromkeys(read))
        alone = extractor.extract_model(read, [value.name or "" for value in item.outputs])
        yield Unit(
            item=item, model=_loaded(alone), integers={name: to_integers(arrays[name], plan, name) for name in read}
        )


def _loaded(proto: onnx.ModelProto) -> ir.Model:
    return ir.from_proto(proto)


def spelled_unit(unit: Unit, plan: QuantizationPlan, spelling: SpellingName) -> ir.Model:
    placement = Placement(target="test", integer_nodes=unit.item.names, float_nodes={})
    return spell(unit.model, plan, placement, spelling)


def run_unit(unit: Unit, plan: QuantizationPlan, spelling: SpellingName, *, optimized: bool = True) -> list[Integers]:
    """The integers that the unit makes in ONNX Runtime, spelled so; its kernels unless `optimized` is False."""
    feeds = {name: to_real(integers, plan, name) for name, integers in unit.integers.items()}
    results = run(spelled_unit(unit, plan, spelling), feeds, optimized=optimized)
    names = [value.name or "" for value in unit.item.outputs]
    return [to_integers(real, plan, name) for real, name in zip(results, names, strict=True)]
