"""What NNAPI (Android) and CoreML (iOS, macOS) could take of a model, by ONNX Runtime's own usability checker.

The checker goes by operator type, rank and fixed shapes; what else an execution provider asks for it lists as caveats
that it did not check. Its suitability is a rule of thumb: one partition with most nodes is good, three are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxprune.contracts import Finding, JsonObject, JsonValue
from onnxprune.errors import OnnxPruneError, quoted_list
from onnxprune.runtime.child import ChildFailure, call_in_child

__all__ = ["check_in_this_process", "mobile_findings"]

TIMEOUT_S = 600.0

_PROVIDERS = {
    "NNAPI": "nnapi_supported_ops.md",
    "CoreML (NeuralNetwork)": "coreml_supported_neuralnetwork_ops.md",
    "CoreML (MLProgram)": "coreml_supported_mlprogram_ops.md",
}
_VERDICTS = {
    "YES": "should run well there",
    "MAYBE": "may be worth trying there",
    "NO": "is better off on the CPU provider",
}
_MAX_CAVEATS = 3


def mobile_findings(model: Path, *, folder: Path, has_int8_activations: bool) -> tuple[Finding, ...]:
    """One finding for each execution provider, from the ONNX file `model`; never an error.

    Args:
        model: The graph before ONNX Runtime's optimizations, which compiling providers see.
        folder: For the child's files.
        has_int8_activations: Whether QuantizeLinear makes signed integers, which NNAPI refuses.
    """
    try:
        answers = call_in_child(
            "onnxprune.targets.mobile_check:check_in_this_process",
            {"model": str(model)},
            folder=folder,
            timeout_s=TIMEOUT_S,
        )
    except (ChildFailure, OnnxPruneError) as failure:
        return (
            Finding(
                topic="NNAPI and CoreML",
                text=f"Not checked: ONNX Runtime's usability checker {failure}.",
                severity="warning",
            ),
        )
    findings = [Finding(topic=name, text=_text(name, answers[name])) for name in _PROVIDERS]
    if has_int8_activations:
        findings.append(
            Finding(
                topic="NNAPI",
                text="NNAPI takes uint8 activations only; the int8 of the arm64 spelling stays on the CPU provider.",
            )
        )
    return tuple(findings)


def check_in_this_process(arguments: JsonObject, folder: Path) -> JsonValue:  # noqa: ARG001 - as `call_in_child` calls
    """The child's side of `mobile_findings`: the checker configures the root logger and hashes protobuf objects."""
    from onnxruntime.tools.mobile_helpers import usability_checker
    from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo

    loaded = ModelProtoWithShapeInfo(Path(arguments["model"]))
    model = loaded.model_with_shape_info
    answers: dict[str, JsonObject] = {}
    for name, table in _PROVIDERS.items():
        for require_fixed_shapes in (True, False):
            if name == "NNAPI":
                found = usability_checker.check_nnapi_partitions(model, require_fixed_shapes)
            else:
                found = usability_checker.check_coreml_partitions(model, require_fixed_shapes, table)
            entry = {
                "num_nodes": found.num_nodes,
                "num_supported": found.num_supported_nodes,
                "num_partitions": found.num_partitions,
                "unsupported_ops": sorted(found.unsupported_ops),
                "num_dynamic": found.nodes_unsupported_due_to_dynamic_input,
                "caveats": found.supported_ops_checker.get_caveats(),
                "verdict": found.suitability().name if found.num_nodes else "NO",
            }
            answers.setdefault(name, {})["as_is" if require_fixed_shapes else "fixed_shapes"] = entry
    return answers


def _text(name: str, answer: Mapping[str, JsonObject]) -> str:
    as_is, fixed = answer["as_is"], answer["fixed_shapes"]
    sentences = [f"{_nodes(as_is)}: the model {_VERDICTS[as_is['verdict']]}."]
    if as_is["num_dynamic"] and fixed["num_supported"] > as_is["num_supported"]:
        sentences.append(f"With fixed input shapes (--shape): {_nodes(fixed)}, and it {_VERDICTS[fixed['verdict']]}.")
    if fixed["unsupported_ops"]:
        sentences.append(f"Not supported: {quoted_list(_plain(fixed['unsupported_ops']))}.")
    caveats = [" ".join(caveat.removeprefix("ai.onnx:").split()) for caveat in fixed["caveats"]]
    if caveats:
        more = len(caveats) - _MAX_CAVEATS
        listed = " ".join(f"{caveat.rstrip('.')}." for caveat in caveats[:_MAX_CAVEATS])
        sentences.append(f"Not checked: {listed}" + (f" And {more} more." if more > 0 else ""))
    if name == "NNAPI":
        sentences.append("Android deprecates NNAPI since version 15.")
    return " ".join(sentences)


def _nodes(entry: JsonObject) -> str:
    parts = "1 part" if entry["num_partitions"] == 1 else f"{entry['num_partitions']} parts"
    return f"{entry['num_supported']} of {entry['num_nodes']} nodes in {parts}"


def _plain(names: Sequence[str]) -> list[str]:
    return [name.removeprefix("ai.onnx:") for name in names]
