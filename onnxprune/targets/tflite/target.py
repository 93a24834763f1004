"""Target `tflite`: a `.tflite` file for LiteRT on phones and small CPUs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxprune.contracts import (
    Artifact,
    Finding,
    JsonValue,
    ModelState,
    PassConfig,
    Placement,
    QuantizationPlan,
    Runner,
    Target,
    TargetContext,
)
from onnxprune.errors import PreconditionError, TargetError, disk_errors
from onnxprune.graph.shapes import fix_input_shapes
from onnxprune.ops.shapes import SHAPES
from onnxprune.runtime.fixed_batch import FixedBatchRunner
from onnxprune.runtime.host import host_isa
from onnxprune.runtime.litert import litert_runner_from_path
from onnxprune.runtime.litert_file import INTEGERS_KEY, LAYOUTS_KEY
from onnxprune.targets import qdq
from onnxprune.targets.building import (
    PROVENANCE_KEY,
    artifact_file,
    check_interface,
    is_qdq,
    require_placement_for,
    scratch_folder,
)
from onnxprune.targets.placement_findings import planned_placement_finding, table_placement_finding
from onnxprune.targets.proof import Arithmetic, prove, write_reference
from onnxprune.targets.qdq.tflite import place_tflite
from onnxprune.targets.tflite.emit import EmitOptions, Layout, emit
from onnxprune.targets.tflite.graph import Graph, Model
from onnxprune.targets.tflite.lowering import unsupported_error, unsupported_nodes
from onnxprune.targets.tflite.precision import Precision
from onnxprune.targets.tflite.schema import schema
from onnxprune.targets.tflite.serialize import WrittenFile, write_tflite
from onnxprune.targets.tflite.sparse import SparseMode

__all__ = ["TfliteConfig", "TfliteTarget"]


class TfliteConfig(PassConfig):
    """Options of target `tflite`."""

    precision: Precision | Literal["auto"] = "auto"
    """What weights and activations are. "fp32"; "fp16": weights are stored in half precision; "int8": all of it, inputs
    and outputs too; "int8-float-io": int8 inside, float32 at inputs and outputs; "dynamic-int8": int8 weights, and
    activations that are quantized while the model runs. "auto" is what the passes made: "int8-float-io" after static
    quantization, "dynamic-int8" after the other modes, else "fp32"."""
    platform: Literal["arm64", "x86-64", "auto"] = "arm64"
    """The processors that the file is for: decides whether latencies measured here count. The file is the same."""
    input_layout: Layout = "as-is"
    """"as-is": pictures are fed with the axes that the ONNX model has (channels first, mostly; a model from Keras keeps
    its channels last); "nhwc": float inputs of rank 3 to 5 are fed with the channels last."""
    output_layout: Layout = "as-is"
    """The same for float outputs of rank 3 to 5."""
    sparse: SparseMode = "auto"
    """What is done with zero weights. "auto": where XNNPACK can skip them on phones with arm64, the file is written so
    that it does; else they are stored like any number, and the report says what is in the way. "storage": as "auto",
    and weights take fewer bytes on disk where XNNPACK can't skip zeros. "never": they are stored like any number."""
    batch: int | None = None
    """Makes the open first dimension of the inputs this number. None: it stays open."""


class TfliteTarget(Target[TfliteConfig]):
    """Writes `<stem>.tflite`.

    1. Spells int8 as a QDQ graph where the state has a plan with scales for activations and the precision is int8.
    2. Emits the graph (`emit`): lowering, layout, fusion, integers.
    3. Writes it with the model's metadata, the provenance and the layouts of its tensors.
    4. Runs it in LiteRT and compares it with the ONNX graph in ONNX Runtime (`proof`).
    """

    name: ClassVar[str] = "tflite"
    summary: ClassVar[str] = "A .tflite file for LiteRT (TensorFlow Lite): fp32, fp16 or int8."
    config_type: ClassVar[type[PassConfig]] = TfliteConfig

    @property
    def is_host(self) -> bool:
        """True when this machine has the platform's instruction set; LiteRT is the runtime here and there."""
        return self.config.platform in ("auto", host_isa().arch)

    def check(self, state: ModelState, *, will_quantize: bool) -> None:
        """Refuse what can't be built.

        Raises:
            ModelError: An input or output is not a tensor.
            MissingExtraError: ai-edge-litert is not installed.
            PreconditionError: int8 is asked for, and no pass quantizes.
            TargetError: TFLite can't express nodes of the model; all of them are named.
        """
        check_interface(state.model)
        schema()
        if not will_quantize and state.quantization is None and not is_qdq(state.model):
            self._require_int8_source()
        problems = unsupported_nodes(self._with_batch(state.model))
        if problems:
            raise unsupported_error(problems)

    def build(self, state: ModelState, context: TargetContext) -> Artifact:
        """Emit, write, run and compare.

        Raises:
            TargetError: The model can't be expressed, or the file does not load, run, or compute what the graph does.
            OutputError: The file can't be written.
        """
        precision = self._precision(state)
        spelled = _spelled(state, context, precision)
        model = self._with_batch(spelled.model)
        options = EmitOptions(
            input_layout=self.config.input_layout,
            output_layout=self.config.output_layout,
            precision=precision,
            sparse=self.config.sparse,
        )
        emitted = emit(model, options, plan=state.quantization, source=state.model)
        path = context.folder / f"{context.stem}.tflite"
        with disk_errors(f"Writing '{path.name}'"), scratch_folder(context.folder) as scratch:
            built = scratch / path.name
            written = write_tflite(with_metadata(emitted.model, model, context.provenance), built)
            proof = prove(
                write_reference(model, scratch),
                built,
                model=model,
                arithmetic=_ARITHMETIC[precision],
                folder=scratch,
                seed=context.seed,
                custom_op_libraries=context.custom_op_libraries,
            )
            files = (artifact_file(built.replace(path), role="model"),)
        return Artifact(
            target=self.name,
            folder=context.folder,
            files=files,
            inputs=proof.inputs,
            outputs=proof.outputs,
            findings=(
                _interface_finding(emitted.model, precision),
                *spelled.findings,
                *emitted.findings,
                *_layout_findings(emitted.model.main),
                *_size_findings(written),
                *proof.findings,
            ),
            provenance=context.provenance,
            placement=spelled.placement,
        )

    def runner(self, artifact: Artifact, *, threads: int = 1, custom_op_libraries: tuple[Path, ...] = ()) -> Runner:
        """The artifact in LiteRT, with XNNPACK as applications run it; one with a fixed batch takes any number."""
        runner = litert_runner_from_path(artifact.model_path, threads=threads)
        batch = self.config.batch
        if batch is None or any(not spec.shape or spec.shape[0] != batch for spec in runner.inputs):
            return runner
        return FixedBatchRunner(runner, batch)

    def _precision(self, state: ModelState) -> Precision:
        plan = state.quantization
        if self.config.precision == "auto":
            if plan is None:
                return "int8-float-io" if is_qdq(state.model) else "fp32"
            return "int8-float-io" if plan.mode == "static" else "dynamic-int8"
        if plan is None and not is_qdq(state.model):
            self._require_int8_source()
        if plan is not None and plan.mode != "static" and self.config.precision in ("int8", "int8-float-io"):
            raise PreconditionError(
                f"precision '{self.config.precision}' needs scales for activations, and the plan's mode is "
                f"'{plan.mode}'.",
                "Set quant.mode to 'static', or precision to 'dynamic-int8'.",
            )
        return self.config.precision

    def _require_int8_source(self) -> None:
        if self.config.precision in ("int8", "int8-float-io"):
            raise PreconditionError(
                f"Target 'tflite' has precision '{self.config.precision}', and no pass quantizes the model.",
                "Add pass 'quant', or set precision to 'dynamic-int8', which needs no calibration data.",
            )

    def _with_batch(self, model: ir.Model) -> ir.Model:
        """`model`, or a copy with the batch of the configuration."""
        batch = self.config.batch
        if batch is None:
            return model
        shapes: dict[str, tuple[int, ...]] = {}
        for value in model.graph.inputs:
            if not value.shape or isinstance(value.shape[0], int):
                continue
            others = [dim for dim in value.shape[1:] if isinstance(dim, int)]
            if len(others) + 1 < len(value.shape):
                raise TargetError(
                    f"batch = {batch} leaves input '{value.name}' with further open dimensions: {value.shape}.",
                    f"Fix all of them with `--shape {value.name}=...` instead.",
                )
            shapes[value.name or ""] = (batch, *others)
        if not shapes:
            return model
        fixed = model.clone()
        fix_input_shapes(fixed, shapes, SHAPES)
        return fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spelled:
    model: ir.Model
    placement: Placement | None = None
    findings: tuple[Finding, ...] = ()


# Against the graph that was emitted: the QDQ graph, or the float one where weights alone are integers.
_ARITHMETIC: Mapping[Precision, Arithmetic] = {
    "fp32": "float32",
    "fp16": "float16",
    "int8": "int8",
    "int8-float-io": "int8",
    "dynamic-int8": "int8",
}


def with_metadata(model: Model, source: ir.Model, provenance: Mapping[str, JsonValue]) -> Model:
    """`model` with the metadata of `source`, the provenance, and how its tensors are stored."""
    values = {value.name or "": value for value in (*source.graph.inputs, *source.graph.outputs)}
    ports = zip((*model.input_names, *model.output_names), (*model.main.inputs, *model.main.outputs), strict=True)
    integers = [
        public
        for public, name in ports
        if model.main.tensors[name].quantization is not None and _is_integer(values[public])
    ]
    layouts = {tensor.name: list(tensor.layout) for tensor in model.main.tensors.values() if tensor.layout is not None}
    texts = {
        **source.metadata_props,
        PROVENANCE_KEY: json.dumps(provenance, sort_keys=True, separators=(",", ":")),
        LAYOUTS_KEY: json.dumps(layouts, sort_keys=True, separators=(",", ":")),
        INTEGERS_KEY: json.dumps(integers, separators=(",", ":")) if integers else "",
    }
    return replace(model, metadata={key: text.encode() for key, text in texts.items() if text})


def _is_integer(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_integer()


def _spelled(state: ModelState, context: TargetContext, precision: Precision) -> _Spelled:
    plan = state.quantization
    if plan is None:
        return _Spelled(model=state.model)
    if precision not in ("int8", "int8-float-io"):
        return _Spelled(model=state.model, findings=_ignored_plan(plan, precision))
    placement = context.placement
    if placement is None:
        placement = place_tflite(state.model, plan)
        finding = table_placement_finding(placement)
    else:
        require_placement_for(placement, "tflite", hint="Run without --plan to decide anew.")
        finding = planned_placement_finding(placement)
    return _Spelled(model=qdq.spell(state.model, plan, placement, "tflite"), placement=placement, findings=(finding,))


def _ignored_plan(plan: QuantizationPlan, precision: Precision) -> tuple[Finding, ...]:
    if precision == "dynamic-int8" and plan.mode != "static":
        return ()
    return (
        Finding(
            topic="precision",
            text=f"precision '{precision}' leaves the quantization of this run out.",
            severity="warning",
        ),
    )


def _interface_finding(model: Model, precision: Precision) -> Finding:
    graph = model.main
    ports = [
        f"{'input' if is_input else 'output'} '{public}' {graph.tensors[name].type.lower()}"
        f"[{', '.join(str(dim) if dim >= 0 else '?' for dim in graph.tensors[name].shape)}]"
        for is_input, names, tensors in (
            (True, model.input_names, graph.inputs),
            (False, model.output_names, graph.outputs),
        )
        for public, name in zip(names, tensors, strict=True)
    ]
    shown = "; ".join(ports[:_PORTS_SHOWN]) + (
        f"; and {len(ports) - _PORTS_SHOWN} more" if len(ports) > _PORTS_SHOWN else ""
    )
    return Finding(topic="interface", text=f"{precision}; {shown}.")


def _layout_findings(graph: Graph) -> list[Finding]:
    """Where numbers are still moved for the sake of their order."""
    left = [operator for operator in graph.operators if operator.kind == "TRANSPOSE"]
    if not left:
        return []
    nodes = Counter(operator.node or operator.outputs[0] for operator in left)
    shown = ", ".join(f"'{name}'" for name in list(nodes)[:_PORTS_SHOWN])
    more = f" and {len(nodes) - _PORTS_SHOWN} more places" if len(nodes) > _PORTS_SHOWN else ""
    count = "1 TRANSPOSE is" if len(left) == 1 else f"{len(left)} TRANSPOSE are"
    return [Finding(topic="layout", text=f"{count} left, at {shown}{more}.")]


def _size_findings(written: WrittenFile) -> list[Finding]:
    if not written.is_behind:
        return []
    return [
        Finding(
            topic="large model",
            text=f"{written.constant_bytes / 2**30:.1f} GiB of weights stand behind the flatbuffer, which can't hold "
            "them: LiteRT and TensorFlow Lite read that form from version 3c of the schema on (ai-edge-litert 2.3 and "
            "tensorflow 2.21 do); older interpreters, and many converters and viewers, find no weights.",
            severity="warning",
        )
    ]


_PORTS_SHOWN = 5
