"""The one way to run a pass: its author's code between what the pass requires and what it must leave true.

`run_pass` is for the pipeline and for library users alike. Around `plan` and `apply` it checks, in this order:

1. the run has what the pass requires, and the pass accepts the model (`check`);
2. the model it is given keeps the canonical form;
3. `plan` returned a `plan_type` and left the model alone;
4. `apply`, which works on a copy that shares the weights, left the caller's model alone;
5. the inputs and outputs are the same as before;
6. the result keeps the canonical form, with shapes inferred anew;
7. ONNX Runtime loads and runs the result (models of up to `MAX_TRIAL_RUN_BYTES`).

What fails in 3 to 7 is a fault of the pass's author, never of the user: `VerificationError` for our own passes and
`PluginError` for a third party's, and the message names a folder with the model before, the model after and the plan.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from pydantic import TypeAdapter, ValidationError

from onnxprune.contracts import (
    CanonicalModel,
    JsonValue,
    ModelState,
    Pass,
    PassContext,
    PassOutcome,
    Requirement,
)
from onnxprune.errors import OnnxPruneError, PluginError, PreconditionError, UsageError, VerificationError, quoted_list
from onnxprune.graph.io import save_model
from onnxprune.graph.shapes import refresh_shapes
from onnxprune.graph.verify import verify
from onnxprune.graph.weights import weight_bytes
from onnxprune.ops.shapes import SHAPES

__all__ = ["MAX_TRIAL_RUN_BYTES", "check_requirements", "plan_from_json", "plan_to_json", "run_pass"]

MAX_TRIAL_RUN_BYTES = 500_000_000
"""Models with more bytes of weights are neither run on trial nor written to a dump.

A trial run takes about three times the weights in memory (serialized, parsed, prepared), and seconds for each GB.
"""

# What to give for each requirement: the library's argument and the command's option.
_HOW_TO_GIVE = {
    Requirement.CALIBRATION: "Give `--calibration FOLDER` (images or .npz; `calibration=` in the library)",
    Requirement.EVALUATOR: "Give `--eval DATA` (labelled images, .npz or module:function; `evaluator=` in the library)",
    Requirement.TIMING: "Only this machine can be timed: build for it and measure, or set another target",
}

ResultT = TypeVar("ResultT")


def check_requirements(
    passes: Sequence[Pass[Any, Any]],
    *,
    has_calibration: bool,
    has_evaluator: bool,
    untimed_reason: str = "",
    is_quantized: bool = False,
) -> None:
    """Refuse a list of passes that the run can't serve, before anything is opened.

    Args:
        passes: In their order.
        has_calibration: The run has calibration data.
        has_evaluator: The run has an evaluator.
        untimed_reason: Why timings of this machine do not count ("latencies are not measured"); "" where they do.
        is_quantized: An earlier pass has made a quantization plan.

    Raises:
        PreconditionError: Calibration data or an evaluator is missing, a pass would make the quantization plan of an
            earlier one wrong, or needs one that no earlier pass makes. The message names the passes and what to give.
    """
    given = {
        Requirement.CALIBRATION: has_calibration,
        Requirement.EVALUATOR: has_evaluator,
        Requirement.TIMING: not untimed_reason,
    }
    for requirement in Requirement:
        needing = [pass_.pass_id for pass_ in passes if requirement in pass_.requirements]
        if needing and not given[requirement]:
            subject = f"Passes {quoted_list(needing)} need" if len(needing) > 1 else f"Pass '{needing[0]}' needs"
            lack = untimed_reason if requirement is Requirement.TIMING else "the run has none"
            ways = [pass_.without_calibration for pass_ in passes if requirement is Requirement.CALIBRATION]
            instead = "".join(f", {way}" for way in dict.fromkeys(ways) if way)
            raise PreconditionError(
                f"{subject} {requirement.value}, but {lack}.",
                f"{_HOW_TO_GIVE[requirement]}{instead}, or drop {quoted_list(needing)}.",
            )
    quantized_by: str | None = None
    has_activations = False
    for pass_ in passes:
        if quantized_by is not None and pass_.produces_quantization:
            raise PreconditionError(
                f"Passes '{quantized_by}' and '{pass_.pass_id}' both quantize, and a model is quantized once.",
                "Drop one of them.",
            )
        if quantized_by is not None and not pass_.keeps_quantization:
            raise PreconditionError(
                f"Pass '{pass_.pass_id}' stands after '{quantized_by}' and would make its plan wrong.",
                f"Put '{pass_.pass_id}' before '{quantized_by}'.",
            )
        if pass_.needs_quantization and quantized_by is None and not is_quantized:
            raise PreconditionError(
                f"Pass '{pass_.pass_id}' repairs what quantization does, but no pass before it quantizes.",
                f"Put 'quant' before '{pass_.pass_id}', or drop it.",
            )
        if pass_.needs_quantization and quantized_by is not None and not has_activations:
            raise PreconditionError(
                f"Pass '{pass_.pass_id}' needs scales for activations, and '{quantized_by}' plans none in its mode.",
                f"Set {quantized_by}.mode to 'static', or drop '{pass_.pass_id}'.",
            )
        if pass_.produces_quantization:
            quantized_by, has_activations = pass_.pass_id, pass_.plans_activations


def run_pass(pass_: Pass[Any, Any], state: ModelState, context: PassContext, *, plan: Any = None) -> PassOutcome:
    """The state after `pass_`, and its report with pass id, configuration and duration filled in.

    `state.model` stays as it was; the result shares the tensors of weights that did not change, and is `state.model`
    itself where the pass changed nothing.

    Args:
        pass_: A configured pass.
        state: The model, and the quantization plan of an earlier pass.
        context: Data and seed; `context.seed` also makes the inputs of the trial run.
        plan: A plan to carry out (from `plan_from_json`); None lets the pass decide.

    Raises:
        PreconditionError: The run lacks what the pass requires, or the pass would make `state.quantization` wrong.
        VerificationError: The pass broke its contract; the message says how and where the dump is.
        PluginError: The same for a pass of a third party, or its code failed.
        OnnxPruneError: Whatever the pass itself refuses.
    """
    check_requirements(
        # Data are for deciding: a plan that is given has decided already.
        [pass_],
        has_calibration=context.calibration is not None or plan is not None,
        has_evaluator=context.evaluator is not None or plan is not None,
        is_quantized=state.quantization is not None,
    )
    if state.quantization is not None and not pass_.keeps_quantization:
        raise PreconditionError(
            f"Pass '{pass_.pass_id}' would make the quantization plan of an earlier pass wrong.",
            f"Run '{pass_.pass_id}' before the pass that quantizes.",
        )
    started = time.perf_counter()
    case = _Case(pass_=pass_, state=state, context=context)
    case.guarded("check", lambda: pass_.check(state))
    case.verify_given()
    before = _fingerprint(state.model)
    if plan is None:
        case.guarded("check_files", lambda: pass_.check_files(state))
        plan = case.guarded("plan", lambda: pass_.plan(state, context))
    if not isinstance(plan, pass_.plan_type):
        raise case.fault(f"its plan is a '{type(plan).__name__}', not the declared '{pass_.plan_type.__name__}'")
    case = dataclasses.replace(case, plan=plan)
    if _fingerprint(state.model) != before:
        raise case.fault("`plan` changed the model; deciding must only read it")
    working_copy = dataclasses.replace(state, model=CanonicalModel(state.model.clone()))
    copied = _fingerprint(working_copy.model)
    outcome = case.guarded("apply", lambda: pass_.apply(working_copy, plan, context))
    if not isinstance(outcome, PassOutcome):
        raise case.fault(f"`apply` returned a '{type(outcome).__name__}', not a PassOutcome")
    case = dataclasses.replace(case, result=outcome.state.model)
    if _fingerprint(state.model) != before:
        raise case.fault("`apply` changed the caller's model instead of the copy it was given")
    if pass_.produces_quantization and outcome.state.quantization is None:
        raise case.fault("it declares to produce a quantization plan and returned none")
    if outcome.state.model is working_copy.model and _fingerprint(working_copy.model) == copied:
        # Nothing was changed: the caller can see that by identity, and nothing needs to be checked again.
        outcome = dataclasses.replace(outcome, state=dataclasses.replace(outcome.state, model=state.model))
    else:
        case.verify_result(outcome.state.model)
        case.try_run(outcome.state.model)
    report = dataclasses.replace(
        outcome.report,
        pass_id=pass_.pass_id,
        pass_name=pass_.name,
        config=pass_.config.model_dump(mode="json"),
        duration_s=time.perf_counter() - started,
    )
    return dataclasses.replace(outcome, report=report, plan=plan)


def plan_to_json(pass_: Pass[Any, Any], plan: Any) -> JsonValue:
    """`plan` as plain JSON values, for `plan.lock.json`."""
    return TypeAdapter(pass_.plan_type).dump_python(plan, mode="json")


def plan_from_json(pass_: Pass[Any, Any], data: JsonValue) -> Any:
    """The plan that `plan_to_json` wrote.

    Raises:
        UsageError: `data` is not a plan of this pass; every wrong place is named (at most five).
    """
    try:
        # JSON mode: lists become tuples, and numbers, strings and booleans are told apart.
        return TypeAdapter(pass_.plan_type).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in detail['loc']) or 'the plan'}: {detail['msg']}"
            for detail in error.errors(include_url=False)
        ]
        hidden = len(problems) - 5
        more = f"; and {hidden} more" if hidden > 0 else ""
        raise UsageError(
            f"The plan given for pass '{pass_.pass_id}' does not fit: {'; '.join(problems[:5])}{more}.",
            "Use a plan that the same version of onnxprune wrote for this pass, or run without `--plan`.",
        ) from error


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """One run of one pass: what is needed to say what went wrong, and to keep the evidence."""

    pass_: Pass[Any, Any]
    state: ModelState
    context: PassContext
    plan: Any = None
    result: ir.Model | None = None

    @property
    def is_ours(self) -> bool:
        return type(self.pass_).__module__.partition(".")[0] == __name__.partition(".")[0]

    def guarded(self, step: str, call: Callable[[], ResultT]) -> ResultT:
        """What `call` returns; an unforeseen error of a third party's pass is said to be theirs."""
        if self.is_ours:
            return call()
        try:
            return call()
        except OnnxPruneError:
            raise
        except Exception as error:
            raise PluginError(
                f"Pass '{self.pass_.pass_id}' of '{type(self.pass_).__module__}' failed in `{step}`: "
                f"{type(error).__name__}: {error}",
                "Report it to the pass's author, or drop the pass.",
            ) from error

    def verify_given(self) -> None:
        """Check the canonical form of the model that was given; a break is the fault of whoever made it."""
        try:
            verify(self.state.model)
        except VerificationError as error:
            raise VerificationError(
                f"The model given to pass '{self.pass_.pass_id}' is not canonical: {error.message}",
                "Bring it into form with `onnxprune.graph.canonical.canonicalize` first.",
            ) from error

    def verify_result(self, result: ir.Model) -> None:
        """Check the interface and the canonical form of the result, with shapes inferred anew."""
        difference = _interface_difference(
            self.state.model, result, element_types_may_change=self.pass_.changes_io_types
        )
        if difference:
            raise self.fault(difference)
        try:
            refresh_shapes(result, SHAPES)
            verify(result)
        except VerificationError as error:
            raise self.fault(f"its result is not canonical: {error.message}") from error

    def try_run(self, result: ir.Model) -> None:
        """Load and run the result once in ONNX Runtime, unless the model given could not be run either."""
        if weight_bytes(result) > MAX_TRIAL_RUN_BYTES:
            return
        problem = self._run_problem(result)
        if problem and not self._run_problem(self.state.model):
            raise self.fault(f"its result does not run in ONNX Runtime, while the model it was given does: {problem}")

    def _run_problem(self, model: ir.Model) -> str:
        """Why `model` can't be run on seeded inputs, or "" where it can and gives finite numbers."""
        from onnxprune.runtime.feeds import random_feeds
        from onnxprune.runtime.sessions import ort_runner_from_model

        try:
            runner = ort_runner_from_model(
                model, custom_op_libraries=self.context.custom_op_libraries, optimization="basic"
            )
            outputs = runner.run(random_feeds(runner.inputs, seed=self.context.seed))
        except OnnxPruneError as error:
            return error.message
        for name, array in outputs.items():
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                return f"output '{name}' is not finite."
        return ""

    def fault(self, problem: str) -> OnnxPruneError:
        """The error for a broken contract, after a dump was written."""
        text = f"Pass '{self.pass_.pass_id}' is at fault: {problem.rstrip('.')}. {self._dump()}"
        if self.is_ours:
            return VerificationError(text, "This is a bug of onnxprune: please report it with that folder.")
        return PluginError(text, f"Report it to the author of '{type(self.pass_).__module__}' with that folder.")

    def _dump(self) -> str:
        """Write plan and models to a new folder; says where, or why not."""
        folder = Path(tempfile.mkdtemp(prefix=f"onnxprune-dump-{self.pass_.name}-"))
        try:
            if isinstance(self.plan, self.pass_.plan_type):
                plan_text = json.dumps(plan_to_json(self.pass_, self.plan), indent=1)
                (folder / "plan.json").write_text(plan_text, encoding="utf-8")
            for stem, model in (("before", self.state.model), ("after", self.result)):
                if model is not None and weight_bytes(model) <= MAX_TRIAL_RUN_BYTES:
                    save_model(model, folder / f"{stem}.onnx")
        except (OnnxPruneError, OSError, ValueError, TypeError, RuntimeError) as error:
            # A broken model may not even be writable; what was written before it is still worth keeping.
            return f"The dump in '{folder}' is incomplete ({error})."
        return f"The models before and after and the plan are in '{folder}'."


def _fingerprint(model: ir.Model) -> tuple[object, ...]:
    """Equal before and after means: same nodes, connections, attributes, metadata, and the very same weight tensors."""
    graphs = (model.graph, *model.graph.subgraphs())
    interface = [(id(value), value.name, value.dtype) for value in (*model.graph.inputs, *model.graph.outputs)]
    weights = [(name, id(value.const_value)) for graph in graphs for name, value in graph.initializers.items()]
    nodes = [
        (
            id(node),
            node.name,
            node.domain,
            node.op_type,
            tuple(id(value) for value in node.inputs),
            tuple((id(value), value.name) for value in node.outputs),
            tuple((name, id(attribute)) for name, attribute in node.attributes.items()),
            tuple(node.metadata_props.items()),
        )
        for node in model.graph.all_nodes()
    ]
    return (interface, weights, nodes, dict(model.opset_imports), dict(model.metadata_props))


def _interface_difference(before: ir.Model, after: ir.Model, *, element_types_may_change: bool) -> str:
    """How inputs and outputs differ, or "". A dimension that was unknown may have become known."""
    for kind, old_values, new_values in (
        ("input", before.graph.inputs, after.graph.inputs),
        ("output", before.graph.outputs, after.graph.outputs),
    ):
        old_names = [value.name for value in old_values]
        new_names = [value.name for value in new_values]
        if old_names != new_names:
            return f"it changed the {kind}s from {old_names} to {new_names}"
        for old, new in zip(old_values, new_values, strict=True):
            if old.dtype != new.dtype and not element_types_may_change:
                return f"it changed the element type of {kind} '{old.name}' from {old.dtype} to {new.dtype}"
            if not _shape_holds(old.shape, new.shape):
                return f"it changed the shape of {kind} '{old.name}' from {old.shape} to {new.shape}"
    return ""


def _shape_holds(old: ir.Shape | None, new: ir.Shape | None) -> bool:
    if old is None:
        return True
    if new is None or len(old) != len(new):
        return False
    return all(before == after for before, after in zip(old, new, strict=True) if isinstance(before, int))
