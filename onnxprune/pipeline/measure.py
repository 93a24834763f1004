"""Before and after: what an artifact is worth, measured beside the source in one run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxprune.contracts import (
    Artifact,
    Batch,
    CalibrationSource,
    Evaluator,
    Fidelity,
    LoadFigures,
    Measurements,
    Progress,
    Runner,
    Score,
    Target,
)
from onnxprune.evaluate.feeds import feeds_for
from onnxprune.evaluate.fidelity import fidelity
from onnxprune.evaluate.figures import zipped_bytes
from onnxprune.recipe import MeasureOptions
from onnxprune.runtime.feeds import working_feeds
from onnxprune.runtime.fixed_batch import FixedBatchRunner
from onnxprune.runtime.latency import interleaved_ratio
from onnxprune.runtime.memory import measure_load

__all__ = ["Yardstick", "measure_artifact", "measure_source", "sample_batches"]

FIDELITY_SAMPLES = 32  # enough for a stable worst case on real data, and seconds even for large models
RANDOM_SAMPLES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """What every artifact is measured against and how.

    `batches` are a few samples; `data` says where they came from. `source_score` is None without an evaluator.
    """

    source: Runner
    batches: Sequence[Batch]
    data: str
    evaluator: Evaluator | None
    source_score: Score | None
    options: MeasureOptions
    custom_op_libraries: tuple[Path, ...]


def sample_batches(
    source: Runner, calibration: CalibrationSource | None, *, seed: int
) -> tuple[tuple[Batch, ...], str]:
    """A few batches for comparisons: from the calibration data where there are any, else seeded random ones."""
    if calibration is not None:
        return tuple(itertools.islice(calibration, FIDELITY_SAMPLES)), "calibration"
    return tuple(working_feeds(source, seed=seed + index) for index in range(RANDOM_SAMPLES)), "random"


def measure_source(yardstick: Yardstick, *, path: Path, data_files: Sequence[Path] = ()) -> Measurements:
    """The figures of the source as an ONNX file with its external data files."""
    files = (path, *data_files)
    return Measurements(
        target="source",
        size_bytes=sum(file.stat().st_size for file in files),
        zipped_bytes=sum(zipped_bytes(file) for file in files),
        score=yardstick.source_score,
        load=_load(path, yardstick),
    )


def measure_artifact(artifact: Artifact, target: Target[Any], yardstick: Yardstick, progress: Progress) -> Measurements:
    """Size, fidelity, score, interleaved latency and load figures of one artifact."""
    options = yardstick.options
    runner = target.runner(artifact, threads=options.threads, custom_op_libraries=yardstick.custom_op_libraries)
    difference = None
    if options.fidelity:
        progress.note(f"{artifact.target}: comparing outputs with the source's")
        difference = Fidelity(
            difference=fidelity(yardstick.source, runner, yardstick.batches),
            num_samples=len(yardstick.batches),
            data=yardstick.data,
        )
    score = None
    if options.score and yardstick.evaluator is not None:
        progress.note(f"{artifact.target}: scoring")
        score = yardstick.evaluator.evaluate(runner)
    latency = None
    if options.latency:
        progress.note(f"{artifact.target}: timing source and artifact in turn")
        first = yardstick.batches[0]
        if isinstance(runner, FixedBatchRunner):
            # As many samples for both.
            first = runner.whole(first)
        latency = interleaved_ratio(
            yardstick.source,
            runner,
            first,
            after_feeds=feeds_for(runner.inputs, first),
            min_seconds=options.min_seconds,
            threads=options.threads,
        )
    return Measurements(
        target=artifact.target,
        size_bytes=artifact.size_bytes,
        zipped_bytes=sum(
            zipped_bytes(artifact.folder / f.path) for f in artifact.files if f.role in ("model", "weights")
        ),
        score=score,
        fidelity=difference,
        latency=latency,
        latency_on_target=target.is_host,
        load=_load(artifact.model_path, yardstick),
    )


def _load(path: Path, yardstick: Yardstick) -> LoadFigures | None:
    if not yardstick.options.load:
        return None
    return measure_load(path, threads=yardstick.options.threads, custom_op_libraries=yardstick.custom_op_libraries)
