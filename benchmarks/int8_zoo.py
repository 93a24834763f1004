"""How much faster int8 is than float over a folder of models.

    python int8_zoo.py FOLDER [--only PATTERN] [--limit N] [--threads N] [--spelling x86-vnni|x86|arm64] [--seconds S]
                       [--measured]

Each model runs in a process of its own: simplified, calibrated on four batches of random numbers, placed by the table
of costs (or by measurement, as a run does it), spelled, and timed against its float form in turn, with the 95 %
interval of the ratio. Times do not depend on the values of weights or inputs, so untrained models will do.

Goals on x86 with VNNI, one thread: ResNet-50 3.0, MobileNetV2 1.8, EfficientNet-B0 1.3, MobileNetV3-Large 1.25; the
geometric mean over convolutional networks 1.7; no model whose interval lies wholly below 0.98.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Mapping
from pathlib import Path

from model_folder import Found, RandomBatches, folder_arguments, measured_in_a_process, model_paths, slower_models

from onnxprune.contracts import CanonicalModel

_LIMIT_S = 900
_NUM_CALIBRATION = 4
# A network counts as convolutional when this part of its multiplications is in convolutions.
_CONVOLUTIONAL = 0.9


def main() -> None:
    options = arguments()
    if options.one:
        print(json.dumps(measure(options.folder, options)))
        return
    more = ["--spelling", options.spelling] if options.spelling else []
    more += ["--measured"] if options.measured else []
    print(f"{'model':40} {'fp32 ms':>9} {'int8 ms':>9} {'ratio':>6}  {'interval':13}  integer/float nodes")
    all_found = []
    for path in model_paths(options):
        found = measured_in_a_process(__file__, path, options, more, limit_s=_LIMIT_S)
        print(line(found), flush=True)
        all_found.append(found)
    summarize(all_found)


def arguments() -> argparse.Namespace:
    parser = folder_arguments(__doc__)
    parser.add_argument("--spelling", default=None, help="how integers are written; the host's by default")
    parser.add_argument("--measured", action="store_true", help="place by measurement instead of the table")
    return parser.parse_args()


def measure(path: Path, options: argparse.Namespace) -> Found:
    """Figures of one model, measured in this process."""
    from onnxprune.contracts import ModelState, PassContext
    from onnxprune.convert.onnx_file import load_onnx
    from onnxprune.passes.harness import run_pass
    from onnxprune.passes.quant import QuantConfig, QuantPass
    from onnxprune.passes.simplify import SimplifyConfig, SimplifyPass
    from onnxprune.runtime.host import host_isa
    from onnxprune.runtime.latency import interleaved_ratio
    from onnxprune.runtime.model_timing import ModelTimer
    from onnxprune.runtime.sessions import ort_runner_from_model
    from onnxprune.targets import qdq
    from onnxprune.targets.building import host_spelling, require_spelling
    from onnxprune.targets.qdq.measured import measured_placement

    logging.disable(logging.WARNING)
    state = ModelState(model=load_onnx(path))
    state = run_pass(SimplifyPass(SimplifyConfig()), state, PassContext()).state
    before = ort_runner_from_model(state.model, threads=options.threads)
    batches = RandomBatches(before, _NUM_CALIBRATION)
    state = run_pass(QuantPass(QuantConfig()), state, PassContext(calibration=batches)).state
    if state.quantization is None:
        raise SystemExit("no plan")
    isa = host_isa()
    spelling = require_spelling(options.spelling or host_spelling(isa), isa)
    if options.measured:
        timer = ModelTimer(threads=options.threads, folder=None)
        placement = measured_placement(state.model, state.quantization, spelling, timer=timer).placement
    else:
        placement = qdq.place(state.model, state.quantization, spelling)
    spelled = qdq.spell(state.model, state.quantization, placement, spelling)
    after = ort_runner_from_model(spelled, threads=options.threads)
    timed = interleaved_ratio(before, after, batches.batches[0], min_runs=15, min_seconds=options.seconds)
    return {
        "name": path.stem,
        "before_ms": timed.before.p50_ms,
        "after_ms": timed.after.p50_ms,
        "ratio": timed.ratio,
        "low": timed.low,
        "high": timed.high,
        "integer": len(placement.integer_nodes),
        "float": len(placement.float_nodes),
        "convolutional": share_of_convolutions(state.model) >= _CONVOLUTIONAL,
    }


def share_of_convolutions(model: CanonicalModel) -> float:
    """The part of the multiplications that convolutions have; 0 where shapes are unknown."""
    from onnxprune.ops.macs import count_macs_per_sample

    by_node: Mapping[str, int] = count_macs_per_sample(model).per_node
    convolutions = {node.name for node in model.graph.all_nodes() if node.op_type in ("Conv", "ConvTranspose")}
    total = sum(by_node.values())
    return sum(macs for name, macs in by_node.items() if name in convolutions) / total if total else 0.0


def line(found: Found) -> str:
    if "error" in found:
        return f"{found['name']:40} FAILED {found['error']}"
    return (
        f"{found['name']:40} {found['before_ms']:9.2f} {found['after_ms']:9.2f} {found['ratio']:6.2f}  "
        f"[{found['low']:.2f}, {found['high']:.2f}]  {found['integer']}/{found['float']}"
    )


def summarize(all_found: list[Found]) -> None:
    good = [found for found in all_found if "error" not in found]
    if not good:
        return
    convolutional = [found["ratio"] for found in good if found["convolutional"]]
    others = [found["ratio"] for found in good if not found["convolutional"]]
    print(f"\n{len(good)} of {len(all_found)} models")
    for name, ratios in (("convolutional", convolutional), ("other", others)):
        if ratios:
            mean = statistics.geometric_mean(ratios)
            print(f"{name}: {len(ratios)}, geometric mean {mean:.2f}, least {min(ratios):.2f}")
    print(slower_models(good))


if __name__ == "__main__":
    main()
