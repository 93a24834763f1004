"""Target `ort-mobile`: a `.ort` file for ONNX Runtime on phones, and what a reduced build of the runtime needs."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import onnx_ir as ir
from pydantic import model_validator

from onnxprune.contracts import (
    Artifact,
    Finding,
    ModelState,
    PassConfig,
    Runner,
    Target,
    TargetContext,
)
from onnxprune.errors import PreconditionError, TargetError, disk_errors
from onnxprune.graph.io import save_model
from onnxprune.graph.weights import weight_bytes
from onnxprune.runtime.host import HostIsa, host_isa, runtime_versions
from onnxprune.runtime.model_timing import ModelTimer
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
from onnxprune.targets.mobile_check import mobile_findings
from onnxprune.targets.ort_convert import OptimizationLevel, OptimizationStyle, convert_to_ort
from onnxprune.targets.ort_format import OrtFileFacts, minimum_ort_version, read_ort_facts
from onnxprune.targets.proof import arithmetic_of, prove, write_reference
from onnxprune.targets.qdq.saturation import saturation_findings
from onnxprune.targets.qdq.spelling import SpellingName

__all__ = ["OrtMobileConfig", "OrtMobileTarget"]

_MAX_FLATBUFFER_BYTES = 2**31 - 1

_SPELLINGS: dict[str, SpellingName] = {"arm64": "arm64", "x86-64": "x86", "x86-64-vnni": "x86-vnni"}


class OrtMobileConfig(PassConfig):
    """Options of target `ort-mobile`."""

    platform: Literal["arm64", "x86-64", "x86-64-vnni", "auto"] = "arm64"
    """The processors that the file is for: int8 spelling and optimizations. "auto" takes this machine's."""
    placement: PlacementChoice = "measured"
    """Who decides which nodes are integer: "measured", timings of this machine where it is the platform, timing is not
    switched off, and the file is fully optimized in the fixed style, and else the operator table; always the
    "table"; or nobody: "everywhere" makes all nodes integer that have scales, in 16 bits too, for NPUs."""
    optimization_style: OptimizationStyle = "fixed"
    """"fixed" for the CPU provider; "runtime" where NNAPI or CoreML take a part of the model."""
    optimization_level: OptimizationLevel = "all"
    """How far the graph is optimized. Sessions don't optimize a `.ort` file any further."""
    type_reduction: bool = False
    """Let the list of required operators name element types as well: a smaller build that takes less."""
    blocked_layout: bool = False
    """Store convolution weights in blocks of this machine's vector width: float models on x86 get faster, and are
    for CPUs with the same width only."""

    @model_validator(mode="after")
    def _blocked_layout_fits(self) -> OrtMobileConfig:
        if not self.blocked_layout:
            return self
        if self.platform == "arm64":
            raise ValueError("blocked_layout is for x86-64 only, and platform is 'arm64'")
        if self.optimization_style != "fixed" or self.optimization_level != "all":
            raise ValueError("blocked_layout needs optimization_style 'fixed' and optimization_level 'all'")
        return self


class OrtMobileTarget(Target[OrtMobileConfig]):
    """Writes `<stem>.ort` and `<stem>.required_operators.config` (`..._and_types.config` with type reduction).

    1. Spells int8 where the state has a quantization plan; else the float graph is converted as it is.
    2. Converts it in a child process and puts the file's bytes in a fixed order (`ort_convert`, `ort_format`).
    3. Loads and runs the file, and compares it with the graph (`proof`).
    4. Says which ONNX Runtime the file needs, and what NNAPI and CoreML could take (`mobile_check`).
    """

    name: ClassVar[str] = "ort-mobile"
    summary: ClassVar[str] = "A .ort file for ONNX Runtime on phones, with the operators that a reduced build needs."
    config_type: ClassVar[type[PassConfig]] = OrtMobileConfig

    @property
    def spelling(self) -> SpellingName | None:
        """The int8 spelling of the platform; None: "auto" on an architecture without one."""
        return host_spelling(host_isa()) if self.config.platform == "auto" else _SPELLINGS[self.config.platform]

    @property
    def is_host(self) -> bool:
        """True when this machine has the platform's instruction set."""
        return self.spelling is not None and self.spelling == host_spelling(host_isa())

    def check(self, state: ModelState, *, will_quantize: bool) -> None:
        """Refuse what can't be built.

        Raises:
            ModelError: An input or output is not a tensor.
            PreconditionError: "auto" finds no platform here, or `blocked_layout` is asked for on another one.
            TargetError: The weights don't fit into a `.ort` file.
        """
        check_interface(state.model)
        isa = host_isa()
        require_spelling(self.spelling, isa)
        if self.config.blocked_layout and isa.arch != "x86-64":
            raise PreconditionError(
                f"blocked_layout stores weights for the vector width of this machine, which is {isa.arch} and not "
                "x86-64.",
                "Build on an x86-64 machine, or leave blocked_layout out.",
            )
        # int8 weights are a quarter of float32's.
        size = weight_bytes(state.model) // (4 if will_quantize else 1)
        if size > _MAX_FLATBUFFER_BYTES:
            raise TargetError(
                f"{size / 2**30:.1f} GiB of weights don't fit into a .ort file: a flatbuffer ends at 2 GiB.",
                "Use target 'onnx', which stores such weights in a file beside the model.",
            )

    def build(self, state: ModelState, context: TargetContext) -> Artifact:
        """Spell, convert, load, run and compare.

        Raises:
            TargetError: The model can't be converted, or the file does not load, run, or compute what the graph
                computes.
            OutputError: A file can't be written.
        """
        isa = host_isa()
        spelling = require_spelling(self.spelling, isa)
        spelled = spell_for(
            state,
            context,
            spelling,
            choice=self.config.placement,
            # Conversion would fold the other form into float32.
            stored="kept",
            timer=self._timer(context),
        )
        is_quantized = spelled.has_integer_arithmetic
        path = context.folder / f"{context.stem}.ort"
        with disk_errors(f"Writing '{path.name}'"), scratch_folder(context.folder) as scratch:
            source = scratch / f"{context.stem}.onnx"
            save_model(with_provenance(spelled.model, context.provenance), source)
            converted, operators = convert_to_ort(
                source,
                folder=scratch,
                is_arm=spelling == "arm64",
                style=self.config.optimization_style,
                level=self.config.optimization_level,
                blocked_layout=self.config.blocked_layout,
                type_reduction=self.config.type_reduction,
                custom_op_libraries=context.custom_op_libraries,
            )
            built = converted.rename(scratch / path.name)
            facts = read_ort_facts(built)
            proof = prove(
                write_reference(spelled.model, scratch),
                built,
                model=spelled.model,
                arithmetic=arithmetic_of(
                    spelled.model, is_quantized=is_quantized, host_saturates=kernels_saturate(spelling, isa)
                ),
                folder=scratch,
                seed=context.seed,
                custom_op_libraries=context.custom_op_libraries,
                replay_saved_optimizations=facts.has_runtime_optimizations,
            )
            is_static = state.quantization is not None and state.quantization.mode == "static"
            mobile = mobile_findings(source, folder=scratch, has_int8_activations=is_static and spelling == "arm64")
            config = self._write_config(path, operators)
            built.replace(path)
            files = (artifact_file(path, role="model"), artifact_file(config, role="config"))
        return Artifact(
            target=self.name,
            folder=context.folder,
            files=files,
            inputs=proof.inputs,
            outputs=proof.outputs,
            findings=(
                *self._findings(state, facts, config, isa, is_quantized=is_quantized),
                *spelled.findings,
                *saturation_findings(state, spelled.placement, spelling),
                *data_free_findings(state, spelled, spelling, stored="kept"),
                *proof.findings,
                *mobile,
            ),
            provenance=context.provenance,
            placement=spelled.placement,
            regions=spelled.regions,
        )

    def runner(self, artifact: Artifact, *, threads: int = 1, custom_op_libraries: tuple[Path, ...] = ()) -> Runner:
        """The artifact in ONNX Runtime, with the optimizations that a file of the runtime style carries."""
        return ort_runner_from_path(
            artifact.model_path,
            threads=threads,
            custom_op_libraries=custom_op_libraries,
            replay_saved_optimizations=self.config.optimization_style == "runtime",
        )

    def _timer(self, context: TargetContext) -> ModelTimer | None:
        """Sessions don't optimize a `.ort` file any further, so timings of fully optimized models are for such only."""
        if self.config.optimization_level != "all" or self.config.optimization_style != "fixed":
            return None
        return model_timer(context, self.config.placement, blocked_layout=self.config.blocked_layout)

    def _write_config(self, model_path: Path, operators: str) -> Path:
        kind = "required_operators_and_types" if self.config.type_reduction else "required_operators"
        config = model_path.with_name(f"{model_path.stem}.{kind}.config")
        header = f"# Operators that '{model_path.name}' needs, for ONNX Runtime's build.py --include_ops_by_config.\n"
        config.write_text(header + operators, encoding="utf-8")
        return config

    def _findings(
        self, state: ModelState, facts: OrtFileFacts, config: Path, isa: HostIsa, *, is_quantized: bool
    ) -> list[Finding]:
        findings = [_version_finding(facts), _build_finding(config, self.config.optimization_style)]
        if self.config.optimization_style == "runtime":
            findings.append(_runtime_style_finding(facts))
        if self.config.blocked_layout:
            findings.append(_blocked_finding(isa))
        if is_quantized and not self.is_host:
            spelling = require_spelling(self.spelling, isa)
            findings.append(int8_finding(self.config.platform, spelling, isa))
        noted = (
            custom_operators_finding(state.model),
            _half_finding(state.model, isa),
            zeros_finding(state.model, stored_as="a .ort file"),
        )
        return [*findings, *(finding for finding in noted if finding is not None)]


def _version_finding(facts: OrtFileFacts) -> Finding:
    built_with = runtime_versions().get("onnxruntime", "unknown")
    opset = facts.opsets.get("", 0)
    needed = minimum_ort_version(facts)
    since = f"at least {needed}" if needed is not None else f"{built_with}, as no older version is known to read it"
    return Finding(
        topic="ONNX Runtime version",
        text=f"The file needs ONNX Runtime {since} (ORT format {facts.format_version}, opset {opset}). It was written "
        f"and run with {built_with}: an application should ship that version or a newer one.",
    )


def _build_finding(config: Path, style: OptimizationStyle) -> Finding:
    option = "--minimal_build extended" if style == "runtime" else "--minimal_build"
    return Finding(
        topic="reduced build",
        text=f"A build of ONNX Runtime with {option} --include_ops_by_config {config.name} holds just the kernels of "
        "this model. There is no ready-made reduced package: 'onnxruntime-mobile' ended with 1.18; the full packages "
        "run the file as well.",
    )


def _runtime_style_finding(facts: OrtFileFacts) -> Finding:
    if not facts.has_runtime_optimizations:
        return Finding(
            topic="optimization style",
            text="The model has nothing that the runtime style could save for later; the fixed style gives the same.",
        )
    return Finding(
        topic="optimization style",
        text="Saved optimizations are replayed only in sessions with the option "
        "'session.enable_saved_runtime_optimizations' = '1'; without it the nodes left to the CPU run slower.",
    )


def _blocked_finding(isa: HostIsa) -> Finding:
    width = "AVX-512 (blocks of 16)" if isa.has_avx512 else "no AVX-512 (blocks of 8)"
    return Finding(
        topic="blocked layout",
        text=f"Weights are stored in the blocks of this machine, which has {width}. The file is not for CPUs "
        "with another width: their kernels read other blocks.",
        severity="warning",
    )


def _half_finding(model: ir.Model, isa: HostIsa) -> Finding | None:
    halves = [value for value in model.graph.initializers.values() if value.dtype is ir.DataType.FLOAT16]
    stored_only = all(use.node.op_type == "Cast" for value in halves for use in value.uses())
    if not halves or (isa.arch == "arm64" and not stored_only):
        return None
    reason = (
        "the optimizations of this file carry out the Casts behind them"
        if stored_only
        else f"it was built on {isa.arch}, whose ONNX Runtime has no float16 kernels and casts back"
    )
    return Finding(
        topic="float16",
        text=f"The float16 weights are float32 again in this file, which computes in float32: {reason}. The target "
        "'onnx' keeps them and its file small.",
        severity="warning",
    )
