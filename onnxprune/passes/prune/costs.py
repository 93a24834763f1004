"""What a model costs as a function of the classes that are kept, without building it.

Parameters of a weight are proportional to the kept positions on each labelled axis, MACs of a node to those of the
axes that its channel rule named. Both are exact for static shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.evaluate.figures import holds_parameters
from onnxprune.ops.channels import LabelArray
from onnxprune.ops.macs import count_macs_per_sample
from onnxprune.passes.prune.analysis import ChannelClasses

__all__ = ["CostModel", "Costs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Parameters (as `evaluate.figures` defines them), and MACs of one sample: None where more than that is dynamic."""

    parameters: int
    macs: int | None


class CostModel:
    """Costs of `model` for any choice of kept classes."""

    def __init__(self, model: ir.Model, classes: ChannelClasses) -> None:
        self._axes: list[LabelArray] = []
        self._axis_ids: dict[bytes, int] = {}
        self._weights: list[tuple[int, tuple[int, ...]]] = []
        self._nodes: list[tuple[int, tuple[int, ...]]] = []
        labelled = classes.labelling.weights
        for graph in model.graphs():
            for value in graph.initializers.values():
                if value.const_value is None or not holds_parameters(value):
                    continue
                self._weights.append((value.const_value.size, self._factors(classes, labelled.get(value, {}).values())))
        macs = count_macs_per_sample(model)
        self._macs_known = macs.total is not None
        self._collect_nodes(model, classes, macs.per_node)
        self._lengths = np.array([len(axis) for axis in self._axes], dtype=np.float64)
        self._starts = np.cumsum([0, *(len(axis) for axis in self._axes)])[:-1]
        self._joined = np.concatenate(self._axes) if self._axes else np.zeros(0, dtype=np.int64)

    def _collect_nodes(self, model: ir.Model, classes: ChannelClasses, per_node: Mapping[str, int]) -> None:
        for node in model.graph:
            count = per_node.get(node.name or node.op_type, 0)
            if count:
                self._nodes.append((count, self._factors(classes, classes.labelling.macs_axes.get(node, ()))))

    def _factors(self, classes: ChannelClasses, axes: Iterable[LabelArray]) -> tuple[int, ...]:
        return tuple(self._axis(classes.classes_at(labels)) for labels in axes if len(labels))

    def _axis(self, class_array: LabelArray) -> int:
        key = class_array.tobytes()
        if key not in self._axis_ids:
            self._axis_ids[key] = len(self._axes)
            self._axes.append(class_array)
        return self._axis_ids[key]

    def costs(self, keeps: npt.NDArray[np.bool_]) -> Costs:
        """Costs when exactly the classes flagged in `keeps` stay."""
        kept_counts = np.zeros(0)
        if len(self._joined):
            kept_counts = np.add.reduceat(keeps[self._joined].astype(np.int64), self._starts)
        ratios = kept_counts / self._lengths
        return Costs(
            parameters=self._sum(self._weights, ratios),
            macs=self._sum(self._nodes, ratios) if self._macs_known else None,
        )

    @staticmethod
    def _sum(items: list[tuple[int, tuple[int, ...]]], ratios: npt.NDArray[np.float64]) -> int:
        total = 0
        for size, axes in items:
            factor = 1.0
            for axis in axes:
                factor *= float(ratios[axis])
            total += round(size * factor)
        return total
