"""What int8 costs trained models on real data: each calibration method, beside float and onnxruntime's own quantizer.

Every figure is of the spelled QDQ model in ONNX Runtime, on the same test samples. Test sets are small, so a picture or
two more or less are chance; the signal-to-noise ratio of the outputs (dB, of the first output) tells methods apart more
finely, though a larger one need not mean a better score.

    python int8_accuracy.py [PART OF A NAME ...]        all models whose data are there, as Markdown

Without VNNI the spelling is "x86" (7-bit weights), on ARM "arm64"; the table is meant for one with VNNI.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from trained_models import ArrayBatches, FloatArray, Trained, chosen_models

from onnxprune.contracts import Batch, CanonicalModel, ModelState, PassContext, Runner
from onnxprune.passes.quant import QuantConfig, QuantPass
from onnxprune.runtime.host import host_isa
from onnxprune.runtime.sessions import ort_runner_from_model, ort_runner_from_path
from onnxprune.targets import qdq
from onnxprune.targets.qdq import SpellingName

# Points (hundredths) that a kind of model may lose with the defaults.
GOALS = {"ResNet": 0.3, "MobileNet": 0.5, "detector": 0.5}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "minmax": {},
    "moving-average": {"calibration_method": "moving-average"},
    "percentile": {"calibration_method": "percentile"},
    "entropy": {"calibration_method": "entropy"},
    "mse": {"calibration_method": "mse"},
    "minmax, weights mse": {"weight_method": "mse"},
    "mse, weights mse": {"calibration_method": "mse", "weight_method": "mse"},
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One cell."""

    score: float
    snr_db: float


class RivalReader(CalibrationDataReader):
    """The same samples for `quantize_static`."""

    def __init__(self, batches: ArrayBatches) -> None:
        self._batches: Iterator[Batch] = iter(batches)

    def get_next(self) -> Batch | None:
        """One batch, or None at the end."""
        return next(self._batches, None)


def spelled(model: CanonicalModel, batches: ArrayBatches, settings: Mapping[str, Any]) -> Runner:
    plan = QuantPass(QuantConfig(**settings)).plan(ModelState(model=model), PassContext(calibration=batches))
    name = host_spelling()
    return ort_runner_from_model(qdq.spell(model, plan, qdq.place(model, plan, name), name))


def rival(model: CanonicalModel, batches: ArrayBatches, folder: Path) -> Runner:
    """`quantize_static` as one has to set it on x86: per channel, uint8 activations, MinMax."""
    source, path = folder / "float.onnx", folder / "rival.onnx"
    onnx.save(ir.to_proto(model), source)
    quantize_static(
        source,
        path,
        RivalReader(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        reduce_range=host_spelling() == "x86",
    )
    return ort_runner_from_path(path)


def host_spelling() -> SpellingName:
    isa = host_isa()
    return "arm64" if isa.arch == "arm64" else "x86-vnni" if isa.has_vnni else "x86"


def outputs(runner: Runner, probe: FloatArray) -> npt.NDArray[np.float64]:
    name, output = runner.inputs[0].name, runner.outputs[0].name
    return np.concatenate([runner.run({name: sample[np.newaxis]})[output] for sample in probe]).astype(np.float64)


def measured(runner: Runner, trained: Trained, reference: npt.NDArray[np.float64]) -> Result:
    error = np.square(reference - outputs(runner, trained.probe())).sum()
    snr_db = float(10 * np.log10(np.square(reference).sum() / max(error, 1e-30)))
    return Result(score=next(iter(trained.score(runner).values())), snr_db=snr_db)


def compare(trained: Trained) -> None:
    model = trained.open_model()
    runner = ort_runner_from_model(model)
    batches = ArrayBatches(runner.inputs[0].name, trained.calibration())
    metric, score = next(iter(trained.score(runner).items()))
    reference = outputs(runner, trained.probe())
    cells = {
        name: measured(spelled(model, batches, settings), trained, reference) for name, settings in SETTINGS.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        cells["quantize_static"] = measured(rival(model, batches, Path(folder)), trained, reference)
    texts = [f"{100 * cell.score:.1f} ({cell.snr_db:.0f})" for cell in cells.values()]
    goal = GOALS.get(trained.kind)
    lost = 100 * (score - cells["minmax"].score)
    verdict = "" if goal is None else f"{lost:+.2f}, goal {goal}: {'met' if lost <= goal else 'MISSED'}"
    row = [trained.name, metric, str(batches.num_samples), f"{100 * score:.1f}", *texts, verdict]
    print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    logging.disable(logging.WARNING)
    print(f"host: {host_isa()}; spelling {host_spelling()}; score in hundredths (dB of the first output)\n")
    header = ["model", "score", "calibrated on", "float", *SETTINGS, "quantize_static", "lost with the defaults"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for trained in chosen_models(sys.argv[1:]):
        compare(trained)


if __name__ == "__main__":
    main()
