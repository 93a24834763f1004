"""How far the model's outputs move when one group of channels loses some of them, from calibration data.

The channels that score lowest are masked with zeros wherever something sums over them, one group and one probe at a
time (the per-layer analysis of Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, on outputs instead of
accuracy, so that no labels are needed):

    damage = sum over outputs of |y - y0|^2 / |y0|^2            over all samples; y0 without a mask

With s the part of the group's importance (sum of scores) that a probe removes, damage is taken to follow a * s^b; the
two probes give a and b. Masks are inputs of one model, so that it is loaded once: two probes of g groups take 2 g + 1
passes over the samples, of which there are at most `MAX_SAMPLES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import Batch, CalibrationSource, Progress
from onnxprune.graph.names import UniqueNames
from onnxprune.ops.channels import ChannelPolicy, LabelArray
from onnxprune.passes.calibration import batch_size, run_samples
from onnxprune.passes.prune.allocation import DamageCurve
from onnxprune.passes.prune.analysis import ChannelGroup, analyze_channels
from onnxprune.runtime.sessions import ort_runner_from_model

__all__ = ["MAX_SAMPLES", "damage_curves"]

MAX_SAMPLES = 16
_PROBES = (0.25, 0.5)
# Below 1, taking all of one group before touching another would always be best; above 4 two probes say little.
_EXPONENTS = (1.0, 4.0)
# What outputs that are not finite any more count for, in squared norms of the output.
_WORST_DAMAGE = 1e6
# ONNX Runtime's sums depend on how they are split among threads, so the number is fixed.
_THREADS = 2

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Mask:
    """A model input that holds a factor for each position of an axis; `classes` are those of the positions."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    classes: LabelArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Probe:
    group: str
    share: float
    removed: LabelArray


def damage_curves(
    model: ir.Model,
    policy: ChannelPolicy,
    groups: Sequence[ChannelGroup],
    scores: Scores,
    calibration: CalibrationSource,
    *,
    custom_op_libraries: Sequence[Path],
    progress: Progress,
) -> dict[str, DamageCurve]:
    """The curve of each group, by its id.

    Args:
        model: Unpruned; stays as it is.
        policy: The one that the groups were found under.
        groups: Those that may lose channels.
        scores: One per class of the model.
        calibration: Its first samples are run.
        custom_op_libraries: Shared libraries with custom operators.
        progress: Follows the probes.
    """
    probes = [probe for group in groups for probe in _probes(group, scores)]
    if not probes:
        return {}
    masked, masks = _with_mask_inputs(model, policy, np.concatenate([probe.removed for probe in probes]))
    runner = ort_runner_from_model(masked, threads=_THREADS, custom_op_libraries=custom_op_libraries)
    batches = list(_few_samples(calibration))
    progress.note(
        f"Sensitivity: {len(probes)} probes of {len(groups)} groups on {sum(map(batch_size, batches))} samples"
    )
    ones = {mask.name: np.ones(mask.shape, mask.dtype) for mask in masks}
    expected = [run_samples(runner, {**batch, **ones}, 0) for batch in batches]
    damages: dict[str, list[tuple[float, float]]] = {group.id: [] for group in groups}
    for probe in progress.track(probes, "probing", total=len(probes)):
        feeds = ones | {m.name: _zeroed(m, probe.removed) for m in masks if np.isin(probe.removed[0], m.classes)}
        outputs = (runner.run({**batch, **feeds}) for batch in batches)
        damages[probe.group].append((probe.share, _damage(expected, outputs)))
    return {group: _fitted(points) for group, points in damages.items()}


def _probes(group: ChannelGroup, scores: Scores) -> list[_Probe]:
    own = group.classes[np.argsort(scores[group.classes], kind="stable")]
    importance = np.cumsum(np.maximum(scores[own], 0.0))
    if not importance[-1] > 0:
        importance = np.arange(1.0, len(own) + 1)
    counts = sorted({max(1, round(part * len(own))) for part in _PROBES})
    return [
        _Probe(group=group.id, share=float(importance[count - 1] / importance[-1]), removed=own[:count])
        for count in counts
    ]


def _few_samples(calibration: CalibrationSource) -> Iterable[Batch]:
    """Whole batches until `MAX_SAMPLES` are reached."""
    left = MAX_SAMPLES
    for batch in calibration:
        yield batch
        left -= batch_size(batch)
        if left <= 0:
            return


def _with_mask_inputs(model: ir.Model, policy: ChannelPolicy, wanted: LabelArray) -> tuple[ir.Model, list[_Mask]]:
    """A copy of `model` with a factor, given as an input, on every axis with `wanted` classes that is summed over."""
    masked = model.clone()
    classes = analyze_channels(masked, policy)
    is_wanted = np.zeros(classes.num_classes, dtype=np.bool_)
    is_wanted[wanted] = True
    names, node_names = UniqueNames.of_values(masked), UniqueNames.of_nodes(masked)
    masks: dict[tuple[bytes, int, int, ir.DataType], tuple[_Mask, ir.Value]] = {}
    for contraction in classes.labelling.contractions:
        own = classes.classes_at(contraction.labels)
        value = contraction.node.inputs[contraction.position]
        if (
            value is None
            or value.dtype is None
            or contraction.node.graph is not masked.graph
            or not is_wanted[own].any()
        ):
            continue
        key = (own.tobytes(), contraction.axis, contraction.rank, value.dtype)
        if key not in masks:
            shape = tuple(len(own) if axis == contraction.axis else 1 for axis in range(contraction.rank))
            name = names.claim("channel_mask")
            mask = _Mask(name=name, shape=shape, dtype=value.dtype.numpy(), classes=own)
            factor = ir.val(name, dtype=value.dtype, shape=shape)
            masked.graph.inputs.append(factor)
            masks[key] = (mask, factor)
        product = ir.Value(name=names.claim(f"{value.name}_masked"), shape=value.shape, type=value.type)
        multiply = ir.Node(
            "", "Mul", [value, masks[key][1]], outputs=[product], name=node_names.claim(f"{contraction.node.name}_mask")
        )
        masked.graph.insert_before(contraction.node, multiply)
        contraction.node.replace_input_with(contraction.position, product)
    return masked, [mask for mask, _ in masks.values()]


def _zeroed(mask: _Mask, removed: LabelArray) -> npt.NDArray[Any]:
    return (~np.isin(mask.classes, removed)).astype(mask.dtype).reshape(mask.shape)


def _damage(expected: Sequence[Batch], outputs: Iterable[Batch]) -> float:
    """The sum over outputs of the squared relative difference; for integers, the part of elements that differ."""
    moved: dict[str, float] = {}
    whole: dict[str, float] = {}
    for wanted, found in zip(expected, outputs, strict=True):
        for name, reference in wanted.items():
            if reference.dtype.kind == "f" or reference.dtype.name == "bfloat16":
                wide = reference.astype(np.float64)
                difference = float(np.square(found[name].astype(np.float64) - wide).sum())
                size = float(np.square(wide).sum())
            elif reference.shape == found[name].shape:
                difference, size = float((reference != found[name]).sum()), float(reference.size)
            else:
                difference, size = float(reference.size), float(reference.size)
            moved[name] = moved.get(name, 0.0) + difference
            whole[name] = whole.get(name, 0.0) + size
    total = sum(moved[name] / whole[name] for name in moved if whole[name] > 0)
    return min(total, _WORST_DAMAGE) if math.isfinite(total) else _WORST_DAMAGE


def _fitted(points: Sequence[tuple[float, float]]) -> DamageCurve:
    """The curve through the last (s, damage), its exponent from the first one where both tell something."""
    share, damage = points[-1]
    first_share, first_damage = points[0]
    exponent = 1.0
    if 0 < first_share < share and first_damage > 0 and damage > 0:
        exponent = math.log(damage / first_damage) / math.log(share / first_share)
    exponent = float(np.clip(exponent, *_EXPONENTS))
    return DamageCurve(scale=damage / share**exponent if share > 0 else 0.0, exponent=exponent)
