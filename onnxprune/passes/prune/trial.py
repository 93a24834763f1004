"""Removing channels with a net: what comes out is checked, and a group that breaks the model is put back alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import Batch, PassContext
from onnxprune.errors import OnnxPruneError
from onnxprune.graph.limits import BIG_WEIGHTS_BYTES
from onnxprune.graph.verify import verify
from onnxprune.graph.weights import weight_bytes
from onnxprune.ops.channels import ChannelPolicy
from onnxprune.passes.prune.analysis import analyze_channels
from onnxprune.passes.prune.oracle import largest_difference, masked_model
from onnxprune.passes.prune.plan import PrunedGroup, flags_from_plan
from onnxprune.passes.prune.surgery import remove_channels
from onnxprune.runtime.feeds import working_feeds
from onnxprune.runtime.sessions import ort_runner_from_model

__all__ = ["PrunedModel", "RolledBack", "remove_with_rollback"]

# float32 sums in another order differ by a few 1e-7 per layer; a wrong cut changes outputs by whole percents.
_ORACLE_TOLERANCE = 1e-3
# float16 has 11 bits, bfloat16 8.
_ORACLE_TOLERANCE_HALF = 5e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack:
    """A group that was not pruned because the model broke with it."""

    group: PrunedGroup
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrunedModel:
    """The result: `model`, the groups that were pruned, and those that were put back.

    `oracle_difference` is the difference from the masked original where it was asked for.
    """

    model: ir.Model
    groups: tuple[PrunedGroup, ...]
    rolled_back: tuple[RolledBack, ...]
    was_run: bool
    oracle_difference: float | None


def remove_with_rollback(
    model: ir.Model,
    groups: Sequence[PrunedGroup],
    context: PassContext,
    *,
    with_oracle: bool,
    policy: ChannelPolicy | None = None,
) -> PrunedModel:
    """Prune `groups` on copies of `model`, which stays as it is.

    Each result is checked: canonical form, shapes, the outputs' shapes, one run in ONNX Runtime where the original
    runs there, and the oracle where asked for. When all groups together fail, halves are tried, down to single groups.

    Raises:
        PassError: `groups` do not fit `model`.
    """
    trial = _Trial(model, context, policy, with_oracle=with_oracle)
    done, reason = trial.attempt(groups)
    rolled_back: list[RolledBack] = []
    kept_groups = tuple(groups)
    if done is None:
        kept_groups = _largest_working(trial, groups, reason, rolled_back)
        done, _ = trial.attempt(kept_groups)
    if done is None:
        # Each half worked alone and not together: add group by group.
        kept_groups = ()
        for group in groups:
            attempt, reason = trial.attempt((*kept_groups, group))
            if attempt is None:
                rolled_back.append(RolledBack(group=group, reason=reason))
            else:
                kept_groups, done = (*kept_groups, group), attempt
    pruned = done or _Attempt(model=model.clone(), oracle_difference=None)
    return PrunedModel(
        model=pruned.model,
        groups=kept_groups,
        rolled_back=tuple({item.group: item for item in rolled_back}.values()),
        was_run=trial.can_run,
        oracle_difference=pruned.oracle_difference,
    )


def _largest_working(
    trial: _Trial, groups: Sequence[PrunedGroup], reason: str, rolled_back: list[RolledBack]
) -> tuple[PrunedGroup, ...]:
    """Groups that work, found by halving; `groups` as a whole failed for `reason`."""
    if len(groups) == 1:
        rolled_back.append(RolledBack(group=groups[0], reason=reason))
        return ()
    middle = len(groups) // 2
    working: list[PrunedGroup] = []
    for half in (groups[:middle], groups[middle:]):
        done, half_reason = trial.attempt(half)
        working.extend(half if done is not None else _largest_working(trial, half, half_reason, rolled_back))
    return tuple(working)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Attempt:
    model: ir.Model
    oracle_difference: float | None


class _Trial:
    """The original and what is needed to hold a pruned model against it."""

    def __init__(
        self, model: ir.Model, context: PassContext, policy: ChannelPolicy | None, *, with_oracle: bool
    ) -> None:
        self._model = model
        self._policy = policy
        self._context = context
        self._with_oracle = with_oracle
        self._feeds: Batch | None = None
        self._expected_shapes: dict[str, tuple[int, ...]] = {}
        # Larger models are checked by their shapes only: ONNX Runtime would hold their weights once more.
        if weight_bytes(model) <= BIG_WEIGHTS_BYTES:
            self._run_original()

    @property
    def can_run(self) -> bool:
        """True when the original runs in ONNX Runtime, so that pruned models must, too."""
        return self._feeds is not None

    def attempt(self, groups: Sequence[PrunedGroup]) -> tuple[_Attempt | None, str]:
        """The model without `groups`, or None and what is wrong with it."""
        pruned = self._model.clone()
        classes = analyze_channels(pruned, self._policy)
        keeps = flags_from_plan(classes, groups)
        try:
            remove_channels(pruned, classes, keeps)
            verify(pruned)
            problem = self._shape_problem(pruned)
            if problem:
                return None, problem
            if self._feeds is None:
                return _Attempt(model=pruned, oracle_difference=None), ""
            outputs = self._run(pruned, self._feeds)
        except OnnxPruneError as error:
            return None, error.message
        for name, shape in self._expected_shapes.items():
            if outputs[name].shape != shape:
                return None, f"output '{name}' has shape {outputs[name].shape} instead of {shape}"
        return self._against_oracle(pruned, keeps, outputs)

    def _against_oracle(
        self, pruned: ir.Model, keeps: npt.NDArray[np.bool_], outputs: Batch
    ) -> tuple[_Attempt | None, str]:
        if not self._with_oracle or self._feeds is None:
            return _Attempt(model=pruned, oracle_difference=None), ""
        expected = self._run(masked_model(self._model, keeps, self._policy), self._feeds)
        difference = largest_difference(expected, outputs)
        tolerance = _ORACLE_TOLERANCE_HALF if self._is_half() else _ORACLE_TOLERANCE
        if not difference <= tolerance:
            return None, f"outputs differ from the masked original by {difference:.2g} of their range"
        return _Attempt(model=pruned, oracle_difference=difference), ""

    def _shape_problem(self, pruned: ir.Model) -> str:
        for old, new in zip(self._model.graph.outputs, pruned.graph.outputs, strict=True):
            if old.shape is None or new.shape is None:
                continue
            pairs = zip(old.shape, new.shape, strict=False)
            differs = any(a != b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
            if len(old.shape) != len(new.shape) or differs:
                return f"output '{new.name}' would change its shape from {old.shape} to {new.shape}"
        return ""

    def _run_original(self) -> None:
        try:
            runner = ort_runner_from_model(
                self._model, custom_op_libraries=self._context.custom_op_libraries, optimization="basic"
            )
            feeds = working_feeds(runner, seed=self._context.seed)
            outputs = runner.run(feeds)
        except OnnxPruneError:
            return  # what can't be run before can't be held against a run afterwards
        self._feeds = feeds
        self._expected_shapes = {name: array.shape for name, array in outputs.items()}

    def _run(self, model: ir.Model, feeds: Batch) -> Batch:
        runner = ort_runner_from_model(
            model, custom_op_libraries=self._context.custom_op_libraries, optimization="basic"
        )
        return runner.run(feeds)

    def _is_half(self) -> bool:
        halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        return any(value.dtype in halves for value in self._model.graph.initializers.values())
