"""Target `onnx`: a plain ONNX file for ONNX Runtime, with int8 spelled for one kind of processor."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from onnxprune.contracts import (
    Artifact,
    Finding,
    ModelState,
    PassConfig,
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
    artifact_file,
    check_interface,
    custom_operators_finding,
    host_spelling,
    int8_finding,
    kernels_saturate,
    require_spelling,
    scratch_folder,
    spell_for,
    with_provenance,
    zeros_finding,
)
from onnxprune.targets.proof import arithmetic_of, prove, write_reference
from onnxprune.targets.qdq.spelling import SpellingName

__all__ = ["OnnxTarget", "OnnxTargetConfig"]

_MAX_ONE_FILE_BYTES = 2**31 - 1  # protobuf


class OnnxTargetConfig(PassConfig):
    """Options of target `onnx`."""

    spelling: Literal["auto", "x86-vnni", "x86", "arm64"] = "auto"
    """The processors that int8 is written for; "auto" takes this machine's."""
    external_data: bool | None = None
    """Weights in a file of their own beside the model. None: only above 1.5 GB, where one file can't hold them."""


class OnnxTarget(Target[OnnxTargetConfig]):
    """Writes `<stem>.onnx`, and `<stem>.onnx.data` where weights are external.

    1. Spells int8 where the state has a quantization plan; else the float graph is written as it is.
    2. Stores the provenance in the model's metadata under the key `onnxprune`; what was there stays.
    3. Writes by `graph.io.save_model`: equal weights once, the same bytes for the same model.
    4. Loads and runs the file, and compares it with the graph (see `onnxprune.targets.proof`).
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
            TargetError: One file is asked for, and the weights don't fit into it.
        """
        check_interface(state.model)
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
        spelling = require_spelling(self.spelling, isa) if state.quantization is not None else self.spelling
        spelled = spell_for(state, context, spelling or "x86")
        path = context.folder / f"{context.stem}.onnx"
        with disk_errors(f"Writing '{path.name}'"), scratch_folder(context.folder) as scratch:
            built = scratch / path.name
            save_model(
                with_provenance(spelled.model, context.provenance), built, external_data=self.config.external_data
            )
            proof = prove(
                write_reference(spelled.model, scratch),
                built,
                model=spelled.model,
                arithmetic=arithmetic_of(
                    spelled.model,
                    is_quantized=spelled.placement is not None,
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
            findings=(*self._findings(state, spelling), *proof.findings),
            provenance=context.provenance,
            placement=spelled.placement,
        )

    def runner(self, artifact: Artifact, *, threads: int = 1, custom_op_libraries: tuple[Path, ...] = ()) -> Runner:
        """The artifact in ONNX Runtime with all its optimizations, as applications run it."""
        return ort_runner_from_path(artifact.model_path, threads=threads, custom_op_libraries=custom_op_libraries)

    def _findings(self, state: ModelState, spelling: SpellingName | None) -> list[Finding]:
        noted = (custom_operators_finding(state.model), zeros_finding(state.model, stored_as="an ONNX file"))
        findings = [finding for finding in noted if finding is not None]
        if state.quantization is not None and spelling is not None and not self.is_host:
            findings.append(int8_finding(spelling, spelling, host_isa()))
        return findings
