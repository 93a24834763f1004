"""The pass `prune`: the filters and channels that matter least are physically removed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
from typing_extensions import override

from onnxprune.contracts import CanonicalModel, Iteration, ModelState, Pass, PassContext, PassOutcome, Requirement
from onnxprune.errors import PluginError, PreconditionError, UsageError, quoted_list
from onnxprune.graph.scope import require_scopes
from onnxprune.ops.macs import count_macs_per_sample
from onnxprune.passes.prune.activations import collect_activations
from onnxprune.passes.prune.analysis import ChannelClasses, ChannelGroup, analyze_channels
from onnxprune.passes.prune.baseline import Baseline
from onnxprune.passes.prune.config import PruneConfig
from onnxprune.passes.prune.costs import CostModel
from onnxprune.passes.prune.criterion_plugins import criterion_file, find_criterion
from onnxprune.passes.prune.decide import decide
from onnxprune.passes.prune.gradients import Gradients, open_gradients
from onnxprune.passes.prune.plan import PruningPlan, flags_from_plan, pruned_groups
from onnxprune.passes.prune.reach import channel_reach
from onnxprune.passes.prune.report import pruning_report
from onnxprune.passes.prune.scoring import Scorer
from onnxprune.passes.prune.trial import remove_with_rollback

__all__ = ["PrunePass"]


class PrunePass(Pass[PruneConfig, PruningPlan]):
    """Fewer channels, everywhere they reach, and the same computation for those that stay.

    1. Channels that must live or die together form classes (`analyze_channels`); a class is removed as a whole:
       filters, biases, BatchNorm rows, the input slices of whatever reads it, and numbers that count it.
    2. Classes that reach an input, an output or an operator without a rule are frozen, each with its reason.
    3. The lowest scores go until the target is met; no layer falls below `min_channels` or
       off a `channel_multiple` that is a number.
    4. The result equals the original with the removed channels masked to zero where they are read, and left out of the
       statistics that are taken over channels (`verify_oracle` checks that on the model at hand).
    5. A group whose removal breaks the model is put back alone, and reported.

        x (N,3,H,W) -> Conv 64x3x3x3 -> Relu -> Conv 128x64x3x3 -> y (N,128,H,W)
        x (N,3,H,W) -> Conv 32x3x3x3 -> Relu -> Conv 128x32x3x3 -> y (N,128,H,W)       ratio = 0.5

    Weights are not adapted: accuracy has to be recovered by training, or the ratio kept small.
    """

    name: ClassVar[str] = "prune"
    summary: ClassVar[str] = "removes whole filters and channels, and everything that goes with them"
    config_type: ClassVar[type[PruneConfig]] = PruneConfig
    plan_type: ClassVar[type[PruningPlan]] = PruningPlan

    @property
    @override
    def requirements(self) -> frozenset[Requirement]:
        """Calibration data where criterion or ranking looks at activations, and timings for a budget of time."""
        needed = set()
        if self.config.ranking == "sensitivity" or self._criterion_needs_calibration():
            needed.add(Requirement.CALIBRATION)
        if self.config.latency_ratio is not None:
            needed.add(Requirement.TIMING)
        return frozenset(needed)

    @property
    @override
    def uses_calibration(self) -> bool:
        """True also for a budget of time: what is timed is a batch of the data, where there are any."""
        return Requirement.CALIBRATION in self.requirements or self.config.latency_ratio is not None

    def _criterion_needs_calibration(self) -> bool:
        try:
            return find_criterion(self.config.criterion).needs == "calibration"
        except (UsageError, PluginError):
            # A plan that is given doesn't need the function; where there is none, `check_files` raises this.
            return False

    @property
    @override
    def files_read(self) -> tuple[Path, ...]:
        """A user's criterion and gradients."""
        gradients = None if self.config.gradients is None else Path(self.config.gradients)
        return tuple(file for file in (criterion_file(self.config.criterion), gradients) if file is not None)

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
    def check_files(self, state: ModelState) -> None:
        """Refuse a criterion or gradients that can't be used.

        Raises:
            UsageError: There is no such file or function, or the criterion needs `gradients`.
            PluginError: The criterion's module fails.
            BadDataError: The gradients don't fit the model.
        """
        if find_criterion(self.config.criterion).needs == "gradients" and self.config.gradients is None:
            raise UsageError(
                f"Criterion '{self.config.criterion}' of pass '{self.pass_id}' needs gradients, but there are none.",
                "Set `gradients` to a .npz or .safetensors file.",
            )
        gradients = self._gradients(state.model)
        if gradients is not None:
            gradients.require_finite()

    @override
    def plan(self, state: ModelState, context: PassContext) -> PruningPlan:
        """Rank the channels and choose.

        Raises:
            UsageError: A pattern of `skip` or `scopes` means nothing in the model.
        """
        require_scopes(state.model, self.config.skip, of=f"`skip` of pass '{self.name}'")
        require_scopes(state.model, (s.match for s in self.config.scopes), of=f"`scopes` of pass '{self.name}'")
        classes = analyze_channels(state.model, self.config.policy)
        costs = CostModel(state.model, classes)
        scorer = self._scorer(state, classes, context)
        baseline = self._baseline(classes, costs, context.iteration)
        decision = decide(state, classes, costs, self.config, scorer, baseline, context)
        before, after = costs.costs(decision.keeps | True), costs.costs(decision.keeps)
        latency = decision.latency
        return PruningPlan(
            groups=pruned_groups(classes.groups, decision.keeps),
            reached=decision.reached,
            target=self.config.target[0],
            target_ratio=decision.target_ratio,
            parameters_before=before.parameters,
            parameters_after=after.parameters,
            macs_before=before.macs,
            macs_after=after.macs,
            skipped=tuple((", ".join(group.layers) or group.id, reason) for group, reason in decision.skipped),
            latency_ratio_predicted=latency.predicted_ratio if latency is not None else None,
            latency_ratio_measured=latency.measured_ratio if latency is not None else None,
            notes=tuple(self._criterion_notes(classes, scorer, [group for group, _ in decision.skipped])),
        )

    def _baseline(self, classes: ChannelClasses, costs: CostModel, iteration: Iteration | None) -> Baseline:
        if iteration is None:
            return Baseline.of(classes, costs)
        original = analyze_channels(iteration.original.model, self.config.policy)
        target, ratio = self.config.target
        return Baseline.of(
            original,
            CostModel(iteration.original.model, original),
            iteration,
            ratio=ratio if target == "ratio" else 0.0,
        )

    def _scorer(self, state: ModelState, classes: ChannelClasses, context: PassContext) -> Scorer:
        criterion = find_criterion(self.config.criterion)
        activations = None
        if criterion.needs == "calibration" and context.calibration is not None:
            activations = collect_activations(
                state.model,
                classes,
                context.calibration,
                custom_op_libraries=context.custom_op_libraries,
                progress=context.progress,
            )
        return Scorer(
            criterion=criterion,
            rng=context.rng(),
            activations=activations,
            gradients=self._gradients(state.model, classes),
        )

    def _gradients(self, model: ir.Model, classes: ChannelClasses | None = None) -> Gradients | None:
        if self.config.gradients is None:
            return None
        classes = classes or analyze_channels(model, self.config.policy)
        return open_gradients(Path(self.config.gradients), model, classes)

    def _criterion_notes(
        self, classes: ChannelClasses, scorer: Scorer, skipped: Sequence[ChannelGroup]
    ) -> Iterable[str]:
        if scorer.gradients is not None and scorer.gradients.unused:
            unused = quoted_list(scorer.gradients.unused, limit=3)
            yield f"'{scorer.gradients.path.name}' has gradients of {unused}, which the model has no weight for."
        left_alone = {group.id for group in skipped}
        groups = [g for g in classes.groups if g.frozen_reason is None and g.id not in left_alone]
        for reason, names in scorer.unsuited(classes, groups).items():
            yield (
                f"Criterion '{self.config.criterion}' can't score {len(names)} of {len(groups)} groups of channels, "
                f"{quoted_list(names, limit=3)}: {reason}. They are ranked by 'l2'."
            )

    @override
    def apply(self, state: ModelState, plan: PruningPlan, context: PassContext) -> PassOutcome:
        """Remove what `plan` says.

        Raises:
            PassError: The plan was made for another model.
        """
        classes = analyze_channels(state.model, self.config.policy)
        costs = CostModel(state.model, classes)
        keeps = flags_from_plan(classes, plan.groups)
        before = costs.costs(keeps | True)
        pruned = None
        if not keeps.all():
            pruned = remove_with_rollback(
                state.model,
                plan.groups,
                context,
                with_oracle=self.config.verify_oracle,
                policy=self.config.policy,
            )
            keeps = flags_from_plan(classes, pruned.groups)
        report = pruning_report(
            pass_id=self.pass_id,
            pass_name=self.name,
            plan=plan,
            classes=classes,
            reach=channel_reach(state.model, classes),
            keeps=keeps,
            pruned=pruned,
            before=before,
            after=costs.costs(keeps),
            channel_multiple=self.config.channel_multiple,
        )
        if pruned is None or keeps.all():
            return PassOutcome(state=state, report=report)
        return PassOutcome(state=replace(state, model=CanonicalModel(pruned.model)), report=report)
