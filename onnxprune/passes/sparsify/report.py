"""What `sparsify` tells the user."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.contracts import Change, PassReport, Skip
from onnxprune.errors import quoted_list
from onnxprune.evaluate.figures import SPARSE_STORAGES, sparse_storage_bytes
from onnxprune.graph.weights import iter_windows
from onnxprune.passes.sparsify.decide import WINDOW_BYTES
from onnxprune.passes.sparsify.patterns import Unstructured, parse_pattern
from onnxprune.passes.sparsify.plan import SparsifyPlan, TensorPlan
from onnxprune.passes.sparsify.sites import WeightSite

__all__ = ["sparsify_report"]

_NO_SAVING = (
    "Zeros alone make a model neither smaller nor faster on ONNX Runtime, which stores and multiplies them like any "
    "other number. They pay in a compressed download and in runtimes with sparse kernels; `prune` removes whole "
    "channels."
)


def sparsify_report(plan: SparsifyPlan, sites: Sequence[WeightSite], *, pass_id: str, pass_name: str) -> PassReport:
    """The report for weights that now are as `plan` says; `sites` are these weights in the plan's order."""
    units = "weights" if Unstructured() == parse_pattern(plan.pattern) else f"units of pattern '{plan.pattern}'"
    nonzero = [_nonzero(plan, tensor, site) for tensor, site in zip(plan.tensors, sites, strict=True)]
    total = sum(site.size for site in sites)
    zeros = total - sum(nonzero)
    changes = [
        Change(
            what="zeroed" if tensor.changes_weights else "was sparse enough",
            where=site.describe(),
            figures={
                "sparsity": tensor.sparsity,
                "threshold": tensor.threshold,
                "units": tensor.units,
                "units_zero_before": tensor.zero_before,
                "units_zero": max(tensor.zeroed, tensor.zero_before),
                "zeros_ratio": 1 - kept / site.size,
            },
        )
        for tensor, site, kept in zip(plan.tensors, sites, nonzero, strict=True)
        if site.size
    ]
    storage = _storage_bytes(sites, nonzero)
    chosen, all_units = sum(t.zeroed for t in plan.tensors), sum(t.units for t in plan.tensors)
    changed = sum(tensor.changes_weights for tensor in plan.tensors)
    return PassReport(
        pass_id=pass_id,
        pass_name=pass_name,
        summary=(
            f"{zeros:,} of {total:,} weights in {len(sites)} tensors are zero ({zeros / total:.1%}); "
            f"{changed} tensors changed"
            if total
            else "no weight is within reach"
        ),
        changes=tuple(changes),
        skips=tuple(Skip(where=name, reason=reason) for name, reason in plan.skipped.items()),
        notes=(_NO_SAVING, _storage_note(storage), *_emptied(sites, nonzero), *_shortfalls(plan, units))
        if total
        else (),
        figures={
            "weights": total,
            "weights_zeroed": zeros,
            "weights_zeroed_ratio": zeros / total if total else 0.0,
            "units": all_units,
            "units_zeroed": chosen,
            "tensors_changed": changed,
            **{f"{name}_bytes": size for name, size in storage.items()},
        },
    )


def _storage_bytes(sites: Sequence[WeightSite], nonzero: Sequence[int]) -> dict[str, int]:
    """Bytes of these weights as they are stored ("dense") and in each sparse storage."""
    sparse = [
        sparse_storage_bytes(site.shape, site.dtype.bitwidth, kept) for site, kept in zip(sites, nonzero, strict=True)
    ]
    return {
        "dense": sum(site.num_bytes for site in sites),
        **{storage: sum(sizes[storage] for sizes in sparse) for storage in SPARSE_STORAGES},
    }


def _storage_note(storage: dict[str, int]) -> str:
    sparse = ", ".join(f"{storage[name]:,} as {name}" for name in SPARSE_STORAGES)
    return f"These weights take {storage['dense']:,} bytes as they are stored; in sparse storage {sparse}."


def _emptied(sites: Sequence[WeightSite], nonzero: Sequence[int]) -> tuple[str, ...]:
    """A warning about weights of which nothing is left: their node gives the same whatever its input."""
    empty = [site.name for site, kept in zip(sites, nonzero, strict=True) if not kept and site.size]
    if not empty:
        return ()
    return (f"Nothing is left of {quoted_list(empty)}: use a lower sparsity, or scope = 'layer', or skip them.",)


def _shortfalls(plan: SparsifyPlan, units: str) -> tuple[str, ...]:
    """One note for each level that the pattern did not allow to reach."""
    asked: dict[tuple[str, float], list[TensorPlan]] = {}
    for tensor in plan.tensors:
        asked.setdefault((tensor.group, tensor.sparsity), []).append(tensor)
    notes = []
    for (group, level), tensors in asked.items():
        all_units = sum(tensor.units for tensor in tensors)
        chosen = sum(tensor.zeroed for tensor in tensors)
        # Half a unit for each tensor is rounding, when every tensor reaches the level on its own.
        if chosen + len(tensors) < level * all_units:
            notes.append(
                f"Sparsity {level:g} ({group}) is not reached: pattern '{plan.pattern}' allowed {chosen:,} of "
                f"{all_units:,} {units}, because some weights have incomplete groups."
            )
    return tuple(notes)


def _nonzero(plan: SparsifyPlan, tensor: TensorPlan, site: WeightSite) -> int:
    """Weights that are not zero now. Known from the plan where a unit is one weight, else counted."""
    if isinstance(parse_pattern(plan.pattern), Unstructured):
        return tensor.units - max(tensor.zeroed, tensor.zero_before)
    return sum(int(np.count_nonzero(window.array)) for window in iter_windows(site.value, WINDOW_BYTES))
