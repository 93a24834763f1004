"""Bringing ONNX files below opset 18 into the canonical range, and proving that they still compute the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnxprune.contracts import CanonicalModel, OutputDifference
from onnxprune.errors import ModelError, OnnxPruneError
from onnxprune.evaluate.fidelity import compare_outputs
from onnxprune.graph.canonical import MIN_OPSET
from onnxprune.graph.constants import lift_constants
from onnxprune.graph.functions import inline_functions
from onnxprune.graph.names import give_unique_names
from onnxprune.graph.opset import raise_opset
from onnxprune.graph.shapes import infer_source_shapes
from onnxprune.graph.weights import weight_bytes
from onnxprune.ops.shapes import SHAPES
from onnxprune.runtime.feeds import working_feeds
from onnxprune.runtime.sessions import ort_runner_from_model, ort_runner_from_path

__all__ = ["UpgradeReport", "compare_upgrade", "upgrade_opset"]

TOLERANCE = 1e-3
"""Largest allowed difference, relative to an output's largest value. Rewrites are exact up to rounding (1e-6 is usual);
deep networks with random weights amplify it, and wrong coordinates or axes start above 1e-2."""
_ABSOLUTE_FLOOR = 1e-6
_MAX_COMPARED_BYTES = 1 << 30
_SEED = 0
# By the opset from which on an operator is what it is; onnx's checker refuses the form before, which exporters wrote.
_WITHDRAWN = {"GroupNormalization": 21}


@dataclass(frozen=True, slots=True, kw_only=True)
class UpgradeReport:
    """What an upgrade did. `difference` is None when the two could not be compared; `not_compared_reason` says why."""

    from_opset: int
    to_opset: int
    difference: OutputDifference | None
    not_compared_reason: str = ""


def upgrade_opset(model: ir.Model) -> int:
    """Raise `model` to opset 18, in place, if it is below; returns the opset that it was in.

    A model with GroupNormalization goes to opset 21 instead: what opsets 18 to 20 call by that name is withdrawn.

    Raises:
        ModelError: Below opset 7, or a node has no equal in the newer opset; names it.
    """
    opset = model.opset_imports.get("", MIN_OPSET)
    is_withdrawn = any(n.op_type in _WITHDRAWN and n.domain in ("", "ai.onnx") for n in model.graph.all_nodes())
    wanted = max(_WITHDRAWN.values()) if is_withdrawn else MIN_OPSET
    if opset >= wanted:
        return opset
    # Rules look at ranks, and functions can't be in another opset than the model.
    inline_functions(model)
    lift_constants(model)
    give_unique_names(model)
    infer_source_shapes(model, SHAPES)
    raise_opset(model, wanted)
    return opset


def compare_upgrade(
    path: Path, model: CanonicalModel, *, from_opset: int, custom_op_libraries: Sequence[Path] = ()
) -> UpgradeReport:
    """Run the file and the model made of it on the same seeded inputs.

    Raises:
        ModelError: They differ by more than rounding.
    """
    to_opset = model.opset_imports[""]

    def not_compared(reason: str) -> UpgradeReport:
        return UpgradeReport(from_opset=from_opset, to_opset=to_opset, difference=None, not_compared_reason=reason)

    if weight_bytes(model) > _MAX_COMPARED_BYTES:
        return not_compared(f"it has more than {_MAX_COMPARED_BYTES >> 30} GiB of weights")
    try:
        original = ort_runner_from_path(path, custom_op_libraries=custom_op_libraries, optimization="disabled")
        feeds = working_feeds(original, seed=_SEED)
        expected = original.run(feeds)
    except OnnxPruneError as error:
        return not_compared(f"ONNX Runtime does not run the original ({error.message})")
    # One session at a time: each holds all weights.
    del original
    upgraded = ort_runner_from_model(model, custom_op_libraries=custom_op_libraries, optimization="disabled")
    difference = compare_outputs(expected, upgraded.run(feeds))
    if not (difference.max_rel <= TOLERANCE or difference.max_abs <= _ABSOLUTE_FLOOR):
        worst = max(difference.per_output, key=lambda name: difference.per_output[name].max_rel, default="")
        raise ModelError(
            f"'{path.name}' was brought from opset {from_opset} to {to_opset}, but then computes something else: "
            f"output '{worst}' differs by {difference.max_abs:.3g} (relative {difference.max_rel:.3g}).",
            f"A mistake in onnxprune's upgrade rules: please report it. Exporting with opset {to_opset} avoids it.",
        )
    return UpgradeReport(from_opset=from_opset, to_opset=to_opset, difference=difference)
