"""Compress the digits detector and ship it only if it keeps what was promised."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

import onnxprune

DIGITS = Path(__file__).resolve().parent.parent / "digits"


def main(out: Path) -> None:
    report = onnxprune.run(
        DIGITS / "models" / "detector.onnx",
        recipe=DIGITS / "detector.toml",
        settings=["measure.min_seconds=0.2"],
        out=out,
    )
    if not report.within_budget:
        missed = [outcome for outcome in report.budgets if not outcome.met]
        sys.exit(f"not shipped: {missed}")

    artifact, measured = report.artifacts[0], report.measurements[0]
    before = report.source_measurements.size_bytes
    print(f"ship {artifact.model_path} ({measured.size_bytes:,} bytes, {before:,} before)")

    session = onnxruntime.InferenceSession(artifact.model_path)
    image = np.asarray(Image.open(next((DIGITS / "images" / "test").glob("*.jpg"))).convert("RGB"), dtype=np.float32)
    boxes, scores = session.run(None, {"image": image.transpose(2, 0, 1)[None] / 255})
    best = np.unravel_index(np.argmax(scores), scores.shape)
    print(f"best of {boxes.shape[1]} boxes has score {scores[best]:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
