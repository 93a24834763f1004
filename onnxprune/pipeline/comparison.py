"""Opens what `onnxprune compare` compares: two models, and samples that both take."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from onnxprune.contracts import Batch, Progress
from onnxprune.convert.request import SourceRequest
from onnxprune.convert.source import open_source
from onnxprune.data.preprocess import Preprocess
from onnxprune.data.source import open_data
from onnxprune.evaluate.model_diff import ComparedModel, ModelComparison, compare_models
from onnxprune.evaluate.tensor_diff import TensorSource
from onnxprune.graph.io import load_model
from onnxprune.graph.tensor_graph import tensor_graph
from onnxprune.recipe import decode_recipe, read_recipe_file
from onnxprune.runtime.artifacts import ArtifactRunner, check_artifact, is_tflite, refuse_useless_libraries
from onnxprune.runtime.feeds import working_feeds
from onnxprune.runtime.litert import litert_runner_from_path
from onnxprune.runtime.sessions import ort_runner_from_model, ort_runner_from_path
from onnxprune.runtime.tensors import LitertTensors, OrtTensors
from onnxprune.targets.building import PROVENANCE_KEY

__all__ = ["RANDOM", "compare_sources"]

RANDOM = "random"
"""In place of a path: seeded random samples."""


def compare_sources(
    reference: str,
    actual: str,
    *,
    data: str,
    samples: int,
    per_tensor: bool,
    recipe: Path | None,
    threads: int,
    custom_op_libraries: tuple[Path, ...],
    seed: int,
    progress: Progress,
) -> ModelComparison:
    """Open both models and the samples, and compare; see `onnxprune.api.compare`."""
    refuse_useless_libraries(custom_op_libraries, [Path(source) for source in (reference, actual)])
    opened = [
        _open(source, threads=threads, custom_op_libraries=custom_op_libraries, progress=progress)
        for source in (reference, actual)
    ]
    runners = [runner for _, runner in opened]
    batches: Iterable[Batch]
    if data == RANDOM:
        shapes = _fixed_shapes(*runners)
        batches = tuple(working_feeds(runners[0], seed=seed + number, shapes=shapes) for number in range(samples))
        count = samples
    else:
        source = open_data(data, inputs=runners[0].inputs, preprocess=_preprocess(recipe, runners), limit=samples)
        batches, count = source, source.num_samples
    first, second = (model for model, _ in opened)
    if first.name == second.name:
        first, second = replace(first, name=reference), replace(second, name=actual)
    return compare_models(
        first, second, batches, data=data, num_samples=count, per_tensor=per_tensor, progress=progress
    )


def _open(
    source: str, *, threads: int, custom_op_libraries: tuple[Path, ...], progress: Progress
) -> tuple[ComparedModel, ArtifactRunner]:
    path = Path(source)
    runner: ArtifactRunner
    tensors: TensorSource
    if is_tflite(path):
        check_artifact(path)
        runner = litert_runner_from_path(path, threads=threads)
        tensors = LitertTensors(path=path, threads=threads)
        return ComparedModel(name=path.name, runner=runner, graph=runner.graph, tensors=tensors), runner
    if path.suffix == ".ort":
        runner = ort_runner_from_path(path, threads=threads, custom_op_libraries=custom_op_libraries)
        return ComparedModel(name=path.name, runner=runner), runner
    if path.suffix == ".onnx":
        model = load_model(path)  # look at the file before a runtime does
        runner = ort_runner_from_path(path, threads=threads, custom_op_libraries=custom_op_libraries)
    else:
        request = SourceRequest(source=source, custom_op_libraries=custom_op_libraries)
        model = open_source(request, progress=progress).model
        runner = ort_runner_from_model(model, threads=threads, custom_op_libraries=custom_op_libraries)
    tensors = OrtTensors(model=model, threads=threads, custom_op_libraries=custom_op_libraries)
    return ComparedModel(name=path.name, runner=runner, graph=tensor_graph(model.graph), tensors=tensors), runner


def _fixed_shapes(runner: ArtifactRunner, other: ArtifactRunner) -> dict[str, tuple[int, ...]]:
    """Shapes of inputs whose size `runner` leaves open and `other` prescribes; a batch that both leave open is 1."""
    prescribed = {spec.name: spec.shape for spec in other.inputs}
    shapes = {}
    for spec in runner.inputs:
        theirs = prescribed.get(spec.name)
        if spec.shape is None or theirs is None or len(spec.shape) != len(theirs):
            continue
        sizes = [
            next((size for size in (own, other_size, 1 if axis == 0 else None) if isinstance(size, int)), None)
            for axis, (own, other_size) in enumerate(zip(spec.shape, theirs, strict=True))
        ]
        known = tuple(size for size in sizes if size is not None)
        if len(known) == len(sizes):
            shapes[spec.name] = known
    return shapes


def _preprocess(recipe: Path | None, runners: Sequence[ArtifactRunner]) -> Preprocess:
    """The recipe's; else what an artifact was made with, the second model's first; else the default."""
    if recipe is not None:
        return decode_recipe(read_recipe_file(recipe), origin=recipe.name).preprocess
    for runner in reversed(runners):
        try:
            stored: Any = json.loads(runner.metadata.get(PROVENANCE_KEY, "{}"))
            if isinstance(stored, dict) and "preprocess" in stored:
                return Preprocess.model_validate_json(json.dumps(stored["preprocess"]))
        except (json.JSONDecodeError, ValidationError):
            continue  # metadata of another version or tool say nothing about ours
    return Preprocess()
