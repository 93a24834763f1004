"""How near `latency_ratio = 0.5` comes to half the time: ResNet-50, other networks of the onnx wheel, and files named.

Prints for each network a second measurement of source against result (one thread, as if nothing else ran), beside it
interleaved medians of wall time with their 95 % interval (the same on an idle machine), the ratio that the pass
measured itself, what was removed, and how long planning took with an empty and with a filled table of layer times.

    python latency_budget.py [MODEL.onnx ...]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from networks import write_light_network

from onnxprune.api import load
from onnxprune.contracts import ModelState, PassContext
from onnxprune.passes.harness import run_pass
from onnxprune.passes.prune import PruneConfig, PrunePass
from onnxprune.runtime.feeds import working_feeds
from onnxprune.runtime.latency import interleaved_ratio, undisturbed_ratio
from onnxprune.runtime.sessions import ort_runner_from_model

GOAL = 0.5
LIGHT = ("resnet50", "squeezenet", "shufflenet")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        named = [Path(argument) for argument in sys.argv[1:]]
        sources = named or [write_light_network(name, folder / f"{name}.onnx") for name in LIGHT]
        print(f"goal {GOAL}; 'within' means 0.45 to 0.55")
        for source in sources:
            measure(source)


def measure(source: Path) -> None:
    state = load(source)
    pass_ = PrunePass(PruneConfig(latency_ratio=GOAL))
    first_s = planning_s(pass_, state)
    started = time.perf_counter()
    outcome = run_pass(pass_, state, PassContext())
    again_s = time.perf_counter() - started
    figures = outcome.report.figures
    before, after = (ort_runner_from_model(model) for model in (state.model, outcome.state.model))
    feeds = working_feeds(before, seed=0)
    measured = undisturbed_ratio(before, after, feeds, tolerance=0.003, round_seconds=1.0)
    ratio = interleaved_ratio(before, after, feeds, min_runs=100, min_seconds=8.0)
    print(
        f"{source.stem}: {measured:.3f}, {'within' if 0.45 <= measured <= 0.55 else 'OUTSIDE'}; wall time "
        f"{1 / ratio.ratio:.3f} ({1 / ratio.high:.3f} to {1 / ratio.low:.3f}); the pass measured "
        f"{figures['latency_ratio_measured']:.3f}; {ratio.before.p50_ms:.2f} -> {ratio.after.p50_ms:.2f} ms; "
        f"parameters -{100 * (1 - figures['parameters_after'] / figures['parameters_before']):.0f} %; "
        f"planned in {first_s:.0f} s with an empty table, planned and pruned in {again_s:.0f} s with it",
        flush=True,
    )


def planning_s(pass_: PrunePass, state: ModelState) -> float:
    started = time.perf_counter()
    pass_.plan(state, PassContext())
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
