"""What the passes around `quant` win back: `equalize`, `adaround`, `bias-correction`, on trained models with real data.

    python int8_recovery.py [PART OF A MODEL'S NAME ...]

For each model and each way of quantizing, the score and the signal-to-noise ratio of the outputs (in dB, on test
samples; before a last Softmax or Sigmoid), computed with the rounded numbers of the plan: what every target computes,
up to the rounding of sums. Calibration sees no label and no test sample.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from trained_models import ArrayBatches, Trained, trained_models

from onnxprune.contracts import CanonicalModel, ModelState, PassContext, PassReport
from onnxprune.passes.harness import run_pass
from onnxprune.passes.layerwise.gain import output_snr_db
from onnxprune.passes.quant.simulate import simulated
from onnxprune.plugins import find_pass
from onnxprune.recipe import decode_step
from onnxprune.runtime.sessions import ort_runner_from_model

Steps = tuple[tuple[str, Mapping[str, Any]], ...]

PLAIN: Steps = (("quant", {}),)
EQUALIZED: Steps = (("equalize", {}), ("quant", {}))
CORRECTED: Steps = (("quant", {}), ("bias-correction", {}))
ROUNDED: Steps = (("quant", {}), ("adaround", {}))
LEARNED: Steps = (("quant", {}), ("adaround", {"method": "adaround"}))

WAYS: tuple[tuple[str, Mapping[str, Any], tuple[Steps, ...]], ...] = (
    ("8 bits, per channel", {}, (PLAIN, EQUALIZED, CORRECTED, ROUNDED)),
    ("8 bits, per tensor", {"per_channel": False}, (PLAIN, EQUALIZED)),
    ("4 bits, per channel", {"weight_bits": 4}, (PLAIN, CORRECTED, ROUNDED, LEARNED)),
)


def run_steps(
    model: CanonicalModel, steps: Steps, way: Mapping[str, Any], data: ArrayBatches
) -> tuple[ModelState, list[PassReport]]:
    state, reports = ModelState(model=model), []
    for name, config in steps:
        settings = {**config, **way} if name in ("quant", "equalize") else config
        pass_ = find_pass(name)(decode_step(name, settings).config)
        outcome = run_pass(pass_, state, PassContext(calibration=data))
        state = outcome.state
        reports.append(outcome.report)
    return state, reports


def show(trained: Trained) -> None:
    model = trained.open_model()
    runner = ort_runner_from_model(model)
    (given,) = runner.inputs
    data = ArrayBatches(given.name, trained.calibration())
    probe = list(ArrayBatches(given.name, trained.probe()))
    metric, score = next(iter(trained.score(runner).items()))
    print(f"\n{trained.name}: {metric} {100 * score:.2f} in float, {data.num_samples} calibration samples", flush=True)
    for way_name, way, rows in WAYS:
        for steps in rows:
            start = time.perf_counter()
            state, reports = run_steps(model, steps, way, data)
            seconds = time.perf_counter() - start
            if state.quantization is None:
                raise SystemExit("no plan")
            rounded = simulated(state.model, state.quantization)
            found = next(iter(trained.score(ort_runner_from_model(rounded)).values()))
            label = " + ".join(name + (" (learned)" if config else "") for name, config in steps)
            undone = " (undone)" if any(note.startswith("Undone") for r in reports for note in r.notes) else ""
            decibel = output_snr_db(model, rounded, probe)
            print(f"  {way_name:21}{label:32}{100 * found:7.2f} {decibel:7.1f} dB {seconds:7.1f} s{undone}", flush=True)


def main() -> None:
    logging.disable(logging.WARNING)
    wanted = sys.argv[1:]
    for trained in trained_models():
        if not wanted or any(part in trained.name for part in wanted):
            if trained.is_there:
                show(trained)
            else:
                print(f"\n{trained.name}: its data are not on this machine")


if __name__ == "__main__":
    main()
