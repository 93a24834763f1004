"""Whole int8 models: the .tflite file in LiteRT against the x86 spelling of the same plan in ONNX Runtime.

For each trained model whose data are there: the score of the float model and of both int8 forms on all test samples;
the share of samples for which both int8 forms choose the same class, and, for comparison, int8 in ONNX Runtime and
float; and how many operators work on integers.

    python tflite_int8.py [PART OF A NAME ...]
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from int8_accuracy import host_spelling
from trained_models import ArrayBatches, Trained, chosen_models

from onnxprune.contracts import Batch, ModelState, PassContext, Runner
from onnxprune.passes.quant import QuantConfig, QuantPass
from onnxprune.runtime.litert import litert_runner_from_path
from onnxprune.runtime.sessions import ort_runner_from_model
from onnxprune.targets import qdq
from onnxprune.targets.qdq.tflite import place_tflite
from onnxprune.targets.tflite.emit import EmitOptions, emit
from onnxprune.targets.tflite.graph import Graph
from onnxprune.targets.tflite.serialize import write_tflite

# Points (hundredths) that the file may differ from the x86 spelling, and samples that may differ in their top class.
LARGEST_LOSS, LARGEST_DISAGREEMENT = 0.3, 0.01


class Recorder:
    """A `Runner` that notes the largest class of the first output for each sample."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.inputs, self.outputs, self.threads = runner.inputs, runner.outputs, runner.threads
        self.classes: list[npt.NDArray[np.intp]] = []

    def run(self, feeds: Batch) -> Mapping[str, npt.NDArray[Any]]:
        """The outputs."""
        found = self._runner.run(feeds)
        self.classes.append(np.asarray(found[self.outputs[0].name]).argmax(axis=-1))
        return found


def agreement(one: Recorder, other: Recorder) -> float:
    """Share of samples with the same largest class."""
    pairs = zip(one.classes, other.classes, strict=True)
    return float(np.mean(np.concatenate([np.atleast_1d(first == second) for first, second in pairs])))


def integer_share(graph: Graph) -> str:
    kinds = Counter(
        graph.tensors[operator.outputs[0]].type in ("INT8", "INT16")
        for operator in graph.operators
        if operator.kind not in ("QUANTIZE", "DEQUANTIZE")
    )
    return f"{kinds[True]}/{kinds.total()}"


def compare(trained: Trained) -> None:
    model = trained.open_model()
    float_runner = ort_runner_from_model(model)
    batches = ArrayBatches(float_runner.inputs[0].name, trained.calibration())
    plan = QuantPass(QuantConfig()).plan(ModelState(model=model), PassContext(calibration=batches))
    name = host_spelling()
    ort_runner = ort_runner_from_model(qdq.spell(model, plan, qdq.place(model, plan, name), name))
    spelled = qdq.spell(model, plan, place_tflite(model, plan), "tflite")
    emitted = emit(spelled, EmitOptions(precision="int8-float-io"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        write_tflite(emitted.model, path)
        size = path.stat().st_size
        runner = litert_runner_from_path(path, threads=1)
    recorders = [Recorder(float_runner), Recorder(ort_runner), Recorder(runner)]
    scores = [next(iter(trained.score(one).values())) for one in recorders]
    is_met = 100 * (scores[1] - scores[2]) <= LARGEST_LOSS
    verdict = "met" if is_met else "MISSED"
    shares = ["", ""]
    if trained.kind != "detector":
        found = [agreement(recorders[1], recorders[2]), agreement(recorders[0], recorders[1])]
        shares = [f"{100 * share:.2f}" for share in found]
        verdict += ", met" if found[0] >= 1 - LARGEST_DISAGREEMENT else ", MISSED"
    cells = [
        trained.name,
        *(f"{100 * score:.2f}" for score in scores),
        *shares,
        integer_share(emitted.model.main),
        f"{size / 1024:.0f}",
        verdict,
    ]
    print(f"| {' | '.join(cells)} |", flush=True)
    for finding in emitted.findings:
        print(f"    {finding.topic}: {finding.text}", file=sys.stderr)


def main() -> None:
    logging.disable(logging.WARNING)
    header = [
        "model", "float", f"ORT {host_spelling()}", "TFLite", "same class, %", "ORT and float, %",
        "integer operators", "KiB",
        f"within {LARGEST_LOSS}, classes",
    ]  # fmt: skip
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for trained in chosen_models(sys.argv[1:]):
        compare(trained)


if __name__ == "__main__":
    main()
