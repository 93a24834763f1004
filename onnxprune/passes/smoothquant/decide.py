"""Which factors, group by group, and whether all of them together help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import Batch, CanonicalModel, PassContext
from onnxprune.errors import PreconditionError
from onnxprune.graph.scope import require_scopes
from onnxprune.graph.weights import constant_array
from onnxprune.passes.calibration import run_samples
from onnxprune.passes.layerwise.channels import layer_weight
from onnxprune.passes.layerwise.gain import Gain
from onnxprune.passes.layerwise.matrices import LayerMatrix, layer_matrix
from onnxprune.passes.layerwise.samples import split_samples
from onnxprune.passes.layerwise.statistics import channel_statistics
from onnxprune.passes.layerwise.trial import trial_snr_db
from onnxprune.passes.smoothquant.apply import apply_groups
from onnxprune.passes.smoothquant.config import SmoothQuantConfig
from onnxprune.passes.smoothquant.factors import ALPHAS, choose_factors
from onnxprune.passes.smoothquant.groups import Group, find_groups
from onnxprune.passes.smoothquant.plan import GroupPlan, SmoothQuantPlan
from onnxprune.runtime.sessions import ort_runner_from_model

__all__ = ["MAX_ROWS", "decide"]

Array = npt.NDArray[Any]

MAX_ROWS = 256
"""Rows of each tensor that the search looks at; all rows count for the ranges."""


def decide(model: CanonicalModel, config: SmoothQuantConfig, context: PassContext) -> SmoothQuantPlan:
    """Factors for every group that gains by them.

    Raises:
        PreconditionError: The run has no calibration data.
    """
    if context.calibration is None:
        raise PreconditionError("SmoothQuant measures activations, but the run has no calibration data.")
    require_scopes(model, config.exclude, of="`exclude` of pass 'smoothquant'")
    groups, skipped = find_groups(model, exclude=config.exclude, insert_mul=config.insert_mul)
    if not groups:
        return SmoothQuantPlan(groups=(), skipped=skipped)
    split = split_samples(context.calibration, max_samples=config.num_samples)
    statistics = channel_statistics(
        model, {group.tensor: -1 for group in groups}, split.fit, custom_op_libraries=context.custom_op_libraries
    )
    known = [group for group in groups if group.tensor in statistics]
    rows = _rows(model, known, split.fit, context)
    alphas = ALPHAS if config.alpha == "auto" else (config.alpha,)
    plans: list[GroupPlan] = []
    for group in context.progress.track(known, "Smoothing", len(known)):
        choice = choose_factors(
            statistics[group.tensor],
            rows[group.tensor],
            [_weight_rows(node) for node in group.layers],
            alphas,
            per_channel=config.per_channel,
            weight_bits=config.weight_bits,
        )
        if config.alpha == "auto" and choice.error_ratio >= 1.0:
            reason = "no alpha makes the error of its output smaller"
            skipped.update({node.name or "": reason for node in group.layers})
            continue
        plans.append(
            GroupPlan(
                tensor=group.tensor,
                layers=tuple(node.name or "" for node in group.layers),
                folds=group.folds,
                factors=tuple(float(factor) for factor in choice.factors),
                alpha=choice.alpha,
                error_ratio=choice.error_ratio,
            )
        )
    if not plans:
        return SmoothQuantPlan(groups=(), skipped=skipped)
    changed = CanonicalModel(model.clone())
    apply_groups(changed, plans)
    before, after = (
        trial_snr_db(model, one, split, context, per_channel=config.per_channel, weight_bits=config.weight_bits)
        for one in (model, changed)
    )
    gain = Gain(before_db=before, after_db=after, measured_on=split.judged_on)
    is_undone = not gain.is_worth_it
    return SmoothQuantPlan(groups=() if is_undone else tuple(plans), skipped=skipped, gain=gain, is_undone=is_undone)


def _rows(
    model: CanonicalModel, groups: Sequence[Group], batches: Sequence[Batch], context: PassContext
) -> dict[str, Array]:
    """`MAX_ROWS` rows of each tensor, drawn from all batches alike."""
    inputs = {value.name for value in model.graph.inputs}
    names = [group.tensor for group in groups if group.tensor not in inputs]
    runner = ort_runner_from_model(model, custom_op_libraries=context.custom_op_libraries, extra_outputs=names)
    rng = context.rng()
    each = max(1, MAX_ROWS // len(batches))
    kept: dict[str, list[Array]] = {group.tensor: [] for group in groups}
    for number, batch in enumerate(batches):
        arrays = {**batch, **run_samples(runner, batch, number)}
        for name, parts in kept.items():
            found = arrays[name].reshape(-1, arrays[name].shape[-1])
            chosen = np.sort(rng.choice(len(found), size=min(each, len(found)), replace=False))
            parts.append(found[chosen])
    return {name: np.concatenate(parts)[:MAX_ROWS] for name, parts in kept.items()}


def _weight_rows(node: ir.Node) -> Array:
    """(outputs, channels)."""
    matrix, array = layer_matrix(node), constant_array(layer_weight(node))
    if not isinstance(matrix, LayerMatrix) or array is None:
        raise ValueError(f"'{node.name}' is no matrix product.")
    found: Array = matrix.to_matrix(array)[0]
    return found
