"""What the passes of this kind have in common when they refuse and when they report."""

from __future__ import annotations

from collections.abc import Collection

from onnxprune.contracts import ModelState, QuantizationPlan
from onnxprune.errors import PreconditionError
from onnxprune.passes.layerwise.gain import Gain

__all__ = ["gain_notes", "require_static_plan"]


def require_static_plan(state: ModelState, pass_id: str) -> QuantizationPlan:
    """The quantization plan of `state`.

    Raises:
        PreconditionError: There is none, or it has no scales for activations.
    """
    plan = state.quantization
    if plan is None:
        raise PreconditionError(
            f"Pass '{pass_id}' repairs what int8 does, but nothing is quantized yet.",
            f"Put 'quant' before '{pass_id}'.",
        )
    if plan.mode != "static":
        raise PreconditionError(
            f"Pass '{pass_id}' needs scales for activations, but the quantization is {plan.mode}.",
            f"Quantize with calibration data (mode 'static'), or drop '{pass_id}'.",
        )
    return plan


def gain_notes(
    gain: Gain | None, *, is_undone: bool, subject: str, count: int, skipped: Collection[str], idle: str
) -> tuple[str, ...]:
    """What the user should know about the judgement of a step.

    Args:
        gain: None where it was not judged.
        is_undone: It was taken back.
        subject: What it does, in the plural ("the roundings").
        count: How many of them there are.
        skipped: The layers that were left alone, which have reasons of their own.
        idle: Why there may be nothing to do where no layer was left alone either.
    """
    if is_undone and gain is not None:
        verdict = "made the outputs worse" if gain.is_worse and gain.is_visible else "hardly changed the outputs"
        return (f"Undone: {subject} would have {verdict} ({gain.text}).",)
    if gain is None:
        if not count:
            reason = "the report has a reason for each layer that was skipped" if skipped else idle
            return (f"Nothing was done: {reason}.",)
        return (f"Not judged: there were no data, so it is not known whether {subject} help.",)
    return ()
