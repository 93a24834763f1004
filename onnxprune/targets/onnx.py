"""Target `onnx`: a plain ONNX file for ONNX Runtime, with int8 spelled for one kind of processor."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import model_validator

from onnxprune.contracts import (
    Artifact,
    Finding,
    ModelState,
    PassConfig,
    QuantizationPlan,
    Runner,
    Target,
    TargetContext,
)
from onnxprune.errors import TargetError, disk_errors
from onnxprune.graph.io import save_model
from onnxprune.graph.weights import weight_bytes
from onnxprune.runtime.host import host_isa
from onnxprune.runtime.sessions import ort_runner_from_path
from onnxprune.targets.building import (
    PlacementChoice,
    artifact_file,
    check_interface,
    custom_operators_finding,
    host_spelling,
    int8_finding,
    kernels_saturate,
    model_timer,
    require_spelling,
    scratch_folder,
    spell_for,
    with_provenance,
    zeros_finding,
)
from onnxprune.targets.data_free_findings import data_free_findings
from onnxprune.targets.proof import arithmetic_of, prove, write_reference
from onnxprune.targets.qdq.qoperator import SIGNED_QOPERATORS, as_qoperators, require_quantized
from onnxprune.targets.qdq.saturation import saturation_findings
from onnxprune.targets.qdq.spelling import SpellingName

__all__ = ["OnnxTarget", "OnnxTargetConfig"]

_MAX_ONE_FILE_BYTES = 2**31 - 1  # protobuf


class OnnxTargetConfig(PassConfig):
    """Options of target `onnx`."""

    spelling: Literal["auto", "x86-vnni", "x86", "arm64"] = "auto"
    """The processors that int8 is written for; "auto" takes this machine's."""
    placement: PlacementChoice = "measured"
    """Who decides which nodes are integer: "measured", timings of this machine where it is the target and timing is not
    switched off, and else the operator table; always the "table"; or nobody: "everywhere" makes all nodes integer that
    have scales, in 16 bits too, for NPUs and other runtimes."""
    external_data: bool | None = None
    """Weights in a file of their own beside the model. None: only above 1.5 GB, where one file can't hold them."""
    int8_format: Literal["qdq", "qoperator"] = "qdq"
    """How int8 stands in the graph: "qdq" is QuantizeLinear and DequantizeLinear around float operators, which ONNX
    Runtime fuses when it loads the file; "qoperator" is the fused operators themselves (QLinearConv, QGemm ...), for
    runtimes and settings that don't optimize. The integers are the same."""

    @model_validator(mode="after")
    def _format_has_kernels(self) -> OnnxTargetConfig:
        if self.int8_format == "qoperator" and self.placement == "everywhere":
            raise ValueError("int8_format 'qoperator' is for ONNX Runtime's kernels, and placement 'everywhere' is not")
        return self


class OnnxTarget(Target[OnnxTargetConfig]):
    """Writes `<stem>.onnx`, and `<stem>.onnx.data` where weights are external.

    1. Spells int8 where the state has a quantization plan and int8 pays; else the float graph is written as it is.
    2. Stores the provenance in the model's metadata under the key `onnxprune`; what was there stays.
    3. Writes by `graph.io.save_model`: equal weights once, the same bytes for the same model.
    4. Loads and runs the file, and compares it with the graph (see `onnxprune.targets.proof`).

    With `int8_format = "qoperator"`, what stands between DequantizeLinear and QuantizeLinear is written as integer
    operators (`targets/qdq/qoperator.py`), and compared with the QDQ graph.
    """

    name: ClassVar[str] = "onnx"
    summary: ClassVar[str] = "A plain ONNX file for ONNX Runtime, int8 spelled for x86 or ARM."
    config_type: ClassVar[type[PassConfig]] = OnnxTargetConfig

    @property
    def is_host(self) -> bool:
        """True when int8 is spelled as this machine wants it; float files are timed under the same rule."""
        return self.spelling is not None and self.spelling == host_spelling(host_isa())

    @property
    def spelling(self) -> SpellingName | None:
        """The spelling in use; None: "auto" on an architecture without one, where only float can be built."""
        return host_spelling(host_isa()) if self.config.spelling == "auto" else self.config.spelling

    def check(self, state: ModelState, *, will_quantize: bool) -> None:
        """Refuse what can't be built.

        Raises:
            ModelError: An input or output is not a tensor.
            PreconditionError: int8 is wanted, and "auto" finds no spelling for this machine.
            TargetError: One file is asked for, and the weights don't fit into it; or integer operators are, and
                nothing is quantized.
        """
        check_interface(state.model)
        if self.config.int8_format == "qoperator" and not will_quantize and state.quantization is None:
            require_quantized(state.model)
        if will_quantize or state.quantization is not None:
            require_spelling(self.spelling, host_isa())
        size = weight_bytes(state.model)
        if self.config.external_data is False and not will_quantize and size > _MAX_ONE_FILE_BYTES:
            raise TargetError(
                f"{size / 2**30:.1f} GiB of weights don't fit into one ONNX file (2 GiB).",
                "Leave external_data out of the configuration of target 'onnx', or set it to true.",
            )

    def build(self, state: ModelState, context: TargetContext) -> Artifact:
        """Write, load, run and compare.

        Raises:
            TargetError: The file does not load, run, or compute what the graph computes.
            OutputError: It can't be written.
        """
        isa = host_isa()
        self._check_format(state.quantization)
        spelling = require_spelling(self.spelling, isa) if state.quantization is not None else self.spelling
        timer = model_timer(context, self.config.placement)
        spelled = spell_for(state, context, spelling or "x86", choice=self.config.placement, timer=timer)
        path = context.folder / f"{context.stem}.onnx"
        with disk_errors(f"Writing '{path.name}'"), scratch_folder(context.folder) as scratch:
            built = scratch / path.name
            written = as_qoperators(spelled.model) if self.config.int8_format == "qoperator" else spelled.model
            save_model(with_provenance(written, context.provenance), built, external_data=self.config.external_data)
            proof = prove(
                write_reference(spelled.model, scratch),
                built,
                model=spelled.model,
                arithmetic=arithmetic_of(
                    spelled.model,
                    is_quantized=spelled.has_integer_arithmetic,
                    host_saturates=spelling is not None and kernels_saturate(spelling, isa),
                ),
                folder=scratch,
                seed=context.seed,
                custom_op_libraries=context.custom_op_libraries,
            )
            files = []
            data = built.with_name(f"{built.name}.data")
            if data.exists():
                files.append(artifact_file(data.replace(context.folder / data.name), role="weights"))
            files.insert(0, artifact_file(built.replace(path), role="model"))
        return Artifact(
            target=self.name,
            folder=context.folder,
            files=tuple(files),
            inputs=proof.inputs,
            outputs=proof.outputs,
            findings=(
                *self._findings(state, spelling),
                *spelled.findings,
                *saturation_findings(state, spelled.placement, spelling),
                *data_free_findings(state, spelled, spelling, stored="folded"),
                *proof.findings,
            ),
            provenance=context.provenance,
            placement=spelled.placement,
            regions=spelled.regions,
        )

    def runner(self, artifact: Artifact, *, threads: int = 1, custom_op_libraries: tuple[Path, ...] = ()) -> Runner:
        """The artifact in ONNX Runtime with all its optimizations, as applications run it."""
        return ort_runner_from_path(artifact.model_path, threads=threads, custom_op_libraries=custom_op_libraries)

    def _check_format(self, plan: QuantizationPlan | None) -> None:
        if self.config.int8_format == "qoperator" and plan is not None and plan.mode != "static":
            raise TargetError(
                f"int8_format 'qoperator' is a form of static int8, and the plan's mode is '{plan.mode}'.",
                "Leave int8_format out of the configuration of target 'onnx', or set quant.mode to 'static'.",
            )

    def _findings(self, state: ModelState, spelling: SpellingName | None) -> list[Finding]:
        noted = (custom_operators_finding(state.model), zeros_finding(state.model, stored_as="an ONNX file"))
        findings = [finding for finding in noted if finding is not None]
        if state.quantization is not None and spelling is not None and not self.is_host:
            findings.append(int8_finding(spelling, spelling, host_isa()))
        if state.quantization is not None and self.config.int8_format == "qoperator" and spelling == "arm64":
            findings.append(SIGNED_QOPERATORS)
        return findings
