"""What NNAPI (Android) and CoreML (iOS, macOS) could take of a model, by ONNX Runtime's own usability checker.

The checker goes by operator type, rank and fixed shapes; what else an execution provider asks for it lists as caveats
that it did not check. Its suitability is a rule of thumb: one partition with most nodes is good, three are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnxprune.contracts import Finding, JsonObject
from onnxprune.errors import quoted_list
from onnxprune.runtime.child import ChildFailure, call_in_child
from onnxprune.targets.ort_child import PROVIDERS

__all__ = ["mobile_findings"]

TIMEOUT_S = 600.0

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
            "onnxprune.targets.ort_child:check_mobile_usability",
            {"model": str(model)},
            folder=folder,
            timeout_s=TIMEOUT_S,
        )
    except ChildFailure as failure:
        return (
            Finding(
                topic="NNAPI and CoreML",
                text=f"Not checked: ONNX Runtime's usability checker {failure}.",
                severity="warning",
            ),
        )
    findings = [Finding(topic=name, text=_text(name, answers[name])) for name in PROVIDERS]
    if has_int8_activations:
        findings.append(
            Finding(
                topic="NNAPI",
                text="NNAPI takes uint8 activations only; the int8 of the arm64 spelling stays on the CPU provider.",
            )
        )
    return tuple(findings)


def _text(name: str, answer: JsonObject) -> str:
    as_is, fixed = answer["as_is"], answer["fixed_shapes"]
    sentences = [f"{_nodes(as_is)}: the model {_VERDICTS[as_is['verdict']]}."]
    if as_is["num_dynamic"] and answer["has_dynamic_inputs"]:
        sentences.append(f"With fixed input shapes (--shape): {_nodes(fixed)}, and it {_VERDICTS[fixed['verdict']]}.")
    elif as_is["num_dynamic"]:
        sentences.append(f"Nodes with shapes that are known only when it runs: {as_is['num_dynamic']}.")
    if fixed["unsupported_ops"]:
        sentences.append(f"Not supported: {quoted_list(_plain(fixed['unsupported_ops']))}.")
    caveats = [" ".join(caveat.removeprefix("ai.onnx:").replace(":", ": ", 1).split()) for caveat in fixed["caveats"]]
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
