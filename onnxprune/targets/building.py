"""What the targets of ONNX Runtime have in common: spelling, provenance, files, findings."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxprune.contracts import (
    ArtifactFile,
    Finding,
    JsonValue,
    ModelState,
    Placement,
    QuantizationPlan,
    RegionTiming,
    TargetContext,
)
from onnxprune.errors import ModelError, PreconditionError, quoted_list
from onnxprune.graph.weights import iter_windows
from onnxprune.runtime.host import HostIsa
from onnxprune.runtime.latency_table import default_table_folder
from onnxprune.runtime.model_timing import ModelTimer
from onnxprune.targets import qdq
from onnxprune.targets.placement_findings import (
    measured_placement_findings,
    planned_placement_finding,
    table_placement_finding,
)
from onnxprune.targets.qdq.data_free import place_data_free, spell_data_free
from onnxprune.targets.qdq.everywhere import everywhere_target, place_everywhere, spell_everywhere
from onnxprune.targets.qdq.measured import measured_placement
from onnxprune.targets.qdq.spelling import SpellingName
from onnxprune.targets.qdq.stored import StorageForm

__all__ = [
    "PROVENANCE_KEY",
    "PlacementChoice",
    "Spelled",
    "artifact_file",
    "check_interface",
    "custom_operators_finding",
    "host_spelling",
    "int8_finding",
    "is_qdq",
    "kernels_saturate",
    "model_timer",
    "require_placement_for",
    "require_spelling",
    "scratch_folder",
    "spell_for",
    "with_provenance",
    "zeros_finding",
]

PlacementChoice: TypeAlias = Literal["measured", "table", "everywhere"]

PROVENANCE_KEY = "onnxprune"
"""The key of the model's metadata under which the provenance stands, as JSON."""

# Domains whose operators are part of every full build of ONNX Runtime.
_BUILT_IN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})

NOTABLE_ZEROS_RATIO = 0.1
"""Share of zero weights below which nobody takes them for a saving."""
_WINDOW_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelled:
    """A graph ready to be written: the float model itself, or its int8 spelling with the placement behind it."""

    model: ir.Model
    placement: Placement | None
    regions: tuple[RegionTiming, ...] = ()
    findings: tuple[Finding, ...] = ()
    """How the placement was decided, and what came of it."""

    @property
    def has_integer_arithmetic(self) -> bool:
        """True when layers compute in integers; False for float, and where only the stored weights are integers."""
        return self.placement is not None and bool(self.placement.integer_nodes)


def model_timer(context: TargetContext, choice: PlacementChoice, *, blocked_layout: bool = True) -> ModelTimer | None:
    """What times the integer regions of this build; None where nothing may be timed."""
    if choice != "measured" or context.timing_threads is None:
        return None
    return ModelTimer(
        threads=context.timing_threads,
        folder=default_table_folder() / "models",
        blocked_layout=blocked_layout,
        custom_op_libraries=context.custom_op_libraries,
    )


def host_spelling(isa: HostIsa) -> SpellingName | None:
    """The int8 spelling that is right for a machine; None for an architecture without one."""
    if isa.arch == "x86-64":
        return "x86-vnni" if isa.has_vnni else "x86"
    return "arm64" if isa.arch == "arm64" else None


def kernels_saturate(spelling: SpellingName, isa: HostIsa) -> bool:
    """True when int8 spelled so gives other integers on `isa` than on the machine it is meant for.

    Only uint8 by full 8-bit weights does, on x86 without VNNI; ONNX Runtime's int8 by int8 kernels are exact there.
    """
    return spelling == "x86-vnni" and isa.arch == "x86-64" and not isa.has_vnni


def require_spelling(spelling: SpellingName | None, isa: HostIsa) -> SpellingName:
    """`spelling`, where the machine has one.

    Raises:
        PreconditionError: It is None.
    """
    if spelling is None:
        raise PreconditionError(
            f"There is no int8 spelling for this machine's architecture '{isa.arch}'.",
            "Name the machine that the artifact is for: spelling 'x86-vnni', 'x86' or 'arm64'.",
        )
    return spelling


def require_placement_for(placement: Placement, wanted: str, *, hint: str) -> None:
    """Refuse a placement of an earlier run that was made for another platform than `wanted`.

    Raises:
        PreconditionError: It was; `hint` says what to do.
    """
    if placement.target != wanted:
        raise PreconditionError(
            f"The plan places integers for '{placement.target}', and this build is for '{wanted}'.", hint
        )


def is_qdq(model: ir.Model) -> bool:
    """True when nodes of `model` quantize: it computes in integers, whoever wrote it."""
    return any(node.op_type == "QuantizeLinear" for node in model.graph.all_nodes())


def spell_for(
    state: ModelState,
    context: TargetContext,
    spelling: SpellingName,
    *,
    choice: PlacementChoice,
    stored: StorageForm = "folded",
    timer: ModelTimer | None = None,
) -> Spelled:
    """The graph to write for `state`: the int8 spelling where it has a quantization plan, else the float model.

    Args:
        state: Model and plan.
        context: Has the placement of an earlier run, where there is one: nothing is decided then.
        spelling: The processor.
        choice: Who places a static plan. "everywhere": for runtimes with kernels of their own, 16 bits included.
        stored: How weights are stored that the modes without calibration data compute with in float.
        timer: What times integer regions; None: the operator table decides.

    Raises:
        PreconditionError: The context's placement is for another platform.
    """
    model, plan = state.model, state.quantization
    if plan is None:
        return Spelled(model=model, placement=None)
    is_everywhere = choice == "everywhere" and plan.mode == "static"
    wanted = everywhere_target(spelling) if is_everywhere else qdq.find_spelling(spelling).placement_target
    placement = context.placement
    if placement is not None:
        require_placement_for(
            placement,
            wanted,
            hint="Name the plan's platform in the target's settings, or run without --plan to decide anew.",
        )
    if plan.mode != "static":
        placement = placement or place_data_free(model, plan, spelling, form=stored)
        return Spelled(model=spell_data_free(model, plan, placement, spelling, form=stored), placement=placement)
    if is_everywhere:
        placement = placement or place_everywhere(model, plan, spelling)
        return Spelled(model=spell_everywhere(model, plan, placement, spelling), placement=placement)
    return _spelled_for_kernels(state, plan, context, spelling, timer)


def _spelled_for_kernels(
    state: ModelState,
    plan: QuantizationPlan,
    context: TargetContext,
    spelling: SpellingName,
    timer: ModelTimer | None,
) -> Spelled:
    """A static plan, integer where ONNX Runtime's kernels make that faster."""
    regions: tuple[RegionTiming, ...] = ()
    placement, findings = context.placement, []
    if placement is not None:
        findings.append(planned_placement_finding(placement))
    elif timer is None:
        placement = qdq.place(state.model, plan, spelling)
        findings.append(table_placement_finding(placement))
    else:
        measured = measured_placement(
            state.model, plan, spelling, timer=timer, seed=context.seed, progress=context.progress
        )
        placement, regions = measured.placement, measured.regions
        findings.extend(measured_placement_findings(measured))
    model = qdq.spell(state.model, plan, placement, spelling)
    return Spelled(model=model, placement=placement, regions=regions, findings=tuple(findings))


def with_provenance(model: ir.Model, provenance: Mapping[str, JsonValue]) -> ir.Model:
    """A clone (weights shared) that carries `provenance` in its metadata beside what was there."""
    clone = model.clone()
    clone.metadata_props[PROVENANCE_KEY] = json.dumps(provenance, sort_keys=True, separators=(",", ":"))
    return clone


def check_interface(model: ir.Model) -> None:
    """Refuse inputs and outputs that no runtime of ours can be fed.

    Raises:
        ModelError: One of them is not a tensor; the message names it.
    """
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            raise ModelError(
                f"'{value.name}' is a {value.type} and not a tensor: artifacts can't be fed or compared with such "
                "inputs and outputs.",
                "Cut the model before that value.",
            )


def zeros_finding(model: ir.Model, *, stored_as: str) -> Finding | None:
    """What many zero weights are worth in this format, where there are many."""
    zeros = total = 0
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is None or not value.const_value.dtype.is_floating_point():
                continue
            for window in iter_windows(value, _WINDOW_BYTES):
                total += window.array.size
                zeros += window.array.size - int(np.count_nonzero(window.array))
    if total == 0 or zeros / total < NOTABLE_ZEROS_RATIO:
        return None
    return Finding(
        topic="sparse storage",
        text=f"{zeros / total:.0%} of the weights are zero, but {stored_as} stores and computes them like any other "
        "number: they save bytes only in a compressed download.",
    )


def custom_operators_finding(model: ir.Model) -> Finding | None:
    """Which operators an application must bring itself, where there are any."""
    names = {f"{node.domain}::{node.op_type}" for node in model.graph.all_nodes()}
    custom = sorted(name for name in names if name.partition("::")[0] not in _BUILT_IN_DOMAINS)
    if not custom:
        return None
    return Finding(
        topic="custom operators",
        text=f"The application must register a library with {quoted_list(custom)}: ONNX Runtime does not have them.",
    )


def int8_finding(platform: str, spelling: SpellingName, isa: HostIsa) -> Finding:
    """What can't be said about int8 for `platform` on a machine that is another one."""
    text = (
        f"int8 is spelled for '{platform}', and this machine is {isa.summary}: its speed is not measured on the "
        "target, and the operator table decided what is integer."
    )
    if kernels_saturate(spelling, isa):
        text += " Scores measured here may be too low: without VNNI these kernels saturate at 16 bits."
    return Finding(topic="int8", text=text, severity="warning")


def artifact_file(path: Path, *, role: str) -> ArtifactFile:
    """Size and sha256 of a file that was written.

    Raises:
        OSError: It can't be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ArtifactFile(path=path.name, sha256=digest, size_bytes=path.stat().st_size, role=role)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A folder inside `folder`, so that finished files move by renaming; gone at the end.

    Raises:
        OSError: It can't be made.
    """
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as scratch:
        yield Path(scratch)
