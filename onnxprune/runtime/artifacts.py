"""Model files and who runs them: ONNX Runtime where they end in `.onnx` or `.ort`, LiteRT where in `.tflite`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from onnxprune.errors import UsageError, quoted_list
from onnxprune.graph.io import load_model
from onnxprune.runtime.litert import LitertRunner, litert_runner_from_path, require_litert
from onnxprune.runtime.litert_foreign import check_foreign_file
from onnxprune.runtime.sessions import OrtRunner, ort_runner_from_path

__all__ = [
    "ARTIFACT_SUFFIXES",
    "ArtifactRunner",
    "check_artifact",
    "is_tflite",
    "load_runtime",
    "refuse_useless_libraries",
    "runner_from_path",
]

ARTIFACT_SUFFIXES = (".onnx", ".ort", ".tflite")
ArtifactRunner: TypeAlias = OrtRunner | LitertRunner


def is_tflite(path: Path) -> bool:
    """Whether LiteRT runs the file."""
    return path.suffix == ".tflite"


def runner_from_path(path: Path, *, threads: int = 1, custom_op_libraries: Sequence[Path] = ()) -> ArtifactRunner:
    """A runner for the file as applications run it. The libraries are for ONNX Runtime; LiteRT has no such thing.

    Raises:
        OutputError, ModelError, UsageError, MissingExtraError: As the runtime's own function.
    """
    if is_tflite(path):
        return litert_runner_from_path(path, threads=threads)
    return ort_runner_from_path(path, threads=threads, custom_op_libraries=custom_op_libraries)


def check_artifact(path: Path) -> None:
    """Look at a file of unknown origin before a runtime is let loose on it in this process.

    Raises:
        OnnxPruneError: It is not there, damaged, or not what its ending says.
    """
    if is_tflite(path):
        check_foreign_file(path)
    elif path.suffix == ".onnx":
        load_model(path)


def refuse_useless_libraries(libraries: Sequence[Path], files: Sequence[Path]) -> None:
    """Raises UsageError where libraries are given and LiteRT runs all of `files`."""
    if libraries and files and all(is_tflite(path) for path in files):
        names = quoted_list(dict.fromkeys(path.name for path in files))
        raise UsageError(
            f"'--custom-op-library' means nothing for {names}: LiteRT has no such libraries.", "Leave the option out."
        )


def load_runtime(path: Path) -> None:
    """Have the native library in memory that runs the file, so that loading the file is all that is timed."""
    if is_tflite(path):
        require_litert(f"Running '{path.name}'")
        from ai_edge_litert import interpreter, schema_py_generated  # noqa: F401

        return
    import onnxruntime

    onnxruntime.SessionOptions()  # the native library is loaded with the first use
