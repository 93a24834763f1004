"""The pass `prune`: the filters and channels that matter least are physically removed."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from typing_extensions import override

from onnxprune.contracts import CanonicalModel, ModelState, Pass, PassContext, PassOutcome
from onnxprune.errors import PreconditionError, quoted_list
from onnxprune.graph.scope import require_scopes
from onnxprune.ops.macs import count_macs_per_sample
from onnxprune.passes.prune.analysis import analyze_channels
from onnxprune.passes.prune.config import PruneConfig
from onnxprune.passes.prune.costs import CostModel
from onnxprune.passes.prune.plan import PruningPlan, flags_from_plan, pruned_groups
from onnxprune.passes.prune.report import pruning_report
from onnxprune.passes.prune.selection import select
from onnxprune.passes.prune.trial import remove_with_rollback

__all__ = ["PrunePass"]


class PrunePass(Pass[PruneConfig, PruningPlan]):
    """Fewer channels, everywhere they reach, and the same computation for those that stay.

    1. Channels that must live or die together form classes (`analyze_channels`); a class is removed as a whole:
       filters, biases, BatchNorm rows, the input slices of whatever reads it, and numbers that count it.
    2. Classes that reach an input, an output or an operator without a rule are frozen, each with its reason.
    3. The lowest scores go until the target is met; no layer falls below `min_channels` or off `channel_multiple`.
    4. The result equals the original with the removed channels masked to zero where they are read (`verify_oracle`
       checks that on the model at hand).
    5. A group whose removal breaks the model is put back alone, and reported.

        x (N,3,H,W) -> Conv 64x3x3x3 -> Relu -> Conv 128x64x3x3 -> y (N,128,H,W)
        x (N,3,H,W) -> Conv 32x3x3x3 -> Relu -> Conv 128x32x3x3 -> y (N,128,H,W)       ratio = 0.5

    Weights are not adapted: accuracy has to be recovered by training, or the ratio kept small.
    """

    name: ClassVar[str] = "prune"
    summary: ClassVar[str] = "removes whole filters and channels, and everything that goes with them"
    config_type: ClassVar[type[PruneConfig]] = PruneConfig
    plan_type: ClassVar[type[PruningPlan]] = PruningPlan

    @override
    def check(self, state: ModelState) -> None:
        """Refuse a MACs target for a model whose MACs are unknown.

        Raises:
            PreconditionError: A dimension other than the batch is dynamic.
        """
        if self.config.target[0] != "macs_ratio":
            return
        macs = count_macs_per_sample(state.model)
        if macs.total is None:
            raise PreconditionError(
                f"Pass '{self.pass_id}' has the target macs_ratio, but the MACs of {quoted_list(macs.dynamic)} depend "
                "on dynamic shapes.",
                "Fix the input with `--shape input=1,3,224,224`, or use `ratio` or `params_ratio`.",
            )

    @override
    def plan(self, state: ModelState, context: PassContext) -> PruningPlan:
        """Rank the channels and choose.

        Raises:
            UsageError: A pattern of `skip` or `scopes` means nothing in the model.
        """
        require_scopes(state.model, self.config.skip, of=f"`skip` of pass '{self.name}'")
        require_scopes(state.model, (s.match for s in self.config.scopes), of=f"`scopes` of pass '{self.name}'")
        classes = analyze_channels(state.model)
        costs = CostModel(state.model, classes)
        selection = select(classes, costs, self.config, context.rng())
        before, after = costs.costs(selection.keeps | True), costs.costs(selection.keeps)
        target, ratio = self.config.target
        return PruningPlan(
            groups=pruned_groups(classes.groups, selection.keeps),
            reached=selection.reached,
            target=target,
            target_ratio=ratio,
            parameters_before=before.parameters,
            parameters_after=after.parameters,
            macs_before=before.macs,
            macs_after=after.macs,
            skipped=tuple((", ".join(group.layers) or group.id, reason) for group, reason in selection.skipped),
        )

    @override
    def apply(self, state: ModelState, plan: PruningPlan, context: PassContext) -> PassOutcome:
        """Remove what `plan` says.

        Raises:
            PassError: The plan was made for another model.
        """
        classes = analyze_channels(state.model)
        costs = CostModel(state.model, classes)
        keeps = flags_from_plan(classes, plan.groups)
        before = costs.costs(keeps | True)
        pruned = None
        if not keeps.all():
            pruned = remove_with_rollback(state.model, plan.groups, context, with_oracle=self.config.verify_oracle)
            keeps = flags_from_plan(classes, pruned.groups)
        report = pruning_report(
            pass_id=self.pass_id,
            pass_name=self.name,
            plan=plan,
            classes=classes,
            keeps=keeps,
            pruned=pruned,
            before=before,
            after=costs.costs(keeps),
        )
        if pruned is None or keeps.all():
            return PassOutcome(state=state, report=report)
        return PassOutcome(state=replace(state, model=CanonicalModel(pruned.model)), report=report)
