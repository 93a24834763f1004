"""The modes of `quant` beside each other: file size, latency, noise, and the score of trained models.

One thread, batch 1 unless the model says otherwise. Noise is the median over samples. Latencies are ratios to the
float model, each mode timed in turn with it as if nothing else ran (`undisturbed_ratio`), so they may be read on a busy
machine; they depend on the instruction set. `quantize_dynamic` is ONNX Runtime's own. "16 bits" is placed everywhere
and runs in float on a CPU, so its latency says nothing.

    python int8_modes.py MODEL.onnx ...    models on seeded inputs; no calibration data, so no static modes
    python int8_modes.py --trained         the models of trained_models.py, with calibration data and scores
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import quantize_dynamic

from onnxprune.contracts import Batch, CalibrationSource, CanonicalModel, ModelState, PassContext, Runner
from onnxprune.convert.onnx_file import load_onnx
from onnxprune.evaluate.fidelity import compare_outputs
from onnxprune.graph.io import save_model
from onnxprune.passes.fp16 import Fp16Config, Fp16Pass
from onnxprune.passes.harness import run_pass
from onnxprune.passes.quant import QuantConfig, QuantPass
from onnxprune.runtime.feeds import working_feeds
from onnxprune.runtime.host import host_isa
from onnxprune.runtime.latency import undisturbed_ratio
from onnxprune.runtime.sessions import OrtRunner, ort_runner_from_path
from onnxprune.targets import qdq
from onnxprune.targets.building import host_spelling
from onnxprune.targets.qdq import SpellingName
from onnxprune.targets.qdq.data_free import place_data_free, spell_data_free
from onnxprune.targets.qdq.everywhere import place_everywhere, spell_everywhere

TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model, with what is known about it."""

    name: str
    model: CanonicalModel
    calibration: CalibrationSource | None
    probes: Callable[[OrtRunner], list[Batch]]
    score: Callable[[Runner], float] | None


def spelling_of_host() -> SpellingName:
    found = host_spelling(host_isa())
    if found is None:
        raise SystemExit("there is no int8 spelling for this machine")
    return found


def planned(case: Case, **config: object) -> ModelState:
    state = ModelState(model=case.model)
    return run_pass(
        QuantPass(QuantConfig.model_validate(config)), state, PassContext(calibration=case.calibration)
    ).state


def data_free(case: Case, mode: str) -> ir.Model:
    state, spelling = planned(case, mode=mode), spelling_of_host()
    assert state.quantization is not None
    placement = place_data_free(state.model, state.quantization, spelling, form="folded")
    return spell_data_free(state.model, state.quantization, placement, spelling, form="folded")


def static(case: Case) -> ir.Model:
    state, spelling = planned(case), spelling_of_host()
    assert state.quantization is not None
    placement = qdq.place(state.model, state.quantization, spelling)
    return qdq.spell(state.model, state.quantization, placement, spelling)


def sixteen_bits(case: Case) -> ir.Model:
    state, spelling = planned(case, activation_bits=16), spelling_of_host()
    assert state.quantization is not None
    placement = place_everywhere(state.model, state.quantization, spelling)
    return spell_everywhere(state.model, state.quantization, placement, spelling)


def half(case: Case) -> ir.Model:
    return run_pass(Fp16Pass(Fp16Config()), ModelState(model=case.model), PassContext()).state.model


def modes_of(case: Case, folder: Path) -> dict[str, Callable[[Path], object]]:
    """What writes the file of each mode."""

    def saved(make: Callable[[], ir.Model]) -> Callable[[Path], object]:
        return lambda path: save_model(make(), path)

    modes = {
        "float16 weights": saved(lambda: half(case)),
        "weight-only": saved(lambda: data_free(case, "weight-only")),
        "dynamic": saved(lambda: data_free(case, "dynamic")),
        "quantize_dynamic": lambda path: quantize_dynamic(folder / "float.onnx", path),
    }
    if case.calibration is not None:
        modes["static"] = saved(lambda: static(case))
        modes["16 bits"] = saved(lambda: sixteen_bits(case))
    return modes


def compare(case: Case, folder: Path) -> None:
    """Print one row for each mode."""
    path = folder / "float.onnx"
    save_model(case.model, path)
    size = path.stat().st_size
    reference = ort_runner_from_path(path)
    probes = case.probes(reference)
    expected = [reference.run(probe) for probe in probes]
    score = f"{case.score(reference):.3f}" if case.score is not None else "-"
    print(f"| {case.name} | float | {size / 1e6:.2f} MB | 1 | - | {score} |", flush=True)
    for name, write in modes_of(case, folder).items():
        try:
            write(folder / "mode.onnx")
            runner = ort_runner_from_path(folder / "mode.onnx")
        except Exception as error:  # noqa: BLE001 - a rival that fails is a result
            print(f"| | {name} | failed: {str(error)[:60]} | | | |")
            continue
        noise = np.median(
            [compare_outputs(want, runner.run(probe)).snr_db for want, probe in zip(expected, probes, strict=True)]
        )
        faster = 1 / undisturbed_ratio(reference, runner, probes[0], tolerance=TOLERANCE)
        score = f"{case.score(runner):.3f}" if case.score is not None else "-"
        ratio = (folder / "mode.onnx").stat().st_size / size
        print(f"| | {name} | {ratio:.3f} | {faster:.2f}x | {noise:.1f} dB | {score} |", flush=True)


def trained_cases() -> list[Callable[[], Case]]:
    """What opens each of the trained models whose data are there."""
    from trained_models import ArrayBatches, Trained, trained_models

    def case(trained: Trained) -> Case:
        model = trained.open_model()
        name = model.graph.inputs[0].name or ""
        return Case(
            name=trained.name,
            model=model,
            calibration=ArrayBatches(name, trained.calibration()),
            probes=lambda _runner: [{name: sample[None]} for sample in trained.probe()[:16]],
            score=lambda runner: next(iter(trained.score(runner).values())),
        )

    return [partial(case, trained) for trained in trained_models() if trained.is_there]


def case_of_file(path: Path) -> Case:
    return Case(
        name=path.stem,
        model=load_onnx(path),
        calibration=None,
        probes=lambda runner: [working_feeds(runner, seed=0)],
        score=None,
    )


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--trained", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    print(
        f"{host_isa().summary}, one thread\n\n"
        "| model | mode | size | speed | noise | score |\n|---|---|---|---|---|---|"
    )
    cases: list[Callable[[], Case]] = [partial(case_of_file, path) for path in arguments.models]
    if arguments.trained:
        cases += trained_cases()
    for make in cases:
        with tempfile.TemporaryDirectory() as folder:
            compare(make(), Path(folder))


if __name__ == "__main__":
    main()
