"""Any source in, a model in canonical form out, with the proof that both give the same outputs."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnxprune.contracts import CanonicalModel, JsonValue, NullProgress, Progress
from onnxprune.convert.child import run_converter
from onnxprune.convert.compare import Comparison, compare_with_cases, compare_with_file
from onnxprune.convert.extras import installed_versions, require_packages
from onnxprune.convert.onnx_file import load_onnx, load_onnx_with_report
from onnxprune.convert.recognize import RecognizedSource, recognize
from onnxprune.convert.reference import ForeignConversion, load_conversion, model_path_in
from onnxprune.convert.report import ConversionReport, ConvertedModel, SourceKind
from onnxprune.convert.request import SourceRequest
from onnxprune.convert.shapes import apply_shapes, tensor_specs
from onnxprune.errors import ModelError, UsageError
from onnxprune.graph.canonical import canonicalize
from onnxprune.ops.shapes import SHAPES

__all__ = ["ConversionReport", "ConvertedModel", "SourceKind", "SourceRequest", "open_source"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Converter:
    """Who converts a kind of source, what it needs, and which options of a request it has a use for."""

    function: str = ""
    packages: tuple[str, ...] = ()
    options: frozenset[str] = frozenset()


_NAMES = frozenset({"inputs", "outputs"})
_TF_PACKAGES = ("tensorflow", "keras", "tf2onnx")
_CONVERTERS: dict[SourceKind, _Converter] = {
    SourceKind.ONNX: _Converter(),
    SourceKind.TORCH_EXPORTED: _Converter(
        function="onnxprune.convert.pytorch:convert_exported",
        packages=("torch",),
        options=_NAMES | {"trust_source"},
    ),
    SourceKind.TORCH_FACTORY: _Converter(
        function="onnxprune.convert.pytorch:convert_factory", packages=("torch",), options=_NAMES | {"weights"}
    ),
    SourceKind.TORCH_OBJECT: _Converter(packages=("torch",), options=_NAMES | {"example_inputs", "dynamic_shapes"}),
    SourceKind.SAVED_MODEL: _Converter(
        function="onnxprune.convert.tensorflow:convert_saved_model",
        packages=_TF_PACKAGES,
        options=frozenset({"signature", "trust_source"}),
    ),
    SourceKind.KERAS_FILE: _Converter(
        function="onnxprune.convert.tensorflow:convert_keras_file",
        packages=_TF_PACKAGES,
        options=frozenset({"trust_source"}),
    ),
    SourceKind.KERAS_H5: _Converter(
        function="onnxprune.convert.tensorflow:convert_keras_file",
        packages=_TF_PACKAGES,
        options=frozenset({"trust_source"}),
    ),
    SourceKind.KERAS_OBJECT: _Converter(packages=_TF_PACKAGES),
    SourceKind.FROZEN_GRAPH: _Converter(
        function="onnxprune.convert.tensorflow:convert_frozen_graph",
        packages=_TF_PACKAGES,
        options=_NAMES | {"trust_source"},
    ),
    SourceKind.TFLITE: _Converter(function="onnxprune.convert.tensorflow:convert_tflite", packages=_TF_PACKAGES),
}
# The options that only some kinds have a use for, and how the command line spells them.
_OPTIONAL = {
    "weights": "--weights",
    "signature": "--signature",
    "inputs": "--inputs",
    "outputs": "--outputs",
    "trust_source": "--trust-source",
    "example_inputs": "example_inputs",
    "dynamic_shapes": "dynamic_shapes",
}


def open_source(request: SourceRequest, *, progress: Progress | None = None) -> ConvertedModel:
    """Convert what `request` names, and prove that source and result agree.

    ONNX files are read in this process; every other file and every factory is converted in a child process; objects
    are exported here, and stay as they were.

    Raises:
        UsageError: An option does not fit the kind of source, or a shape does not fit its inputs.
        ModelError: The source is missing, damaged, refused, not supported, or the outputs differ beyond tolerance.
        MissingExtraError: The converter's packages are not installed.
        PluginError: The user's factory failed or returned something else than a model.
    """
    progress = progress or NullProgress()
    started_s = time.monotonic()
    source = recognize(request.source)
    _check_options(request, source)
    converter = _CONVERTERS[source.kind]
    require_packages(converter.packages, needed_for=f"Converting a {source.kind.value}")
    if source.kind is SourceKind.ONNX:
        converted = _open_onnx(source, request)
    elif source.kind is SourceKind.TORCH_OBJECT:
        converted = _open_torch_object(source, request)
    elif source.kind is SourceKind.KERAS_OBJECT:
        converted = _open_keras_object(source, request, progress)
    else:
        arguments = _arguments(source, request)
        converted = _convert_in_child(source, converter.function, arguments, request, progress)
    report = dataclasses.replace(converted.report, duration_s=time.monotonic() - started_s)
    return dataclasses.replace(converted, report=report)


def _check_options(request: SourceRequest, source: RecognizedSource) -> None:
    fitting = _CONVERTERS[source.kind].options
    for option, spelling in _OPTIONAL.items():
        value = getattr(request, option)
        if option not in fitting and value is not None and value is not False and value != ():
            kinds = [kind.value for kind, converter in _CONVERTERS.items() if option in converter.options]
            raise UsageError(
                f"{spelling} has no meaning for '{source.name}', which is: {source.kind.value}.",
                f"It is for: {', '.join(kinds)}.",
            )
    if source.kind is SourceKind.FROZEN_GRAPH and not (request.inputs and request.outputs):
        raise UsageError(
            f"'{source.name}' is a frozen TensorFlow graph, which does not say what its inputs and outputs are.",
            "Give them: --inputs input:0 --outputs softmax:0.",
        )
    for name, shape in request.shapes.items():
        if any(isinstance(dim, int) and dim < 1 for dim in shape):
            raise UsageError(
                f"--shape {name}={','.join(map(str, shape))}: every size must be at least 1.",
                f"An axis that stays dynamic gets a name: --shape {name}=batch,...",
            )


def _arguments(source: RecognizedSource, request: SourceRequest) -> dict[str, JsonValue]:
    """What the child needs of the request, as JSON."""
    return {
        "path": None if source.path is None else str(source.path.resolve()),
        "factory": source.factory,
        "weights": None if request.weights is None else str(_existing(request.weights)),
        "shapes": {name: list(shape) for name, shape in request.shapes.items()},
        "signature": request.signature,
        "inputs": list(request.inputs),
        "outputs": list(request.outputs),
        "trust_source": request.trust_source,
        "seed": request.seed,
    }


def _existing(weights: Path) -> Path:
    if not weights.is_file():
        raise ModelError(f"Weights '{weights}' do not exist.", "Check the path.")
    with weights.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{":
        require_packages(("safetensors",), needed_for=f"Reading '{weights.name}'")
    return weights.resolve()


def _open_onnx(source: RecognizedSource, request: SourceRequest) -> ConvertedModel:
    assert source.path is not None, "ONNX sources are files"  # noqa: S101 - recognize() says so
    loaded = load_onnx_with_report(source.path, custom_op_libraries=request.custom_op_libraries)
    model = apply_shapes(loaded.model, request.shapes)
    comparison = compare_with_file(source.path, model, request, upgrade=loaded.upgrade)
    return _converted(
        source,
        request,
        model,
        comparison,
        versions=installed_versions(("onnx",)),
        metadata=model.metadata_props,
        notes=loaded.notes,
    )


def _open_torch_object(source: RecognizedSource, request: SourceRequest) -> ConvertedModel:
    from onnxprune.convert.pytorch import convert_object

    graph_model, conversion = convert_object(request.source, request)
    return _finish(source, request, canonicalize(graph_model, shape_rules=SHAPES), conversion)


def _open_keras_object(source: RecognizedSource, request: SourceRequest, progress: Progress) -> ConvertedModel:
    from onnxprune.convert.tensorflow_objects import save_keras_object

    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        saved = save_keras_object(request.source, Path(folder) / "saved_model")
        # Saved by this process from the caller's own object: its code has been trusted already.
        trusted = dataclasses.replace(request, trust_source=True, inputs=saved.inputs, outputs=saved.outputs)
        source = dataclasses.replace(source, path=saved.path)
        arguments = _arguments(source, trusted)
        function = _CONVERTERS[SourceKind.SAVED_MODEL].function
        return _convert_in_child(source, function, arguments, request, progress)


def _convert_in_child(
    source: RecognizedSource,
    function: str,
    arguments: Mapping[str, JsonValue],
    request: SourceRequest,
    progress: Progress,
) -> ConvertedModel:
    progress.note(f"Converting '{source.name}' ({source.kind.value}) in a process of its own")
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as name:
        folder = Path(name)
        run_converter(
            function,
            arguments,
            folder=folder,
            subject=f"Source '{source.name}'",
            timeout_s=request.timeout_s,
            memory_limit_bytes=request.memory_limit_bytes,
        )
        conversion = load_conversion(folder)
        model = load_onnx(model_path_in(folder), custom_op_libraries=request.custom_op_libraries)
        _read_into_memory(model)
    return _finish(source, request, model, conversion)


def _read_into_memory(model: ir.Model) -> None:
    """Weights that lie in files beside the model are read, because those files go away."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = ir.Tensor(value.const_value.numpy(), name=value.name, dtype=value.const_value.dtype)


def _finish(
    source: RecognizedSource, request: SourceRequest, model: CanonicalModel, conversion: ForeignConversion
) -> ConvertedModel:
    model.metadata_props.update(conversion.metadata)
    model = apply_shapes(model, request.shapes)
    comparison = compare_with_cases(model, conversion, request, source_name=source.name)
    return _converted(
        source,
        request,
        model,
        comparison,
        versions=conversion.versions,
        metadata=conversion.metadata,
        notes=conversion.notes,
    )


def _converted(
    source: RecognizedSource,
    request: SourceRequest,
    model: CanonicalModel,
    comparison: Comparison,
    *,
    versions: Mapping[str, str],
    metadata: Mapping[str, str],
    notes: tuple[str, ...],
) -> ConvertedModel:
    report = ConversionReport(
        source_name=source.name,
        kind=source.kind,
        inputs=tensor_specs(model.graph.inputs),
        outputs=tensor_specs(model.graph.outputs),
        opset=model.graph.opset_imports.get("", 0),
        difference=comparison.difference,
        not_compared_reason=comparison.not_compared_reason,
        num_comparisons=comparison.num_comparisons,
        tolerance=comparison.allowed,
        seed=request.seed,
        shape_used=comparison.shape_used,
        metadata=dict(metadata),
        versions=versions,
        notes=(*notes, *comparison.notes),
    )
    return ConvertedModel(model=model, report=report)
