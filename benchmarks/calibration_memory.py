"""Peak memory and time of calibration over 32 and over 512 samples, each in a process of its own.

Figures to reach: the peaks lie within 10 % of each other, and MinMax takes at most 1.2 times the plain float runs.

    python calibration_memory.py [network]        resnet50 is the default
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from networks import write_light_network

from onnxprune.contracts import Batch, ModelState, PassContext
from onnxprune.convert.onnx_file import load_onnx
from onnxprune.graph.io import save_model
from onnxprune.passes.harness import run_pass
from onnxprune.passes.quant import QuantConfig, QuantPass
from onnxprune.passes.simplify import SimplifyConfig, SimplifyPass
from onnxprune.runtime.sessions import ort_runner_from_model

SAMPLE_COUNTS = (32, 512)
THREADS = 2
METHODS = ("minmax", "moving-average", "percentile", "entropy", "mse")


class Batches:
    """A `CalibrationSource` that makes its samples as they are asked for."""

    content_hash = "seeded"

    def __init__(self, name: str, shape: tuple[int, ...], count: int) -> None:
        self._name, self._shape, self.num_samples = name, shape, count

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng(0)
        for _ in range(self.num_samples):
            yield {self._name: rng.standard_normal(self._shape).astype(np.float32)}


def calibrate_once(path: Path, count: int, method: str) -> None:
    """What the child does; its last line is the figures. Method "none" runs the float model only."""
    model = load_onnx(path)
    (given,) = model.graph.inputs
    batches = Batches(given.name or "", tuple(given.shape.numpy()) if given.shape else (), count)
    start = time.perf_counter()
    if method == "none":
        runner = ort_runner_from_model(model, threads=THREADS)
        for batch in batches:
            runner.run(batch)
    else:
        config = QuantConfig(calibration_method=method, threads=THREADS)
        QuantPass(config).plan(ModelState(model=model), PassContext(calibration=batches))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak}))


def write_simplified(network: str, folder: Path) -> Path:
    """The network as the `quant` pass meets it in a recipe: with BatchNormalization folded."""
    source = load_onnx(write_light_network(network, folder / f"{network}.source.onnx"))
    outcome = run_pass(SimplifyPass(SimplifyConfig()), ModelState(model=source), PassContext())
    path = folder / f"{network}.onnx"
    save_model(outcome.state.model, path)
    return path


def in_child(path: Path, count: int, method: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(path), str(count), method]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        calibrate_once(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
        return
    network = sys.argv[1] if len(sys.argv) > 1 else "resnet50"
    with tempfile.TemporaryDirectory() as folder:
        path = write_simplified(network, Path(folder))
        plain = in_child(path, SAMPLE_COUNTS[0], "none")
        print(f"{network}, {THREADS} threads: {SAMPLE_COUNTS[0]} float runs take {plain['seconds']:.1f} s")
        for method in METHODS:
            few, many = (in_child(path, count, method) for count in SAMPLE_COUNTS)
            growth = many["peak_rss_bytes"] / few["peak_rss_bytes"]
            print(
                f"  {method:15}peak {few['peak_rss_bytes'] / 2**20:.0f} MiB with {SAMPLE_COUNTS[0]} samples, "
                f"{many['peak_rss_bytes'] / 2**20:.0f} MiB with {SAMPLE_COUNTS[1]}: ratio {growth:.3f} (at most 1.1); "
                f"{few['seconds'] / plain['seconds']:.2f} times the float runs"
            )


if __name__ == "__main__":
    main()
