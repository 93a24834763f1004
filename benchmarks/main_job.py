"""The main job on a ResNet-50-sized graph with 32 calibration images (goals: under 60 s on 2 cores, under 3 GiB).

Prints time and peak RSS of `onnxprune run --passes simplify,prune,quant`, and what came out.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from networks import write_light_network
from process_figures import measure_command

IMAGES = 32


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_light_network("resnet50", folder / "resnet50.onnx")
        images = np.random.default_rng(0).normal(size=(IMAGES, 3, 224, 224)).astype(np.float32)
        np.savez(folder / "calibration.npz", **{"gpu_0/data_0": images})
        figures = measure_command(
            [
                str(Path(sys.executable).with_name("onnxprune")),
                "run",
                str(model),
                "--passes",
                "simplify,prune,quant",
                "--calibration",
                str(folder / "calibration.npz"),
                "--out",
                str(folder / "out"),
                "-q",
            ]
        )
        report = json.loads((folder / "out" / "report.json").read_text())
        measured = report["measurements"][0]
        print(
            f"time {figures.wall_s:.1f} s (goal: 60), peak RSS {figures.peak_rss_bytes / 2**30:.2f} GiB "
            f"(with children {figures.peak_tree_rss_bytes / 2**30:.2f} GiB; goal: 3)"
        )
        for entry in report["passes"]:
            print(f"  {entry['pass_id']:10} {entry['duration_s']:.1f} s  {entry['summary']}")
        print(
            f"source {report['source_measurements']['size_bytes']:,} bytes -> {measured['size_bytes']:,} bytes; "
            f"{measured['latency']['ratio']:.2f}x faster on {report['host']['instruction_set']}"
        )


if __name__ == "__main__":
    main()
