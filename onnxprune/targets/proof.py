"""The proof that an artifact is what it should be: it is loaded, run, and compared with the graph it came from.

The reference is that graph as onnx_ir itself writes it, run by ONNX Runtime without any optimization. So what is
compared is everything that came after: our writer (merged weights, external data), the conversion, ONNX Runtime's
optimizations, and its integer kernels against the float arithmetic of the QDQ graph. All of it happens in a child
process: an artifact that crashes its runtime is an error, not the end of the run.

Limits:
    float32     largest difference at most 1e-3 of the output's largest value. Fused and blocked kernels add in another
                order: 1e-6 on a single layer, 1e-5 on ResNet-50. A wrong graph is off by more than 1e-1.
    float16     5e-2, because each fused node spares a rounding to 11 bits.
    int8        signal to noise of at least 10 dB. Kernels round ties differently from QDQ arithmetic, and one step
                spreads: 58 dB for a chain of 60 convolutions, 37 dB for a MobileNetV2-SSD, 24 dB for FastestDet. A
                wrong scale or zero point gives about 0 dB. An output that was decided behind the integers (Softmax,
                Exp, TopK ...) gets a finding instead of an error: where two candidates are nearly equal, one step
                of rounding turns the decision round, as on random inputs it may.
    saturating  any finite figure, with a finding below 10 dB: int8 with 8-bit weights, run on x86 without VNNI, whose
                kernels saturate at 16 bits (4.5 dB on FastestDet). Machines that it is meant for don't.
    integers    outputs such as classes must be equal for 99 % (float) of their elements; for int8 they are not
                compared, since a class may flip at a tie. Those with a scale beside them are compared as what they
                stand for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import Finding, JsonObject, TensorSpec
from onnxprune.errors import OnnxPruneError, TargetError, quoted_list
from onnxprune.evaluate.fidelity import compare_outputs
from onnxprune.runtime.affine import real_values
from onnxprune.runtime.artifacts import is_tflite
from onnxprune.runtime.child import ChildFailure, call_in_child
from onnxprune.runtime.feeds import random_feeds, working_feeds
from onnxprune.runtime.litert import LitertRunner, litert_runner_from_path
from onnxprune.runtime.sessions import OrtRunner, ort_runner_from_path
from onnxprune.targets.building import is_qdq

__all__ = ["Arithmetic", "Proof", "arithmetic_of", "compare_in_this_process", "prove", "write_reference"]

Arithmetic: TypeAlias = Literal["float32", "float16", "int8", "saturating"]

MAX_RELATIVE: Mapping[Arithmetic, float] = {"float32": 1e-3, "float16": 5e-2}
MIN_SNR_DB: Mapping[Arithmetic, float] = {"int8": 10.0, "saturating": -math.inf}
MIN_EQUAL_RATIO = 0.99

# Operators that turn a small difference into a large one where candidates are nearly equal.
DECIDING_OPS = frozenset(
    {"ArgMax", "ArgMin", "Exp", "Hardmax", "LogSoftmax", "NonMaxSuppression", "Sigmoid", "Softmax", "TopK"}
)

NUM_SAMPLES = 2
TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What the artifact showed when it ran. The differences are the worst over outputs and samples."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    max_relative: float
    snr_db: float
    findings: tuple[Finding, ...]


def arithmetic_of(model: ir.Model, *, is_quantized: bool, host_saturates: bool) -> Arithmetic:
    """Which limits apply to `model`; a QDQ graph from elsewhere runs on the same integer kernels as one of ours."""
    if is_quantized or is_qdq(model):
        return "saturating" if host_saturates else "int8"
    halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    values = (*model.graph.inputs, *model.graph.initializers.values())
    return "float16" if any(value.dtype in halves for value in values) else "float32"


def write_reference(model: ir.Model, folder: Path) -> Path:
    """Write `model` into `folder` by onnx_ir's own writer, which shares no code with ours.

    Raises:
        OSError: Writing failed.
    """
    path = folder / "reference.onnx"
    ir.save(model, path, external_data="reference.data")
    return path


def prove(
    reference: Path,
    artifact: Path,
    *,
    model: ir.Model,
    arithmetic: Arithmetic,
    folder: Path,
    seed: int,
    custom_op_libraries: Sequence[Path] = (),
    replay_saved_optimizations: bool = False,
) -> Proof:
    """Load and run `artifact`, and hold it against `reference` on seeded random inputs.

    Args:
        reference: What `write_reference` wrote.
        artifact: The `.onnx` or `.ort` file that was built.
        model: The graph that both came from: names and types of inputs and outputs must be as in it.
        arithmetic: Which limits apply.
        folder: For the child's files.
        seed: For the inputs.
        custom_op_libraries: Shared libraries with custom operators.
        replay_saved_optimizations: As `ort_runner_from_path` takes it.

    Raises:
        TargetError: It can't be loaded or run, crashes, has another interface, or differs by more than the limit.
    """
    try:
        answer = call_in_child(
            "onnxprune.targets.proof:compare_in_this_process",
            {
                "reference": str(reference),
                "artifact": str(artifact),
                "seed": seed,
                "custom_op_libraries": [str(library.resolve()) for library in custom_op_libraries],
                "replay_saved_optimizations": replay_saved_optimizations,
            },
            folder=folder,
            timeout_s=TIMEOUT_S,
        )
    except ChildFailure as failure:
        runtime = "LiteRT" if is_tflite(artifact) else "ONNX Runtime"
        raise TargetError(f"{runtime} {failure} while it loaded and ran '{artifact.name}'.") from failure
    except OnnxPruneError as error:
        raise TargetError(f"'{artifact.name}' was written, but does not run. {error.message}", error.hint) from error
    inputs = tuple(_spec_from_json(spec) for spec in answer["inputs"])
    outputs = tuple(_spec_from_json(spec) for spec in answer["outputs"])
    _check_interface(artifact.name, model, inputs, outputs)
    _check_metadata(artifact.name, model, answer["metadata"])
    findings = _check_differences(
        artifact.name, answer["outputs_compared"], arithmetic, decided=_decided_outputs(model)
    )
    floats = [entry for entry in answer["outputs_compared"].values() if "snr_db" in entry]
    return Proof(
        inputs=inputs,
        outputs=outputs,
        metadata=answer["metadata"],
        max_relative=max((entry["max_rel"] for entry in floats), default=0.0),
        snr_db=min((entry["snr_db"] for entry in floats), default=math.inf),
        findings=findings,
    )


def compare_in_this_process(arguments: JsonObject, folder: Path) -> JsonObject:  # noqa: ARG001 - as `call_in_child` calls
    """The child's side of `prove`: one runner at a time, so that the weights are in memory once."""
    libraries = [Path(library) for library in arguments["custom_op_libraries"]]
    reference = ort_runner_from_path(
        Path(arguments["reference"]), custom_op_libraries=libraries, optimization="disabled"
    )
    samples = _samples(reference, arguments["seed"])
    expected = [reference.run(sample) for sample in samples]
    del reference
    artifact = _artifact_runner(
        Path(arguments["artifact"]), libraries, replay_saved_optimizations=arguments["replay_saved_optimizations"]
    )
    actual = [artifact.run(sample) for sample in samples]
    return {
        "inputs": [_spec_to_json(spec) for spec in artifact.inputs],
        "outputs": [_spec_to_json(spec) for spec in artifact.outputs],
        "metadata": artifact.metadata,
        "outputs_compared": {
            spec.name: _compare(*_with_meaning(spec.name, artifact, expected, actual))
            for spec in artifact.outputs
            if all(spec.name in outputs for outputs in expected)
        },
    }


def _artifact_runner(
    path: Path, libraries: Sequence[Path], *, replay_saved_optimizations: bool
) -> OrtRunner | LitertRunner:
    if is_tflite(path):
        return litert_runner_from_path(path)
    return ort_runner_from_path(
        path, custom_op_libraries=libraries, replay_saved_optimizations=replay_saved_optimizations
    )


def _samples(runner: OrtRunner, seed: int) -> list[dict[str, npt.NDArray[Any]]]:
    first = working_feeds(runner, seed=seed)
    shapes = {name: array.shape for name, array in first.items()}
    more = [random_feeds(runner.inputs, seed=seed + index, shapes=shapes) for index in range(1, NUM_SAMPLES)]
    return [first, *more]


def _with_meaning(
    name: str,
    artifact: OrtRunner | LitertRunner,
    expected: Sequence[Mapping[str, npt.NDArray[Any]]],
    actual: Sequence[Mapping[str, npt.NDArray[Any]]],
) -> tuple[str, list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]]:
    """The arrays of one output, in pairs; integers of which the artifact knows the scale as real numbers."""
    pairs = [(want[name], got[name]) for want, got in zip(expected, actual, strict=True)]
    stored = artifact.stored_outputs if isinstance(artifact, LitertRunner) else ()
    for tensor in stored:
        if tensor.name == name and tensor.is_integer_in_source:
            pairs = [(real_values(want, tensor), real_values(got, tensor)) for want, got in pairs]
    return name, pairs


def _compare(name: str, pairs: Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> JsonObject:
    """The worst difference of one output over all samples, by the kind of its elements."""
    for want, got in pairs:
        if want.shape != got.shape:
            return {"shapes": [list(want.shape), list(got.shape)]}
    if pairs[0][0].dtype.kind in "biuOUS":
        return {"equal_ratio": min(float(np.mean(want == got)) if want.size else 1.0 for want, got in pairs)}
    differences = [compare_outputs({name: want}, {name: got}) for want, got in pairs]
    return {
        "max_rel": max(difference.max_rel for difference in differences),
        "snr_db": min(difference.snr_db for difference in differences),
    }


def _check_interface(
    artifact: str, model: ir.Model, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> None:
    for kind, values, specs in (("inputs", model.graph.inputs, inputs), ("outputs", model.graph.outputs, outputs)):
        wanted = [value.name or "" for value in values]
        found = [spec.name for spec in specs]
        if wanted != found:
            raise TargetError(
                f"'{artifact}' has the {kind} {quoted_list(found)}, but the model has {quoted_list(wanted)}."
            )


def _check_metadata(artifact: str, model: ir.Model, found: Mapping[str, str]) -> None:
    lost = [key for key, text in model.metadata_props.items() if text and key not in found]
    if lost:
        raise TargetError(f"'{artifact}' lost the model's metadata {quoted_list(lost)}.")


def _check_differences(
    artifact: str, compared: Mapping[str, JsonObject], arithmetic: Arithmetic, *, decided: frozenset[str]
) -> tuple[Finding, ...]:
    findings = []
    for name, entry in compared.items():
        problem = _difference_problem(entry, arithmetic)
        is_finite = not math.isnan(entry.get("snr_db", 0.0))
        if problem and arithmetic == "int8" and name in decided and is_finite:
            findings.append(
                Finding(
                    topic="int8",
                    text=f"On random inputs, output '{name}' {problem} against the exact integers: it is decided by "
                    "nearly equal candidates there. The score, or the comparison on real data, tells whether it holds.",
                    severity="warning",
                )
            )
            continue
        if problem:
            raise TargetError(
                f"'{artifact}' does not compute what its graph computes: output '{name}' {problem}.",
                "Please report it with the model; another optimization level may avoid it.",
            )
        if arithmetic == "saturating" and entry.get("snr_db", math.inf) < MIN_SNR_DB["int8"]:
            findings.append(
                Finding(
                    topic="int8",
                    text=f"Output '{name}' reached {entry['snr_db']:.1f} dB against the exact integers here, because "
                    "this machine has no VNNI and its int8 kernels saturate at 16 bits. Scores of this artifact that "
                    "are measured here are too low.",
                    severity="warning",
                )
            )
    return tuple(findings)


def _decided_outputs(model: ir.Model) -> frozenset[str]:
    """Outputs of a QDQ graph with a deciding operator between them and the integers."""
    decided = set()
    for output in model.graph.outputs:
        seen: set[ir.Node] = set()
        waiting = [output.producer()]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen or node.op_type == "DequantizeLinear":
                continue
            seen.add(node)
            if node.op_type in DECIDING_OPS:
                decided.add(output.name or "")
                break
            waiting.extend(value.producer() for value in node.inputs if value is not None)
    return frozenset(decided)


def _difference_problem(entry: JsonObject, arithmetic: Arithmetic) -> str:
    is_int8 = arithmetic in MIN_SNR_DB
    if "shapes" in entry:
        # Outputs such as kept boxes have as many rows as pass a threshold.
        wanted, got = entry["shapes"]
        return "" if is_int8 and len(wanted) == len(got) else f"has the shape {got} instead of {wanted}"
    if "equal_ratio" in entry:
        ratio = entry["equal_ratio"]
        return "" if is_int8 or ratio >= MIN_EQUAL_RATIO else f"is equal in only {ratio:.1%} of its elements"
    if is_int8:
        limit, snr_db = MIN_SNR_DB[arithmetic], entry["snr_db"]
        # Not `<`: NaN must fail.
        return "" if snr_db >= limit else f"reaches {snr_db:.1f} dB instead of at least {limit:.0f} dB"
    limit, max_rel = MAX_RELATIVE[arithmetic], entry["max_rel"]
    return "" if max_rel <= limit else f"is off by {max_rel:.2g} of its largest value, above the limit of {limit:g}"


def _spec_to_json(spec: TensorSpec) -> JsonObject:
    return {"name": spec.name, "dtype": spec.dtype, "shape": None if spec.shape is None else list(spec.shape)}


def _spec_from_json(spec: JsonObject) -> TensorSpec:
    shape = spec["shape"]
    return TensorSpec(name=spec["name"], dtype=spec["dtype"], shape=None if shape is None else tuple(shape))
