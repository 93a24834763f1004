"""Carrying a plan out: zeros written into copies of the weights, or, for large models, when they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import CanonicalModel
from onnxprune.errors import UsageError
from onnxprune.graph.weights import (
    StartEdit,
    constant_array,
    replace_weight,
    replace_weight_by_windows,
    replace_weight_lazily,
)
from onnxprune.passes.sparsify.patterns import Pattern, Unstructured, parse_pattern, unit_keys, unit_mask, window_keys
from onnxprune.passes.sparsify.plan import SparsifyPlan, TensorPlan
from onnxprune.passes.sparsify.select import Chooser
from onnxprune.passes.sparsify.sites import WeightSite, find_weights

__all__ = ["MAX_COPIED_BYTES", "apply_plan"]

MAX_COPIED_BYTES = 256 << 20
"""Up to here changed weights are held in memory; beyond it they are made anew whenever they are read."""

_BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def apply_plan(model: CanonicalModel, plan: SparsifyPlan) -> tuple[WeightSite, ...]:
    """Zero in `model`, in place, what `plan` says; those weights in the plan's order.

    Raises:
        UsageError: The plan names a weight that the model does not have.
    """
    pattern = parse_pattern(plan.pattern)
    sites = {site.name: site for site in find_weights(model).sites}
    touched = tuple(_find(sites, tensor) for tensor in plan.tensors)
    copied_bytes = 0
    for site, tensor in zip(touched, plan.tensors, strict=True):
        if not tensor.changes_weights:
            continue
        if isinstance(pattern, Unstructured):
            replace_weight_by_windows(site.value, _start_zeroing(tensor, site.dtype))
        else:
            make = partial(_sparse_array, _detached(site), tensor, pattern)
            replace_weight_lazily(site.value, site.shape, site.dtype, make)
        copied_bytes += site.num_bytes
        sparse = constant_array(site.value) if copied_bytes <= MAX_COPIED_BYTES else None
        if sparse is not None:
            replace_weight(site.value, sparse, dtype=site.dtype)
    return touched


def _find(sites: dict[str, WeightSite], tensor: TensorPlan) -> WeightSite:
    site = sites.get(tensor.tensor)
    if site is None:
        raise UsageError(
            f"The plan for pass 'sparsify' names the weight '{tensor.tensor}', which this model does not have.",
            "Use a plan that was made for this model.",
        )
    if tensor.threshold > 0 and site.size < tensor.units:
        raise UsageError(
            f"The plan for pass 'sparsify' counts {tensor.units} units in {site.describe()}, which has fewer weights.",
            "Use a plan that was made for this model.",
        )
    return site


def _start_zeroing(plan: TensorPlan, dtype: ir.DataType) -> StartEdit:
    """Edits windows of single weights: what `plan` chose becomes +0.0, all other bits stay."""
    bits = _BITS[dtype.numpy().itemsize]

    def start() -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
        is_zeroed = Chooser(threshold=plan.threshold, ties=plan.ties)

        def zero(weights: npt.NDArray[Any]) -> npt.NDArray[Any]:
            # Multiplying the bit patterns by 0 or 1 is several times faster than any masked assignment of NumPy.
            sparse: npt.NDArray[Any] = np.multiply(weights.view(bits), ~is_zeroed(window_keys(weights)))
            return sparse.view(weights.dtype)

        return zero

    return start


def _sparse_array(source: WeightSite, plan: TensorPlan, pattern: Pattern) -> npt.NDArray[Any]:
    """The whole weight with the units that `plan` chose set to +0.0."""
    weight = constant_array(source.value)
    if weight is None:
        raise ValueError(f"'{source.name}' is not constant.")
    is_zeroed = Chooser(threshold=plan.threshold, ties=plan.ties)
    mask = unit_mask(pattern, is_zeroed(unit_keys(pattern, weight, source.axes)), source.shape, source.axes)
    return np.where(mask, weight.dtype.type(0), weight)


def _detached(site: WeightSite) -> WeightSite:
    """The same weight, apart from the model: it keeps its tensor when the model's is replaced."""
    value = ir.Value(name=site.name, shape=ir.Shape(site.shape), type=site.value.type, const_value=site.tensor)
    return replace(site, value=value)
