"""The same in single steps: load, prune, look, save, build."""

from __future__ import annotations

import sys
from pathlib import Path

import onnxprune

DIGITS = Path(__file__).resolve().parent.parent / "digits"


def main(out: Path) -> None:
    state = onnxprune.load(DIGITS / "models" / "detector.onnx")
    state, _ = onnxprune.apply(state, "simplify")
    state, report = onnxprune.apply(state, "prune", {"ratio": 0.1})
    print(report.summary)
    for skip in report.skips[:3]:
        print(f"left alone: {skip.where}: {skip.reason}")
    out.mkdir(parents=True, exist_ok=True)
    onnxprune.save(state, out / "pruned.onnx")
    artifact = onnxprune.build(state, "ort-mobile", {"platform": "arm64"}, out=out)
    print(f"{artifact.model_path.name}: {artifact.size_bytes:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
