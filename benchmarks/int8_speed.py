"""How much faster int8 is than float, ours and that of onnxruntime's `quantize_static` (U8S8, per channel, QDQ).

One thread, batch 1; the three sessions take turns within one run, so that whatever else the machine does hits all of
them. What counts is the ratio, and it depends on the instruction set: on x86 with VNNI the ResNet-50 should come out
at 2.8 or above; without VNNI `quantize_static`'s ratio on the same machine is the yardstick.

    python int8_speed.py [network ...]        resnet50 is the default; any light network of the onnx wheel works
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from networks import write_light_network
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from onnxprune.contracts import Batch, CanonicalModel, ModelState, PassContext, QuantizationPlan
from onnxprune.convert.onnx_file import load_onnx
from onnxprune.passes.harness import run_pass
from onnxprune.passes.quant import QuantConfig, QuantPass
from onnxprune.passes.simplify import SimplifyConfig, SimplifyPass
from onnxprune.runtime.host import host_isa
from onnxprune.targets import qdq
from onnxprune.targets.qdq import SpellingName

NUM_CALIBRATION = 8
NUM_ROUNDS = 25


class Batches:
    """A `CalibrationSource` of seeded normal numbers."""

    content_hash = "seeded"
    num_samples = NUM_CALIBRATION

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self._name, self._shape = name, shape

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng(0)
        for _ in range(NUM_CALIBRATION):
            yield {self._name: rng.standard_normal(self._shape).astype(np.float32)}


class RivalReader(CalibrationDataReader):
    """The same numbers for `quantize_static`."""

    def __init__(self, batches: Batches) -> None:
        self._batches = iter(batches)

    def get_next(self) -> Batch | None:
        """One batch, or None at the end."""
        return next(self._batches, None)


def session(content: bytes, write_to: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.optimized_model_filepath = str(write_to)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def interleaved_ms(sessions: dict[str, onnxruntime.InferenceSession], feeds: Batch) -> dict[str, float]:
    """Median milliseconds of each session."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(NUM_ROUNDS + 3):
        for name, found in sessions.items():
            start = time.perf_counter()
            found.run(None, feeds)
            if number >= 3:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: float(np.median(values)) for name, values in times.items()}


def plan_of(model: CanonicalModel, batches: Batches) -> QuantizationPlan:
    outcome = run_pass(QuantPass(QuantConfig()), ModelState(model=model), PassContext(calibration=batches))
    if outcome.state.quantization is None:
        raise SystemExit("no plan")
    return outcome.state.quantization


def compare(network: str, spelling: SpellingName, folder: Path) -> None:
    source = load_onnx(write_light_network(network, folder / f"{network}.onnx"))
    model = run_pass(SimplifyPass(SimplifyConfig()), ModelState(model=source), PassContext()).state.model
    (given,) = model.graph.inputs
    batches = Batches(given.name or "", tuple(given.shape.numpy()) if given.shape else ())
    plan = plan_of(model, batches)
    placement = qdq.place(model, plan, spelling)
    float_path = folder / "float.onnx"
    onnx.save(ir.to_proto(model), float_path)
    quantize_static(
        float_path,
        folder / "rival.onnx",
        RivalReader(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        reduce_range=spelling == "x86",
    )
    contents = {
        "float": float_path.read_bytes(),
        "onnxprune": ir.to_proto(qdq.spell(model, plan, placement, spelling)).SerializeToString(),
        "quantize_static": (folder / "rival.onnx").read_bytes(),
    }
    sessions = {name: session(content, folder / f"{name}.optimized.onnx") for name, content in contents.items()}
    medians = interleaved_ms(sessions, next(iter(batches)))
    print(f"{network}: {len(placement.integer_nodes)} nodes integer, {len(placement.float_nodes)} float")
    for reason, count in qdq.float_reasons(placement).items():
        print(f"  float because {reason}: {count}")
    for name, median in medians.items():
        operators = Counter(node.op_type for node in onnx.load(folder / f"{name}.optimized.onnx").graph.node)
        conversions = operators["QuantizeLinear"] + operators["DequantizeLinear"]
        print(
            f"  {name:16}{median:8.2f} ms   {medians['float'] / median:5.2f}x   "
            f"{operators['QLinearConv']} QLinearConv, {conversions} conversions left"
        )


def main() -> None:
    logging.disable(logging.WARNING)
    isa = host_isa()
    spelling: SpellingName = "arm64" if isa.arch == "arm64" else "x86-vnni" if isa.has_vnni else "x86"
    print(f"host: {isa}; spelling {spelling}, one thread, median of {NUM_ROUNDS} interleaved runs")
    with tempfile.TemporaryDirectory() as folder:
        for network in sys.argv[1:] or ["resnet50"]:
            compare(network, spelling, Path(folder))


if __name__ == "__main__":
    main()
