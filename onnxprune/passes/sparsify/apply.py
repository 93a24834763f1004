"""Carrying a plan out: zeros written into copies of the weights, or, for large models, when they are read."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import CanonicalModel
from onnxprune.errors import UsageError
from onnxprune.graph.weights import constant_array, iter_windows, replace_weight, replace_weight_lazily
from onnxprune.passes.sparsify.decide import WINDOW_BYTES, keys_of_site
from onnxprune.passes.sparsify.patterns import Pattern, Unstructured, parse_pattern, unit_mask
from onnxprune.passes.sparsify.plan import SparsifyPlan, TensorPlan
from onnxprune.passes.sparsify.select import choose
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
        make = partial(_sparse_array, _detached(site), tensor, pattern)
        copied_bytes += site.num_bytes
        if copied_bytes <= MAX_COPIED_BYTES:
            replace_weight(site.value, make())
        else:
            replace_weight_lazily(site.value, site.shape, site.dtype, make)
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


def _sparse_array(source: WeightSite, plan: TensorPlan, pattern: Pattern) -> npt.NDArray[np.generic]:
    """The weight with what `plan` chose set to +0.0; all other bits stay, those of negative zeros too."""
    dtype = source.dtype.numpy()
    # Multiplying the bit patterns by 0 or 1 is several times faster than any masked assignment of NumPy.
    bits = _BITS[dtype.itemsize]
    sparse = np.empty(source.shape, bits)
    chosen = choose(keys_of_site(source, pattern), threshold=plan.threshold, ties=plan.ties)
    if isinstance(pattern, Unstructured):
        flat = sparse.reshape(-1)
        windows = iter_windows(source.value, WINDOW_BYTES)
        for window, is_zeroed in zip(windows, chosen, strict=True):
            target = flat[window.start : window.start + window.array.size]
            np.multiply(window.array.view(bits), ~is_zeroed, out=target)
    else:
        mask = unit_mask(pattern, np.concatenate(list(chosen)), source.shape, source.axes)
        weight = constant_array(source.value)
        np.multiply(np.ascontiguousarray(weight).view(bits), ~mask, out=sparse)
    return sparse.view(dtype)


def _detached(site: WeightSite) -> WeightSite:
    """The same weight, apart from the model: it keeps its tensor when the model's is replaced."""
    value = ir.Value(name=site.name, shape=ir.Shape(site.shape), type=site.value.type, const_value=site.tensor)
    return replace(site, value=value)
