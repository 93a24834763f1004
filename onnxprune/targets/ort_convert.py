"""ONNX file -> `.ort` file and the list of operators that a reduced build of ONNX Runtime needs for it.

ONNX Runtime writes a `.ort` file as a by-product of loading a model. Its own script
(`onnxruntime.tools.convert_onnx_models_to_ort`) wraps that, prints, takes a setting from the environment, and writes
the model's full path into the configuration, so the same calls are made here, in a child process.

What depends on the platform:
    arm64   `session.qdqisint8allowed=1`: int8 QDQ becomes int8 kernels (elsewhere it would be left in float)
    all     `NchwcTransformer` stays off: it stores weights in blocks of this machine's vector width (8 or 16), which
            machines with another can't use. `blocked_layout` puts it on.

Styles:
    fixed    every optimization of the level is applied before saving
    runtime  only those that suit any execution provider; the rest is saved as a list of nodes to be replaced, which a
             session replays on nodes that NNAPI or CoreML did not take (`session.enable_saved_runtime_optimizations`)
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from onnxprune.contracts import JsonObject
from onnxprune.errors import OnnxPruneError, OutputError, TargetError
from onnxprune.runtime.child import ChildFailure, call_in_child
from onnxprune.targets.ort_child import CONFIG_FILE, MODEL_FILE
from onnxprune.targets.ort_format import normalize_ort_file

__all__ = ["OptimizationLevel", "OptimizationStyle", "convert_to_ort"]

OptimizationStyle: TypeAlias = Literal["fixed", "runtime"]
OptimizationLevel: TypeAlias = Literal["all", "extended", "basic"]

TIMEOUT_S = 1800.0


def convert_to_ort(
    source: Path,
    *,
    folder: Path,
    is_arm: bool,
    style: OptimizationStyle,
    level: OptimizationLevel,
    blocked_layout: bool,
    type_reduction: bool,
    custom_op_libraries: tuple[Path, ...] = (),
) -> tuple[Path, str]:
    """Convert the `.onnx` file `source`; the same source gives the same bytes.

    Args:
        source: The ONNX file.
        folder: For all files of the conversion.
        is_arm: Whether int8 kernels of ARM may be chosen.
        style: See the top of this file.
        level: How far the graph is optimized.
        blocked_layout: Bind the file to CPUs with this machine's vector width.
        type_reduction: Say for each operator which element types it needs.
        custom_op_libraries: Shared libraries with custom operators.

    Returns:
        The `.ort` file in `folder`, and the lines of the configuration for `--include_ops_by_config`, sorted.

    Raises:
        TargetError: ONNX Runtime can't convert the model, or crashes.
        OutputError: The file can't be written.
    """
    arguments: JsonObject = {
        "source": str(source),
        "is_arm": is_arm,
        "style": style,
        "level": level,
        "blocked_layout": blocked_layout,
        "type_reduction": type_reduction,
        "custom_op_libraries": [str(library.resolve()) for library in custom_op_libraries],
    }
    try:
        call_in_child("onnxprune.targets.ort_child:convert", arguments, folder=folder, timeout_s=TIMEOUT_S)
    except ChildFailure as failure:
        raise TargetError(f"ONNX Runtime {failure} while it converted '{source.name}' to ORT format.") from failure
    except OutputError:
        raise
    except OnnxPruneError as error:
        raise TargetError(f"Conversion to ORT format failed. {error.message}", error.hint) from error
    converted = folder / MODEL_FILE
    normalize_ort_file(converted)
    # Comments name the files that the list was made from, with their full paths.
    lines = (folder / CONFIG_FILE).read_text(encoding="utf-8").splitlines()
    return converted, "".join(f"{line}\n" for line in lines if line and not line.startswith("#"))
