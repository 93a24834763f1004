"""onnx-neural-compressor as an engine: it calibrates in a Python of its own, and its scales become a plan of ours.

1. `probe_engine` asks the interpreter for versions, missing packages, and what its ONNX Runtime reads.
2. The float model goes there as a copy with plain names, the calibration samples as one .npz file for each batch.
3. It writes a QDQ model; `engine_answer` reads scales, zero points and weight scales out of it, by node.
4. `engine_plan` makes a `QuantizationPlan` of them, so that placement, spelling, report and verification are the same.

The engine is treated as hostile: a child process with a time and a memory limit, and a result that is checked.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, ValidationError

from onnxprune.contracts import JsonObject, JsonValue, PassContext, QuantizationPlan
from onnxprune.errors import ModelError, OnnxPruneError, PassError, PreconditionError, quoted_list
from onnxprune.graph.io import load_model
from onnxprune.graph.metadata import module_path
from onnxprune.graph.scope import first_match, weight_names
from onnxprune.passes.quant.calibrate import calibrate
from onnxprune.passes.quant.candidates import find_candidates
from onnxprune.passes.quant.engine_answer import EngineNumbers, read_answer
from onnxprune.passes.quant.engine_copy import EngineCopy, node_alias, write_copy, write_samples
from onnxprune.passes.quant.engine_plan import NUM_BITS, Provenance, plan_from_engine
from onnxprune.passes.quant.engine_settings import CALIBRATION_METHODS, EngineSettings
from onnxprune.passes.quant.tail_ranges import channel_axes, reasons_with_ranges
from onnxprune.runtime import child
from onnxprune.runtime.child import ChildFailure, call_script

if TYPE_CHECKING:
    from onnxprune.passes.quant.quant_pass import QuantConfig

__all__ = ["EngineProbe", "engine_files", "plan_with_neural_compressor", "probe_engine", "require_engine"]

ENGINE = "neural-compressor"
MAJOR_VERSION = "1"
PROBE_TIMEOUT_S = 120.0
CHILD_SCRIPT = Path(child.__file__).with_name("neural_compressor_child.py")
INSTALL_HINT = (
    "Make one: python3 -m venv nc && nc/bin/pip install onnx-neural-compressor==1.0 scipy prettytable, "
    "then set `quant.engine_python = 'nc/bin/python'`."
)
_MEMORY_INFO = Path("/proc/meminfo")


class EngineProbe(BaseModel):
    """What an interpreter says about itself. `files` change with what is installed in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    python: str
    missing: tuple[str, ...]
    versions: dict[str, str] = {}
    files: tuple[Path, ...] = ()
    max_opset: int = 0
    max_ir_version: int = 0

    @property
    def engine_version(self) -> str:
        """The version of onnx-neural-compressor, "unknown" without its metadata."""
        return self.versions.get("onnx-neural-compressor", "unknown")


def require_engine(settings: EngineSettings) -> None:
    """Refuse early an engine that can't be used; nothing is looked at where our own calibrates.

    Raises:
        PreconditionError: As `probe_engine`.
    """
    if settings.engine == ENGINE:
        probe_engine(settings.engine_python)


def engine_files(settings: EngineSettings) -> tuple[Path, ...]:
    """The files that say what is installed where the engine runs; none without an engine that can be used."""
    if settings.engine != ENGINE:
        return ()
    try:
        return probe_engine(settings.engine_python).files
    except PreconditionError:
        return ()


def probe_engine(python: str | None) -> EngineProbe:
    """What the interpreter `python` has; asked once in the life of this process.

    Raises:
        PreconditionError: It is missing, is no Python, lacks packages, or has another version of the engine.
    """
    # Not Path.resolve: an environment's interpreter is a link, and what it links to has none of its packages.
    return _probe(os.path.abspath(python or ""))  # noqa: PTH100


@functools.lru_cache(maxsize=8)
def _probe(python: str) -> EngineProbe:
    subject = "`quant.engine_python` must name a Python interpreter that has onnx-neural-compressor"
    if not Path(python).is_file():
        raise PreconditionError(f"{subject}: there is no file '{python}'.", INSTALL_HINT)
    try:
        answer = _call(Path(python), {"task": "probe"}, timeout_s=PROBE_TIMEOUT_S)
        probe = EngineProbe.model_validate(answer)
    except ChildFailure as failure:
        raise PreconditionError(f"{subject}: '{python}' {failure}.", INSTALL_HINT) from failure
    except (ValidationError, OnnxPruneError) as error:
        raise PreconditionError(f"{subject}: '{python}' gave an answer that makes no sense.", INSTALL_HINT) from error
    if probe.missing:
        raise PreconditionError(
            f"{subject}: '{python}' (Python {probe.python}) lacks {quoted_list(probe.missing)}.", INSTALL_HINT
        )
    if probe.engine_version.partition(".")[0] != MAJOR_VERSION:
        raise PreconditionError(
            f"'{python}' has onnx-neural-compressor {probe.engine_version}; what is understood here is version 1.0.",
            INSTALL_HINT,
        )
    if not (probe.max_opset and probe.max_ir_version):
        raise PreconditionError(
            f"The onnxruntime {probe.versions.get('onnxruntime', '')} of '{python}' is too old: it reads no opset 18.",
            "Install a newer one there.",
        )
    return probe


def plan_with_neural_compressor(model: ir.Model, config: QuantConfig, context: PassContext) -> QuantizationPlan:
    """Calibrate with onnx-neural-compressor and choose all scales as it does, where our rules allow.

    Raises:
        PreconditionError: There is no calibration data, or the interpreter can't be used or can't read the model.
        PassError: The engine failed, or gave back another graph; or nothing in the model can be quantized.
        BadDataError: The samples hold numbers that are not finite, or make a tensor non-finite.
    """
    if context.calibration is None:
        raise PreconditionError("Static quantization needs calibration data, but the run has none.")
    if context.custom_op_libraries:
        raise PreconditionError(
            "neural-compressor can't load libraries with custom operators.", "Use `quant.engine = 'onnxprune'`."
        )
    probe = probe_engine(config.engine_python)
    context.progress.note(f"neural-compressor {probe.engine_version} calibrates")
    with tempfile.TemporaryDirectory(prefix="onnxprune-engine-") as name:
        folder = Path(name)
        copy = write_copy(model, folder / "model.onnx", max_opset=probe.max_opset, max_ir_version=probe.max_ir_version)
        samples = write_samples(
            context.calibration,
            folder / "samples",
            model=model,
            inputs=copy.inputs,
            max_samples=config.num_samples,
            progress=context.progress,
        )
        _run(copy, _job(model, config, samples.num_batches), config, folder)
        numbers = _read(model, folder / "quantized.onnx")
    candidates = find_candidates(model, exclude=config.exclude)
    axes = channel_axes(candidates)
    # The engine knows ranges of whole tensors only; what a last layer's channels need is looked at here.
    last = calibrate(
        model,
        [value for item in candidates.last_layers for value in item.outputs],
        context.calibration,
        channel_axes=axes,
        max_samples=config.num_samples,
        threads=config.threads,
        progress=context.progress,
    )
    method = config.calibration_method
    named = f"percentile {config.percentile:g}" if method == "percentile" else method
    plan = plan_from_engine(
        model,
        numbers,
        Provenance(
            engine=ENGINE,
            method=f"{ENGINE} {probe.engine_version} {named}",
            calibration_hash=context.calibration.content_hash,
            num_samples=samples.num_samples,
        ),
        exclude=config.exclude,
        per_channel=config.per_channel,
        channels=last.channels,
    )
    tail_reasons = reasons_with_ranges(
        model,
        candidates,
        context.calibration,
        num_bits=NUM_BITS,
        custom_op_libraries=context.custom_op_libraries,
    )
    return replace(plan, excluded_nodes={**plan.excluded_nodes, **tail_reasons})


def _job(model: ir.Model, config: QuantConfig, num_batches: int) -> JsonObject:
    excluded = [
        node_alias(position)
        for position, node in enumerate(model.graph)
        if first_match(config.exclude, node.name, *weight_names(node), module_paths=(module_path(node),))
    ]
    return {
        "task": "quantize",
        "calibration_method": CALIBRATION_METHODS[config.calibration_method],
        "percentile": config.percentile,
        "per_channel": config.per_channel,
        "op_types": list(config.engine_op_types),
        "activation_symmetric": config.engine_activation_symmetric,
        "quantize_last_matmul": config.engine_quantize_last_matmul,
        "nodes_to_exclude": excluded,
        "num_batches": num_batches,
        "threads": config.threads,
        "memory_limit_bytes": _available_bytes(),
    }


def _run(copy: EngineCopy, job: JsonObject, config: QuantConfig, folder: Path) -> None:
    python = Path(os.path.abspath(config.engine_python or ""))  # noqa: PTH100 - as in `probe_engine`
    try:
        call_script(python, _script(), job, folder=folder, timeout_s=config.engine_timeout_s)
    except ChildFailure as failure:
        raise PassError(f"neural-compressor {copy.translated(str(failure))}.", _advice(str(failure))) from failure


def _advice(failure: str) -> str:
    if "memory" in failure:
        return (
            'With "percentile" and "entropy" it keeps every activation of every sample: use '
            "`quant.calibration_method = 'minmax'`, a smaller `quant.num_samples`, or `quant.engine = 'onnxprune'`."
        )
    if "did not finish" in failure:
        return "Raise `quant.engine_timeout_s`, or lower `quant.num_samples`."
    return "Exclude what it fails on with `quant.exclude`, or use `quant.engine = 'onnxprune'`."


def _read(model: ir.Model, path: Path) -> EngineNumbers:
    try:
        answer = load_model(path)
    except ModelError as error:
        text = error.message.replace(str(path), path.name).rstrip(".")
        raise PassError(f"neural-compressor gave back a model that can't be read: {text}.") from error
    return read_answer(model, answer, engine=ENGINE)


def _call(python: Path, job: JsonObject, *, timeout_s: float) -> JsonValue:
    with tempfile.TemporaryDirectory(prefix="onnxprune-engine-") as name:
        return call_script(python, _script(), job, folder=Path(name), timeout_s=timeout_s)


def _script() -> str:
    return CHILD_SCRIPT.read_text(encoding="utf-8")


def _available_bytes() -> int | None:
    """Memory that is free now; None where the system does not say (only Linux does this way)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _MEMORY_INFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
