"""A recipe without passes changes no output and grows no file by more than 1 % (goal), on the wheel's topologies."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from networks import LIGHT, write_light_network

import onnxprune


def main() -> None:
    names = sys.argv[1:] or sorted(path.stem.removeprefix("light_") for path in LIGHT.glob("light_*.onnx"))
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            source = write_light_network(name, Path(folder) / f"{name}.onnx")
            report = onnxprune.run(
                str(source),
                out=Path(folder) / name,
                passes=[],
                settings=["measure.latency=false", "measure.load=false"],
            )
            measured = report.measurements[0]
            growth = measured.size_bytes / source.stat().st_size - 1
            assert measured.fidelity is not None
            print(
                f"{name:15} file {growth:+.3%}   largest output difference {measured.fidelity.difference.max_rel:.2e}"
            )


if __name__ == "__main__":
    main()
