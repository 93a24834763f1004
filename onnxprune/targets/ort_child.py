"""The child processes of `ort_convert` and `mobile_check`: the only code that calls `onnxruntime.tools`.

Those tools print, change `sys.path`, configure the root logger when they are imported, and crash on unusual graphs.
What they are called with and what they give is plain JSON and files. This module imports as little as it can, because
every child has to import it again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from onnxprune.errors import OutputError, TargetError
from onnxprune.runtime.ort_errors import load_error, ort_exceptions, short_ort_message

if TYPE_CHECKING:
    from onnxprune.contracts import JsonObject, JsonValue

__all__ = ["CONFIG_FILE", "MODEL_FILE", "PROVIDERS", "check_mobile_usability", "convert"]

MODEL_FILE = "converted.ort"
CONFIG_FILE = "required.config"

PROVIDERS = {
    "NNAPI": "nnapi_supported_ops.md",
    "CoreML (NeuralNetwork)": "coreml_supported_neuralnetwork_ops.md",
    "CoreML (MLProgram)": "coreml_supported_mlprogram_ops.md",
}
"""Execution providers, and the checker's table of what each supports."""

_SAVE_FAILED = "Failed to save ORT format model"


def convert(arguments: JsonObject, folder: Path) -> None:
    """Write `MODEL_FILE` and `CONFIG_FILE` for the arguments of `ort_convert.convert_to_ort`."""
    converted = folder / MODEL_FILE
    is_runtime_style = arguments["style"] == "runtime"
    _save_as_ort(arguments, converted, minimal_build_optimizations="save" if is_runtime_style else None)
    models = [converted]
    if is_runtime_style:
        # Saved optimizations may or may not be replayed: a build must hold the operators of both outcomes.
        replayed = folder / "replayed.ort"
        _save_as_ort(arguments, replayed, minimal_build_optimizations="apply")
        models.append(replayed)
    _hide_torch()
    from onnxruntime.tools.ort_format_model import create_config_from_models

    try:
        create_config_from_models(models, folder / CONFIG_FILE, arguments["type_reduction"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise TargetError(
            f"The list of required operators can't be made: {short_ort_message(error)}.",
            "Switch type_reduction off." if arguments["type_reduction"] else "",
        ) from error


def _hide_torch() -> None:
    # onnxruntime.tools imports torch where there is one: seconds and 200 MB for export helpers that nobody calls here.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


def _save_as_ort(arguments: JsonObject, path: Path, *, minimal_build_optimizations: str | None) -> None:
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    options.optimized_model_filepath = str(path)
    options.graph_optimization_level = {
        "all": levels.ORT_ENABLE_ALL,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "basic": levels.ORT_ENABLE_BASIC,
    }[arguments["level"]]
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.qdqisint8allowed", "1" if arguments["is_arm"] else "0")
    if minimal_build_optimizations is not None:
        options.add_session_config_entry("optimization.minimal_build_optimizations", minimal_build_optimizations)
    for library in arguments["custom_op_libraries"]:
        options.register_custom_ops_library(library)
    try:
        onnxruntime.InferenceSession(
            arguments["source"],
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=None if arguments["blocked_layout"] else ["NchwcTransformer"],
        )
    except ort_exceptions() as error:
        if _SAVE_FAILED in str(error):
            raise OutputError(
                "ONNX Runtime could not write the .ort file.", "Check that the output folder has room."
            ) from error
        raise load_error(error, "The model") from error


def check_mobile_usability(arguments: JsonObject, folder: Path) -> JsonValue:  # noqa: ARG001 - as `call_in_child` calls
    """For each provider, what it takes of `arguments["model"]` as it is and with fixed input shapes."""
    _hide_torch()
    from onnxruntime.tools.mobile_helpers import usability_checker
    from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo

    loaded = ModelProtoWithShapeInfo(Path(arguments["model"]))
    model = loaded.model_with_shape_info
    dynamic_inputs, _ = usability_checker.check_shapes(model.graph)
    answers: dict[str, JsonObject] = {}
    for name, table in PROVIDERS.items():
        for require_fixed_shapes in (True, False):
            if name == "NNAPI":
                found = usability_checker.check_nnapi_partitions(model, require_fixed_shapes)
            else:
                found = usability_checker.check_coreml_partitions(model, require_fixed_shapes, table)
            entry = {
                "num_nodes": found.num_nodes,
                "num_supported": found.num_supported_nodes,
                "num_partitions": found.num_partitions,
                "unsupported_ops": sorted(found.unsupported_ops),
                "num_dynamic": found.nodes_unsupported_due_to_dynamic_input,
                "caveats": found.supported_ops_checker.get_caveats(),
                "verdict": found.suitability().name if found.num_nodes else "NO",
            }
            answer = answers.setdefault(name, {"has_dynamic_inputs": bool(dynamic_inputs)})
            answer["as_is" if require_fixed_shapes else "fixed_shapes"] = entry
    return answers
