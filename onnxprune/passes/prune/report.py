"""What `prune` says about what it did, and about what it left and why."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import numpy.typing as npt

from onnxprune.contracts import Change, PassReport, Skip
from onnxprune.errors import quoted_list
from onnxprune.passes.prune.analysis import ChannelClasses, ChannelGroup
from onnxprune.passes.prune.costs import Costs
from onnxprune.passes.prune.plan import PruningPlan
from onnxprune.passes.prune.reach import ChannelReach
from onnxprune.passes.prune.trial import PrunedModel

__all__ = ["pruning_report"]

# A model that loses parameters only (late, small feature maps) gets hardly faster.
_NOTEWORTHY_PARAMETERS = 0.05
_MACS_PART_OF_PARAMETERS = 0.2
# ONNX Runtime's blocked convolution kernels take channels 8 (AVX2) or 16 (AVX-512) at a time, and only such widths:
# FastestDet with 30 % of its channels gone ran 1.17x slower at odd widths, and 1.15x faster at multiples of 8.
_KERNEL_BLOCK = 8
# A measured latency ratio this far from the target is said to miss it.
_MISSED_LATENCY = 0.05


def pruning_report(
    *,
    pass_id: str,
    pass_name: str,
    plan: PruningPlan,
    classes: ChannelClasses,
    reach: ChannelReach,
    keeps: npt.NDArray[np.bool_],
    pruned: PrunedModel | None,
    before: Costs,
    after: Costs,
    channel_multiple: int | Literal["auto"],
) -> PassReport:
    """The report; all but `pruned` and `after` are of the unpruned model, `pruned` is None where nothing was to do."""
    groups = [group for group in classes.groups if group.slices]
    total = sum(group.num_channels for group in groups)
    removed = sum(_removed(group, keeps) for group in groups)
    frozen = sum(group.num_channels for group in groups if group.frozen_reason is not None)
    figures: dict[str, float] = {
        "channels_before": total,
        "channels_after": total - removed,
        "channels_frozen": frozen,
        "parameters_before": before.parameters,
        "parameters_after": after.parameters,
        "weight_bytes_before": before.weight_bytes,
        "weight_bytes_after": after.weight_bytes,
    }
    if before.macs is not None and after.macs is not None:
        figures |= {"macs_before": before.macs, "macs_after": after.macs}
    if plan.latency_ratio_measured is not None:
        figures["latency_ratio_measured"] = plan.latency_ratio_measured
    if pruned is not None and pruned.oracle_difference is not None:
        figures["oracle_difference"] = pruned.oracle_difference
    return PassReport(
        pass_id=pass_id,
        pass_name=pass_name,
        summary=_summary(removed, total, before, after),
        changes=_changes(classes, keeps),
        skips=_skips(plan, classes, reach, pruned),
        notes=(
            *plan.notes,
            *_notes(plan, classes, keeps, pruned, before, after),
            *_width_notes(classes, keeps, channel_multiple),
        ),
        figures=figures,
    )


def _removed(group: ChannelGroup, keeps: npt.NDArray[np.bool_]) -> int:
    return int((~keeps[group.classes]).sum()) * (group.num_channels // len(group))


def _summary(removed: int, total: int, before: Costs, after: Costs) -> str:
    if not removed:
        return "no channel was removed"
    text = f"{removed} of {total} channels removed: parameters {_down(before.parameters, after.parameters)}"
    if before.macs and after.macs is not None:
        text += f", MACs {_down(before.macs, after.macs)}"
    return text


def _down(before: int, after: int) -> str:
    return f"-{100 * (1 - after / before):.1f} %" if before else "none"


def _changes(classes: ChannelClasses, keeps: npt.NDArray[np.bool_]) -> tuple[Change, ...]:
    """One change for each layer that became narrower."""
    changes: dict[str, Change] = {}
    for width in classes.widths:
        kept, size = int(keeps[width.classes].sum()), len(width.classes)
        if kept < size:
            figures = {"channels_before": float(size), "channels_after": float(kept)}
            changes[width.layer] = Change(what=f"{width.op_type} narrowed", where=width.layer, figures=figures)
    return tuple(changes.values())


def _skips(
    plan: PruningPlan, classes: ChannelClasses, reach: ChannelReach, pruned: PrunedModel | None
) -> tuple[Skip, ...]:
    skips = [
        Skip(
            where=_where(group),
            reason=f"frozen: {group.frozen_reason}",
            figures={"channels": group.num_channels, "parameters": held.unreachable},
        )
        for group, held in zip(classes.groups, reach.groups, strict=True)
        if group.slices and group.frozen_reason is not None
    ]
    skips += [Skip(where=where, reason=reason) for where, reason in plan.skipped]
    skips += [
        Skip(where=", ".join(item.group.layers) or item.group.weight, reason=f"put back: {item.reason}")
        for item in (pruned.rolled_back if pruned is not None else ())
    ]
    return tuple(skips)


def _where(group: ChannelGroup) -> str:
    return ", ".join(group.layers) or group.id


def _approximation_notes(classes: ChannelClasses, keeps: npt.NDArray[np.bool_]) -> Iterable[str]:
    """What is not exact: statistics that are now taken over fewer channels."""
    touched = [g for g in classes.groups if g.approximate and not keeps[g.classes].all()]
    if touched:
        found = list(dict.fromkeys(what for group in touched for what in group.approximate))
        yield (
            f"Approximate: {_counted(len(found), 'statistic')} over channels (LayerNorm, means, Softmax) are now those "
            f"of the channels that are left. The first {found[0]}. Set exact = true to leave such channels alone."
        )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _notes(
    plan: PruningPlan,
    classes: ChannelClasses,
    keeps: npt.NDArray[np.bool_],
    pruned: PrunedModel | None,
    before: Costs,
    after: Costs,
) -> Iterable[str]:
    removed = not keeps.all()
    if plan.latency_ratio_measured is not None and plan.latency_ratio_predicted is not None:
        yield (
            f"Measured on the machine that decided, the pruned model takes {plan.latency_ratio_measured:.3g} of the "
            f"original's time (predicted from its layers: {plan.latency_ratio_predicted:.3g}, asked for: "
            f"{plan.target_ratio:.3g})."
        )
        if abs(plan.latency_ratio_measured - plan.target_ratio) > _MISSED_LATENCY:
            yield (
                "That misses the target: the widths that kernels take, and what can't be removed, leave no choice "
                "nearer to it. Small models have few such widths; `macs_ratio` or `ratio` can be met more closely."
            )
    if not removed and not plan.groups and any(g.frozen_reason is None and g.slices for g in classes.groups):
        yield (
            "Channels that may go were all kept: fewer would leave layers below `min_channels` (by default the larger "
            "of 8 and an eighth of a layer's width), off `channel_multiple`, or the ratio is less than one channel."
        )
    if not plan.reached:
        yield (
            f"The target {plan.target} = {plan.target_ratio:g} can't be reached: frozen layers, `min_channels` and "
            "`channel_multiple` leave too little to remove. Everything that may go is gone."
        )
    if removed and pruned is not None and not pruned.was_run:
        yield (
            "The pruned model was checked by its shapes only: the original is too large for a trial run, or ONNX "
            "Runtime can't run it here."
        )
    if removed and pruned is not None and pruned.oracle_difference is not None:
        yield (f"Outputs equal those of the masked original within {pruned.oracle_difference:.1g} of their range.")
    yield from _approximation_notes(classes, keeps)
    if before.macs and after.macs is not None and before.parameters:
        parameters_down = 1 - after.parameters / before.parameters
        macs_down = 1 - after.macs / before.macs
        if parameters_down > _NOTEWORTHY_PARAMETERS and macs_down < _MACS_PART_OF_PARAMETERS * parameters_down:
            yield (
                f"Parameters fell by {100 * parameters_down:.1f} %, but MACs only by {100 * macs_down:.1f} %: expect a "
                "smaller file rather than a faster model. A target of `macs_ratio` prunes where the time goes."
            )


def _width_notes(
    classes: ChannelClasses, keeps: npt.NDArray[np.bool_], channel_multiple: int | Literal["auto"]
) -> Iterable[str]:
    if channel_multiple == "auto":
        return
    odd: list[str] = []
    for width in classes.widths:
        kept = int(keeps[width.classes].sum())
        if width.op_type == "Conv" and kept % _KERNEL_BLOCK and not len(width.classes) % _KERNEL_BLOCK:
            odd.append(width.layer)
    if odd:
        yield (
            f"The widths of {quoted_list(odd, limit=3)} are no longer multiples of {_KERNEL_BLOCK}, which fast "
            'convolution kernels need: the model may even get slower. Leave channel_multiple at "auto", or set '
            f"{_KERNEL_BLOCK}."
        )
