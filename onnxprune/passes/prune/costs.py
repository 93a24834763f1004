"""What a model costs as a function of the classes that are kept, without building it.

Parameters and bytes of a weight are proportional to the kept positions on each labelled axis, MACs of a node to those
of the axes that its channel rule named. All are exact for static shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.evaluate.figures import holds_parameters
from onnxprune.ops.channels import LabelArray, MacsTerm
from onnxprune.ops.macs import count_macs_per_sample
from onnxprune.passes.prune.analysis import ChannelClasses

__all__ = ["CostModel", "Costs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a model weighs and computes.

    Attributes:
        parameters: As `evaluate.figures` defines them.
        macs: Of one sample; None where more than the batch is dynamic.
        weight_bytes: Of all initializers, in the types that they are stored in.
    """

    parameters: int
    macs: int | None
    weight_bytes: int


_Item: TypeAlias = tuple[int, tuple[int, ...]]
"""A size, and the axes whose kept parts it is proportional to."""


class CostModel:
    """Costs of `model` for any choice of kept classes."""

    def __init__(self, model: ir.Model, classes: ChannelClasses) -> None:
        self._axes: list[LabelArray] = []
        self._axis_ids: dict[bytes, int] = {}
        weights: list[_Item] = []
        stored: list[_Item] = []
        labelled = classes.labelling.weights
        for graph in model.graphs():
            for value in graph.initializers.values():
                if value.const_value is None:
                    continue
                factors = self._factors(classes, labelled.get(value, {}).values())
                stored.append((value.const_value.nbytes, factors))
                if holds_parameters(value):
                    weights.append((value.const_value.size, factors))
        macs = count_macs_per_sample(model)
        self._macs_known = macs.total is not None
        self._parameter_sum, self._byte_sum = _SumOfProducts(weights), _SumOfProducts(stored)
        self._macs_sum = _SumOfProducts(self._macs_items(model, classes, macs.per_node))
        self._lengths = np.array([len(axis) for axis in self._axes], dtype=np.float64)
        self._starts = np.cumsum([0, *(len(axis) for axis in self._axes)])[:-1]
        self._joined = np.concatenate(self._axes) if self._axes else np.zeros(0, dtype=np.int64)

    def _macs_items(self, model: ir.Model, classes: ChannelClasses, per_node: Mapping[str, int]) -> list[_Item]:
        items = []
        for node in model.graph:
            count = per_node.get(node.name or node.op_type, 0)
            if not count:
                continue
            terms = classes.labelling.macs_terms.get(node, (MacsTerm(1.0, ()),))
            items += [(round(count * term.share), self._factors(classes, term.axes)) for term in terms]
        return items

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
            parameters=self._parameter_sum.at(ratios),
            macs=self._macs_sum.at(ratios) if self._macs_known else None,
            weight_bytes=self._byte_sum.at(ratios),
        )


class _SumOfProducts:
    """Sizes, each of them times the kept part of some axes, as arrays: budgets ask for thousands of sums."""

    def __init__(self, items: Sequence[_Item]) -> None:
        self._sizes = np.array([size for size, _ in items], dtype=np.float64)
        most = max((len(axes) for _, axes in items), default=0)
        # Axis -1 is the 1 behind the last ratio: it pads products of fewer factors.
        self._axes = np.full((len(items), most), -1, dtype=np.int64)
        for row, (_, axes) in enumerate(items):
            self._axes[row, : len(axes)] = axes

    def at(self, ratios: npt.NDArray[np.float64]) -> int:
        """The sum when these parts of the axes are kept; each product is a whole number up to rounding."""
        factors = np.append(ratios, 1.0)[self._axes]
        return int(np.rint(self._sizes * factors.prod(axis=1)).sum())
