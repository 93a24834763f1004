"""TensorFlow, Keras and TFLite sources; every function here runs in the child process."""

from __future__ import annotations

import dataclasses
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from onnxprune.contracts import JsonObject, TensorSpec
from onnxprune.convert.extras import installed_versions
from onnxprune.convert.labels import MAX_LABEL_BYTES, is_label_file, labels_from_lines
from onnxprune.convert.reference import model_path_in, save_conversion
from onnxprune.convert.request import Dimension
from onnxprune.convert.tensorflow_graph import (
    OPSET,
    CallableRunner,
    check_operators,
    function_to_onnx,
    import_tensorflow,
    reference_cases,
    run_tf2onnx,
    tidy_interface,
)
from onnxprune.convert.tensorflow_keras import load_keras_file
from onnxprune.errors import ModelError, UsageError, did_you_mean, quoted_list

__all__ = ["convert_frozen_graph", "convert_keras_file", "convert_saved_model", "convert_tflite"]

_SERVING = "serving_default"
# Rounding noise is judged over many values; one sample of a classifier has a handful.
_QUANTIZED_SAMPLES = 16


def convert_keras_file(arguments: JsonObject, folder: Path) -> None:
    """Convert a `.keras` or `.h5` file."""
    tf = import_tensorflow()
    path = Path(arguments["path"])
    loaded = load_keras_file(path, folder, trust_source=arguments["trust_source"])
    model = loaded.model
    if not getattr(model, "inputs", None):
        raise ModelError(
            f"'{path}' does not say what its inputs are: the model was never built.",
            "Call it once before saving, or export it as a SavedModel with model.export(folder).",
        )
    specs = [tf.TensorSpec(t.shape, t.dtype, name=t.name) for t in model.inputs]
    names = keras_output_names(model)

    def call(*tensors: Any) -> dict[str, Any]:
        return call_keras(model, tensors, names)

    _convert_function(call, specs, names, arguments, folder, notes=loaded.notes)


def keras_output_names(model: Any) -> list[str]:
    """The names that Keras gives a model's outputs: dict keys, or the names of the layers they come from."""
    import keras

    struct = getattr(model, "output", None)
    flat = keras.tree.flatten(struct)
    if isinstance(struct, Mapping) and len(struct) == len(flat):
        names = [str(key) for key in struct]
    else:
        names = list(getattr(model, "output_names", None) or [])
        if len(names) != len(flat):
            names = [model.layers[-1].name] if len(flat) == 1 else [f"output_{i}" for i in range(len(flat))]
    inputs = {t.name for t in model.inputs}
    unique: list[str] = []
    for name in names:
        candidate = f"{name}_output" if name in inputs else name
        number = 1
        while candidate in unique:
            candidate = f"{name}_{number}"
            number += 1
        unique.append(candidate)
    return unique


def call_keras(model: Any, tensors: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    """Outputs by name of a Keras model for its inputs in the order of `model.inputs`, in inference mode."""
    import keras

    packed = keras.tree.pack_sequence_as(model.input, list(tensors)) if len(tensors) > 1 else tensors[0]
    answer = model(packed, training=False)
    values = list(answer.values()) if isinstance(answer, Mapping) else keras.tree.flatten(answer)
    return dict(zip(names, values, strict=True))


def convert_saved_model(arguments: JsonObject, folder: Path) -> None:
    """Convert one signature of a SavedModel folder."""
    tf = import_tensorflow()
    path = Path(arguments["path"])
    readable = _checked_copy(path, folder, trust_source=arguments["trust_source"])
    try:
        loaded = tf.saved_model.load(str(readable))
    except (tf.errors.OpError, OSError, ValueError, KeyError, TypeError, AttributeError, DecodeError) as error:
        lines = str(error).strip().splitlines()
        raise ModelError(
            f"TensorFlow {tf.__version__} can't load SavedModel '{path.name}': {lines[0] if lines else error!r}",
            "Check that its folder is complete (variables/), and that custom operators are not needed.",
        ) from error
    function = _signature(loaded, arguments["signature"], path)
    declared = function.structured_input_signature[1]
    specs = [
        tf.TensorSpec(declared[name].shape, declared[name].dtype, name=name)
        for name in _ordered(declared, arguments["inputs"])
    ]
    names = _ordered(function.structured_outputs, arguments["outputs"])
    keys = [spec.name for spec in specs]
    labels = _labels_beside(path)

    def call(*tensors: Any) -> dict[str, Any]:
        return dict(function(**dict(zip(keys, tensors, strict=True))))

    _convert_function(call, specs, names, arguments, folder, metadata=labels)


def _checked_copy(path: Path, folder: Path, *, trust_source: bool) -> Path:
    """A view of SavedModel `path` that TensorFlow can load: without what its optimizer left behind.

    SavedModels of Keras 2 hold the slot variables of their optimizer (momentum and the like); TensorFlow without
    Keras 2 can't revive the optimizer, and fails on them. Inference has no use for them.

    Raises:
        ModelError: The graph is damaged, or would run Python or touch files.
    """
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel()
    try:
        saved.ParseFromString((path / "saved_model.pb").read_bytes())
    except DecodeError as error:
        raise ModelError(
            f"SavedModel '{path.name}' is damaged: saved_model.pb is truncated or something else.", "Save it again."
        ) from error
    if not saved.meta_graphs:
        raise ModelError(f"SavedModel '{path.name}' holds no graph.")
    for meta_graph in saved.meta_graphs:
        if not trust_source:
            check_operators(meta_graph.graph_def.node, source=path.name)
            for function in meta_graph.graph_def.library.function:
                check_operators(function.node_def, source=path.name)
        for node in meta_graph.object_graph_def.nodes:
            del node.slot_variables[:]
    view = folder / "saved_model"
    view.mkdir()
    for entry in path.iterdir():
        if entry.name != "saved_model.pb":
            (view / entry.name).symlink_to(entry.resolve(), target_is_directory=entry.is_dir())
    (view / "saved_model.pb").write_bytes(saved.SerializeToString())
    return view


def _signature(loaded: Any, wanted: str | None, path: Path) -> Any:
    signatures = loaded.signatures
    known = list(signatures)
    if wanted is not None and wanted not in known:
        raise UsageError(f"SavedModel '{path.name}' has no signature '{wanted}'.", did_you_mean(wanted, known))
    if wanted is None:
        if not known:
            raise ModelError(
                f"SavedModel '{path.name}' has no signature, so nothing says what its inputs and outputs are.",
                "Save it with signatures: model.export(folder), or tf.saved_model.save(..., signatures=function).",
            )
        if _SERVING not in known and len(known) > 1:
            raise UsageError(
                f"SavedModel '{path.name}' has several signatures and none is called '{_SERVING}'.",
                f"Choose one with --signature: {', '.join(known)}.",
            )
        wanted = _SERVING if _SERVING in known else known[0]
    return signatures[wanted]


def _ordered(names: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """`names` as `wanted`, where that names the same; else sorted with numbers as numbers.

    A signature is a map, which comes in another order in every process.
    """
    if set(wanted) == set(names):
        return list(wanted)
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _labels_beside(path: Path) -> dict[str, str]:
    for assets in ("assets.extra", "assets"):
        for file in sorted((path / assets).glob("*.txt")):
            if is_label_file(file.name) and file.stat().st_size <= MAX_LABEL_BYTES:
                return labels_from_lines(file.read_text(encoding="utf-8", errors="replace"))
    return {}


def convert_frozen_graph(arguments: JsonObject, folder: Path) -> None:
    """Convert a frozen GraphDef, whose inputs and outputs the caller names."""
    tf = import_tensorflow()
    import tf2onnx

    path = Path(arguments["path"])
    graph_def = tf.compat.v1.GraphDef()
    try:
        graph_def.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ModelError(
            f"'{path.name}' is damaged, or not a TensorFlow GraphDef.", "A frozen graph is one binary protobuf file."
        ) from error
    if not arguments["trust_source"]:
        check_operators(graph_def.node, source=path.name)
        for function in graph_def.library.function:
            check_operators(function.node_def, source=path.name)
    graph = tf.Graph()
    try:
        with graph.as_default():
            tf.import_graph_def(graph_def, name="")
    except (ValueError, TypeError, KeyError, tf.errors.OpError) as error:
        raise ModelError(f"TensorFlow can't import '{path.name}': {str(error).splitlines()[0]}") from error
    inputs = [_tensor(graph, name, "--inputs") for name in arguments["inputs"]]
    outputs = [_tensor(graph, name, "--outputs") for name in arguments["outputs"]]
    shapes = _shapes(arguments)
    specs = tuple(_spec(_plain(t.name), t.dtype, _merged_shape(_plain(t.name), t.shape, shapes)) for t in inputs)

    def call(feeds: Mapping[str, Any]) -> dict[str, Any]:
        with tf.compat.v1.Session(graph=graph) as session:
            values = session.run(outputs, {t: feeds[_plain(t.name)] for t in inputs})
        return {_plain(t.name): value for t, value in zip(outputs, values, strict=True)}

    runner = CallableRunner(
        inputs=specs, outputs=tuple(_spec(_plain(t.name), t.dtype, t.shape) for t in outputs), call=call
    )
    names = [_plain(t.name) for t in outputs]
    model = run_tf2onnx(
        lambda: tf2onnx.convert.from_graph_def(
            graph_def,
            name=path.stem,
            input_names=[t.name for t in inputs],
            output_names=[t.name for t in outputs],
            opset=OPSET,
            shape_override={
                t.name: [dim if isinstance(dim, int) else None for dim in spec.shape]
                for t, spec in zip(inputs, specs, strict=True)
                if spec.shape is not None
            },
            tensors_to_rename={t.name: _plain(t.name) for t in (*inputs, *outputs)},
        ),
        source=path.name,
    )
    _finish(model, runner, names, arguments, folder)


def _plain(tensor_name: str) -> str:
    """'input:0' -> 'input'; a further output keeps its number."""
    name, _, index = tensor_name.partition(":")
    return name if index == "0" else f"{name}_{index}"


def _tensor(graph: Any, name: str, option: str) -> Any:
    try:
        return graph.get_tensor_by_name(name if ":" in name else f"{name}:0")
    except (KeyError, ValueError) as error:
        wanted = name.partition(":")[0]
        operations = [op.name for op in graph.get_operations() if op.outputs and op.type != "Const"]
        if option == "--inputs":
            operations = [op.name for op in graph.get_operations() if op.type == "Placeholder"] or operations
        known = operations if len(operations) <= 20 else [*operations[:3], *operations[-3:]]
        raise UsageError(f"{option}: the graph has no tensor '{name}'.", did_you_mean(wanted, known)) from error


def convert_tflite(arguments: JsonObject, folder: Path) -> None:
    """Convert a TFLite file, float or quantized."""
    import_tensorflow()
    import tf2onnx

    path = Path(arguments["path"])
    interpreter = _interpreter(path)
    details = interpreter.get_input_details()
    outputs = interpreter.get_output_details()
    is_quantized = any(t["quantization"][0] for t in interpreter.get_tensor_details())

    def call(feeds: Mapping[str, Any]) -> dict[str, Any]:
        for detail in details:
            interpreter.resize_tensor_input(detail["index"], feeds[detail["name"]].shape)
        interpreter.allocate_tensors()
        for detail in details:
            interpreter.set_tensor(detail["index"], feeds[detail["name"]])
        interpreter.invoke()
        return {detail["name"]: interpreter.get_tensor(detail["index"]) for detail in outputs}

    runner = CallableRunner(
        inputs=tuple(_tflite_spec(detail) for detail in details),
        outputs=tuple(_tflite_spec(detail) for detail in outputs),
        call=call,
    )
    model = run_tf2onnx(lambda: tf2onnx.convert.from_tflite(str(path), opset=OPSET), source=path.name)
    metadata = _labels_in_tflite(path)
    _finish(
        model, runner, [o["name"] for o in outputs], arguments, folder, is_quantized=is_quantized, metadata=metadata
    )


def _interpreter(path: Path) -> Any:
    import warnings

    import tensorflow as tf

    try:
        with warnings.catch_warnings():
            # TensorFlow announces that its interpreter will move to ai-edge-litert.
            warnings.simplefilter("ignore")
            interpreter = tf.lite.Interpreter(
                str(path),
                experimental_op_resolver_type=tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            )
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        raise ModelError(
            f"'{path.name}' can't be loaded as TFLite: {lines[0] if lines else error!r}",
            "It may be truncated, or need operators that TensorFlow's interpreter does not have.",
        ) from error
    return interpreter


def _tflite_spec(detail: Mapping[str, Any]) -> TensorSpec:
    signature = detail.get("shape_signature")
    shape = detail["shape"] if signature is None or len(signature) == 0 else signature
    return TensorSpec(
        name=detail["name"],
        dtype=np.dtype(detail["dtype"]).name,
        shape=tuple(int(dim) if dim >= 0 else None for dim in shape),
    )


def _labels_in_tflite(path: Path) -> dict[str, str]:
    """Label files that TFLite metadata carry: a zip archive behind the flatbuffer."""
    if not zipfile.is_zipfile(path):
        return {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if is_label_file(info.filename) and info.file_size <= MAX_LABEL_BYTES:
                return labels_from_lines(archive.read(info).decode("utf-8", "replace"))
    return {}


def _convert_function(
    call: Any,
    specs: Sequence[Any],
    names: Sequence[str],
    arguments: JsonObject,
    folder: Path,
    *,
    notes: tuple[str, ...] = (),
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Trace `call` as one `tf.function` with named inputs and outputs, and convert that."""
    import tensorflow as tf

    shapes = _shapes(arguments)
    known = [spec.name for spec in specs]
    for name in shapes:
        if name not in known:
            raise UsageError(f"--shape names '{name}', which is no input of the model.", did_you_mean(name, known))
    signature = [
        tf.TensorSpec(_merged_shape(spec.name, spec.shape, shapes), spec.dtype, name=spec.name) for spec in specs
    ]
    function = tf.function(call, input_signature=signature)
    source = Path(arguments["path"]).name
    model = function_to_onnx(function, signature, source=source)
    concrete = function.get_concrete_function()
    outputs = concrete.structured_outputs
    runner = CallableRunner(
        inputs=tuple(_spec(spec.name, spec.dtype, spec.shape) for spec in signature),
        outputs=tuple(_spec(name, outputs[name].dtype, outputs[name].shape) for name in names),
        call=lambda feeds: function(*(tf.constant(feeds[spec.name], dtype=spec.dtype) for spec in signature)),
    )
    _finish(model, runner, names, arguments, folder, notes=notes, metadata=metadata)


def _shapes(arguments: JsonObject) -> dict[str, tuple[Dimension, ...]]:
    return {name: tuple(shape) for name, shape in arguments["shapes"].items()}


def _merged_shape(name: str, declared: Any, shapes: Mapping[str, tuple[Dimension, ...]]) -> Any:
    """`declared` (a tf.TensorShape) with the axes fixed that the caller fixes."""
    import tensorflow as tf

    declared = tf.TensorShape(declared)
    asked = shapes.get(name)
    if asked is None:
        return declared
    wanted = tf.TensorShape([dim if isinstance(dim, int) else None for dim in asked])
    if not declared.is_compatible_with(wanted):
        raise UsageError(
            f"--shape {name}={','.join(map(str, asked))} does not fit the input, whose shape is {declared}."
        )
    return declared.merge_with(wanted)


def _spec(name: str, dtype: Any, shape: Any) -> TensorSpec:
    is_known = shape is not None and getattr(shape, "rank", len(shape) if shape is not None else None) is not None
    return TensorSpec(
        name=name, dtype="object" if dtype.name == "string" else dtype.name, shape=tuple(shape) if is_known else None
    )


def _finish(
    model: onnx.ModelProto,
    runner: CallableRunner,
    names: Sequence[str],
    arguments: JsonObject,
    folder: Path,
    *,
    notes: tuple[str, ...] = (),
    metadata: Mapping[str, str] | None = None,
    is_quantized: bool = False,
) -> None:
    missing = [spec.name for spec in runner.inputs if spec.name not in {value.name for value in model.graph.input}]
    if missing:
        raise ModelError(
            f"tf2onnx left out the inputs {quoted_list(missing)}: no output depends on them.",
            "Export the model without them.",
        )
    tidy_interface(model, names)
    conversion = reference_cases(
        runner,
        _shapes(arguments),
        seed=arguments["seed"],
        num_samples=_QUANTIZED_SAMPLES if is_quantized else 1,
    )
    save_conversion(
        dataclasses.replace(
            conversion,
            is_quantized=is_quantized,
            notes=notes,
            metadata=dict(metadata or {}),
            versions=installed_versions(("tensorflow", "tensorflow-cpu", "keras", "tf2onnx", "onnx")),
        ),
        folder,
    )
    model_path_in(folder).write_bytes(model.SerializeToString())
