"""What placement by measurement gains over the operator table, over a folder of models.

    python int8_placement.py FOLDER [--only PATTERN] [--limit N] [--threads N] [--seconds S] [--cache FOLDER]

Each model runs in a process of its own: simplified, calibrated on seeded random numbers, placed by the table and by
measurement, and both are timed against the float model in turn. Printed are the ratios float to int8 (above 1 is
faster) with the 95 % interval of the measured one, how many nodes are integer in both, regions and those returned to
float, and the seconds that placing took, anew and from the cache.

Goal: no model whose interval lies wholly below 0.98.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path

from model_folder import Found, RandomBatches, folder_arguments, measured_in_a_process, model_paths, slower_models

from onnxprune.contracts import ModelState, PassContext
from onnxprune.convert.onnx_file import load_onnx
from onnxprune.passes.harness import run_pass
from onnxprune.passes.quant import QuantConfig, QuantPass
from onnxprune.passes.simplify import SimplifyConfig, SimplifyPass
from onnxprune.runtime.host import host_isa
from onnxprune.runtime.latency import interleaved_ratio
from onnxprune.runtime.model_timing import ModelTimer
from onnxprune.targets import qdq
from onnxprune.targets.building import host_spelling, require_spelling
from onnxprune.targets.qdq.measured import measured_placement

_LIMIT_S = 1800
_NUM_CALIBRATION = 2


def main() -> None:
    options = arguments()
    if options.one:
        print(json.dumps(measure(options.folder, options)))
        return
    print(f"{'model':36} {'fp32 ms':>8} {'table':>6} {'measured':>8}  {'interval':12}  nodes      regions  seconds")
    with tempfile.TemporaryDirectory() as folder:
        more = ["--cache", str(options.cache or folder)]
        all_found = [
            show(measured_in_a_process(__file__, path, options, more, limit_s=_LIMIT_S))
            for path in model_paths(options)
        ]
    good = [found for found in all_found if "error" not in found]
    if good:
        for kind in ("table", "measured"):
            print(f"geometric mean, {kind}: {statistics.geometric_mean(found[kind] for found in good):.3f}")
        print(slower_models(good))


def arguments() -> argparse.Namespace:
    parser = folder_arguments(__doc__)
    parser.add_argument("--cache", type=Path, default=None, help="keep timings here; a temporary folder by default")
    return parser.parse_args()


def measure(path: Path, options: argparse.Namespace) -> Found:
    """Figures of one model, measured in this process."""
    logging.disable(logging.WARNING)
    timer = ModelTimer(threads=options.threads, folder=options.cache)
    state = run_pass(SimplifyPass(SimplifyConfig()), ModelState(model=load_onnx(path)), PassContext()).state
    before = timer.runner(state.model)
    batches = RandomBatches(before, _NUM_CALIBRATION)
    state = run_pass(QuantPass(QuantConfig()), state, PassContext(calibration=batches)).state
    plan = state.quantization
    if plan is None:
        raise SystemExit("no plan")
    isa = host_isa()
    spelling = require_spelling(host_spelling(isa), isa)
    table = qdq.place(state.model, plan, spelling)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        found = measured_placement(state.model, plan, spelling, timer=timer)
        seconds.append(time.perf_counter() - started)
    timed = [
        interleaved_ratio(
            before,
            timer.runner(qdq.spell(state.model, plan, placement, spelling)),
            batches.batches[0],
            min_runs=15,
            min_seconds=options.seconds,
        )
        for placement in (table, found.placement)
    ]
    return {
        "name": path.stem,
        "before_ms": timed[1].before.p50_ms,
        "table": timed[0].ratio,
        "measured": timed[1].ratio,
        "low": timed[1].low,
        "high": timed[1].high,
        "integer": [len(table.integer_nodes), len(found.placement.integer_nodes)],
        "regions": [len(found.regions), sum(not region.is_integer for region in found.regions)],
        "seconds": seconds,
        "notes": list(found.notes),
    }


def show(found: Found) -> Found:
    if "error" in found:
        print(f"{found['name']:36} FAILED {found['error']}", flush=True)
        return found
    nodes, regions = (f"{first}/{second}" for first, second in (found["integer"], found["regions"]))
    print(
        f"{found['name']:36} {found['before_ms']:8.2f} {found['table']:6.2f} {found['measured']:8.2f}  "
        f"[{found['low']:.2f}, {found['high']:.2f}]  {nodes:9}  {regions:7}  "
        f"{found['seconds'][0]:.1f}, {found['seconds'][1]:.1f} {' '.join(found['notes'])}",
        flush=True,
    )
    return found


if __name__ == "__main__":
    main()
