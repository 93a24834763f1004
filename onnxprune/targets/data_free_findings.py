"""What int8 without calibration data means for size, latency and memory, said with the artifact."""

from __future__ import annotations

from onnxprune.contracts import Finding, ModelState
from onnxprune.targets.building import Spelled
from onnxprune.targets.qdq.spelling import SpellingName
from onnxprune.targets.qdq.stored import StorageForm

__all__ = ["data_free_findings"]

TOPIC = "int8 without calibration data"


def data_free_findings(
    state: ModelState, spelled: Spelled, spelling: SpellingName | None, *, stored: StorageForm
) -> tuple[Finding, ...]:
    """One finding about layers in integers and one about weights that are only stored as such, where there are any."""
    plan, placement = state.quantization, spelled.placement
    if plan is None or placement is None or plan.mode == "static":
        return ()
    findings = []
    num_integer = len(placement.integer_nodes)
    if num_integer:
        how = _DYNAMIC if plan.mode == "dynamic" else _BLOCK_WISE
        findings.append(Finding(topic=TOPIC, text=how.format(count=num_integer)))
    num_stored = sum(reason.startswith(STORED_MARK) for reason in placement.float_nodes.values())
    if num_stored:
        text = (_FOLDED if stored == "folded" else _KEPT).format(count=num_stored)
        findings.append(Finding(topic=TOPIC, text=text, severity="info" if stored == "folded" else "warning"))
    if plan.mode == "dynamic" and not num_integer:
        text = f"No layer is faster with ranges of each run on '{spelling}': the arithmetic is that of float."
        findings.append(Finding(topic=TOPIC, text=text, severity="warning"))
    return tuple(findings)


STORED_MARK = "its weight is stored as int8"

_DYNAMIC = (
    "Layers that compute in int8 with the range that each run finds in their input: {count}. A sample's result depends "
    "on the other samples of its batch, by less than the rounding."
)
_BLOCK_WISE = (
    "Matrix products that are MatMulNBits with 8 bits (ONNX Runtime 1.22 or newer): {count}. Their weights stay int8 "
    "in memory, and activations are rounded to int8 by the range of each row and block of 128."
)
_FOLDED = (
    "Layers whose weights are stored as int8, and become float32 when ONNX Runtime loads the file: {count}. "
    "The file is smaller; latency and memory in use are those of float."
)
_KEPT = (
    "Layers whose weights are stored as int8 and become float32 in each run, because a .ort file is not "
    "optimized again when it is loaded: {count}. The file is smaller, and they are slower than in float (single "
    "convolutions took up to 2.5 times as long). Target 'onnx' converts them once."
)
